"""Experiments: the runs of a grid of configurations, planned, kept in one folder, resumed after an interruption.

A comparison (several algorithms and seeds in one setting) is the smallest experiment: its grid is empty. Every
experiment has one folder:

    experiment.yaml            title, command and grid, from which `fedkdx resume` plans the same runs again
    [SECTION/]RUN/             a run folder for each run (see `results.run_folder`); a section is one setting
    [SECTION/]comparison.*     the section's table (.md, .csv) and plot (.png)
    report/                    the report of all sections

Every comparison gets a new folder. The folder of a grid has the grid's name and is used again by the same command; the
names of its run folders end in a hash of their settings, so that a changed grid finds no results of another one.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_utils.files import is_file, is_folder, locked, unwritable, yaml_text
from dataset_utils.sealed import Sealed
from dataset_utils.spec import check_used, shards_folder
from fedkdx_plugin.configuration.choice import resolve, run_settings
from fedkdx_plugin.configuration.config import Config, from_dict, read_yaml
from fedkdx_plugin.experiments.grid import PARTS, combinations, condition, find, mapping, meets, varied
from fedkdx_plugin.experiments.search import candidates, check_first, check_given
from fedkdx_plugin.experiments.setting import check, check_assumed
from fedkdx_plugin.privacy.client import check_planned
from fedkdx_plugin.privacy.options import NONE
from fedkdx_plugin.results.run_folder import new_folder
from fedkdx_plugin.results.runs import ENVIRONMENT, rounds_done
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from registry import catalog
from registry.errors import UserError
from registry.parameters import check as check_range
from registry.parameters import convert, suggest

if TYPE_CHECKING:
    from fedkdx_plugin.experiments.results import Results

FILE, LOCK = "experiment.yaml", ".lock"
FORMAT = 3  # of the experiment folder
SEARCH = "candidate"  # the axis of a search's candidates
OF_A_RUN = ("algorithm", "set", "seed", "data_seed", "times")  # differ between the runs of one configuration
NO_RESULT = ("out", "raw", "download", "data_root", "backend", "device", "device_id")  # do not change the results


@dataclass(frozen=True)
class PlannedRun:
    """One run to be made: one algorithm with one seed.

    Attributes:
        name: name in messages and plots.
        section: name of its section's folder; '' in a comparison.
        folder: its run folder, relative to the experiment folder.
        settings: its resolved configuration (see `choice.run_settings`).
    """

    name: str
    section: str
    folder: Path
    settings: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        """Planned number of rounds."""
        return int(self.settings["global_rounds"])

    @property
    def config(self) -> Config:
        """Checked configuration of the run."""
        return from_dict(self.settings, "experiment")

    def info(self, parent: Path) -> RunInfo:
        """Return the run as callbacks see it, in the experiment folder `parent`."""
        return RunInfo(self.name, self.name.partition(" seed ")[0], parent / self.folder, self.settings)


@dataclass
class Experiment:
    """Planned runs, all of them checked.

    `comparison`, `grid` and `resumed` plan one; `run` makes its runs.

    Attributes:
        title, about: a line and a paragraph for the report.
        runs: all runs, ordered by seed.
        name: name of the experiment folder.
        out: the folder in which the experiment folder is made.
        source: what the runs are planned from: 'base' and, of a grid, 'grid', 'given', 'only' and perhaps 'search'.
        folder: the experiment folder; None before `make_folder`.
        remark: what the user should know when its runs go on.
    """

    title: str
    about: str
    runs: list[PlannedRun]
    name: str
    out: Path
    source: Mapping[str, Any]
    folder: Path | None = field(default=None)
    remark: str = ""

    @staticmethod
    def comparison(config: Config | Mapping[str, Any]) -> Experiment:
        """Plan a run for each algorithm and seed of a configuration, or of its options by name. Raises UserError."""
        if not isinstance(config, Config):
            config = from_dict(config, "comparison")
        choices = check(config)
        _check_vary(config)
        check_assumed([config])
        model = catalog.find("models", config.model).name
        resolved = resolve(config, choices)
        runs = [
            PlannedRun(
                f"{choice.name} seed {seed}" if config.times > 1 else choice.name,
                "",
                Path(file_name(f"{choice.name}-seed{seed}")),
                run_settings(resolved, choice, seed),
            )
            for seed in range(config.seed, config.seed + config.times)
            for choice in choices
        ]
        data = Path(config.shards.data).stem
        name = file_name(f"{data}-{model}-{_goal(config)}")
        return Experiment(f"{data}, {model}", "", runs, name, Path(config.out), {"base": resolved})

    @staticmethod
    def grid(name: str, given: Mapping[str, Any] | None = None, only: Sequence[str] = ()) -> Experiment:
        """Plan the runs of a grid in a YAML file.

        Args:
            name: name of the experiment, or path of its YAML file (see `find`).
            given: options that replace those of the file, including whole axes of its grid.
            only: conditions `KEY=VALUE,VALUE`; only runs that meet all of them are planned.

        Raises:
            UserError: an unknown experiment, a wrong YAML file, a wrong configuration, or no run meets `only`.
        """
        path = find(name)
        if not (content := read_yaml(path)):
            raise UserError(f"{path}: is empty; write base and grid (docs/guide/experiments.md)")
        for key in content:
            if key not in PARTS:
                raise UserError(
                    f"{path}: unknown key '{key}'{suggest(str(key), PARTS)}; it may hold {', '.join(PARTS)}"
                )
        return _planned_grid(path.stem, str(path), content, given or {}, only)

    @staticmethod
    def resumed(folder: str | Path, rounds: int | str | None = None) -> Experiment:
        """Plan the runs of an experiment folder again, to resume them.

        Args:
            rounds: a new number of rounds in place of the planned one.

        Raises:
            UserError: the folder holds no experiment, or one of another version.
        """
        folder = Path(folder)
        path = folder / FILE
        if not is_folder(folder):
            raise UserError(f"{folder}: no such folder; give that of a comparison or an experiment, such as runs/NAME")
        if not is_file(path):
            older = is_file(folder / "config.yaml") and not is_file(folder / ENVIRONMENT)
            reason = "made by an earlier version, whose runs cannot be resumed" if older else "no experiment there"
            raise UserError(f"{folder}: {reason} (it should hold {FILE}); `fedkdx report` reads its finished runs")
        content = read_experiment(folder)
        if (found := content.get("format")) != FORMAT:
            raise UserError(
                f"{path}: has format {found}, and this version resumes format {FORMAT}; resume it with the version of "
                "fedkdx that made it, or begin anew; `fedkdx report` reads its finished runs"
            )
        base = mapping(path.name, content, "base")
        changed = {} if rounds is None else {"global_rounds": _rounds(rounds)}
        if "grid" in content:
            given = mapping(path.name, content, "given") | changed
            planned = _planned_grid(str(content["name"]), str(path), content, given, content.get("only") or ())
        else:
            planned = Experiment.comparison(from_dict(base | changed, str(path)))
            before, now = base.get("global_rounds"), planned.runs[0].rounds
            if base.get("dp", NONE) != NONE:
                check_planned(int(base["global_rounds"]), now)
            if before != now:
                planned.remark = (
                    f"{now} rounds instead of {before}: what depends on the number of rounds, such as a compression "
                    f"schedule, is computed for {now} from here on, so this is not a run of {now} rounds from the start"
                )
        planned.folder = folder
        return planned

    def run(self, jobs: int | None = None, callbacks: Sequence[Callback] = (), progress: bool = True) -> Results:
        """Make all runs that are not finished; an exception of a run is raised.

        Args:
            jobs: number of runs in parallel, in a process each; 1: a comparison runs in this process. None: see
                `runner.run`.
            callbacks: receive the events of all runs (see `Callback`).
            progress: show the progress on stderr.

        Raises:
            UserError: wrong input; or the engine is `flower`, whose processes only the command line starts.
        """
        if self.runs[0].settings["engine"] != "local":
            raise UserError("engine 'flower': use the command line (fedkdx run --engine flower), or leave engine out")
        from fedkdx_plugin.experiments import runner

        if jobs is not None:
            jobs = convert(jobs, int, "jobs")
            check_range(jobs, {"low": 1}, "jobs")
        if isinstance(callbacks, Callback) or not all(isinstance(callback, Callback) for callback in callbacks or ()):
            raise UserError("callbacks: must be a list of objects whose classes derive from fedkdx.Callback")
        try:
            results = runner.run(self, ["python"], jobs, callbacks or (), progress, strict=True)
        except KeyboardInterrupt:
            if self.folder is not None:
                print(f"stopped; to go on: fedkdx.Experiment.resumed({str(self.folder)!r}).run()", file=sys.stderr)
            raise
        for section in results.sections():
            section.write()
        return results

    @property
    def is_grid(self) -> bool:
        """Whether the experiment has sections; otherwise it is a comparison."""
        return "grid" in self.source

    @property
    def is_search(self) -> bool:
        """True where its runs are candidates of a search (see `experiments.search`)."""
        return "search" in self.source

    def make_folder(self, private: bool = False) -> Path:
        """Make the experiment folder, or find the one to be resumed, and return it.

        Args:
            private: only its owner may look into a new folder of a comparison.

        Raises:
            UserError: it cannot be made.
        """
        if self.folder is None and not self.is_grid:
            self.folder = new_folder(self.out, self.name, private)
        else:
            self.folder = self.folder or self.out / self.name
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unwritable(self.folder, error) from error
        return self.folder

    @contextmanager
    def begun(self, command: Sequence[str]) -> Iterator[None]:
        """Write `experiment.yaml`, and keep other processes from working in the experiment folder during the block.

        Where a block of a resumed experiment ends with a UserError before a run has gone on, the file is put back: a
        new number of rounds is not the experiment's if its runs are refused.

        Args:
            command: the command line.

        Raises:
            UserError: another process works there.
        """
        path = self.place_of(FILE)
        with locked(self.place_of(LOCK)):
            before = path.read_bytes() if is_file(path) else None
            content = self._content(command, read_experiment(path.parent) if before is not None else {})
            done = self._rounds_done() if before is not None and before != content else None
            _sealed(path.parent).write({FILE: content})
            try:
                yield
            except UserError:
                if before is not None and done is not None and done == self._rounds_done():
                    _sealed(path.parent).write({FILE: before})
                raise

    def _content(self, command: Sequence[str], before: Mapping[str, Any]) -> bytes:
        """Return the content of `experiment.yaml`; how and where it began is as `before` says, if it does."""
        began = {"command": list(command), "started_in": str(Path.cwd())}
        began = {key: before.get(key, value) for key, value in began.items()}
        about = {"format": FORMAT, "name": self.name, "title": self.title, "about": self.about}
        return yaml_text(about | began | dict(self.source)).encode()

    def _rounds_done(self) -> list[int]:
        return [rounds_done(self.place(run)) for run in self.runs]

    def place_of(self, name: str) -> Path:
        """Return the path of a file in the experiment folder. Raises RuntimeError before `make_folder`."""
        if self.folder is None:
            raise RuntimeError("the experiment has no folder yet; call make_folder first")
        return self.folder / name

    def place(self, run: PlannedRun) -> Path:
        """Return the run folder of a run. Raises RuntimeError before `make_folder`."""
        return self.place_of(str(run.folder))


def experiment_folder(folder: Path) -> Path | None:
    """Return the experiment folder that a folder is, or is a run folder of; None if there is none."""
    places = (folder, folder.parent, folder.parent.parent) if is_file(folder / ENVIRONMENT) else (folder,)
    return next((place for place in places if is_file(place / FILE)), None)


def read_experiment(folder: Path) -> dict[str, Any]:
    """Return the content of an experiment's file, as it was written. Raises UserError: it is damaged, or was edited."""
    sealed = _sealed(folder)
    if sealed.sealed():
        sealed.read(FILE)
    return read_yaml(folder / FILE)


