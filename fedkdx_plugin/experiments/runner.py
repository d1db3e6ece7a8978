"""Execution of experiments: data prepared, runs made in this process or in parallel, tables and report written."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from dataset_utils.counts import many
from dataset_utils.files import replacing
from dataset_utils.sealed import Sealed
from dataset_utils.shards import ShardSet
from dataset_utils.spec import shards_folder
from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.configuration.config import Config, read_yaml
from fedkdx_plugin.experiments.cluster import JOBS, Cluster
from fedkdx_plugin.experiments.experiment import FILE, NO_RESULT, Experiment, PlannedRun, file_name
from fedkdx_plugin.experiments.hints import hints
from fedkdx_plugin.experiments.pool import Pool, RunError
from fedkdx_plugin.experiments.results import Results, with_reasons
from fedkdx_plugin.experiments.setting import Setting, check_on, groups_of, prepare_shards, run_device, without_student
from fedkdx_plugin.results.runs import (
    CONFIG,
    FAILED,
    GIVEN_ANEW,
    STATE,
    Run,
    again,
    differs,
    has_traceback,
    nothing_accepted,
    read,
    read_config,
    rounds_done,
)
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from fedkdx_plugin.tracking.progress import Progress
from registry import catalog
from registry.blame import is_expected
from registry.errors import UserError


def run(
    experiment: Experiment,
    command: Sequence[str],
    at_once: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    strict: bool = False,
    slurm: Mapping[str, str] | None = None,
) -> Results:
    """Make all runs that are not finished, and read the results.

    Args:
        command: the command line, for the run folders.
        at_once: number of runs in parallel; 1: a comparison runs in this process. None: 1 for a comparison; for a
            grid, one for each CPU thread, or 1 on a GPU.
        callbacks: receive the events of every run.
        progress: show the progress on stderr.
        strict: raise the exception of a run; otherwise it is recorded in the run folder, and the other runs go on.
        slurm: options of `sbatch` for every run, which is a job of a cluster then (see `cluster.Cluster`); `at_once`
            jobs in the queue at a time, all of them by default. None: the runs are made on this machine.

    Returns:
        The finished runs, and the missing ones with the reason.

    Raises:
        UserError: wrong input, found before the first round, or no run could be made.
        KeyboardInterrupt: stopped by the user; all runs have saved their state.
    """
    check_rounds(experiment)
    data, failed = prepare(experiment)
    begins = experiment.folder is None and not experiment.is_grid
    folder = experiment.make_folder()
    try:
        with experiment.begun(command):
            _make(experiment, list(command), data, failed, at_once, callbacks, progress, strict, slurm)
    except UserError as error:
        if begins and any(rounds_done(experiment.place(planned)) for planned in experiment.runs):
            print(f"to go on: fedkdx resume {folder}", file=sys.stderr)
        elif begins and is_expected(error):  # nothing has been run, and the error says why
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return Results.of(experiment)


def _make(
    experiment: Experiment,
    command: list[str],
    data: str,
    failed: dict[Path, str],
    at_once: int | None,
    callbacks: Sequence[Callback],
    progress: bool,
    strict: bool,
    slurm: Mapping[str, str] | None,
) -> None:
    """Make the runs of an experiment whose folder nobody else works in; see `run`."""
    folder = experiment.place_of("")
    if progress:
        _say(experiment, folder, data, "jobs of Slurm" if slurm is not None else None)
    for path, reason in failed.items():
        _note(folder / path, reason, "")
    ahead = [p for p in experiment.runs if p.folder not in failed and rounds_done(folder / p.folder) < p.rounds]
    for planned in experiment.runs:
        if planned not in ahead and planned.folder not in failed:  # it has ended well, whatever failed in between
            (folder / planned.folder / FAILED).unlink(missing_ok=True)
    rounds: Counter[str] = Counter()
    for planned in ahead:
        rounds[planned.info(folder).kind] += planned.rounds
    side_by_side = (at_once or max(1, len(ahead))) if slurm is not None else _at_once(experiment, ahead, at_once)
    bar = Progress(rounds, side_by_side) if progress else None
    with bar or nullcontext():
        told = [*([bar] if bar else []), *callbacks, _Folders(experiment.is_grid)]
        if side_by_side == 1 and not experiment.is_grid and slurm is None:
            _run_here(folder, ahead, command, told, strict)
        else:
            _check_session(ahead)
            infos = [planned.info(folder) for planned in ahead]
            if slurm is None:
                failures = Pool(command, side_by_side, told).run(infos)
            else:
                failures = Cluster(command, side_by_side, told, folder / JOBS, slurm).run(infos)
            if strict and failures:
                raise next(iter(failures.values()))


def show(experiment: Experiment) -> None:
    """Print each run of a grid with its number of finished rounds (`--dry-run`), or why it cannot be made.

    What depends on data is checked where these are shards, which nothing has to be made of.

    Raises:
        UserError: no run can be made.
    """
    folder = experiment.folder or experiment.out / experiment.name
    given = all(shards_folder(planned.settings["data"]) is not None for planned in experiment.runs)
    failed = prepare(experiment)[1] if given else {}
    for planned in experiment.runs:
        place = folder / planned.folder
        where = f"cannot be made: {failed[planned.folder]}" if planned.folder in failed else str(place)
        print(f"{min(rounds_done(place), planned.rounds):4}/{planned.rounds} {planned.name}  {where}")


@contextmanager
def where_it_began(folder: Path | None) -> Iterator[None]:
    """Change to the folder in which an experiment was started, if it is known and exists; change back at the end."""
    here = Path.cwd()
    if folder is not None:
        with suppress(OSError, KeyError, TypeError, UserError):
            os.chdir(read_yaml(folder / FILE)["started_in"])
    try:
        yield
    finally:
        os.chdir(here)


def prepare(experiment: Experiment) -> tuple[str, dict[Path, str]]:
    """Make missing shards, once for all runs, and check models and algorithms on them.

    Returns:
        A line about the data of a comparison, '' for a grid; and run folder -> why the run cannot be made.

    Raises:
        UserError: no run can be made, or one of a comparison cannot.
    """
    shards: dict[Any, ShardSet | str] = {}
    failed: dict[Path, str] = {}
    idle: dict[str, str | None] = {}
    for planned in experiment.runs:
        config = planned.config
        if config.shards not in shards:
            try:
                shards[config.shards] = prepare_shards(config)
            except UserError as error:
                shards[config.shards] = str(error)
        found = shards[config.shards]
        try:
            if isinstance(found, str):
                raise UserError(found)
            check_on(found, config, choose(config))
            idle |= dict.fromkeys(without_student(found, config, choose(config)), config.student_model)
        except UserError as error:
            failed[planned.folder] = str(error)
    if len(failed) == len(experiment.runs) or (failed and not experiment.is_grid):
        raise UserError(next(iter(failed.values())))
    if idle:
        models = ", ".join(dict.fromkeys(filter(None, idle.values())))
        have = "has" if len(idle) == 1 else "have"
        print(f"-sm {models}: ignored by {', '.join(idle)}, which {have} no student model", file=sys.stderr)
    if experiment.is_grid:
        return "", failed
    first = next(own for own in shards.values() if isinstance(own, ShardSet))
    if experiment.folder is None:
        _name(experiment, first)
    return _described(first, experiment.runs[0].config), failed


def _described(shards: ShardSet, config: Config) -> str:
    """Return a line about the data; the clients set apart are the same for all runs with the same seed."""
    groups = groups_of(config, shards.num_clients)
    apart = "".join(f", {len(ids)} of them {name}" for name, ids in groups.items())
    if others := shards.manifest.get("left_out"):
        apart += f" ({many(len(others), 'more subject')} left out by -nc)"
    train, test = (sum(len(shard.y) for shard in part) for part in (shards.train, shards.test))
    return (
        f"{shards.num_clients} clients{apart}, {train} training and {test} {shards.evaluated_on} windows, "
        f"{shards.num_classes} classes"
    )


def _name(experiment: Experiment, shards: ShardSet) -> None:
    """Name a comparison after its data set instead of after the path given for it."""
    stem = Path(experiment.runs[0].config.shards.data).stem
    experiment.name = file_name(f"{shards.name}-{experiment.name.removeprefix(file_name(stem)).lstrip('-')}")
    experiment.title = f"{shards.name}, {experiment.title.partition(', ')[2]}"


def check_rounds(experiment: Experiment) -> None:
    """Raise UserError if a run has more rounds than planned, or its folder is damaged or holds another run."""
    for planned in experiment.runs if experiment.folder else ():
        place = experiment.place(planned)
        done = rounds_done(place)
        if done > planned.rounds:
            raise UserError(f"{planned.name}: has {done} rounds already; -gr {planned.rounds} would be fewer")
        if done and (difference := differs(read_config(place), planned.settings, (*NO_RESULT, *GIVEN_ANEW))):
            raise UserError(
                f"{place / CONFIG}: of another run than {planned.name} ({difference}); put the right folder back, or "
                f"{again(place)}"
            )


def _say(experiment: Experiment, folder: Path, data: str, where: str | None) -> None:
    """Print a line about the runs that begin, and `where` they are made; None for the device of this machine."""
    done = sum(rounds_done(experiment.place(planned)) >= planned.rounds for planned in experiment.runs)
    count = len(experiment.runs)
    runs = f"{count} run{'s' if count != 1 else ''}" + (f", {done} of them done" if done else "")
    if experiment.remark:
        print(experiment.remark)
    parts = [data, runs, where or str(run_device(experiment.runs[0].config)), f"results in {folder}"]
    print(f"{experiment.title}: {'; '.join(filter(None, parts))}", flush=True)


def _at_once(experiment: Experiment, runs: Sequence[PlannedRun], asked: int | None) -> int:
    """Return the number of runs in parallel (see `run`)."""
    if asked is not None:
        return asked
    if not experiment.is_grid or not all(run_device(planned.config).type == "cpu" for planned in runs):
        return 1
    return max(1, min(torch.get_num_threads(), len(runs)))


def _check_session(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError if a run needs a class that was defined in this process, since it is made in another one."""
    for planned in runs:
        config = planned.config
        names = [("algorithms", config.algorithm[0]), ("models", config.model), ("datasets", config.shards.data)]
        for kind, name in names:
            if any(entry.name == name and entry.origin == catalog.SESSION for entry in catalog.entries(kind)):
                raise UserError(
                    f"'{name}' is known to this process alone, so that its runs cannot be made in others; make one run "
                    "at a time (jobs=1), or put the class into a file and name it as path/to/file.py:Class"
                )


