"""Means, sums and stacks of several clients' tensors, for servers; always in the order of client ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from registry.errors import UserError
from registry.messages import Message, check_samples

State = dict[str, Tensor]
States = Sequence[Mapping[str, Tensor]]

MEAN = "mean"
RULES = (MEAN, "median", "trimmed", "krum", "multi-krum", "geometric")
UNWEIGHTED = ("median", "trimmed", "krum", "multi-krum")  # every reply counts the same
ASSUMING = ("trimmed", "krum", "multi-krum")  # take a share of the replies for bad
FEWEST = 3  # replies among which one that is out of line can be told
ITERATIONS = 200  # of Weiszfeld's algorithm, at most
SMOOTHING = 1e-6  # ν of the smoothed algorithm: no distance counts as smaller
SETTLED = 1e-12  # change of a weight below which the iteration ends
REACH = 1e6  # times the usual distance, beyond which a state is moved nearer
COLUMNS = 1 << 16  # values of each reply that are compared at once, in float64


@dataclass(frozen=True)
class Averaging:
    """Options of the mean that a server takes of its clients.

    Attributes:
        rule: one of `RULES` (`--aggregate`).
        bad: share of a round's replies that the rules `ASSUMING` take for bad (`--assumed-bad`).
        max_share: bound on the weight of one client in `mean` and `geometric` (`--max-share`).
    """

    rule: str = MEAN
    bad: float = 0.2
    max_share: float = 1.0

    def check(self, algorithms: Mapping[str, bool]) -> None:
        """Raise UserError where it does not go together with algorithms, which may average no clients.

        Args:
            algorithms: name -> whether it does (`Server.averages`).
        """
        if self.max_share < 1 and self.rule in UNWEIGHTED:
            raise UserError(f"--max-share: --aggregate {self.rule} gives every reply the same weight; leave it out")
        alone = [name for name, averages in algorithms.items() if not averages]
        if self.asked and alone:
            average = "do not average what their" if len(alone) > 1 else "does not average what its"
            raise UserError(f"{self.asked}: {', '.join(alone)} {average} clients send; leave one of them out")

    def check_share(self, replies: int) -> None:
        """Raise UserError where the weights of so many replies cannot all stay below `max_share`."""
        if self.max_share * replies < 1:
            clients = f"{replies} client{'s' if replies > 1 else ''}"
            raise UserError(
                f"--max-share {self.max_share:g}: a round has {clients}, whose weights cannot all stay below; give "
                f"{math.ceil(1000 / replies) / 1000:g} or more, or select more clients (-jr)"
            )

    @property
    def asked(self) -> str:
        """The flag that asks for something else than the plain mean; '' if none does."""
        if self.rule != MEAN:
            return f"--aggregate {self.rule}"
        return f"--max-share {self.max_share:g}" if self.max_share < 1 else ""


class Average:
    """Mean of clients' states or updates as the run's options ask for it; every server has one, `Server.average`.

    Args:
        how: the options.

    Attributes:
        used: whether the server has taken a mean by it.
        private: whether it clips and noises updates (`--dp client`); every client then counts the same, whatever its
            share, and a round may have no replies.
    """

    private: ClassVar[bool] = False

    def __init__(self, how: Averaging) -> None:
        self.how, self.used = how, False
        self._said: set[str] = set()
        self._notes: list[str] = []

    def __call__(
        self,
        states: States,
        shares: Sequence[float],
        scales: Sequence[float] | None = None,
        around: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Return the mean of the clients, tensor by tensor.

        Args:
            states: floating-point tensors of each client, of the same names and shapes, in the order of ids.
            shares: weight of each, above 0; they add up to 1. `UNWEIGHTED` rules do not use them.
            scales: factor of each state, by which its tensors are multiplied first; None: 1.
            around: state that a client which changed nothing would send, times its scale. Only a private mean uses it,
                which bounds the difference to it.
        """
        self.used = True
        shares, count = self.shares(shares), len(states)
        rule = self.how.rule
        if rule != MEAN and count < FEWEST:
            self._say("few", f"--aggregate {rule}: {count} replies are too few to tell a bad one; their mean is taken")
            rule = MEAN
        if rule == MEAN:
            scales = scales or [1.0] * count
            return weighted_sum(states, [share * scale for share, scale in zip(shares, scales, strict=True)])
        if scales:
            states = [weighted_sum([state], [scale]) for state, scale in zip(states, scales, strict=True)]
        return self._robust(rule, states, shares)

    def shares(self, shares: Sequence[float]) -> list[float]:
        """Return the weights with none above `max_share` (see `capped`)."""
        most = self.how.max_share
        if most * len(shares) < 1:
            text = f"--max-share {most:g}: {len(shares)} replies cannot all stay below; each gets 1/{len(shares)}"
            self._say("share", text)
        return capped(shares, most)

    def take_notes(self) -> list[str]:
        """Return what has to be said since the last call; each is said once."""
        notes, self._notes = self._notes, []
        return notes

    def _say(self, about: str, text: str) -> None:
        if about not in self._said:
            self._said.add(about)
            self._notes.append(f"{text} (said once)")

    def _robust(self, rule: str, states: States, shares: Sequence[float]) -> State:
        count = len(states)
        bad, most = math.ceil(self.how.bad * count - 1e-9), (count - 1) // 2
        if rule == "geometric":
            return geometric_median(states, shares)
        if rule == "trimmed" and bad > most:
            text = f"--aggregate trimmed: of {count} replies, {most} on each side are left out instead of {bad}"
            self._say("trimmed", text)
        if rule.endswith("krum") and count < 2 * bad + 3:
            text = f"--aggregate {rule}: with {bad} assumed bad, {2 * bad + 3} replies are needed"
            self._say("krum", f"{text}; a round with {count} takes the median")
            rule = "median"
        if rule in ("median", "trimmed"):
            return trimmed_mean(states, most if rule == "median" else min(bad, most))
        chosen = closest(distances(states), bad, 1 if rule == "krum" else count - bad)
        return weighted_sum([states[place] for place in chosen], [1 / len(chosen)] * len(chosen))


