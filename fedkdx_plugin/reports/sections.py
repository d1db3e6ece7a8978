"""Runs arranged in sections: methods that may be compared are in one section, seeds of a method together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataset_utils.spec import ONLY_WITH
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.results.runs import Run, nothing_accepted
from registry.errors import UserError
from registry.parameters import suggest

# options that differ between the methods of a section
METHOD = ("algorithm", "label", "set", "student_model", "local_learning_rate")
NO_SETTING = (
    "seed",
    "times",
    "preset",
    "goal",
    "num_classes",
    "data",
)  # not options of a section; data are identified by their hash
NO_RESULT = ("out", "raw", "download", "data_root", "backend", "device", "device_id")  # do not change results
PHRASES = {"partition": "{}", "split": "{} split", "model": "{}", "alpha": "α {}", "evaluate_on": "on {} windows"}
OURS = ("FedKDX+", "FedKDX")  # what the others are tested against where nothing else is asked for
CEILING = "Centralised"  # all data on one machine: no federated method, and so not ranked among them


@dataclass(frozen=True)
class Method:
    """An algorithm with its hyper-parameters: a row of the tables; one run for each seed, in ascending order."""

    name: str
    runs: tuple[Run, ...]

    @property
    def algorithm(self) -> str:
        """Name of the algorithm."""
        return self.runs[0].algorithm

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Section:
    """Methods that may be compared: same data, model, rounds, split, and all other options.

    Attributes:
        particular: options by which it differs from most sections of the report, in words; '' if there are none.
        config: the options that its runs have in common.
        methods: the methods.
        references: the methods that all others are compared with, one after the other; () if none of those asked for
            takes part.
        notes: remarks on these runs.
    """

    particular: str
    config: Mapping[str, Any]
    methods: tuple[Method, ...]
    references: tuple[Method, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Run:
        """First run; all runs have the same data and options."""
        return self.methods[0].runs[0]

    @property
    def data(self) -> str:
        """Name of the data set."""
        return str(self.first.data["name"])

    @property
    def title(self) -> str:
        """Name of the data set, and the options that are particular to this section."""
        return f"{self.data}, {self.particular}" if self.particular else self.data

    @property
    def slug(self) -> str:
        """Title as part of a file name."""
        return slug(self.title)

    @property
    def on(self) -> str:
        """Windows on which metrics were measured: 'test' or 'validation'."""
        return str(self.first.data["evaluated_on"])

    @property
    def runs(self) -> list[Run]:
        """Runs of all methods."""
        return [run for method in self.methods for run in method.runs]


def slug(text: str) -> str:
    """Return a text in a form that can be part of a file name."""
    return re.sub(r"[^\w.=]+", "-", text, flags=re.ASCII).strip("-")


def accuracy(method: Method) -> float:
    """Return the mean over seeds of the accuracy in the last round, in [0, 1]."""
    return sum(run.evaluated[-1].metrics["served"].accuracy for run in method.runs) / len(method.runs)


def arrange(runs: Sequence[Run], references: Sequence[str] = ()) -> list[Section]:
    """Arrange runs in sections, in the order of their first runs, named by the options that differ between them.

    Args:
        runs: finished runs.
        references: names of methods, or of algorithms for all their variants, that the others are compared with; by
            default FedKDX+ and FedKDX, or else the best method of a section.

    Raises:
        UserError: a reference is in no section.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([_data(run), run.data["evaluated_on"], _options(run)], sort_keys=True)
        groups.setdefault(key, []).append(run)
    configs = [_options(group[0]) for group in groups.values()]
    names = _names(configs)
    titles = Counter((group[0].data["name"], name) for group, name in zip(groups.values(), names, strict=True))
    sections = []
    for group, config, name in zip(groups.values(), configs, names, strict=True):
        methods, notes = _methods(group)
        if titles[group[0].data["name"], name] > 1:  # only the data differ
            name = f"{name}, data {_data(group[0])[:8]}".lstrip(", ")
            notes.append("Another section has the same name and options, but other data; they are not mixed.")
        chosen = _asked_for(methods, references) if references else _usual(methods)
        notes += [*_untrained(methods), *not_finite((own.name, run) for own in methods for run in own.runs)]
        sections.append(Section(name, config, methods, chosen, tuple(notes)))
    _check_references(references, sections)
    return sections


def _untrained(methods: Sequence[Method]) -> list[str]:
    """Return a remark on each run in which no reply was ever accepted."""
    return [
        f"{method.name} seed {run.seed} accepted no reply in any round ({reason}): its figures, and its rank, are "
        "those of networks that learned nothing from one another."
        for method in methods
        for run in method.runs
        if (reason := nothing_accepted(run))
    ]


def not_finite(named_runs: Iterable[tuple[str, Run]]) -> list[str]:
    """Return a sentence on each run, and each of its networks, whose last predictions were in part NaN or infinite.

    Args:
        named_runs: name of the method, and a run of it.
    """
    return [
        f"{name} seed {run.seed}{'' if view == SERVED else f' ({view})'}: {metrics.not_finite} (last round)."
        for name, run in named_runs
        for view, metrics in run.evaluated[-1].metrics.items()
        if metrics.not_finite
    ]


