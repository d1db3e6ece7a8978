"""Signals that stop a program, and processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # by a user, by clusters and containers, by a closed terminal
LAST = 3  # the signal that ends the program at once
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
WATCH_SECONDS = 1.0


@contextmanager
def stopping_as_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Raise KeyboardInterrupt on the first of `STOPPING` within the block, unless another handler is installed.

    Further ones would cut off what is being saved: the second is answered by a line, the third ends the process.

    Yields:
        A function that returns whether one has come: code that is interrupted may raise an error of its own instead of
        KeyboardInterrupt, as some packages do while they are imported.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [number for name in STOPPING if (number := getattr(signal, name, None))]  # Windows has no SIGHUP
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) in usual}
    stop = _Stop()
    for number in before:
        signal.signal(number, stop)
    try:
        yield lambda: stop.count > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """Signal handler that counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            raise KeyboardInterrupt
        if self.count < LAST:
            os.write(2, b"stopping already, and saving; once more to end without that\n")
        else:
            os._exit(130)


def once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt: a handler for the first signal of its kind, which ignores those that follow."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def end_with(parent: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when the process that started it has ended, however that ended.

    Linux does so by itself; a thread that looks for another parent does so on any system.

    Args:
        parent: id of the process that started this one.
        number: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def ending_with(parent: int, command: Sequence[str]) -> list[str]:
    """Return a command that runs another one, which gets SIGTERM when its parent ends; on Linux, elsewhere as it is."""
    if sys.platform != "linux":
        return list(command)
    program = (
        f"import ctypes, os, sys; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}); "
        f"os.getppid() == {parent} and os.execv(sys.argv[1], sys.argv[1:])"
    )
    return [sys.executable, "-I", "-S", "-c", program, *command]
