"""Random search of hyper-parameters: the same number of candidates for every method, and the best of them as a preset.

The part `search` of an experiment's file:

    search:
      candidates: 8                     # of each method; the first has the method's defaults
      seed: 0
      every: {local_learning_rate: {log: [0.003, 0.1]}}   # drawn for each method beside its own
      spaces:
        FedAvg: {}                      # nothing of its own; without 'every', it has one candidate
        FedProx: {mu: {log: [0.001, 1]}}              # evenly over logarithms
        FedAvgM: {momentum: {uniform: [0.5, 0.99]}, server_rate: {log: [0.3, 3]}}
        FedMAT: {segments: [1, 2, 4, 8]}              # one of these

Random search: Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, JMLR 13, 2012.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.files import replacing, yaml_text
from fedkdx_plugin.configuration.choice import RATE, Common, choose
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.results.runs import Run
from registry import catalog
from registry.errors import UserError
from registry.parameters import suggest

PARTS = ("candidates", "seed", "every", "spaces")
RANGES = ("log", "uniform")
DEFAULTS = "defaults"
FIRST = "first candidate %"  # head of its accuracy: with the defaults, and what the search's preset or `set` says
DIGITS = 3  # of a drawn number, so that it can be read and written
TRIES = 1000  # draws for a candidate that is none of those before, in a small space


@dataclass(frozen=True)
class Best:
    """The best candidate of a method.

    Attributes:
        algorithm: name of the method.
        label: which candidate.
        values: its hyper-parameters that were drawn, and others that are not the method's defaults (from the search's
            own `preset` or `set`); {}: the defaults.
        accuracy: its mean accuracy on validation windows over data sets and seeds, in [0, 1].
        before: the same of the first candidate, which has the defaults beside the search's own `preset` or `set`.
        candidates: number of candidates.
    """

    algorithm: str
    label: str
    values: Mapping[str, Any]
    accuracy: float
    before: float
    candidates: int


def candidates(where: str, search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return all candidates, as entries of an axis of a grid: 'algorithm', 'label' and 'set'.

    Each method's are drawn from (seed, its name), whatever other methods there are.

    Args:
        where: the file, for messages.
        search: content of the part `search`.

    Raises:
        UserError: the part is not as described above.
    """
    for key in search:
        if key not in PARTS:
            raise UserError(f"{where}: search: unknown key '{key}'{suggest(str(key), PARTS)}")
    count, seed = _whole(where, search, "candidates", 1), _whole(where, search, "seed", 0, 0)
    every, spaces = search.get("every") or {}, search.get("spaces")
    if not isinstance(every, Mapping):
        raise UserError(f"{where}: search: every: must map options to what is drawn from, or be left out")
    if unknown := [name for name in every if name != RATE]:
        raise UserError(f"{where}: search: every: may hold {RATE} alone, not '{unknown[0]}'")
    if not isinstance(spaces, Mapping) or not spaces:
        raise UserError(f"{where}: search: spaces: must map algorithms to spaces, such as 'FedProx: {{mu: [0.1, 1]}}'")
    entries = []
    for algorithm, space in spaces.items():
        if not isinstance(space, Mapping):
            raise UserError(
                f"{where}: search: {algorithm}: must map hyper-parameters to what is drawn from, or be {{}}"
            )
        for values in _drawn(f"{where}: search: {algorithm}", str(algorithm), {**every, **space}, count, seed):
            label = ", ".join(f"{name}={value}" for name, value in values.items()) or DEFAULTS
            sets = {f"{algorithm}.{name}": value for name, value in values.items()}
            entries.append({"algorithm": str(algorithm), "label": label, "set": sets})
    return entries


