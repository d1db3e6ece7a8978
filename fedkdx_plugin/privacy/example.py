"""Example-level differential privacy: the noise that the clients' training takes, and what each has spent so far.

One noise multiplier z serves all clients. It is the smallest with which every client stays within (ε, δ) over the
steps that it is going to make in the whole run; in-process runs know these beforehand, as seed and options decide who
is selected when. A client with few windows is in a lot more often, and is the one that z is made for; the others end
below ε.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from fedkdx_plugin.privacy.accounting import MOST_NOISE, POISSON, Sampling, check_useful, least
from fedkdx_plugin.privacy.accounting import spent as spent_by
from registry.errors import UserError

SCALED = (
    "--scale {}: not with --dp example: every window would depend on all others, by whose statistics it is scaled; use "
    "--scale none"
)
BETWEEN_SITES = "between sites, noise and account would have to be each site's own, and secret, which is not there yet"


@dataclass(frozen=True)
class Work:
    """Steps of DP-SGD of one client, planned or made.

    Attributes:
        windows: number of its windows.
        steps: number of steps.
    """

    windows: int
    steps: int

    def spent(self, noise: float, delta: float, batch_size: int) -> float:
        """Return the ε that these steps cost.

        Args:
            noise: noise multiplier z.
            delta: δ.
            batch_size: expected size of a lot.
        """
        sampling = Sampling(self.windows, min(batch_size, self.windows), POISSON)
        return spent_by(noise, delta, self.steps, sampling)


def noise_for(work: Mapping[int, Work], epsilon: float, delta: float, batch_size: int) -> float:
    """Return the smallest noise multiplier with which no client's steps cost more than (ε, δ).

    Args:
        work: client -> its steps in the whole run; one without steps does not count.
        epsilon, delta: the budget of each client.
        batch_size: expected size of a lot.

    Raises:
        UserError: δ is too large for the number of a client's windows, or ε too small for its steps, or for anything to
            be learned.
    """
    check_delta(work, delta)
    costly = costliest(work.values())
    if not costly:
        return 0.0
    for one in costly:
        for steps in (1, one.steps):
            if Work(one.windows, steps).spent(MOST_NOISE, delta, batch_size) > epsilon:
                raise UserError(
                    f"--epsilon {epsilon:g} --delta {delta:g}: too small for {steps} training step"
                    f"{'s' if steps > 1 else ''} of a client with {one.windows} windows, even with noise of "
                    f"{MOST_NOISE:,.0f} times the bound of a window; raise --epsilon"
                )
    worst = max(
        costly, key=lambda one: one.steps / one.windows**2
    )  # in all likelihood: q² T decides where noise is large
    while True:
        noise = least(partial(_excess, worst, epsilon, delta, batch_size))
        costs = {one: one.spent(noise, delta, batch_size) for one in costly}
        worst = max(costly, key=costs.__getitem__)
        if costs[worst] <= epsilon:
            break
    steps = sum(one.steps for one in work.values())
    drawn = sum(one.steps * min(batch_size, one.windows) for one in work.values())
    check_useful(epsilon, delta, noise * steps**0.5, drawn)
    return noise


def _excess(work: Work, epsilon: float, delta: float, batch_size: int, noise: float) -> float:
    return work.spent(noise, delta, batch_size) - epsilon


def check_delta(work: Mapping[int, Work], delta: float) -> None:
    """Raise UserError where a δ would allow giving away a whole window: it is not below 1/n for the smallest client."""
    training = {id: one.windows for id, one in work.items() if one.steps}
    if not training:
        return
    id = min(training, key=lambda id: (training[id], id))
    if delta >= 1 / training[id]:
        raise UserError(
            f"--delta {delta:g}: not below 1/{training[id]}, so that giving away one of the {training[id]} windows of "
            f"client {id} would count as private; lower it"
        )


def costliest(work: Collection[Work]) -> list[Work]:
    """Return the steps of which no others cost more for certain: fewer windows, and as many steps, cost more."""
    found: list[Work] = []
    for one in sorted(set(work), key=lambda one: (one.windows, -one.steps)):
        if one.steps > max((other.steps for other in found), default=0):
            found.append(one)
    return found


class Ledger:
    """Account of the steps that every client has made.

    Args:
        noise: noise multiplier z of all steps.
        delta: δ.
        batch_size: expected size of a lot.
        windows: number of windows of each client.
    """

    def __init__(self, noise: float, delta: float, batch_size: int, windows: Collection[int]) -> None:
        self.noise, self.delta, self.batch_size = noise, delta, batch_size
        self.work = {id: Work(own, 0) for id, own in enumerate(windows)}

    def add(self, client: int, steps: int) -> None:
        """Book steps of a client."""
        before = self.work[client]
        self.work[client] = Work(before.windows, before.steps + steps)

    def spent(self) -> dict[int, float]:
        """Return the ε that each client has spent, by id."""
        return {id: one.spent(self.noise, self.delta, self.batch_size) for id, one in self.work.items()}

    def most(self) -> float:
        """Return the largest of them; 0 before the first step."""
        costs = (one.spent(self.noise, self.delta, self.batch_size) for one in costliest(self.work.values()))
        return max(costs, default=0.0)
