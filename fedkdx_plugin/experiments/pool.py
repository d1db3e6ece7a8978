"""Runs in parallel, a process each; a failure is recorded, and the other runs go on."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from dataset_utils.interrupts import STOPPING, end_with, once
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.experiments.setting import Setting
from fedkdx_plugin.results.records import without_confusion
from fedkdx_plugin.tracking.callbacks import Callback, Relay, RunInfo
from registry.blame import PluginError
from registry.errors import UserError
from registry.interface import Round


class RunError(RuntimeError):
    """Failure of a run in its process.

    Attributes:
        trace: traceback in that process; '' if there is none.
    """

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason)
        self.trace = trace


class Pool:
    """Processes that make runs.

    Args:
        command: the command line, for the run folders.
        at_once: number of processes at a time.
        callbacks: receive the events of all runs, in this process.
    """

    def __init__(self, command: list[str], at_once: int, callbacks: Sequence[Callback]) -> None:
        self.command, self.at_once, self.callbacks = command, at_once, callbacks
        self.threads = max(1, torch.get_num_threads() // at_once)
        self.failed: dict[str, BaseException] = {}

    def run(self, runs: Sequence[RunInfo]) -> dict[str, BaseException]:
        """Make all runs, and return name -> error of those that failed; on KeyboardInterrupt, all save their state."""
        waiting = deque(runs)
        _start_server()
        stopped: BaseException = KeyboardInterrupt()
        busy: dict[Connection, _Worker] = {}
        try:
            while waiting or busy:
                while waiting and len(busy) < self.at_once:
                    worker = _Worker(waiting.popleft(), self.command, self.threads)
                    busy[worker.connection] = worker
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    if self._heard(busy[connection]):
                        del busy[connection]
        except BaseException as error:
            stopped = error
            raise
        finally:
            for worker in busy.values():
                worker.interrupt()
            for worker in busy.values():
                self._ended(worker.run, stopped)
        return self.failed

    def _heard(self, worker: _Worker) -> bool:
        """Handle a message of a worker. Returns whether the worker is done."""
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            kind, content = "failed", (RunError, f"its process ended with {_how(worker.process.exitcode)}", "")
        relay = Relay(worker.run, self.callbacks)
        if kind == "begin":
            worker.run = replace(worker.run, done=content)
            for callback in self.callbacks:
                callback.on_run_start(worker.run)
        elif kind == "round":
            relay.on_round_start(content)
        elif kind == "record":
            relay.on_round_end(content)
        else:
            worker.process.join()
            error = failure(kind, content)
            if error is not None:
                self.failed[worker.run.name] = error
            self._ended(worker.run, error)
        return kind in ("done", "failed")

    def _ended(self, run: RunInfo, error: BaseException | None) -> None:
        for callback in self.callbacks:
            callback.on_run_end(run, error)


class _Worker:
    """Process that makes one run."""

    def __init__(self, run: RunInfo, command: list[str], threads: int) -> None:
        self.run = run
        self.connection, far = multiprocessing.Pipe(duplex=False)
        self.process = _context().Process(target=_work, args=(run, command, threads, far))
        self.process.start()
        far.close()

    def interrupt(self) -> None:
        """Make the run save its state and end, and wait for it."""
        self.process.terminate()
        self.process.join()


def _start_server() -> None:
    """Start what starts the workers deaf to Ctrl-C, which reaches workers through this process alone.

    A terminal sends Ctrl-C to every process; one that is still importing would print a traceback.
    """
    context = _context()
    if context.get_start_method() == "forkserver" and threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)


def _context() -> multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext:
    """Return how processes start: not forked, which is unsafe with threads, and with shared imports where possible."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _how(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"


def _work(run: RunInfo, command: list[str], threads: int, connection: Connection) -> None:
    """Make a run in a worker process. Its parent passes on what stops it, as SIGTERM, which also follows its end."""
    for name in STOPPING:
        if number := getattr(signal, name, None):
            signal.signal(number, once if number == signal.SIGTERM else signal.SIG_IGN)
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt, BrokenPipeError):  # the run has saved its state; the parent may have ended
        end_with(os.getppid())
        connection.send(outcome(run, command, [_Messenger(connection)]))


def outcome(run: RunInfo, command: list[str], callbacks: Sequence[Callback]) -> tuple[str, Any]:
    """Make a run in this process, which makes no other one.

    Returns:
        ('done', None), or ('failed', (type, reason, traceback)) for `failure`.

    Raises:
        KeyboardInterrupt: stopped; the run has saved its state.
        BrokenPipeError: what a callback writes to is gone.
    """
    try:
        config = from_dict(run.settings, "experiment")
        Setting.of(config).run(config, command, run, callbacks)
    except PluginError as error:
        return "failed", (RunError, str(error), traceback.format_exc())
    except UserError as error:
        return "failed", (UserError, str(error), "")
    except BrokenPipeError:
        raise
    except Exception as error:
        return "failed", (RunError, f"{type(error).__name__}: {error}", traceback.format_exc())
    return "done", None


def failure(kind: str, content: Any) -> BaseException | None:
    """Return the error that an `outcome` of another process tells of; None if its run is done."""
    if kind == "done":
        return None
    type_, reason, trace = content
    return UserError(reason) if type_ is UserError else RunError(reason, trace)


class _Messenger(Callback):
    """Callback that sends the events to the parent process."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_run_start(self, run: RunInfo) -> None:
        self.connection.send(("begin", run.done))

    def on_round_start(self, run: RunInfo, round: Round) -> None:
        self.connection.send(("round", round))

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        self.connection.send(("record", without_confusion(record)))
