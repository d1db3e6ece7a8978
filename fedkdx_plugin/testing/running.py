"""Run checks, each in the same surroundings, and say all that failed."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Check = Callable[[Any], None]


class Checks(list[Check]):
    """Checks in the order in which they are declared; an instance is the decorator that declares one.

    A check is a function of what is checked. It raises AssertionError, with a text that says what is wrong and what to
    do; any other exception says that what is checked failed by itself.
    """

    def __call__(self, function: Check) -> Check:
        @functools.wraps(function)
        def check(case: Any) -> None:
            with surroundings():
                function(case)

        self.append(check)
        return check


@contextmanager
def surroundings() -> Iterator[None]:
    """Set one thread and a fixed seed, on which nothing checked may depend, and put back what was there before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def float64() -> Iterator[None]:
    """Make data and networks in float64: 1e-9 is then millions of roundings, and far less than any mistake."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def require(condition: object, text: str) -> None:
    """Raise AssertionError with this text unless the condition holds; unlike `assert`, also under `python -O`."""
    if not condition:
        raise AssertionError(text)


def run_all(name: str, checks: Sequence[Check], case: Any, skip: Mapping[str, str] | None = None) -> None:
    """Run all checks on a case.

    Args:
        name: of what is checked, for the error.
        skip: name of a check -> why it does not apply.

    Raises:
        AssertionError: names what is checked, and every check that failed with its reason.
        ValueError: `skip` names a check that does not exist, or gives no reason.
    """
    skip = skip or {}
    check_reasons(skip, [check.__name__ for check in checks], "check")
    failures = []
    for check in checks:
        if check.__name__ in skip:
            continue
        try:
            check(case)
        except Exception as error:  # whatever a stranger's code raises, the other checks go on
            failures.append(f"  {check.__name__}: {_in_words(error)}")
    if failures:
        raise AssertionError(f"{name} fails {len(failures)} of {len(checks)} checks:\n" + "\n".join(failures))


def check_reasons(reasons: Mapping[str, str], known: Sequence[str], noun: str) -> None:
    """Raise ValueError unless each name is a known one and has a reason."""
    for name, reason in reasons.items():
        if name not in known:
            raise ValueError(f"there is no {noun} '{name}'; known: {', '.join(known) or 'none'}")
        if not (isinstance(reason, str) and reason.strip()):
            raise ValueError(f"{noun} '{name}' is left out without a reason: say why in a few words")


def _in_words(error: Exception) -> str:
    """Say an error in one line: a failed requirement as it is, any other with its type and where it was raised."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and text:
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}, line {last.lineno})"
