"""Example-level differential privacy of a federation: the noise that its plan takes, and what clients have spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedkdx_plugin.engine.dp_sgd import WindowPrivacy, sampling_rate
from fedkdx_plugin.engine.training import Settings, steps_of
from fedkdx_plugin.privacy.client import SPENT, check_planned
from fedkdx_plugin.privacy.example import Ledger, Work, noise_for
from registry import contract
from registry.interface import Client, Round


class Budget:
    """Budget of every client of a federation.

    Args:
        settings: options of local training, with those of privacy.
        clients: the clients, which have their windows.
        selections: the ids selected in each planned round.

    Attributes:
        rounds: planned number of rounds.
        noise: noise multiplier z of every step.
        ledger: the steps made so far.

    Raises:
        UserError: δ is too large, or ε too small.
    """

    def __init__(
        self, settings: Settings, clients: Sequence[Client], selections: Sequence[tuple[Round, Sequence[int]]]
    ) -> None:
        self.settings, self.clients, self.rounds = settings, clients, len(selections)
        planned: Counter[int] = Counter()
        for round, ids in selections:
            for id in ids:
                planned[id] += self.steps(id, round)
        privacy, size = settings.privacy, settings.batch_size
        windows = [client.samples for client in clients]
        work = {id: Work(own, planned[id]) for id, own in enumerate(windows)}
        self.noise = noise_for(work, privacy.epsilon, privacy.delta, size)
        self.ledger = Ledger(self.noise, privacy.delta, size, windows)

    @property
    def training(self) -> Settings:
        """Options of local training with the noise."""
        clip = self.settings.privacy.clip
        assert clip is not None  # `experiments.private` has checked it
        return replace(self.settings, dp_sgd=WindowPrivacy(clip, self.noise))

    def steps(self, client: int, round: Round) -> int:
        """Return the number of steps of a client in a round."""
        one, settings = self.clients[client], self.settings
        return steps_of(one.samples, settings.epochs(round, client), contract.repeats(one), settings.batch_size)

    def book(self, clients: Iterable[int], round: Round) -> None:
        """Book a round of clients that have trained, whether or not their replies arrive or are finite."""
        for id in clients:
            self.ledger.add(id, self.steps(id, round))

    def figures(self) -> dict[str, float]:
        """Return the largest ε that a client has spent, and the noise, to record after a round."""
        return {SPENT: self.ledger.most(), "privacy_noise": self.noise}

    def table(self) -> dict[str, Any]:
        """Return what has been spent, as JSON values: of each client its windows, sampling rate, steps, and ε."""
        privacy, size = self.settings.privacy, self.settings.batch_size
        spent = self.ledger.spent()
        rows = [
            {
                "client": id,
                "windows": work.windows,
                "sampling_rate": sampling_rate(work.windows, size) if work.windows else 0.0,
                "steps": work.steps,
                "epsilon": spent[id],
            }
            for id, work in self.ledger.work.items()
        ]
        budget = {"epsilon": privacy.epsilon, "delta": privacy.delta, "clip": privacy.clip}
        return {"level": privacy.level, **budget, "noise_multiplier": self.noise, "clients": rows}

    def save(self) -> dict[str, Any]:
        """Return the state to go on from after a restart."""
        steps = [work.steps for work in self.ledger.work.values()]
        return {"planned": self.rounds, "noise": self.noise, "steps": steps}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `save` returned.

        Raises:
            UserError: the noise so far was that of another number of rounds.
            KeyError or ValueError: `saved` is something else.
        """
        check_planned(int(saved["planned"]), self.rounds)
        if float(saved["noise"]) != self.noise:
            raise ValueError(f"a noise multiplier of {float(saved['noise'])!r}, not {self.noise!r}")
        for id, steps in zip(self.ledger.work, saved["steps"], strict=True):
            self.ledger.add(id, int(steps) - self.ledger.work[id].steps)
