"""Lists of the files that are read, and of those that are not, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dataset_utils.sources.own.description import Description, Marks, Stream
from dataset_utils.sources.own.naming import ending, stem
from dataset_utils.sources.own.reading import READERS, SECOND
from registry.errors import UserError
from registry.text import natural


def files_of(stream: Stream, description: Description, root: Path) -> list[Path]:
    """Return the files of a stream, sorted.

    Without patterns these are all readable files in the folder itself; .txt and the like, which may be notes, only if
    there are no others.

    Raises:
        UserError: there are none, or a recording is there twice.
    """
    if description.folder.is_file():
        return [description.folder]
    if stream.files:
        found = {file for pattern in stream.files for file in root.glob(pattern) if file.is_file()}
        found = {file for file in found if not _is_hidden(file, root) and ending(file) in READERS}
    else:
        found = {file for file in root.iterdir() if file.is_file() and not _is_hidden(file, root)}
        found = {file for file in found if ending(file) in READERS or file.suffix.lower() == ".zip"}
        first = {file for file in found if ending(file) not in SECOND}
        found = first or found
    found = found - set(label_files(description, root)) or found  # a file may hold its own labels
    if not found:
        wanted = " or ".join(repr(p) for p in stream.files) if stream.files else "file that can be read"
        near = (
            "" if stream.files else f" ({', '.join(READERS)}); files in its subfolders are named with files: '**/*.csv'"
        )
        raise UserError(f"{root}: holds no {wanted}{near}")
    files = sorted(found, key=lambda file: natural(file.relative_to(root).as_posix()))
    names: dict[Path, Path] = {}
    for file in files:
        other = names.setdefault(file.parent / stem(file), file)
        if other != file:
            raise UserError(f"{other} and {file.name}: one recording twice? Name the files to read with 'files'")
    return files


def alike(files: Sequence[Path]) -> list[str]:
    """Return the names, without ending, that files in several folders have."""
    folders: dict[str, set[Path]] = {}
    for file in files:
        folders.setdefault(stem(file), set()).add(file.parent)
    return [name for name, own in folders.items() if len(own) > 1]


def ignored(description: Description, root: Path, read: Sequence[Path]) -> dict[str, str]:
    """Return file below `root` that is not read -> reason."""
    if description.folder.is_file():
        return {}
    why: dict[str, str] = {}
    taken = {
        *read,
        *(other for file in read for other in companions(file)),
        *label_files(description, root),
        description.path.resolve(),
    }
    patterns = any(stream.files for stream in description.streams)
    for file in sorted(_below(root, why)):
        if file in taken or file.resolve() == description.path.resolve():
            continue
        name = file.relative_to(root).as_posix()
        if not file.is_file():
            why[name] = "is no regular file"
            continue
        if _is_hidden(file, root):
            why[name] = "hidden"
        elif ending(file) not in READERS:
            why[name] = f"the ending '{file.suffix}' is not supported"
        elif patterns:
            why[name] = "does not fit 'files'"
        elif file.parent != root:
            why[name] = "lies in a subfolder; name it with files: '**/*'"
        else:
            why[name] = "may be notes; name it with 'files' if it is a recording"
    return why


def _below(root: Path, why: dict[str, str]) -> Iterator[Path]:
    """Yield the files below a folder; a folder that cannot be listed becomes an entry of `why`."""

    def barred(error: OSError) -> None:
        why[Path(error.filename).relative_to(root).as_posix()] = f"cannot be read ({error.strerror or error})"

    for folder, _, names in os.walk(root, onerror=barred):
        yield from (Path(folder) / name for name in names)


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def companions(file: Path) -> list[Path]:
    """Return the files that are read with a file: the signals of a WFDB record are beside its header."""
    if ending(file) != ".hea":
        return []
    return sorted(other for other in file.parent.glob(f"{stem(file)}.dat") if other.is_file())


def label_files(description: Description, root: Path) -> list[Path]:
    """Return the files that hold the labels, sorted."""
    if not isinstance(description.label, Marks):
        return []
    pattern = description.label.file.replace("{folder}", "**")  # a folder may lie in others
    for word in ("file", "subject", "session"):
        pattern = pattern.replace(f"{{{word}}}", "*")
    pattern = "/".join(part if part == "**" else part.replace("**", "*") for part in pattern.split("/"))
    return sorted(file for file in root.glob(pattern) if file.is_file())
