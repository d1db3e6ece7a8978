"""Runs put in order: what may be compared stands in one section, seeds of one method together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkdx_plugin.results.runs import Run

METHOD = ("algorithm", "label", "set", "student_model")  # tell the methods of a section apart
NO_SETTING = ("seed", "times", "preset", "goal", "num_classes", "data")  # the data are known by their hash
NO_RESULT = ("out", "raw", "download", "data_root", "backend", "device", "device_id")  # do not change what comes out
ONLY_WITH = {"alpha": ("partition", "dirichlet"), "classes_per_client": ("partition", "pathological")}
PHRASES = {"partition": "{}", "split": "{} split", "model": "{}", "alpha": "α {}", "evaluate_on": "on {} windows"}
OURS = ("FedKDX+", "FedKDX")  # what the others are tested against, in this order
CEILING = "Centralised"  # all data on one machine: no federated method, and so not ranked among them


@dataclass(frozen=True)
class Method:
    """A row of the tables: an algorithm with its hyper-parameters; one run a seed, ascending."""

    name: str
    runs: tuple[Run, ...]

    @property
    def algorithm(self) -> str:
        return self.runs[0].algorithm

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Section:
    """Methods that may be compared: same data, model, rounds, split, and all other settings.

    Attributes:
        setting: what sets it apart from the report's other sections; '' where nothing unusual does.
        config: the settings that its runs have in common.
        notes: what a reader must know of these runs.
    """

    setting: str
    config: Mapping[str, Any]
    methods: tuple[Method, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Run:
        """Any run: they have data and settings in common."""
        return self.methods[0].runs[0]

    @property
    def data(self) -> str:
        return str(self.first.data["name"])

    @property
    def title(self) -> str:
        return f"{self.data}, {self.setting}" if self.setting else self.data

    @property
    def slug(self) -> str:
        """The title as part of a file's name."""
        return slug(self.title)

    @property
    def on(self) -> str:
        """What figures are measured on: 'test' or 'validation' windows."""
        return str(self.first.data["evaluated_on"])

    @property
    def reference(self) -> Method:
        """Choose FedKDX+ or else FedKDX, unlabelled or else the first that is; else the last round's best method."""
        own = [method for name in OURS for method in self.methods if method.algorithm == name]
        plain = [method for method in own if method.name in OURS]
        return (plain + own)[0] if own else max(self.methods, key=accuracy)


def slug(text: str) -> str:
    """As part of a file's name."""
    return re.sub(r"[^\w.=]+", "-", text, flags=re.ASCII).strip("-")


def accuracy(method: Method) -> float:
    """Mean over seeds of the last round's accuracy, in [0, 1]."""
    return sum(run.evaluated[-1].metrics["served"].accuracy for run in method.runs) / len(method.runs)


def arrange(runs: Sequence[Run]) -> list[Section]:
    """Sections in the order of their first runs, named by what differs between them."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([_data(run), run.data["evaluated_on"], _settings(run)], sort_keys=True)
        groups.setdefault(key, []).append(run)
    configs = [_settings(group[0]) for group in groups.values()]
    names = _names(configs)
    titles = Counter((group[0].data["name"], name) for group, name in zip(groups.values(), names, strict=True))
    sections = []
    for group, config, name in zip(groups.values(), configs, names, strict=True):
        methods, notes = _methods(group)
        if titles[group[0].data["name"], name] > 1:  # nothing but the data differ
            name = f"{name}, data {_data(group[0])[:8]}".lstrip(", ")
            notes.append("Another section has the same name and settings, but other data; they are not mixed.")
        sections.append(Section(name, config, methods, tuple(notes)))
    return sections


def _data(run: Run) -> str:
    """What tells data apart: where each seed draws its own shards, what they are drawn from."""
    return str((_redrawn(run) and run.data.get("drawn_from")) or run.data["manifest_sha256"])


def _redrawn(run: Run) -> bool:
    return run.config.get("vary") == "data"


def _settings(run: Run) -> dict[str, Any]:
    """What the runs of a section have in common."""
    apart = (*METHOD, *NO_SETTING, *NO_RESULT, *(["data_seed"] if _redrawn(run) else []))
    return {key: value for key, value in run.config.items() if key not in apart}


def _names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is particular about each: of the settings that vary, those that not most have."""
    usual: dict[str, str | None] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = Counter(json.dumps(config.get(key)) for config in configs)
        value, count = values.most_common(1)[0]
        if len(values) > 1:
            usual[key] = value if 2 * count > len(configs) else None
    names = []
    for config in configs:
        own = [key for key, value in usual.items() if json.dumps(config.get(key)) != value]
        # alpha means nothing but with the partition that it belongs to, and there it always does
        own += ["alpha"] if "partition" in own and config["partition"] == "dirichlet" and "alpha" not in own else []
        names.append(", ".join(_phrase(key, config[key]) for key in own if _says(key, config)))
    return names


def _says(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a setting has a meaning here."""
    other, value = ONLY_WITH.get(key, (None, None))
    return config.get(key) is not None and (other is None or config.get(other) == value)


def _phrase(key: str, value: Any) -> str:
    return PHRASES.get(key, f"{key.replace('_', ' ')} {{}}").format(value)


def _methods(runs: Iterable[Run]) -> tuple[tuple[Method, ...], list[str]]:
    """Runs by method, and notes. Methods of one name that differ are called by what they differ in."""
    named: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        variant = json.dumps([run.config.get("set"), run.config.get("student_model")], sort_keys=True)
        named.setdefault(run.name, {}).setdefault(variant, []).append(run)
    methods, notes = [], []
    for name, variants in named.items():
        own = [_hyper(same[0]) for same in variants.values()]
        differing = [key for key in dict.fromkeys(k for o in own for k in o) if len({str(o.get(key)) for o in own}) > 1]
        for values, same in zip(own, variants.values(), strict=True):
            seeds: dict[int, Run] = {}
            for run in same:
                if seeds.setdefault(run.seed, run) is not run:
                    notes.append(f"{name} seed {run.seed} is there twice; {run.folder.name} is left out.")
            full = " ".join([name, *(f"{key}={values.get(key)}" for key in differing)])
            methods.append(Method(full, tuple(seeds[seed] for seed in sorted(seeds))))
    algorithms = list(dict.fromkeys(method.algorithm for method in methods))
    methods.sort(key=lambda method: (algorithms.index(method.algorithm), method.name != method.algorithm))
    return tuple(methods), notes


def _hyper(run: Run) -> dict[str, Any]:
    """Hyper-parameters by name, without the algorithm's."""
    own = {key.rpartition(".")[2]: value for key, value in (run.config.get("set") or {}).items()}
    return own | {"student_model": run.config.get("student_model")}
