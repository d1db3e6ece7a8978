"""Errors of algorithms, models and data sets of other packages: whose they are, in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from registry import catalog
from registry.errors import UserError
from registry.text import shown


class PluginError(UserError, RuntimeError):
    """A failure in a class of another package; the text names package, class, method and error."""


def is_expected(error: BaseException | None) -> bool:
    """Return whether an error is the user's, whose text says all, rather than a failure of code."""
    return isinstance(error, UserError) and not isinstance(error, PluginError)


@contextmanager
def naming(*classes: object) -> Iterator[None]:
    """Turn an error out of a class of another package, or of this session, into a PluginError.

    Args:
        classes: what the block works with; the first of them that is not built in is named where the error arose in
            code of ours.

    Raises:
        PluginError: see above; any other error passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of a plug-in that ends the program
        reason = blamed(error)
        if not reason and (foreign := next((one for one in classes if catalog.origin_of(one)), None)):
            reason = f"{place(foreign)}: {_text(error)}"
        if not reason:
            raise
        raise PluginError(reason) from error


def blamed(error: BaseException) -> str:
    """Return package or file, class, method and line of the plug-in in which an error arose, and the error; or ''."""
    cause: BaseException | None = error
    found = ""
    while cause is not None:
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        own = [frame for frame in frames if catalog.origin_of_module(frame.f_globals.get("__name__", ""))]
        if own:
            lines = [line for frame, line in traceback.walk_tb(cause.__traceback__) if frame is own[-1]]
            file = Path(own[-1].f_code.co_filename).name
            origin = catalog.origin_of_module(own[0].f_globals["__name__"])
            text = _text(error) if error.__cause__ is None else shown(error)
            found = f"{origin}: {_method(own[0])}: {text} ({file}, line {lines[-1]})"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return found


def wrong(owner: object, method: str, wanted: str, found: object) -> PluginError:
    """Return the error for a method that returned something else than its interface says.

    Args:
        owner: the object, or the class, whose method it is.
        wanted: what it should return.
        found: what it returned.
    """
    what = f"{type(found).__name__} {shown(repr(found), 60)}"
    return PluginError(f"{place(owner)}.{method} must return {wanted}, not {what}")


def place(owner: object) -> str:
    """Return the package, or file, and the name of a class, or of an object's class."""
    kind = owner if isinstance(owner, type) else type(owner)
    origin = catalog.origin_of(kind)
    return f"{origin}: {kind.__qualname__}" if origin else kind.__qualname__


def _method(frame: FrameType) -> str:
    """Return class and method of a frame; the function alone where it has no `self` or `cls`."""
    first = frame.f_locals.get("self", frame.f_locals.get("cls"))
    name = frame.f_code.co_name
    if first is None:
        return name
    return f"{(first if isinstance(first, type) else type(first)).__qualname__}.{name}"


def _text(error: BaseException) -> str:
    return shown(f"{type(error).__name__}: {error}")