def check_given(where: str, search: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check the options that are to replace those of a search's file.

    Raises:
        UserError: one would replace what makes a candidate, so that runs are not what their labels say.
    """
    if "algorithm" in given:
        raise UserError(
            f"-algo: the methods are those of search: spaces in {where}; choose some of them with --only algorithm=NAME"
        )
    if given.get("label"):
        raise UserError(f"--label: in {where}, a search labels its candidates itself; leave it out")
    if given.get(RATE) is not None and RATE in (search.get("every") or {}):
        raise UserError(f"-lr: {where} draws the learning rate in search: every; take it out of one")
    for key in given.get("set") or {}:
        scope, _, name = str(key).rpartition(".")
        for algorithm, space in search["spaces"].items():
            if name in {**(search.get("every") or {}), **space} and scope.lower() in ("", str(algorithm).lower()):
                raise UserError(f"--set {key}: {where} draws it in search: spaces: {algorithm}; take it out of one")


def check_first(where: str, search: Mapping[str, Any], values: Mapping[str, Any], config: Config) -> None:
    """Check that a method's first candidate has the method's defaults of all that is drawn for the others.

    Args:
        where: the file, for messages.
        search: content of the part `search`.
        values: a combination of base, grid and a candidate.
        config: the same, checked.

    Raises:
        UserError: a preset, `set` or learning rate has another value, so that the label 'defaults' is wrong.
    """
    if values["label"] != DEFAULTS:
        return
    space = next(own for algorithm, own in search["spaces"].items() if str(algorithm) == values["algorithm"])
    (choice,) = choose(config)
    fields = (*dataclasses.fields(choice.server.Params), *dataclasses.fields(Common))
    has = vars(choice.params) | {RATE: choice.learning_rate}
    default = {own.name: own.default for own in fields}
    for name in {**(search.get("every") or {}), **space}:
        if name in has and has[name] != default[name]:  # the other candidates tell of an unknown name
            raise UserError(
                f"{where}: search: {choice.name}: {name} is drawn, and {_source_of(name, choice.name, config)} says "
                f"{has[name]}, while the first candidate has the default {default[name]}; take it out of one"
            )


def _source_of(name: str, algorithm: str, config: Config) -> str:
    """Return what gives an algorithm its value of a hyper-parameter, in the order of `configuration.choice`."""
    if {name, f"{algorithm}.{name}".lower()} & {name if key == name else key.lower() for key in config.set}:
        return "'set'"
    return RATE if name == RATE and config.local_learning_rate is not None else f"preset {config.preset}"


def check_windows(evaluated_on: Iterable[str]) -> None:
    """Raise UserError if candidates are measured on anything but validation windows."""
    if any(kind != "validation" for kind in evaluated_on):
        raise UserError("hyper-parameters are chosen on validation windows only: add --evaluate-on validation")


def best(runs: Sequence[Run]) -> list[Best]:
    """Return the best candidate of each method, by name; of equal ones the first, which has the defaults.

    Raises:
        UserError: runs are not of validation windows, or a candidate has not run on all that the others have.
    """
    check_windows(run.evaluated_on for run in runs)
    scores: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        scores.setdefault(run.algorithm, {}).setdefault(str(run.config.get("label") or ""), []).append(run)
    found = []
    for algorithm, by_label in scores.items():
        if len({frozenset(map(_setting, same)) for same in by_label.values()}) > 1:
            raise UserError(f"{algorithm}: not all candidates have run in all settings; let the experiment finish")
        means = {label: float(np.mean([_accuracy(run) for run in same])) for label, same in by_label.items()}
        if DEFAULTS not in means:
            raise UserError(f"{algorithm}: no run has its defaults, so these runs are of no search")
        chosen = max(means, key=lambda label: (means[label], label == DEFAULTS))
        values = _values(by_label[chosen][0], chosen)
        found.append(Best(algorithm, chosen, values, means[chosen], means[DEFAULTS], len(means)))
    return sorted(found, key=lambda one: one.algorithm.lower())


def write_preset(path: Path, found: Sequence[Best], about: str) -> None:
    """Write a preset, with the hyper-parameters of each method's best candidate.

    Args:
        path: a YAML file, which must not exist.
        found: the best candidates.
        about: a line on where they are from.

    Raises:
        UserError: the file exists.
    """
    if path.exists():
        raise UserError(f"{path}: exists already; name another file, or remove it")
    values = {one.algorithm: dict(one.values) for one in found if one.values}
    with replacing(path) as part:
        part.write_text(f"# {about}\n{yaml_text(values)}", encoding="utf-8")


def table(found: Sequence[Best]) -> str:
    """Return a Markdown table of the best candidates."""
    heads = ["method", "candidates", "best", "accuracy %", FIRST]
    rows = [
        [one.algorithm, str(one.candidates), one.label, f"{100 * one.accuracy:.2f}", f"{100 * one.before:.2f}"]
        for one in found
    ]
    lines = [heads, ["---", "---:", "---", "---:", "---:"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _drawn(where: str, algorithm: str, space: Mapping[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
    """Return up to `count` different candidates: the defaults as {}, then drawn ones."""
    sources = {str(name): _source(f"{where}: {name}", spec) for name, spec in space.items()}
    params: Any = catalog.load("algorithms", algorithm)
    known = (*dataclasses.fields(params.Params), *dataclasses.fields(Common))
    fixed = {own.name: own.default for own in known if own.name in sources}
    key = int.from_bytes(hashlib.sha256(algorithm.encode()).digest()[:8], "big")
    rng = np.random.default_rng([seed, key])
    found: list[dict[str, Any]] = [{}]
    for _ in range(TRIES if sources else 0):
        if len(found) >= count:
            break
        values = {name: _draw(spec, rng) for name, spec in sources.items()}
        if values not in found and values != fixed:
            found.append(values)
    return found


def _source(where: str, spec: object) -> tuple[str, list[Any]]:
    """Return how a hyper-parameter is drawn, and from what. Raises UserError."""
    if isinstance(spec, list) and spec and all(isinstance(value, (int, float, str, bool)) for value in spec):
        return "one of", spec
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((kind, ends),) = spec.items()
        numbers = isinstance(ends, list) and all(type(end) in (int, float) and math.isfinite(end) for end in ends)
        least = 0.0 if kind == "log" else -math.inf
        if kind in RANGES and numbers and len(ends) == 2 and least < ends[0] < ends[1]:
            return str(kind), [float(end) for end in ends]
    raise UserError(
        f"{where}: {spec!r} is nothing to draw from; write a list of values, {{log: [LOW, HIGH]}} with LOW above 0, or "
        "{uniform: [LOW, HIGH]}"
    )


def _draw(source: tuple[str, list[Any]], rng: np.random.Generator) -> Any:
    kind, values = source
    if kind == "one of":
        return values[int(rng.integers(len(values)))]
    low, high = values
    drawn = math.exp(rng.uniform(math.log(low), math.log(high))) if kind == "log" else rng.uniform(low, high)
    return min(max(float(f"{drawn:.{DIGITS}g}"), low), high)


def _whole(where: str, search: Mapping[str, Any], key: str, least: int, default: int | None = None) -> int:
    value = search.get(key, default)
    if type(value) is not int or value < least:
        raise UserError(f"{where}: search: {key}: must be a whole number of at least {least}, not {value!r}")
    return value


def _setting(run: Run) -> tuple[str, int]:
    return str(run.folder.parent), run.seed


def _accuracy(run: Run) -> float:
    return float(run.evaluated[-1].metrics[SERVED].accuracy)


def _values(run: Run, label: str) -> dict[str, Any]:
    """Return what a preset must hold for a candidate: what its label names, and all that is not the default."""
    drawn = [] if label == DEFAULTS else [part.partition("=")[0] for part in label.split(", ")]
    server: Any = catalog.load("algorithms", str(run.config["algorithm"][0]))
    fields = {own.name: own.default for own in (*dataclasses.fields(server.Params), *dataclasses.fields(Common))}
    values = {}
    for key, value in {RATE: run.config.get(RATE, fields[RATE]), **run.config["set"]}.items():
        name = key.removeprefix(f"{run.algorithm}.")
        default = fields.get(name)
        if name in drawn or value != (list(default) if isinstance(default, tuple) else default):
            values[name] = value
    return values