def _run_here(
    folder: Path, runs: Sequence[PlannedRun], command: list[str], callbacks: Sequence[Callback], strict: bool
) -> None:
    """Make runs one after the other in this process; data are loaded once for runs of the same setting."""
    setting: Setting | None = None
    for planned in runs:
        config, info = planned.config, planned.info(folder)
        error: BaseException | None = None
        try:
            if setting is None or not setting.fits(config):
                setting = None  # frees the memory before more is used
                setting = Setting.of(config)
            setting.run(config, command, info, callbacks)
        except BaseException as caught:
            error = caught
            if strict or is_expected(caught) or isinstance(caught, KeyboardInterrupt):
                raise
        finally:
            for callback in callbacks:
                callback.on_run_end(info, error)


class _Folders(Callback):
    """Callback that records failures in the run folders and removes what a grid does not keep."""

    def __init__(self, of_grid: bool) -> None:
        self.of_grid = of_grid

    def on_run_start(self, run: RunInfo) -> None:
        """Remove the record of an earlier failure."""
        (run.folder / FAILED).unlink(missing_ok=True)

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Record why a run failed. The state of a finished run of a grid is removed: that of all would fill a disk.

        A finished run of a comparison that is refused more rounds stays finished; the error ends the comparison.
        """
        if error is None:
            if self.of_grid:
                Sealed(run.folder, again(run.folder)).remove(STATE)
        elif is_expected(error) and not self.of_grid and _has_finished(run.folder):
            return
        elif isinstance(error, RunError):
            _note(run.folder, str(error), error.trace)
        elif not isinstance(error, KeyboardInterrupt):
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            trace = "" if is_expected(error) else "".join(traceback.format_exception(error))
            _note(run.folder, reason, trace)


def _has_finished(folder: Path) -> bool:
    """Return whether a run folder holds the results of all rounds that its own configuration plans."""
    try:
        return isinstance(read(folder), Run)
    except UserError:
        return False


def _note(folder: Path, reason: str, trace: str) -> None:
    """Write the reason of a failure, and its traceback, into a run folder."""
    with suppress(UserError), replacing(folder / FAILED) as part:  # a full disk is named by the reason already
        part.write_text(f"{' '.join(reason.split())}\n{trace}", encoding="utf-8")


def finish(results: Results) -> int:
    """Print and save tables, plots and, for a grid, the report.

    Returns:
        The exit code: 1 if runs are missing, or made without any reply that was accepted; 2 if all are.
    """
    for section in results.sections():
        if section.runs:
            heading = f"{section.folder.name}\n\n" if results.is_grid else ""
            print(f"\n{heading}{section.write()}")
    for hint in [] if results.is_grid else hints(results.runs):
        print(f"hint: {hint}")
    missing = [(missing.name, missing.reason) for missing in results.missing]
    _tell(missing, f"{len(missing)} of {results.count} runs are missing")
    if any(has_traceback(one.folder) for one in results.missing):
        print(f"  the traceback of a run that failed is in {FAILED} in its folder", file=sys.stderr)
    idle = [(run.folder.name, reason) for run in results.runs if (reason := nothing_accepted(run))]
    _tell(idle, f"{len(idle)} of {results.count} runs accepted no reply in any round, so that nothing was learned")
    if results.is_grid and importlib.util.find_spec("jinja2") and importlib.util.find_spec("matplotlib"):
        print(f"report: {results.report()}")
    print(f"saved in {results.folder}")
    wrong = len(missing) + len(idle)
    return (1 if wrong < results.count else 2) if wrong else 0


def _tell(runs: Sequence[tuple[str, str]], what: str) -> None:
    """Print names of runs with their reasons, those with the same reason in one line; nothing where there are none."""
    if runs:
        print(f"{what}:", file=sys.stderr)
    for line in with_reasons(runs):
        print(f"  {line}", file=sys.stderr)