def sample_weights(replies: Mapping[int, Message]) -> list[float]:
    """Return n_k / n of each reply, from its `samples`. Raises BadMessage where that is missing or not positive."""
    counts = [check_samples(reply) for reply in replies.values()]
    total = sum(counts)
    return [count / total for count in counts]


def capped(shares: Sequence[float], most: float) -> list[float]:
    """Return shares that add up to 1 with none above `most`; the excess goes to the others, in proportion.

    All are equal if `most` is below 1/n.
    """
    if most * len(shares) <= 1:
        return [1 / len(shares)] * len(shares)
    result, full = list(shares), [False] * len(shares)
    while any(share > most and not done for share, done in zip(result, full, strict=True)):
        full = [done or share > most for share, done in zip(result, full, strict=True)]
        left = 1 - most * sum(full)
        free = sum(share for share, done in zip(shares, full, strict=True) if not done)
        result = [most if done else share / free * left for share, done in zip(shares, full, strict=True)]
    return result


def weighted_sum(states: States, weights: Sequence[float]) -> State:
    """Return Σ_k w_k · state_k, tensor by tensor; all states have the same names."""
    names = list(states[0])
    if not names:
        return {}
    total = torch._foreach_mul([states[0][name] for name in names], weights[0])
    for state, weight in zip(states[1:], weights[1:], strict=True):
        torch._foreach_add_(total, [state[name] for name in names], alpha=weight)
    return dict(zip(names, total, strict=True))


def trimmed_mean(states: States, count: int) -> State:
    """Return the mean of each coordinate without its `count` smallest and largest values (Yin et al. 2018, def. 2).

    With all but one or two of them left out on both sides it is the coordinate-wise median (def. 1).
    """
    result = {}
    for name in states[0]:
        rows = torch.stack([state[name] for state in states]).sort(0).values[count : len(states) - count]
        total = rows[0].clone()
        for row in rows[1:]:  # one by one: the order of `sum` depends on memory layout
            total += row
        result[name] = total / len(rows)
    return result


def distances(states: States) -> Tensor:
    """Return the squared distances of whole states, (n, n), float64, on the CPU; the device is waited for once."""
    total: Tensor | None = None
    for name in states[0]:
        rows = torch.stack([state[name].reshape(-1) for state in states])
        for part in rows.split(COLUMNS, dim=1):
            wide = part.double()
            square = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist").square()
            total = square if total is None else total + square
    return torch.zeros(len(states), len(states), dtype=torch.float64) if total is None else total.cpu()


