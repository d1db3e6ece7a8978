"""`fedkdx data init` drafts the description of the recordings in a folder, and reads some of them by it."""

from __future__ import annotations

import dataclasses
import glob
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dataset_utils.consoles import safe_output
from dataset_utils.counts import many
from dataset_utils.draft.drafting import Draft, draft
from dataset_utils.draft.folder import spread
from dataset_utils.draft.writing import missing, text_of, told
from dataset_utils.files import replacing, yaml_text
from registry.errors import UserError
from registry.flags import Parser
from registry.text import in_one_line, shown

CHECKED, CHECKED_BYTES = 40, 16 << 20
"""Most files, and most bytes of them, that are read by a draft to check it."""


def write(folder: Path, path: Path, overwrite: bool = False) -> Draft:
    """Draft the description of the recordings in `folder`, and write it to `path`.

    Raises:
        UserError: nothing can be drafted, the file is there and `overwrite` is not set, or it cannot be written.
    """
    _check_free(path, overwrite)
    found = draft(folder)
    with replacing(path) as part:
        part.write_text(text_of(_placed(found, path), path), encoding="utf-8")
        _check_free(path, overwrite)
    return found


def check(found: Draft) -> tuple[str, list[str], list[str]]:
    """Read some of the recordings by a draft.

    Returns:
        which files were read, in words; what `describe` says; errors.
    """
    from dataset_utils.describe import described
    from dataset_utils.spec import ShardSpec

    files = list(found.files)
    streams = "streams" in found.values
    if sum(file.stat().st_size for file in files) > CHECKED_BYTES or len(files) > CHECKED:
        if streams:
            return "", [], []  # some files of each sensor would have to be those of the same subjects
        files = [file for file in spread(files, CHECKED) if file.stat().st_size <= CHECKED_BYTES]
        while sum(file.stat().st_size for file in files) > CHECKED_BYTES:
            files = spread(files, len(files) // 2)
    if not files:
        return "", [], []
    values = found.values | {"folder": str(found.folder.resolve())}
    if len(files) < len(found.files):
        values["files"] = [glob.escape(file.relative_to(found.folder).as_posix()) for file in files]
    which = many(len(files), "file") if len(files) == len(found.files) else f"{len(files)} of {len(found.files)} files"
    with tempfile.TemporaryDirectory() as holder:
        path = Path(holder, "draft.yaml")
        path.write_text(yaml_text(values), encoding="utf-8")
        try:
            lines, errors = described(ShardSpec(data=str(path)), Path(holder), None, False)
        except UserError as error:
            lines, errors = [], [str(error)]
        return which, lines, [error.replace(str(path), "the draft") for error in errors]


def _placed(found: Draft, path: Path) -> Draft:
    """Return a draft whose folder is given relative to the file, where one way leads from there."""
    folder = found.folder.resolve()
    try:
        inside = os.path.relpath(folder, path.parent.resolve())
    except ValueError:  # on another drive
        inside = str(folder)
    entries = [
        dataclasses.replace(entry, value=Path(inside).as_posix()) if entry.key == "folder" else entry
        for entry in found.entries
    ]
    return dataclasses.replace(found, entries=tuple(entries))


def _check_free(path: Path, overwrite: bool) -> None:
    if path.suffix not in (".yaml", ".yml") and not path.is_dir():
        raise UserError(f"{path}: a description's name ends in .yaml; name another file with -o")
    if os.path.lexists(path) and (not overwrite or path.is_dir()):
        hint = "is a folder; name a file with -o" if path.is_dir() else "is there already; --overwrite, or another -o"
        raise UserError(f"{shown(path)}: {hint}")


def main(argv: Sequence[str] | None = None, prog: str = "python -m dataset_utils.draft.command") -> int:
    """Run the command line; return 0 where a draft was written, 2 for wrong input, 130 when interrupted."""
    safe_output()
    parser = Parser(
        prog=prog,
        description="Draft the YAML description of your own recordings from their files.",
        epilog="says what was found, guessed and left to you, and reads some of the files by the draft",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of the recordings")
    parser.add_argument(
        "-o", "--output", metavar="YAML", help="file to write (default: the folder's name and .yaml, here)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file where it is there")
    try:
        arguments = parser.parse_args(argv)
        folder = Path(arguments.folder)
        path = Path(arguments.output or f"{folder.resolve().name or 'recordings'}.yaml")
        if not str(folder.absolute()).isprintable():
            raise UserError(f"{shown(folder)}: the folder's path has characters that cannot be shown; rename it")
        found = write(folder, path, arguments.overwrite)
        _tell(found, path)
    except UserError as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _tell(found: Draft, path: Path) -> None:
    for line in told(found):
        print(in_one_line(line))
    print(f"written: {shown(path)}", flush=True)
    todo = missing(found)
    if todo:
        print(f"next: replace ??? of {', '.join(todo)} in {shown(path)}, then fedkdx data describe {_word(path)}")
        return
    which, lines, errors = check(found)
    if not which:
        print("not checked: the files are too large or too many to be read at once here")
    else:
        print(f"read by this draft, {which}:")
    for line in lines:
        print(f"  {in_one_line(line)}")
    for line in errors:
        print(f"  error: {in_one_line(line)}")
    print(f"next: {'correct it, then ' if errors else ''}fedkdx data describe {_word(path)}")


def _word(path: Path) -> str:
    import shlex

    return shlex.quote(in_one_line(path))


if __name__ == "__main__":
    sys.exit(main())