def _asked_for(methods: Sequence[Method], references: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of these names, in this order: a method's own name, or that of its algorithm."""
    found = []
    for name in references:
        exact = [method for method in methods if method.name.casefold() == name.casefold()]
        found += exact or [method for method in methods if method.algorithm.casefold() == name.casefold()]
    return tuple({method.name: method for method in found}.values())


def _usual(methods: Sequence[Method]) -> tuple[Method, ...]:
    """Return FedKDX+ and FedKDX, as far as they take part without label; else the first variant; else the best method.

    The best is a federated one, where there is any.
    """
    own = [method for name in OURS for method in methods if method.algorithm == name]
    plain = tuple(method for method in own if method.name in OURS)
    federated = [method for method in methods if method.name != CEILING]
    return plain or tuple(own[:1]) or (max(federated or methods, key=accuracy),)


def _check_references(references: Sequence[str], sections: Sequence[Section]) -> None:
    """Raise UserError if a reference is in no section; without any section, there is nothing to compare."""
    methods = [method for section in sections for method in section.methods]
    known = list(dict.fromkeys(name for method in methods for name in (method.name, method.algorithm)))
    for name in references if sections else ():
        if not _asked_for(methods, [name]):
            raise UserError(f"--reference: no run is of '{name}'{suggest(name, known)}; there are {', '.join(known)}")


def named(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Return the runs with the names of their methods, in their order; variants are told apart as in `arrange`.

    A run of which there is another with the same method and seed is left out.
    """
    names = {run.folder: method.name for section in arrange(runs) for method in section.methods for run in method.runs}
    return [(names[run.folder], run) for run in runs if run.folder in names]


def _data(run: Run) -> str:
    """Return what identifies the data; if each seed draws its own shards, the data from which they are drawn."""
    return str((_redrawn(run) and run.data.get("drawn_from")) or run.data["manifest_sha256"])


def _redrawn(run: Run) -> bool:
    """Return whether each seed draws its own shards."""
    return run.config.get("vary") == "data"


def _options(run: Run) -> dict[str, Any]:
    """Return the options that the runs of a section have in common."""
    apart = (*METHOD, *NO_SETTING, *NO_RESULT, *(["data_seed"] if _redrawn(run) else []))
    return {key: value for key, value in run.config.items() if key not in apart}


def _names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name of each configuration: of the options that differ, those whose value is not that of most."""
    usual: dict[str, str | None] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = Counter(json.dumps(config.get(key)) for config in configs)
        value, count = values.most_common(1)[0]
        if len(values) > 1:
            usual[key] = value if 2 * count > len(configs) else None
    names = []
    for config in configs:
        own = [key for key, value in usual.items() if json.dumps(config.get(key)) != value]
        # alpha is part of the Dirichlet partition, and always named with it
        own += ["alpha"] if "partition" in own and config["partition"] == "dirichlet" and "alpha" not in own else []
        names.append(", ".join(_phrase(key, config[key]) for key in own if _says(key, config)))
    return names


def _says(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether an option has an effect in this configuration."""
    other, values = ONLY_WITH.get(key, ("", ()))
    return config.get(key) not in (None, []) and (not other or config.get(other) in values)


def _phrase(key: str, value: Any) -> str:
    """Return an option and its value in words."""
    text = "+".join(map(str, value)) if isinstance(value, list) else value
    return PHRASES.get(key, f"{key.replace('_', ' ')} {{}}").format(text)


def _methods(runs: Iterable[Run]) -> tuple[tuple[Method, ...], list[str]]:
    """Return the methods, and notes. The names of variants of one method include the differing hyper-parameters."""
    named: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        variant = json.dumps(_hyper(run), sort_keys=True)
        named.setdefault(run.name, {}).setdefault(variant, []).append(run)
    methods, notes = [], []
    for name, variants in named.items():
        own = [_hyper(same[0]) for same in variants.values()]
        differing = [key for key in dict.fromkeys(k for o in own for k in o) if len({str(o.get(key)) for o in own}) > 1]
        for values, same in zip(own, variants.values(), strict=True):
            seeds: dict[int, Run] = {}
            for run in same:
                if (kept := seeds.setdefault(run.seed, run)) is not run:
                    notes.append(f"{name} seed {run.seed} exists twice; {kept.folder} is used, {run.folder} left out.")
            full = " ".join([name, *(_value_in_words(key, values.get(key)) for key in differing)])
            methods.append(Method(full, tuple(seeds[seed] for seed in sorted(seeds))))
    algorithms = list(dict.fromkeys(method.algorithm for method in methods))
    methods.sort(key=lambda method: (algorithms.index(method.algorithm), method.name != method.algorithm))
    return tuple(methods), notes


def _value_in_words(key: str, value: Any) -> str:
    """Return a hyper-parameter as the name of a variant has it; without a model of its own, a student is as `-m`."""
    return "student_model as -m" if key == "student_model" and value is None else f"{key}={value}"


def _hyper(run: Run) -> dict[str, Any]:
    """Return hyper-parameters by name, without the algorithm's name before it."""
    own = {key.rpartition(".")[2]: value for key, value in (run.config.get("set") or {}).items()}
    return own | {name: run.config.get(name) for name in ("student_model", "local_learning_rate")}
