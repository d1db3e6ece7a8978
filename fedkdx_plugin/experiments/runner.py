"""Runs of an experiment side by side, a process each; what fails is noted, and the others go on."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import h5py
import torch

from dataset_utils.files import replacing
from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.engine.rounds import RoundRecord
from fedkdx_plugin.experiments.comparison import Setting, prepare_shards, run_device
from fedkdx_plugin.experiments.experiment import Experiment, Job
from fedkdx_plugin.results.records import without_confusion
from fedkdx_plugin.results.run_folder import STATE, write_yaml
from fedkdx_plugin.tracking.progress import Progress, RunProgress
from registry.errors import UserError

FAILED = "failed.txt"  # in a run's folder: why it failed, in one line, and below it where


def rounds_done(place: Path) -> int:
    """How many rounds a run folder holds results of; 0 where there is none, or a damaged one."""
    try:
        with h5py.File(place / "results.h5") as file:
            return len(file["train_loss"])
    except (OSError, KeyError):
        return 0


def show(experiment: Experiment) -> None:
    """Print the runs, and which are done (`--dry-run`)."""
    for job in experiment.jobs:
        print(f"{min(rounds_done(job.place), job.rounds):4}/{job.rounds} {job.name}  {job.place}")


def run(experiment: Experiment, command: list[str], at_once: int | None = None) -> int:
    """Make all runs that are not done, then the report.

    Args:
        at_once: how many runs side by side; None: one a CPU thread, or one on a GPU.

    Returns:
        0; 1 where a run failed; 130 after Ctrl-C, when the same command goes on.
    """
    jobs = [job for job in experiment.jobs if rounds_done(job.place) < job.rounds]
    print(f"{experiment.title}: {len(experiment.jobs)} runs, {len(experiment.jobs) - len(jobs)} of them done")
    try:
        failed = _without_data(jobs)
        jobs = [job for job in jobs if job not in failed]
        rounds: Counter[str] = Counter()
        for job in jobs:
            rounds[job.kind] += job.rounds
        side_by_side = _at_once(jobs, at_once)
        with Progress(rounds, side_by_side) as progress:
            failed += _Pool(command, side_by_side, progress).run(jobs)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    if failed:
        print(f"{len(failed)} of {len(experiment.jobs)} runs failed:", *_reasons(failed), sep="\n  ", file=sys.stderr)
    _report(experiment)
    return 1 if failed else 0


def _report(experiment: Experiment) -> None:
    from fedkdx_plugin.reports import report
    from fedkdx_plugin.results.runs import EXPERIMENT

    folders = [job.place for job in experiment.jobs]
    whole = folders[0].parent.parent
    write_yaml(whole / EXPERIMENT, {"title": experiment.title, "about": experiment.about})
    page = report.write(folders, whole / "report", experiment.title, experiment.about)
    print(f"report: {page}")


def _at_once(jobs: Sequence[Job], asked: int | None) -> int:
    if asked is not None:
        return asked
    on_cpu = all(run_device(from_dict(job.settings, "experiment")).type == "cpu" for job in jobs)
    return max(1, min(torch.get_num_threads(), len(jobs))) if on_cpu else 1


def _without_data(jobs: Sequence[Job]) -> list[Job]:
    """Make the shards that are missing, once for all runs. Returns the runs whose data are not to be had."""
    reasons: dict[Any, str] = {}
    failed = []
    for job in jobs:
        config = from_dict(job.settings, "experiment")
        if config.shards not in reasons:
            try:
                prepare_shards(config)
                reasons[config.shards] = ""
            except UserError as error:
                reasons[config.shards] = str(error)
        if reasons[config.shards]:
            _fail(job, reasons[config.shards])
            failed.append(job)
    return failed


def _fail(job: Job, reason: str, trace: str = "") -> None:
    with replacing(job.place / FAILED) as part:
        part.write_text(f"{' '.join(reason.split())}\n{trace}", encoding="utf-8")


def _reason(job: Job) -> str:
    return (job.place / FAILED).read_text(encoding="utf-8").splitlines()[0]


def _reasons(jobs: Sequence[Job]) -> list[str]:
    """A line for each reason, with the first run it stopped and how many others."""
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        alike.setdefault(_reason(job), []).append(job)
    return [
        f"{same[0].name}{f' and {len(same) - 1} more' if len(same) > 1 else ''}: {reason}"
        for reason, same in alike.items()
    ]


class _Pool:
    """Processes at work on jobs, `at_once` of them at a time."""

    def __init__(self, command: list[str], at_once: int, progress: Progress) -> None:
        self.command, self.at_once, self.progress = command, at_once, progress
        self.threads = max(1, torch.get_num_threads() // at_once)
        self.failed: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """All jobs. Returns those that failed; on KeyboardInterrupt, all runs save what they have."""
        waiting, busy = deque(jobs), {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.at_once:
                    worker = _Worker(waiting.popleft(), self.command, self.threads)
                    busy[worker.connection] = worker
                for connection in wait(list(busy)):
                    if self._heard(busy[connection]):
                        del busy[connection]
        finally:
            for worker in busy.values():
                worker.interrupt()
        return self.failed

    def _heard(self, worker: _Worker) -> bool:
        """Take in what a worker says. Returns whether that was its last word."""
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            kind, content = "failed", (f"its process ended with {_how(worker.process.exitcode)}",)
        if kind == "begin":
            worker.callback = self.progress.begin(worker.job.kind, worker.job.name, worker.job.rounds, content)
            worker.seen = content
        elif kind == "round":
            worker.callback.on_round(content)
            worker.seen = content.round
        else:
            worker.process.join()
            if kind == "failed":
                _fail(worker.job, *content)
                self.failed.append(worker.job)
                self.progress.skip(worker.job.kind, worker.job.rounds - worker.seen)
                self.progress.say(f"failed: {worker.job.name}: {_reason(worker.job)}")
        return kind not in ("begin", "round")


class _Worker:
    """A process that makes one run."""

    def __init__(self, job: Job, command: list[str], threads: int) -> None:
        self.job, self.seen = job, 0
        self.callback: RunProgress | None = None
        self.connection, far = multiprocessing.Pipe(duplex=False)
        self.process = _context().Process(target=_work, args=(job, command, threads, far))
        self.process.start()
        far.close()

    def interrupt(self) -> None:
        """Let it save what it has, and end."""
        self.process.terminate()
        self.process.join()


def _context() -> multiprocessing.context.BaseContext:
    """Fresh processes, since forking this one, which runs threads, is unsafe; where possible, imports are made once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _how(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"


def _work(job: Job, command: list[str], threads: int, connection: Connection) -> None:
    """A worker's life. Ctrl-C reaches it through its parent alone, as SIGTERM, so that it is told once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt, BrokenPipeError):  # the run has saved itself; nobody may be there to hear of it
        try:
            (job.place / FAILED).unlink(missing_ok=True)
            _run(job, command, connection)
            connection.send(("done", None))
        except UserError as error:
            connection.send(("failed", (str(error),)))
        except BrokenPipeError:
            raise
        except Exception as error:
            connection.send(("failed", (f"{type(error).__name__}: {error}", traceback.format_exc())))


def _run(job: Job, command: list[str], connection: Connection) -> None:
    config = from_dict(job.settings, "experiment")
    (choice,) = choose(config)
    setting = Setting.of(config, [choice])
    setting.run(choice, job.settings, job.place, command, partial(_Messenger.begin, connection))
    # Of every client's networks, a grid's worth would fill a disk; the run's config.yaml makes them again.
    (job.place / STATE).unlink(missing_ok=True)


class _Messenger:
    """A callback that tells the parent."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    @classmethod
    def begin(cls, connection: Connection, done: int) -> _Messenger:
        connection.send(("begin", done))
        return cls(connection)

    def on_round(self, record: RoundRecord) -> None:
        self.connection.send(("round", without_confusion(record)))
