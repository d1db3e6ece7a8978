"""Audit of one run: the attacks that were asked for, and what they found."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedkdx_plugin.engine.randomness import derive
from fedkdx_plugin.privacy.audit import identity, inverting, membership, models, rates
from fedkdx_plugin.privacy.audit.inversion import Effort
from fedkdx_plugin.privacy.audit.inverting import Recovered
from fedkdx_plugin.privacy.audit.options import AuditOptions
from fedkdx_plugin.privacy.audit.rates import Interval
from fedkdx_plugin.privacy.audit.rebuilt import Rebuilt
from fedkdx_plugin.privacy.audit.view import Update
from fedkdx_plugin.privacy.audit.windows import Windows, choose
from fedkdx_plugin.privacy.options import CENTRAL, CLIENT, EXAMPLE
from fedkdx_plugin.results.audits import IDENTITY, INVERSION, MEMBERSHIP, Audit, Figure, Roc

Say = Callable[[str], None]
PROBES = 2  # rounds whose updates are attributed to clients
ALIKE = 0.9  # correlation from which a window counts as recovered
CHANCE = {"auc": 0.5, "advantage": 0.0, **{f"tpr_{few:g}": few for few in rates.FEW}}
NO_UPDATES = (
    "No update of a whole shared model is sent, so there is no membership inference on updates and no inversion."
)


@dataclass
class Found:
    """Findings of the attacks so far, for `Audit`, and windows for the plot."""

    figures: list[Figure] = field(default_factory=list)
    curves: list[Roc] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    recovered: list[Recovered] = field(default_factory=list)

    def add(
        self, attack: str, target: str, method: str, named: Mapping[str, Interval], chance: Mapping[str, float]
    ) -> None:
        """Note figures of one attack."""
        for name, interval in named.items():
            self.figures.append(Figure(attack, target, method, name, *interval, chance.get(name, float("nan"))))


def audit(folder: Path, options: AuditOptions, say: Say) -> tuple[Audit, list[Recovered]]:
    """Attack a run.

    Args:
        folder: the run folder.
        say: is told what is being done.

    Returns:
        The results, and the windows that inversion found.

    Raises:
        UserError: the run cannot be audited.
    """
    began = time.monotonic()
    rebuilt, found = Rebuilt.of(folder), Found()
    found.counts["clients"] = len(rebuilt.clients)
    updates = _updates(rebuilt, options, say)
    if MEMBERSHIP in options.attacks:
        _membership(rebuilt, updates, options, found, say)
    if IDENTITY in options.attacks:
        _identity(rebuilt, updates, found)
    if INVERSION in options.attacks:
        _inversion(rebuilt, options, found, say)
    sent_by = [one.clients for one in updates[0]] + [one.clients for one in found.recovered]
    together = max(map(len, sent_by), default=1)
    if together > 1:
        found.notes.append(
            f"The server sees means of {together} clients' updates: every attack on an update is on such a mean, and "
            f"none can be attributed to a client ({IDENTITY})."
        )
    if rebuilt.done < (planned := rebuilt.config.global_rounds):
        found.notes.append(f"The run is unfinished: it has made {rebuilt.done} of {planned} rounds.")
    if not updates[0] and set(options.attacks) != {INVERSION}:
        found.notes.append("Clients send no shared state, so that their updates cannot be attacked.")
    if rebuilt.settings.privacy.level == CLIENT and rebuilt.settings.privacy.noise == CENTRAL:
        found.notes.append("The server adds the noise, and sees updates before; the shared model has it.")
    if rebuilt.settings.privacy.level == EXAMPLE and INVERSION in options.attacks:
        found.notes.append("With --dp example, no update of one window alone is inverted: it would not be private.")
    result = Audit(
        method=rebuilt.name,
        seed=rebuilt.config.seed,
        round=rebuilt.done,
        options=as_values(options),
        counts=found.counts,
        notes=found.notes,
        seconds=time.monotonic() - began,
        figures=found.figures,
        curves=found.curves,
    )
    return result, found.recovered


def as_values(options: AuditOptions) -> dict[str, object]:
    """Return options as they are written down."""
    return dataclasses.asdict(options) | {"attacks": list(options.attacks)}


def _updates(rebuilt: Rebuilt, options: AuditOptions, say: Say) -> list[list[Update]]:
    """Return what the server would see of every client in the next rounds, of as many as the attacks need."""
    rounds = {IDENTITY: 1 + PROBES, MEMBERSHIP: 1, INVERSION: 0}
    seen: list[list[Update]] = [[]]
    with rebuilt.watched() as watched:
        saved = rebuilt.saved
        for extra in range(max(rounds[attack] for attack in options.attacks)):
            round = rebuilt.at(rebuilt.done + 1 + extra)
            say(f"replies of all clients in round {round.index}")
            seen[extra:] = [watched.updates(saved, round, rebuilt.clients)]
            saved = watched.after(saved, round)
    return seen


def _membership(
    rebuilt: Rebuilt, updates: Sequence[Sequence[Update]], options: AuditOptions, found: Found, say: Say
) -> None:
    windows = choose(rebuilt.data, rebuilt.clients, rebuilt.config.seed)
    found.counts |= {"members": int(windows.member.sum()), "others": int((~windows.member).sum())}
    if not found.counts["members"]:
        found.notes.append("No class of a client has both training and test windows; membership cannot be told.")
        return
    with rebuilt.federation() as federation:
        federation.restore(rebuilt.saved)
        own = models.of_run(federation, rebuilt.data, windows)
        if (of_updates := models.of_updates(federation, updates[0], rebuilt.data, windows)) is not None:
            own[models.UPDATE] = of_updates
        else:
            found.notes.append(NO_UPDATES)
    trained = windows.drawn(options.shadows, rebuilt.config.seed) if options.shadows else np.empty((0, 0), bool)
    shadows = [
        _shadow(rebuilt, windows, chosen, place, f"shadow run {place} of {len(trained)}", say)
        for place, chosen in enumerate(trained, 1)
    ]
    for target, confidences in own.items():
        of_shadows = np.array([one[target] for one in shadows])
        attacks = membership.attacks(confidences, windows.member, windows.client, of_shadows, trained)
        for method, attack in attacks.items():
            rng = np.random.default_rng(derive(rebuilt.config.seed, "audit", "bootstrap", target, method))
            figures = rates.figures(attack.scores, attack.member, attack.clients, rng)
            found.add(MEMBERSHIP, target, method, figures, CHANCE)
            curve = rates.thinned(rates.curve(attack.scores, attack.member))
            found.curves.append(Roc(target, method, curve.false.tolist(), curve.true.tolist()))


def _shadow(
    rebuilt: Rebuilt, windows: Windows, trained: np.ndarray, place: int, name: str, say: Say
) -> dict[str, np.ndarray]:
    """Make a shadow run, which differs from the run in its windows and noise alone; return confidences by target."""
    data, noise = windows.trained_on(rebuilt.data, trained), derive(rebuilt.config.seed, "audit", "noise", place)
    with rebuilt.federation(data, noise) as federation:
        for index in range(1, rebuilt.done + 1):
            say(f"{name}, round {index}/{rebuilt.done}")
            federation.round(rebuilt.at(index))
        result = models.of_run(federation, rebuilt.data, windows)
        saved = federation.save()
    with rebuilt.watched(data, noise) as watched:
        seen = watched.updates(saved, rebuilt.at(rebuilt.done + 1), rebuilt.clients)
        if (of_updates := models.of_updates(watched.federation, seen, rebuilt.data, windows)) is not None:
            result[models.UPDATE] = of_updates
    return result


def _identity(rebuilt: Rebuilt, updates: Sequence[Sequence[Update]], found: Found) -> None:
    known = updates[0]
    if any(len(one.clients) > 1 for one in known):
        return  # `audit` notes it for all attacks
    if len(known) < 2:
        if known:
            found.notes.append(f"A single client sends updates, so that there is no question who did ({IDENTITY}).")
        return
    guesses = [identity.identify(known, later) for later in updates[1:]]
    right = np.concatenate([guess.clients == guess.guessed for guess in guesses]).astype(np.float64)
    clients = np.concatenate([guess.clients for guess in guesses])
    rng = np.random.default_rng(derive(rebuilt.config.seed, "audit", "bootstrap", IDENTITY))
    accuracy = {"accuracy": rates.mean(right, clients, rng)}
    found.add(IDENTITY, models.UPDATE, "nearest update", accuracy, {"accuracy": 1 / len(known)})


def _inversion(rebuilt: Rebuilt, options: AuditOptions, found: Found, say: Say) -> None:
    clients = inverting.chosen_clients(rebuilt, options.inverted)
    for one in inverting.recover(rebuilt, clients, Effort(options.steps)):
        found.recovered.append(one)
        say(f"inverted {one.kind}, {one.when}, client {one.client}")
    kinds = dict.fromkeys((one.kind, one.when) for one in found.recovered)
    for kind, when in kinds:
        own = [one for one in found.recovered if (one.kind, one.when) == (kind, when)]
        values = np.concatenate([one.correlations for one in own])
        of = np.concatenate([np.full(len(one.found), one.client) for one in own])
        rng = np.random.default_rng(derive(rebuilt.config.seed, "audit", "bootstrap", kind, when))
        named = {
            "correlation": rates.mean(values, of, rng),
            "recovered": rates.mean((values >= ALIKE).astype(np.float64), of, rng),
        }
        by_chance, _ = inverting.by_chance(own)
        chance = {"correlation": by_chance.mean(), "recovered": (by_chance >= ALIKE).mean()} if len(by_chance) else {}
        found.add(INVERSION, f"{kind}, {when}", "gradient matching", named, {k: float(v) for k, v in chance.items()})
    if not kinds and NO_UPDATES not in found.notes:
        found.notes.append(NO_UPDATES)
