"""Reading files that may hold anything, and writing files so that they are either complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from dataset_utils import limits
from registry.errors import UserError
from registry.text import shown

KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
UNFINISHED = ".fedkdx-part-"  # begins the names of folders that hold files while they are written
# errors of the system itself; of others, parsers raise such on damaged files, too
SYSTEM = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, BlockingIOError, InterruptedError)


@contextmanager
def private_files() -> Iterator[None]:
    """Let only their owner read the files and folders made while this block runs, also those of programs it starts.

    What is there already keeps its permissions.
    """
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def replacing(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends well, and is removed otherwise.

    The block may make a file or a folder there. A file is on the disk before it takes its place, so that a power cut
    leaves the one before or this one; it takes over the permissions of the one before. What processes that were killed
    have left beside it is removed.

    Args:
        path: the file or folder to be written.
        private: a new file is readable by its owner alone.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder, lock = _holder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be the path of a file ({error})") from error
    try:
        part = holder / path.name
        yield part
        if part.is_file():
            before = path.stat().st_mode if path.exists() else None
            if before is not None or private:
                part.chmod(0o600 if before is None else stat.S_IMODE(before))
            _flush(part)
        part.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _holder(parent: Path) -> tuple[Path, int | None]:
    """Make a folder for an unfinished file, and remove those that nobody holds any more.

    Returns:
        The folder, and the lock that tells that it is in use; None where the system has no such lock.
    """
    for left in parent.glob(f"{UNFINISHED}*"):
        if (lock := _lock(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    while True:
        holder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))
        lock = _lock(holder)
        if holder.is_dir():  # another process may have removed it before it was locked
            return holder, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a lock on a folder, to be closed; None where another process has it, or the system has none."""
    try:
        import fcntl

        lock = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk; a system that cannot do so with folders need not."""
    try:
        file = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and a folder may be writable without being readable
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def state_of(path: Path) -> os.stat_result | None:
    """Return the state of a file or folder, or None where there is none.

    Raises:
        UserError: it may be there, but the way to it is barred, or the path is too long or holds a NUL character.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be the path of a file ({error})") from error


def is_file(path: Path) -> bool:
    """Return whether `path` is a regular file. Raises UserError as `state_of` does."""
    state = state_of(path)
    return state is not None and stat.S_ISREG(state.st_mode)


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder. Raises UserError as `state_of` does."""
    state = state_of(path)
    return state is not None and stat.S_ISDIR(state.st_mode)


def check_listable(folder: Path) -> None:
    """Raise UserError where the contents of a folder cannot be listed."""
    try:
        with os.scandir(folder):
            pass
    except OSError as error:
        raise unreadable(folder, error) from error


def check_regular(path: Path) -> int:
    """Return the bytes of a regular file.

    Raises:
        UserError: there is no such file, its folder is barred, or it is a folder, pipe, socket or device, reading
            which may never end.
    """
    state = state_of(path)
    if state is None:
        raise UserError(f"{path}: cannot be read (there is no such file)")
    if not stat.S_ISREG(state.st_mode):
        kind = KINDS.get(stat.S_IFMT(state.st_mode), "a folder")
        raise UserError(f"{path}: is {kind}, not a file; give a file")
    return state.st_size


@contextmanager
def parsing(where: object, what: str, advice: str = "") -> Iterator[None]:
    """Turn every error that reading a damaged file raises in the block into a UserError.

    Libraries that read files raise almost anything on damaged ones; the block should hold their calls only.

    Args:
        where: name of the file.
        what: what it should be, such as '.mat file'.
        advice: what to do about a damaged one.

    Raises:
        UserError: the file cannot be read, is damaged, or is too large or too deeply nested for this machine.
    """
    advice = f"; {advice}" if advice else ""
    try:
        yield
    except UserError:
        raise
    except SYSTEM as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error
    except (MemoryError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read: its contents are too large or nested too deeply{advice}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ENAMETOOLONG, errno.ESTALE, errno.EMFILE):
            raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error
        reason = shown(error, 160) or type(error).__name__
        raise UserError(f"{where}: is no {what}, or a damaged one ({reason}){advice}") from error


def read_yaml(path: Path) -> Any:
    """Return the values of a YAML file.

    Raises:
        UserError: the file cannot be read, is no YAML, is larger than `limits.YAML_BYTES`, or its aliases expand to
            more than `limits.YAML_VALUES` values.
    """
    import yaml

    size = check_regular(path)
    if size > limits.YAML_BYTES:
        raise UserError(f"{path}: has {size} bytes, at most {limits.YAML_BYTES} are read; is it a YAML file?")
    with parsing(path, "YAML"):
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if expanded(node, _parts) > limits.YAML_VALUES:  # before values are made: merged keys expand in it
                raise UserError(f"{path}: holds more than {limits.YAML_VALUES} values, with aliases written out")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()


def expanded(item: Any, parts: Callable[[Any], Iterable[Any]]) -> float:
    """Return how many values there are in `item`, shared ones counted as often as they are referred to.

    Args:
        item: the root.
        parts: gives the values directly in a value, none for a plain one.

    Raises:
        RecursionError: `item` is nested deeply, or holds itself.
    """
    known: dict[int, float] = {}

    def count(own: Any) -> float:
        if id(own) not in known:
            known[id(own)] = 1.0 + sum(count(part) for part in parts(own))  # no int: doubling would make it long
        return known[id(own)]

    return count(item)


def _parts(node: Any) -> Iterable[Any]:
    """Return the nodes in a node of YAML.

    Raises:
        ValueError: a whole number too long for what is done with it; or a key that stands twice in a mapping, of which
            PyYAML would silently take the last.
    """
    value: Any = getattr(node, "value", None)
    if getattr(node, "tag", "").endswith(":int") and len(value) > limits.DIGITS:
        raise ValueError(f"a whole number of {len(value)} digits")
    if not isinstance(value, list):
        return ()
    if not value or not isinstance(value[0], tuple):
        return value
    lines: dict[tuple[str, str], int] = {}
    for key, _ in value:
        if isinstance(key.value, str):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"the key '{key.value}' stands twice, in lines {lines[name]} and {line}; remove one")
            lines[name] = line
    return chain.from_iterable(value)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file as long as the block lasts; the system gives it up when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # pragma: no cover - systems without it have no such lock
        yield
        return
    try:
        file = path.open("a")
    except OSError as error:
        raise unwritable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{path.parent}: another process works in this folder; wait for it, or stop it") from error
        yield


def yaml_text(values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, keeping its order."""
    import yaml

    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def unwritable(path: Path, error: OSError) -> UserError:
    """Return the error for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{shown(path)}: the disk is full; free some space")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        file = next((place for place in (path, *path.parents) if place.is_file()), path)
        return UserError(f"{shown(path)}: cannot be written ({shown(file)} is a file); give another folder")
    return UserError(f"{shown(path)}: cannot be written ({error.strerror or error})")


def unreadable(path: object, error: OSError) -> UserError:
    """Return the error for a read that failed, or a path that cannot be followed: the file, and the system's reason."""
    return UserError(f"{shown(path)}: cannot be read ({error.strerror or error})")


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces. Raises UserError where it is no regular file."""
    check_regular(path)
    with path.open("rb") as file:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()
