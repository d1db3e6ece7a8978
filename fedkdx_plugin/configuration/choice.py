"""Algorithms of a comparison with their hyper-parameters: defaults <- preset <- `--set`.

The learning rate, an option of all algorithms, may be given like a hyper-parameter of each: 0.01 <- preset <- `-lr` <-
`--set NAME.local_learning_rate`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkdx_plugin.configuration.config import Config, read_yaml
from registry import catalog
from registry.description import describe
from registry.errors import UserError
from registry.interface import Server
from registry.parameters import Params, option, parse, suggest
from registry.text import shown

PRESETS = Path(__file__).parent / "presets"
RATE = "local_learning_rate"


@dataclass(frozen=True)
class Common(Params):
    """Options of all algorithms of which each may have its own value."""

    local_learning_rate: float = option(0.01, "learning rate of the clients' optimiser", low=1e-12)


@dataclass(frozen=True)
class Choice:
    """An algorithm of a comparison.

    Attributes:
        entry: its entry in the catalog.
        server: its class.
        params: its hyper-parameters, an instance of `server.Params`.
        learning_rate: of its clients.
    """

    entry: catalog.Entry
    server: type[Server]
    params: Any
    learning_rate: float

    @property
    def name(self) -> str:
        """Name of the algorithm."""
        return self.entry.name


def choose(config: Config) -> list[Choice]:
    """Return the algorithms of a configuration with their hyper-parameters.

    Raises:
        UserError: an algorithm or hyper-parameter is unknown, or a value is out of range.
    """
    _check_once([word for word in config.algorithm if word.lower() != "all"])
    names = [name for word in config.algorithm for name in (_all() if word.lower() == "all" else [word])]
    entries = list(dict.fromkeys(catalog.find("algorithms", name) for name in names))
    for entry in entries:
        if len(same := [other.origin for other in entries if other.name == entry.name]) > 1:
            raise UserError(f"{' and '.join(same)} have an algorithm '{entry.name}' each; rename one of the classes")
    servers = {entry.name: catalog.load_entry(entry) for entry in entries}
    for name, server in servers.items():
        if RATE in _field_names(server):
            raise UserError(f"{name} has a hyper-parameter '{RATE}', which is an option of every algorithm; rename it")
    values = _assign(config.set, servers)
    preset = {} if _pinned(config, servers, values) else read_preset(config.preset)
    _check_preset(config.preset, preset, servers)
    given = {} if config.local_learning_rate is None else {RATE: config.local_learning_rate}
    choices = []
    for entry in entries:
        own = preset.get(entry.name, {}) | given | values[entry.name]
        common = parse(Common, {RATE: own.pop(RATE)} if RATE in own else {}, entry.name)
        params = _params(entry, servers, own)
        choices.append(Choice(entry, servers[entry.name], params, common.local_learning_rate))
    return choices


def _check_once(words: Sequence[str]) -> None:
    """Raise UserError where an algorithm is named twice: it would run once, and its second row be missing."""
    for entry, count in Counter(catalog.find("algorithms", word) for word in words).items():
        if count > 1:
            raise UserError(f"-algo: {entry.name} is named {count} times; name it once (--times makes several seeds)")


def _pinned(config: Config, servers: Mapping[str, type[Server]], values: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a configuration is a run's own, with a value of every hyper-parameter, over which no preset wins.

    A run is repeated and resumed by these values alone: its preset may have been changed or removed since.
    """
    every = all(values[name].keys() >= set(_field_names(server)) for name, server in servers.items())
    return config.complete and every and config.local_learning_rate is not None


def _params(entry: catalog.Entry, servers: Mapping[str, type[Server]], values: dict[str, Any]) -> Any:
    """Return an algorithm's hyper-parameters from their values, by name. Raises UserError for a wrong value."""
    try:
        return parse(servers[entry.name].Params, values, entry.name)
    except UserError as error:
        raise UserError(f"{error}{_instead(entry.name, values)}") from error


def _instead(algorithm: str, values: Mapping[str, Any]) -> str:
    """Return a hint at an algorithm's variant (its name with '+') if that accepts the values; else an empty text."""
    variant = f"{algorithm}+"
    if variant not in (entry.name for entry in catalog.entries("algorithms")):
        return ""
    server: type[Server] = catalog.load("algorithms", variant)
    try:
        parse(server.Params, dict(values), variant)
    except UserError:
        return ""
    return f"; {variant} takes it (-algo {variant})"


def read_preset(name: str) -> dict[str, dict[str, Any]]:
    """Read hyper-parameters by algorithm from a preset of the project or a YAML file of the user.

    Raises:
        UserError: there is no such preset or file, or it does not map algorithms to mappings.
    """
    own = _presets()
    path = PRESETS / f"{name}.yaml" if name in own else Path(name)
    if name not in own and not path.is_file():
        raise UserError(
            f"--preset {name}: no such preset{suggest(name, own)}; choose {', '.join(own)}, or name a YAML file"
        )
    preset = read_yaml(path)
    for algorithm, values in preset.items():
        if not isinstance(values, Mapping):
            raise UserError(f"{path}: {algorithm}: must be a mapping, such as '{algorithm}: {{gamma: 0.5}}'")
    return {str(algorithm): dict(values) for algorithm, values in preset.items()}