def _sealed(folder: Path) -> Sealed:
    return Sealed(folder, "its options cannot be changed: put the file of before back, or begin an experiment anew")


def title_and_about(folder: Path) -> tuple[str, str]:
    """Return title and about of an experiment folder, '' of any other folder. Raises UserError: the file is damaged."""
    path = folder / FILE
    if not is_file(path):
        return "", ""
    content = read_experiment(folder)
    for key in ("title", "about"):
        if not isinstance(content.get(key), str):
            raise UserError(f"{path}: '{key}' is missing or no text; correct the file, or remove it")
    return content["title"], content["about"]


def algorithms_of(folder: Path) -> list[str]:
    """Return what the algorithms of a comparison's folder are, in its order; [] of any other folder."""
    content = read_experiment(folder) if is_file(folder / FILE) else {}
    base = content.get("base")
    return [] if "grid" in content or not isinstance(base, Mapping) else list(base.get("algorithm") or ())


def file_name(text: str) -> str:
    """Return a text with characters that are unusual in file names replaced by '-'."""
    return re.sub(r"[^\w.,=+@-]+", "-", text).strip("-")


def _rounds(given: int | str) -> int:
    """Return a new number of rounds. Raises UserError: it is none."""
    rounds: int = convert(given, int, "-gr")
    check_range(rounds, {"low": 1}, "-gr")
    return rounds


