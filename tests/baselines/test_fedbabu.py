"""FedBABU: rounds against plain steps in float64, the body at the round's rate and the copy at its share of it."""

from __future__ import annotations

import pytest

from baselines.fedbabu import FedBABU, FedBABUParams
from registry.errors import UserError
from registry.interface import Round
from tests.baselines.reference import RATE, assert_same, descend, full_batch, mean

SHARE = 0.3  # of the round's rate, at which copies are fine-tuned


def is_head(name):
    return name.startswith("model.head.")


def test_rounds_are_the_plain_steps(double):
    """Body: w ← w − η ∇F(w); the copy, body and head: v ← v − f η ∇F(v); both from what was sent."""
    federation = full_batch(FedBABU, params={"finetune_rate": SHARE})
    data, expected = federation.data, dict(federation.server.weights)
    for t in (1, 2):
        federation.round(Round(t, 3))
        clients = list(zip(data.train_x, data.train_y, strict=True))
        copies = [descend(expected, x, y, lambda _, v, g: v - SHARE * RATE * g) for x, y in clients]
        bodies = [descend(expected, x, y, lambda n, w, g: w if is_head(n) else w - RATE * g) for x, y in clients]
        expected = mean(bodies, [len(y) for y in data.train_y])
        assert_same(dict(federation.server.weights), expected)
        for kept, copy in zip(federation.workspace.kept, copies, strict=True):
            assert_same(kept, {name.replace("model.", "personal.", 1): own for name, own in copy.items()})


def test_the_share_is_a_tenth_unless_given_and_never_nothing():
    assert FedBABUParams().finetune_rate == 0.1
    with pytest.raises(UserError, match="finetune_rate: 0 is out of range; it must be above 0"):
        FedBABUParams(finetune_rate=0.0)
