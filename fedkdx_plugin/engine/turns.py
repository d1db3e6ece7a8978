"""Work in two turns, as a generator: it yields what others are to do, and goes on with what they answer.

So the same code runs where answers come from a call, and where somebody else's loop carries them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")
Result = TypeVar("Result")


def run(turns: Generator[Asked, Answered, Result], answer: Callable[[Asked], Answered]) -> Result:
    """Run both turns, with the answer of a function between them."""
    return end(turns, answer(next(turns)))


def end(turns: Generator[Asked, Answered, Result], answer: Answered) -> Result:
    """Run the second turn, of a generator that has yielded what it asks. Returns its result."""
    try:
        turns.send(answer)
    except StopIteration as ended:
        result: Result = ended.value
        return result
    raise RuntimeError("there are two turns, but this one asks again")
