"""Runs as jobs of a Slurm cluster, through submitit; a failure is recorded, and the other runs go on.

What a job does, and what it says at its end, is what a process of `pool` does and says. Its rounds are read from its
run folder, on the file system that the nodes share, which a run writes once a minute.
"""

from __future__ import annotations

import importlib.util
import re
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset_utils.files import locked
from dataset_utils.interrupts import once
from fedkdx_plugin.experiments.pool import RunError, failure, outcome
from fedkdx_plugin.results.runs import FAILED, RESULTS, records_so_far, rounds_done
from fedkdx_plugin.tracking.callbacks import Callback, Relay, RunInfo
from registry.errors import UserError
from registry.interface import Round

JOBS, LOCK = "jobs", ".lock"  # folder of the jobs' files, in an experiment's; a lock file of a run folder
LOOK_SECONDS = 2.0  # between two looks at the jobs
SAVING_SECONDS = 120.0  # for jobs that are cancelled to save their state
# options of sbatch by which a run would be made several times, or by which submitit and Cluster find their jobs
OWN = ("array", "error", "nodes", "ntasks", "ntasks_per_node", "open_mode", "output", "signal", "wrap")


def require() -> None:
    """Raise UserError where submitit, an extra, is not installed, or where this machine cannot submit jobs."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--launcher slurm needs submitit: pip install 'fedkdx[slurm]'")
    from submitit import SlurmExecutor

    if SlurmExecutor.affinity() < 0:
        raise UserError("--launcher slurm: there is no 'srun' on this machine; submit from a node of a cluster")


def options(words: Sequence[str]) -> dict[str, str]:
    """Return the options of `sbatch` that words such as 'time=60' say, by name in snake case.

    Raises:
        UserError: a word is not of this form, or names an option twice or one that is not free.
    """
    found: dict[str, str] = {}
    for word in words:
        match = re.fullmatch(r"([a-z][a-z0-9_-]*)=([^\s,][^\n\r\0]*)", word)
        if match is None:
            raise UserError(f"--slurm {word}: is no option of sbatch; write NAME=VALUE, such as time=60")
        name = match[1].replace("-", "_")
        if name in OWN:
            raise UserError(f"--slurm {word}: a run is one job of one process, with files of its own; leave it out")
        if name in found:
            raise UserError(f"--slurm {word}: '{name}' is given twice; leave one out")
        found[name] = match[2]
    return found


class Cluster:
    """Makes runs as jobs of a cluster, each one a job of its own.

    Args:
        command: the command line, for the run folders.
        at_once: number of jobs in the queue at a time.
        callbacks: receive the events of all runs, in this process.
        folder: of the jobs' files; what is left there is of jobs that failed.
        slurm: options of `sbatch` (see `options`).
    """

    def __init__(
        self,
        command: list[str],
        at_once: int,
        callbacks: Sequence[Callback],
        folder: Path,
        slurm: Mapping[str, str],
    ) -> None:
        self.command, self.at_once, self.callbacks = command, at_once, callbacks
        self.folder, self.slurm = folder, slurm
        self.failed: dict[str, BaseException] = {}

    def run(self, runs: Sequence[RunInfo]) -> dict[str, BaseException]:
        """Make all runs, and return name -> error of those that failed; on KeyboardInterrupt, all jobs are cancelled.

        Raises:
            UserError: the cluster refuses a job.
        """
        if not runs:
            return {}
        executor = _executor(self.folder, self.slurm)
        waiting = deque(runs)
        stopped: BaseException = KeyboardInterrupt()
        queued: list[_Job] = []
        try:
            while waiting or queued:
                while waiting and len(queued) < self.at_once:
                    run = waiting.popleft()
                    queued.append(_Job(run, _submitted(executor, run, self.command), self.callbacks))
                time.sleep(LOOK_SECONDS)
                for job in list(queued):
                    if job.is_done():
                        queued.remove(job)
                        if error := job.end():
                            self.failed[job.run.name] = error
        except BaseException as error:
            stopped = error
            raise
        finally:
            _cancel(queued, stopped)
        return self.failed


class _Job:
    """One run in the queue, or on a node, and what was told of it."""

    def __init__(self, run: RunInfo, submitted: Any, callbacks: Sequence[Callback]) -> None:
        self.run, self.submitted, self.callbacks = run, submitted, callbacks
        self.begun, self.told, self.changed = False, rounds_done(run.folder), 0

    def is_done(self) -> bool:
        """Tell the callbacks what is new, and return whether the job has ended."""
        done: bool = self.submitted.done()
        if not self.begun and (done or self.submitted.paths.stdout.exists()):
            self.begun, self.run = True, replace(self.run, done=self.told)
            for callback in self.callbacks:
                callback.on_run_start(self.run)
        if self.begun:
            self._tell()
        return done

    def end(self) -> BaseException | None:
        """Tell the callbacks how the job ended, and return its error. The files of a job without one are removed."""
        error: BaseException | None
        self.changed = 0  # a time that the node's file system has kept from before says nothing
        self._tell()
        try:
            error = failure(*self.submitted.result())
        except Exception as failed:  # submitit's own errors: no result, such as of a job that used too much memory
            logs, reason = self.submitted.paths.stderr, str(failed).strip().partition("\n")[0]
            error = RunError(f"job {self.submitted.job_id} ended without a result ({reason}); its output is in {logs}")
        self.tell_end(error)
        if error is None:
            folder = self.submitted.paths.folder
            for path in (*folder.glob(f"{self.submitted.job_id}_*"), *folder.glob(".submission_file_*")):
                if not path.name.startswith(".") or not path.exists():  # a link to what has been removed
                    path.unlink(missing_ok=True)
        return error

    def tell_end(self, error: BaseException | None) -> None:
        """Tell the callbacks that the run is over."""
        for callback in self.callbacks:
            callback.on_run_end(self.run, error)

    def _tell(self) -> None:
        """Tell the callbacks of the rounds since the last look, if the run has written any."""
        with suppress(OSError, UserError):  # not there yet, or being written; what stays so is told when runs are read
            changed = (self.run.folder / RESULTS).stat().st_mtime_ns
            if changed == self.changed:
                return
            records = records_so_far(self.run.folder)
            self.changed = changed
            relay = Relay(self.run, self.callbacks)
            for record in records[self.told :]:
                self.told = record.round
                relay.on_round_start(Round(record.round, self.run.rounds))
                relay.on_round_end(record)


def _cancel(jobs: Sequence[_Job], stopped: BaseException) -> None:
    """Cancel jobs, and wait for the state of those that have begun."""
    for job in jobs:
        job.submitted.cancel(check=False)
    until = time.monotonic() + SAVING_SECONDS
    for job in jobs:
        while job.begun and not job.submitted.paths.result_pickle.exists() and time.monotonic() < until:
            time.sleep(min(LOOK_SECONDS, 0.5))
        job.tell_end(stopped)


def _executor(folder: Path, slurm: Mapping[str, str]) -> Any:
    """Return what submits jobs."""
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder)
    # as additional parameters, options have the names, the values and the checks of sbatch; submitit's own default of
    # five minutes would end every run
    executor.update_parameters(job_name="fedkdx", time=None, additional_parameters=dict(slurm))
    if cpus := slurm.get("cpus_per_task"):  # since Slurm 22.05, srun no longer takes it over from sbatch
        executor.update_parameters(srun_args=[f"--cpus-per-task={cpus}"])
    return executor


def _submitted(executor: Any, run: RunInfo, command: list[str]) -> Any:
    """Submit a run. Raises UserError: the cluster refuses the job."""
    from submitit.core.utils import FailedJobError

    try:
        return executor.submit(_work, run, command)
    except (FailedJobError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--launcher slurm: the job of {run.name} was refused: {reason}") from error


def _work(run: RunInfo, command: list[str]) -> tuple[str, Any]:
    """Make a run in a job, and return its outcome.

    The lock keeps a job that was left in the queue from working in the folder together with one submitted again.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):  # cancelled or preempted; its time is almost up
        signal.signal(number, once)
    try:
        run.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(run.folder / LOCK):
            (run.folder / FAILED).unlink(missing_ok=True)
            return outcome(run, command, []) if rounds_done(run.folder) < run.rounds else ("done", None)
    except UserError as error:
        return "failed", (UserError, str(error), "")
    except KeyboardInterrupt:
        reason = "stopped by the cluster, its state saved; the same command goes on with it"
        return "failed", (RunError, reason, "")
