"""Re-identification: which client sent an update, told from an update of an earlier round whose sender is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from fedkdx_plugin.privacy.audit.view import Update


@dataclass(frozen=True, eq=False)
class Guesses:
    """Guesses of who sent what.

    Attributes:
        clients: (n,), who sent each update.
        guessed: (n,), whom the attack names.
        similarity: (n, candidates), cosines, with the candidates ascending.
    """

    clients: np.ndarray
    guessed: np.ndarray
    similarity: np.ndarray


def identify(known: Sequence[Update], unknown: Sequence[Update]) -> Guesses:
    """Name the sender of each unknown update: that of the known update with the largest cosine.

    What all updates of a round have in common, their mean, is taken off before, as it tells nothing of the sender.

    Args:
        known: updates of an earlier round, one of each candidate; each is a single client's.
        unknown: updates of a later round.
    """
    known, unknown = (sorted(updates, key=lambda one: one.clients) for updates in (known, unknown))
    candidates = np.array([one.clients[0] for one in known])
    cosines = _directions(unknown) @ _directions(known).T
    similarity = cosines.cpu().numpy()
    return Guesses(np.array([one.clients[0] for one in unknown]), candidates[similarity.argmax(1)], similarity)


def _directions(updates: Sequence[Update]) -> torch.Tensor:
    """Return the updates less their mean, each of length 1, (updates, values), float64."""
    names = sorted(updates[0].change)
    rows = torch.stack([torch.cat([one.change[name].double().reshape(-1) for name in names]) for one in updates])
    rows = rows - rows.mean(0)
    return F.normalize(rows, eps=torch.finfo(torch.float64).tiny)
