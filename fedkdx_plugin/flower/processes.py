"""Start Flower's programs as processes, leave none of them behind, and read what they print."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import psutil

from dataset_utils.files import private_files
from dataset_utils.interrupts import ending_with
from registry.errors import UserError

MARK = "FEDKDX_FEDERATION"  # in the environment of all that is started, and of what that starts
COLOUR = re.compile(r"\x1b\[\d*m")
GRACE_SECONDS = 5.0  # to end by itself, before it is killed
# Flower counts uses, looks for updates and installs an app's dependencies unless told not to
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "PYTHONUNBUFFERED": "1",
}


class _Started(NamedTuple):
    """A program that was started, by its name, and its log."""

    process: subprocess.Popen[bytes]
    name: str
    log: Path


class Processes:
    """Start programs that end with this block: after success, failure, Ctrl-C, SIGTERM, or a closed terminal.

    Flower's programs start others, some in sessions of their own, so all of them are found by a mark in their
    environment. All files that are made meanwhile, here and by them, can be read by their owner alone.
    """

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)
        self._private = private_files()
        self._started: list[_Started] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Processes:
        self._private.__enter__()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` means it
                self._handlers[number] = signal.signal(number, interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in self._handlers:  # a second Ctrl-C must not stop the cleaning up
            signal.signal(number, signal.SIG_IGN)
        try:
            self.stop()
        finally:
            self._private.__exit__(kind, error, trace)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def start(
        self, command: Sequence[str], home: Path, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program; what it prints is appended to `log`.

        Args:
            command: see `flower` for Flower's own.
            home: where Flower keeps what it installs and knows, for this process alone.
            env: more of its environment.
        """
        with log.open("ab") as out:
            process = subprocess.Popen(
                ending_with(os.getpid(), command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(home) | {MARK: self.mark} | dict(env or {}),
                start_new_session=True,  # Ctrl-C is ours to hear
            )
        self._started.append(_Started(process, Path(command[0]).name, log))
        return process

    def check(self) -> None:
        """Raise UserError where one of them has ended."""
        for process, name, log in self._started:
            if process.poll() is not None:
                raise UserError(
                    f"{name} ended with code {process.returncode}: {last_words(log)}; its whole log is {log}"
                )

    def stop(self) -> None:
        """End all programs and all that they started, by force where they do not end by themselves."""
        for process, _, _ in self._started:
            if process.poll() is None:
                process.terminate()
        psutil.wait_procs(self.running(), GRACE_SECONDS)
        while left := self.running():
            for process in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, GRACE_SECONDS)
        for process, _, _ in self._started:
            process.wait()

    def running(self) -> list[psutil.Process]:
        """Return all processes of this federation on this machine."""
        return [process for process in psutil.process_iter() if _mark(process) == self.mark]


class Tail:
    """Read the lines that another process adds to a log from now on.

    Args:
        path: the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """Return the whole lines that were added since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._seen)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._seen += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's programs: quiet, and with this installation's programs first in PATH."""
    bin = Path(sys.executable).parent
    path = os.pathsep.join([str(bin), os.environ.get("PATH", "")])
    return dict(os.environ) | QUIET | {"FLWR_HOME": str(home.absolute()), "PATH": path}


def run_flower(program: str, arguments: Sequence[str], home: Path) -> str:
    """Run one of Flower's programs to its end; return what it printed. Raises UserError where it failed."""
    result = subprocess.run(
        [flower(program), *arguments], env=environment(home), capture_output=True, text=True, check=False
    )
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise UserError(f"{program} {arguments[0]} failed: {' '.join(said[-3:])}")
    return result.stdout


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(host: str, port: int, processes: Processes, seconds: float = 60.0) -> None:
    """Wait until a program listens there. Raises UserError after so many seconds, or when a process has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        processes.check()
        try:
            socket.create_connection((host, port), 1.0).close()
            return
        except OSError:
            time.sleep(0.2)
    raise UserError(f"{host}:{port}: no program listens there after {seconds:.0f} s; is this machine overloaded?")


def check_free(host: str, port: int) -> None:
    """Raise UserError where a port cannot be listened on."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"{host}:{port}: cannot be listened on ({error.strerror}); choose another --port") from error


def last_words(log: Path) -> str:
    """Return the last line in a log that names an error, or else the last line that is not empty."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return COLOUR.sub("", (errors or lines or ["its log is empty"])[-1])


def flower(name: str) -> str:
    """Return the path of one of Flower's programs. Raises UserError where it is not installed."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise UserError(f"{path}: missing; install Flower anew: pip install 'fedkdx[flower]'")
    return str(path)


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK) if process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, OSError):
        return None


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, as a handler of signals that end a program."""
    raise KeyboardInterrupt


def say(client: int, text: str) -> None:
    """Print a line for the operator of a site."""
    print(f"fedkdx site {client}: {text}", file=sys.stderr, flush=True)