def closest(squared: Tensor, bad: int, count: int) -> list[int]:
    """Return the places, ascending, of the `count` states with the smallest scores (Blanchard et al. 2017, section 4).

    The score of a state is the sum of its squared distances to the n - bad - 2 states nearest to it. Of equal scores,
    the smaller client id comes first.

    Args:
        squared: squared distances (n, n).
        bad: assumed number of bad states, at most (n - 3) / 2.
        count: how many to return: 1 is Krum, more is multi-Krum.
    """
    near = squared.sort(1).values[:, 1 : len(squared) - bad - 1]  # the first is the state itself
    order: list[int] = near.sum(1).sort(stable=True).indices[:count].tolist()
    return sorted(order)


def geometric_median(states: States, shares: Sequence[float]) -> State:
    """Return the geometric median of whole states (see `geometric_weights`).

    A state that is very far is moved nearer first, on its ray from a state in the middle: that leaves the geometric
    median where it is, up to 1 / `REACH` of the usual distance, and sums and squares within the precision of float64.
    """
    squared = distances(states)
    centre, factors = _reached(squared.sqrt(), torch.tensor(shares, dtype=torch.float64))
    if min(factors) < 1:
        middle = states[centre]
        states = [
            state if factor == 1 else {name: middle[name] + factor * (t - middle[name]) for name, t in state.items()}
            for state, factor in zip(states, factors, strict=True)
        ]
        squared = distances(states)
    return weighted_sum(states, geometric_weights(squared, shares))


def _reached(lengths: Tensor, alpha: Tensor) -> tuple[int, list[float]]:
    """Return the place of the state nearest to half of the weight, and for each state the factor that moves it nearer.

    The usual distance is the weighted median of the distances from that state. If it is 0, half of the weight is there,
    and so is the geometric median.
    """
    ordered, places = lengths.sort(1)
    half = (alpha[places].cumsum(1) >= 0.5 - SETTLED).int().argmax(1, keepdim=True)
    usual = ordered.gather(1, half).squeeze(1)
    centre = int(usual.argmin())
    reach = REACH * float(usual[centre])
    return centre, [reach / length if length > reach else 1.0 for length in lengths[centre].tolist()]


def geometric_weights(squared: Tensor, shares: Sequence[float]) -> list[float]:
    """Return weights β with Σ_k β_k x_k the geometric median, by smoothed Weiszfeld (Pillutla et al. 2022, alg. 2).

    It minimises Σ_k α_k ‖v - x_k‖. Every iterate is such a sum, so that its distances follow from those of the states:
    ‖v - x_k‖² = Σ_j β_j d²_jk - ½ Σ_ij β_i β_j d²_ij.

    Args:
        squared: squared distances d² of the states (n, n), float64.
        shares: α, which add up to 1.
    """
    alpha = torch.tensor(shares, dtype=torch.float64)
    beta = alpha
    for _ in range(ITERATIONS):
        mixed = squared @ beta
        lengths = (mixed - beta @ mixed / 2).clamp(min=0).sqrt()
        weights = alpha / lengths.clamp(min=SMOOTHING)
        before, beta = beta, weights / weights.sum()
        if float((beta - before).abs().max()) < SETTLED:
            break
    found: list[float] = beta.tolist()
    return found


def stacked(replies: Mapping[int, Message]) -> dict[str, Tensor]:
    """Stack the replies' tensors with a leading axis of clients: name -> (clients, ...)."""
    first = next(iter(replies.values()))
    return {name: torch.stack([reply.tensors[name] for reply in replies.values()]) for name in first.tensors}


def labelled(models: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put several clients' tensors into one message: `<id>/<name>`."""
    return {f"{id}/{name}": tensor for id, model in models.items() for name, tensor in model.items()}


def of_client(tensors: Mapping[str, Tensor], id: int | None) -> dict[str, Tensor]:
    """Return the tensors without a label, those of a client in their place; None: of a client without its own."""
    common = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    label = f"{id}/"
    return common | {name.removeprefix(label): own for name, own in tensors.items() if name.startswith(label)}


def by_client(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Take apart what `labelled` put together, in the order of client ids."""
    models: dict[int, dict[str, Tensor]] = {}
    for id, name in (key.split("/", 1) for key in tensors):
        models.setdefault(int(id), {})[name] = tensors[f"{id}/{name}"]
    return dict(sorted(models.items()))
