"""Pull of a client's own network towards the one received, by a share that changes over the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import linear
from registry.parameters import Params, option


@dataclass(frozen=True)
class PullParams(Params):
    """Hyper-parameters of the pull."""

    pull_start: float = option(
        1.0,
        "share of the way that a client's own network moves to the one received before training, in round 1",
        0.0,
        1.0,
    )
    pull_end: float = option(
        0.0, "the same in the last round; linear in between, delayed for a client that is rarely selected", 0.0, 1.0
    )


def pull_share(params: PullParams, progress: float, trained: int, expected: float) -> float:
    """Return the share of the way to the network received, of a client that has trained in `trained` earlier rounds.

    Args:
        progress: ρ of the round.
        trained, expected: see `own_progress`.
    """
    return linear(own_progress(progress, trained, expected), params.pull_start, params.pull_end)


def own_progress(progress: float, trained: int, expected: float) -> float:
    """Return a client's progress on the schedule of its pull, in (0, 1]: the round's, unless it is rarely selected.

    The progress of a client that has trained in less than half of the expected rounds follows its own rounds. Its own
    network is stale and has been trained little, so it continues to start from the one received.

    Args:
        progress: ρ of the round.
        trained: number of earlier rounds in which it has trained.
        expected: mean number of rounds of a whole run in which a client takes part.
    """
    return min(progress, (trained + 1) / (expected / 2))


def pull(own: Mapping[str, Tensor], target: Mapping[str, Tensor], share: float) -> None:
    """Move tensors in place by a share of the way to those of the same names."""
    torch._foreach_lerp_(list(own.values()), [target[name] for name in own], share)
