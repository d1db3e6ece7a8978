"""Differential privacy of a client's whole data: updates clipped, averaged with equal weights, and noised.

Each round releases (Σ_k clip_C(Δ_k) + N(0, (zΔ)² I)) / m, with m the planned number of clients, whoever replies
(DP-FedAvg: McMahan et al. 2018, arXiv:1710.06963, with the fixed denominator). Δ is the sensitivity of the sum and z
the noise multiplier that `accounting` gives for all planned rounds. What a server makes of the mean costs nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.privacy import accounting, clipping
from fedkdx_plugin.privacy.accounting import Sampling
from fedkdx_plugin.privacy.noise import Noise
from fedkdx_plugin.privacy.options import DISTRIBUTED, Privacy
from registry.aggregation import Average, Averaging
from registry.errors import UserError

State = dict[str, Tensor]
States = Sequence[Mapping[str, Tensor]]

SPENT, SPENT_SERVER, CLIP = "privacy_epsilon", "privacy_epsilon_server", "privacy_clip"  # in records


@dataclass(frozen=True)
class Plan:
    """Noise of all rounds of a run.

    Attributes:
        sampling: how clients are drawn.
        rounds: planned number of rounds, which spend the budget.
        delta: δ.
        noise: noise multiplier z of a round, standard deviation over the sensitivity of the sum.
    """

    sampling: Sampling
    rounds: int
    delta: float
    noise: float

    @staticmethod
    def of(privacy: Privacy, sampling: Sampling, rounds: int) -> Plan:
        """Return the plan that meets a budget. Raises UserError: δ is too large, or ε too small."""
        clients = sampling.members
        if privacy.delta >= 1 / clients:
            raise UserError(
                f"--delta {privacy.delta:g}: not below 1/{clients}, so that giving away one of the {clients} clients "
                "would count as private; lower it"
            )
        noise = accounting.noise_multiplier(privacy.epsilon, privacy.delta, rounds, sampling)
        return Plan(sampling, rounds, privacy.delta, noise)

    @property
    def share(self) -> float:
        """Return the deviation of a client's own noise, over Δ: z/√(m - 1), where clients add it.

        Whoever takes part knows its own noise, and can take it out of the sum: that of the others must do.
        """
        return float(self.noise / max(self.sampling.selected - 1, 1) ** 0.5)

    def spent(self, rounds: int) -> float:
        """Return ε after so many rounds."""
        return accounting.spent(self.noise, self.delta, rounds, self.sampling)

    def spent_against_server(self, rounds: int, summed: bool) -> float:
        """Return ε after so many rounds against the server, with noise by the clients themselves.

        There is no amplification, as the server knows who takes part; the worst case is a client of every round.

        Args:
            rounds: number of rounds.
            summed: whether the server sees the sum alone, with the noise of all m shares and the sensitivity Δ. Else it
                sees single replies: the noise is a client's own, and replacing its update changes its reply by 2C.
        """
        noise = self.share * (self.sampling.selected**0.5 if summed else self.sampling.sensitivity / 2)
        return accounting.gaussian(noise / max(rounds, 1) ** 0.5, self.delta)


class Protection:
    """Keeps one run private: the bound C, the noise of each round, and what has been spent.

    Args:
        privacy: the options.
        plan: the noise.
        source: of the noise.

    Attributes:
        clip: bound C of the present round.
        average: the mean for `registry.interface.Server.average`.
        round: number of the present round.
        summed: whether the server sees the sum of replies alone (secure aggregation).
        released: whether this round's mean has been released.
        again: sums that may have been released before a restart, and are made again, with other noise, after it.
    """

    def __init__(self, privacy: Privacy, plan: Plan, source: Noise) -> None:
        self.privacy, self.plan, self.source = privacy, plan, source
        self.clip = clipping.FIRST if privacy.clip is None else privacy.clip
        self.average = PrivateAverage(self)
        self.round, self.released, self.again, self.summed = 0, False, 0, False

    @property
    def distributed(self) -> bool:
        """True where the clients clip and add the noise."""
        return self.privacy.noise == DISTRIBUTED

    @property
    def bits(self) -> float:
        """Return the noise multiplier z_b of the count of clipped updates, which C follows where it is not fixed."""
        sampling = self.plan.sampling
        return clipping.bits_noise(self.plan.noise, sampling.selected, sampling.sensitivity)

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the noise in a round's sum of updates, in units of C.

        It is zΔ/C, and more where part of the budget is spent on the count that C follows, or where the m clients add
        it, of whom each has to be safe from itself: then it is that of m shares.
        """
        sampling = self.plan.sampling
        if self.distributed:
            return float(self.plan.share * sampling.selected**0.5 * sampling.sensitivity)
        fixed = self.privacy.clip is not None
        return sampling.sensitivity * (self.plan.noise if fixed else clipping.updates_noise(self.plan.noise, self.bits))

    def begin(self, round: int) -> None:
        """Begin a round."""
        self.round, self.released = round, False

    def release(self, updates: Iterable[State], like: Mapping[str, Tensor]) -> State:
        """Return the noised mean of updates, float64, and let C follow the median where it does.

        Args:
            updates: of the clients that replied, float64; where the noise is distributed, clipped and noised already.
            like: tensors of the same names and shapes, on the same device, also where nobody replied.
        """
        self.released = True
        m, unit = self.plan.sampling.selected, self.plan.sampling.sensitivity
        total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in like.items()}
        lengths: list[Tensor] = []
        for update in updates:  # one by one, which takes the memory of one
            lengths.append(clipping.norm(update))
            weight = 1.0 if self.distributed else clipping.factor(lengths[-1], self.clip)
            for name, own in total.items():
                own += weight * update[name]
        if self.distributed:  # all m replied, one by one or as the mean that secure aggregation leaves of them
            return {name: t / len(lengths) for name, t in total.items()}
        deviation = self.deviation * self.clip
        mean = {name: (t + self._noise(t, deviation, name)) / m for name, t in total.items()}
        if self.privacy.clip is None:
            unclipped = int((torch.stack(lengths) <= self.clip).sum()) if lengths else 0
            drawn = float(self.source.normal(torch.Size(), self.round, "clipped"))
            counted = unclipped - len(lengths) / 2 + self.bits * unit / 2 * drawn
            self.clip = clipping.next_clip(self.clip, counted / m + 0.5)
        return mean

    def noised(self, update: Mapping[str, Tensor], client: int) -> State:
        """Return one client's update, clipped, with its share of the round's noise, where the noise is distributed."""
        own = {name: t.double() for name, t in update.items()}
        factor = clipping.factor(clipping.norm(own), self.clip)
        deviation = self.plan.share * self.plan.sampling.sensitivity * self.clip
        return {name: factor * t + self._noise(t, deviation, client, name) for name, t in own.items()}

    def _noise(self, like: Tensor, deviation: float, *purpose: int | str) -> Tensor:
        drawn = self.source.normal(like.shape, self.round, "update", *purpose)
        return deviation * drawn.to(like.device)

    def figures(self) -> dict[str, float]:
        """Return what has been spent, and the bound, to record after a round."""
        sums = self.round + self.again
        spent = {SPENT: self.plan.spent(sums)}
        if self.distributed:
            spent[SPENT_SERVER] = self.plan.spent_against_server(sums, self.summed)
        return spent | {CLIP: self.clip}

    def table(self) -> dict[str, Any]:
        """Return what the guarantee is of, for `privacy.json`."""
        plan, sampling = self.plan, self.plan.sampling
        return {
            "of": f"{sampling.relation} client",
            "clients": sampling.members,
            "selected": sampling.selected,
            "sampling": sampling.kind,
            "delta": plan.delta,
            "noise_multiplier": plan.noise,
            "deviation_of_sum": self.deviation,  # in units of C
            "noise_by": self.privacy.noise,
            "planned_rounds": plan.rounds,
            "planned_epsilon": plan.spent(plan.rounds),
            "rounds": self.round,
            "sums_made_again": self.again,
            **self.figures(),
        }

    def save(self) -> dict[str, Any]:
        """Return the state to go on from after a restart."""
        return {"clip": self.clip, "round": self.round, "planned": self.plan.rounds, "again": self.again}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `save` returned.

        Raises:
            KeyError or ValueError: it is something else.
            UserError: the noise so far was that of another number of rounds.
        """
        check_planned(int(saved["planned"]), self.plan.rounds)
        self.clip, self.round, self.again = float(saved["clip"]), int(saved["round"]), int(saved["again"])


def check_planned(before: int, now: int) -> None:
    """Raise UserError if the number of rounds changes in the midst of a run, whose noise was measured for it."""
    if before != now:
        raise UserError(
            f"-gr {now}: with --dp the noise was measured for {before} rounds, which spend the whole budget; leave -gr "
            "out, or begin a new run, whose budget adds to that of this one"
        )


class PrivateAverage(Average):
    """Mean with equal weights, a fixed denominator, clipping and noise; weights that a server asks for do not count.

    Args:
        protection: what it is of.
    """

    private = True

    def __init__(self, protection: Protection) -> None:
        super().__init__(Averaging())
        self.protection = protection

    def __call__(
        self,
        states: States,
        shares: Sequence[float],
        scales: Sequence[float] | None = None,
        around: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Return `around` and the private mean of the states' differences to it.

        Raises:
            RuntimeError: the algorithm calls it twice in a round, or without `around`.
        """
        if around is None:
            raise RuntimeError("self.average: --dp needs `around`, the state of a client that changed nothing")
        if self.protection.released:
            raise RuntimeError("self.average: was called twice in a round, and --dp accounts for one mean")
        self.used = True
        updates = (
            {name: scale * t.double() - around[name].double() for name, t in state.items()}
            for state, scale in zip(states, scales or [1.0] * len(states), strict=True)
        )
        change = self.protection.release(updates, around)
        return {name: (own.double() + change[name]).to(own.dtype) for name, own in around.items()}

    def shares(self, shares: Sequence[float]) -> list[float]:
        """Return the weights as they are: none of them counts."""
        return list(shares)