def _check_preset(where: str, preset: Mapping[str, Mapping[str, Any]], servers: Mapping[str, type[Server]]) -> None:
    """Check a whole preset, also what it has for algorithms that do not run: it may be used with them later.

    Values of an algorithm that cannot be loaded here are not checked.

    Raises:
        UserError: it names what is no algorithm or hyper-parameter, or a value is out of range.
    """
    known = dict.fromkeys([*servers, *(entry.name for entry in catalog.entries("algorithms"))])
    for name, values in preset.items():
        if name not in known:
            raise UserError(
                f"--preset {where}: there is no algorithm '{shown(name)}'{suggest(name, known)}; correct the name, or "
                "leave it out"
            )
        if where not in _presets():  # the project's own are right, and hold all algorithms, which need not be loaded
            try:
                server = servers.get(name) or catalog.load("algorithms", name)
            except UserError:
                continue
            _check_values(f"--preset {where}: {name}", name, server, values)


def _check_values(where: str, name: str, server: type[Server], values: Mapping[str, Any]) -> None:
    """Raise UserError where a preset's values for one algorithm have an unknown name, or one is out of range."""
    known = [*_field_names(server), RATE]
    for key in values:
        if key not in known:
            hint = _instead(name, {key: values[key]}) or suggest(str(key), known)
            raise UserError(
                f"{where} has no hyper-parameter '{shown(key)}'{hint}; known: {', '.join(known)}; options of all "
                "algorithms are no part of a preset"
            )
    parse(Common, {RATE: values[RATE]} if RATE in values else {}, where)
    parse(server.Params, {key: value for key, value in values.items() if key != RATE}, where)


def _presets() -> list[str]:
    """Return the names of the project's presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _all() -> list[str]:
    """Return the names of all algorithms that can be loaded; print those that cannot."""
    entries = catalog.entries("algorithms")
    for entry in entries:
        if reason := describe(entry).broken:
            print(f"left out: {entry.name} from {entry.origin}: {reason}", file=sys.stderr)
    return [entry.name for entry in entries if not describe(entry).broken]


def _assign(sets: Mapping[str, Any], servers: Mapping[str, type[Server]]) -> dict[str, dict[str, Any]]:
    """Assign `--set` values to algorithms: `Name.x` to one, `x` to all that have it; `Name.x` takes precedence."""
    values: dict[str, dict[str, Any]] = {name: {} for name in servers}
    for key in sorted(sets, key=lambda key: "." in key):
        scope, _, name = key.rpartition(".")
        targets = [algorithm for algorithm in servers if not scope or algorithm.lower() == scope.lower()]
        if not targets:
            raise UserError(
                f"--set {key}: no algorithm '{scope}' here{suggest(scope, servers)}; choose {', '.join(servers)}"
            )
        having = [a for a in targets if name in (*_field_names(servers[a]), RATE)]
        if not having:
            known = sorted({RATE, *(field for target in targets for field in _field_names(servers[target]))})
            hint = "".join(_instead(target, {name: sets[key]}) for target in targets) or suggest(name, known)
            raise UserError(
                f"--set {key}: {', '.join(targets)} has no hyper-parameter '{name}'{hint}; known: {', '.join(known)}"
            )
        for algorithm in having:
            values[algorithm][name] = sets[key]
    return values


def _field_names(server: type[Server]) -> list[str]:
    """Return the names of an algorithm's hyper-parameters."""
    return [field.name for field in dataclasses.fields(server.Params)]


def resolve(config: Config, choices: list[Choice]) -> dict[str, Any]:
    """Return the configuration with all defaults filled in, with which `--config` repeats the comparison.

    Its learning rate is the first algorithm's; those of others that have another are in `set`.
    """
    scoped = {
        f"{choice.name}.{name}": list(value) if isinstance(value, tuple) else value
        for choice in choices
        for name, value in dataclasses.asdict(choice.params).items()
    }
    rate = choices[0].learning_rate
    scoped |= {f"{choice.name}.{RATE}": choice.learning_rate for choice in choices if choice.learning_rate != rate}
    return config.to_dict() | {"algorithm": [choice.entry.spec for choice in choices], RATE: rate, "set": scoped}


def run_settings(resolved: Mapping[str, Any], choice: Choice, seed: int) -> dict[str, Any]:
    """Return the part of a resolved configuration for one run: one algorithm with one seed."""
    own = {key: value for key, value in resolved["set"].items() if key.startswith(f"{choice.name}.")}
    own.pop(f"{choice.name}.{RATE}", None)
    values = dict(resolved) | {"algorithm": [choice.entry.spec], "seed": seed, "times": 1, "set": own}
    values[RATE] = choice.learning_rate
    if values["vary"] == "data":  # each seed has its own data
        values["data_seed"] += seed - resolved["seed"]
    return values
