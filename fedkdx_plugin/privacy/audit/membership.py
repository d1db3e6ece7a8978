"""Membership inference: was a window trained on?

By a threshold on the loss: Yeom et al., Privacy Risk in Machine Learning, 2018 (arXiv:1709.01604), adversary 2.
By a likelihood ratio (LiRA, online): Carlini et al., Membership Inference Attacks From First Principles, 2022
(arXiv:2112.03570), algorithm 1; where they advise one variance for all windows if shadow models are few (section VI.C),
the distance of the two means is one for all, too.

Training windows may differ from the others in other ways than by having been trained on: another time of day, another
difficulty. Two figures tell the difference: the control is the same attack on shadow runs that never trained on the
windows, whose area is 0.5 unless the two kinds differ; and in attacks on shadow runs, chance decided what they trained
on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LOSS, LIRA = "loss", "LiRA"
CONTROL, DRAWN = " of a model that never saw either", ", members drawn by chance"
METHODS = {
    LOSS: "a threshold on the loss of the run's model",
    LOSS + CONTROL: "the same on shadow runs that trained on none of the windows: what the split alone gives away",
    LIRA: "a likelihood ratio, from the windows' losses in shadow runs that trained on them and in those that did not",
    LOSS + DRAWN: "the threshold on shadow runs, in which chance decided what was trained on",
    LIRA + DRAWN: "the likelihood ratio on each shadow run, from the others",
}


@dataclass(frozen=True, eq=False)
class Attack:
    """Scores of an attack.

    Attributes:
        scores: (n,), higher for what it takes for a member.
        member: (n,), bool, the truth.
        clients: (n,), client of each window.
    """

    scores: np.ndarray
    member: np.ndarray
    clients: np.ndarray


def attacks(
    own: np.ndarray, member: np.ndarray, clients: np.ndarray, shadows: np.ndarray, trained: np.ndarray
) -> Mapping[str, Attack]:
    """Return method -> attack, for each of `METHODS`; the threshold alone without shadow runs.

    Args:
        own: (n,), confidences of the run's model (see `models.confidences`).
        member, clients: (n,), truth and client of each window.
        shadows: (runs, n), confidences of shadow runs.
        trained: (runs, n), bool, which windows each of them trained on; runs come in pairs that divide the windows.
    """
    found = {LOSS: Attack(own, member, clients)}
    if not len(shadows):
        return found
    runs = np.arange(len(shadows))
    everyone, everything = np.broadcast_to(clients, shadows.shape), np.broadcast_to(member, shadows.shape)
    found[LOSS + CONTROL] = Attack(shadows[~trained], everything[~trained], everyone[~trained])
    found[LIRA] = Attack(likelihood_ratio(own, shadows, trained), member, clients)
    found[LOSS + DRAWN] = Attack(shadows.ravel(), trained.ravel(), everyone.ravel())
    # of the run that trained on the other half nothing is used either: it would tell which half is missing
    others = [runs // 2 != run // 2 for run in runs]
    ratios = [
        likelihood_ratio(shadows[run], shadows[rest], trained[rest]) for run, rest in zip(runs, others, strict=True)
    ]
    found[LIRA + DRAWN] = Attack(np.concatenate(ratios), trained.ravel(), everyone.ravel())
    return found


def likelihood_ratio(own: np.ndarray, shadows: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Return log p(own | trained on) - log p(own | not), up to one positive factor for all windows, (n,).

    Both densities are normal. Means and variances of a single window cannot be told from few shadow runs, so the
    variance, and how far training on a window raises its confidence, are taken to be the same for all; what is left is
    how far `own` lies above the middle of the window's two means.

    Args:
        own: (n,).
        shadows, trained: (runs, n); each window is in some run of either kind.
    """
    means = [np.where(kind, shadows, 0).sum(0) / kind.sum(0) for kind in (trained, ~trained)]
    ratio: np.ndarray = own - (means[0] + means[1]) / 2
    return ratio