def _goal(config: Config) -> str:
    """Return the goal for a folder's name; PFLlib's default, 'test', would be wrong on validation windows."""
    if config.shards.evaluate_on == "test":
        return config.goal
    return "validation" if config.goal == "test" else f"{config.goal}-validation"


def _check_vary(config: Config) -> None:
    """Raise UserError if `--vary data` is given for shards, which cannot be divided again."""
    if config.vary == "data" and shards_folder(config.shards.data):
        raise UserError(
            f"--vary data: {config.shards.data} holds shards, which cannot be divided again; give the data set's name "
            "instead of a folder"
        )


def _planned_grid(
    name: str, where: str, content: Mapping[str, Any], given: Mapping[str, Any], only: Sequence[str]
) -> Experiment:
    """Plan the runs of a grid whose file `where` holds `content`; the other arguments are as of `Experiment.grid`."""
    base, grid, search = (mapping(where, content, part) for part in ("base", "grid", "search"))
    axes = grid | ({SEARCH: candidates(where, search)} if search else {})
    if search:
        check_given(where, search, given)
    conditions = [condition(text) for text in only]
    runs: dict[Path, PlannedRun] = {}
    out = Path()
    named: set[str] = set()  # options that the file or the command line has a value of, in any of the configurations
    configs: list[Config] = []
    for values in combinations(where, base, axes, given):
        config = from_dict(values, where)
        named |= values.keys()
        configs.append(config)
        shared = [one for one in conditions if one[0] not in OF_A_RUN]
        if not all(meets(config.to_dict(), key, allowed) for key, allowed in shared):
            continue  # unchecked: what is given need not go with what is left out, as few rounds with late clients
        if search:
            check_first(where, search, values, config)
        out = Path(config.out)
        for run in _runs(config, values, varied(axes, given)):
            if all(meets(run.settings, key, allowed) for key, allowed in conditions):
                runs.setdefault(run.folder, run)
    check_used(named, *(config.shards for config in configs))
    check_assumed(configs)
    if not runs:
        raise UserError(
            f"{where}: no run meets --only {' '.join(only)}; --dry-run without it lists the runs"
            if only
            else f"{where}: its grid is empty"
        )
    ordered = sorted(runs.values(), key=lambda run: run.settings["seed"])
    source = {"base": base, "grid": grid, "given": dict(given), "only": list(only)}
    source |= {"search": search} if search else {}
    about = str(content.get("about", "")).strip()
    return Experiment(str(content.get("title", name)), about, ordered, name, out, source)


def _runs(config: Config, values: Mapping[str, Any], axes: Sequence[str]) -> Iterator[PlannedRun]:
    """Yield a run for each algorithm and seed of one configuration."""
    choices = check(config)
    _check_vary(config)
    resolved = resolve(config, choices)
    data = Path(config.shards.data).stem
    section = ",".join([data, *(f"{k}={_words(resolved[k])}" for k in axes if values.get(k) is not None)])
    for seed in range(config.seed, config.seed + config.times):
        for choice in choices:
            settings = run_settings(resolved, choice, seed)
            label = f"{choice.name} {config.label}".strip()
            counted = {key: value for key, value in settings.items() if key not in NO_RESULT}
            code = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]
            folder = Path(file_name(section)) / file_name(f"{label}-seed{seed}-{code}")
            name = f"{section}: {label}" + (f" seed {seed}" if config.times > 1 else "")
            yield PlannedRun(name, folder.parts[0], folder, settings)


def _words(value: Any) -> str:
    """Return an option's value as part of a section's name."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
