"""Identity of what shards are made from, by contents: shards of other contents have another key."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset_utils.files import replacing, sha256
from dataset_utils.recording import Preprocessing, Source
from dataset_utils.spec import LAYOUT, ShardSpec
from registry.errors import UserError

CACHE = "hashes.json"  # in the folder of all data
LARGEST_CACHE = 64 << 20  # bytes; a larger file is not a cache of this project
# A file that changes within this time after being hashed may keep the same time stamps, whose resolution is limited.
TICK, COARSE_TICK = 50_000_000, 2_000_000_000  # ns; the coarse one for file systems that store whole seconds


@dataclass(frozen=True)
class Origin:
    """Everything that shards depend on besides the parameters in `ShardSpec`.

    Attributes:
        description: `Source.description` as JSON values: classes and channels, or the user's whole YAML.
        preprocessing: preprocessing after the changes of the command line.
        files: name (relative to the data set's folder), size in bytes and SHA-256 of every original file.
    """

    description: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    files: list[dict[str, Any]]

    @staticmethod
    def of(source: Source, settings: Preprocessing, path: Path, cache: Path) -> Origin:
        """Return the origin of a data set whose files are in `path`. Raises UserError for an unreadable file."""
        found = sorted(source.files(path))
        hashes = hashed(found, cache)
        folder = path if path.is_dir() else path.parent
        files = [
            {
                "name": file.relative_to(folder).as_posix() if folder in file.parents else file.name,
                "size": file.stat().st_size,
                "sha256": hashes[file],
            }
            for file in found
        ]
        return Origin(plain(source.description()), asdict(settings), files)

    def key(self, spec: ShardSpec, seed: bool = True) -> str:
        """Return the hex SHA-256 of all that the shards depend on; without the seed it is equal for all seeds."""
        values = {name: value for name, value in spec.counted().items() if seed or name != "seed"}
        content = [LAYOUT, values, self.description, self.preprocessing, self.files]
        # keys stay in the given order: the order of the classes numbers them
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Return `value` as JSON values: mappings keep their order, and types that JSON lacks become text."""
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    known = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def hashed(files: Iterable[Path], cache: Path) -> dict[Path, str]:
    """Return the hex SHA-256 of each file.

    A file whose path, size, times and inode are as at the last call is not read again.

    Args:
        files: the files to hash.
        cache: file that stores the hashes; if it is damaged or cannot be written, files are hashed again.

    Raises:
        UserError: a file cannot be read, or changes while it is.
    """
    known, result, changed = _remembered(cache), {}, False
    for file in files:
        try:
            place, seen, now = str(file.resolve()), _stamp(file), time.time_ns()
            if known.get(place, {}).get("stamp") != seen:
                digest = sha256(file)
                if _stamp(file) != seen:
                    raise UserError(f"{file}: changes while it is being read; try again when it is complete")
                known[place], changed = {"stamp": seen, "sha256": digest}, True
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
        result[file] = known[place]["sha256"]
        if now - max(seen[1:3]) < (COARSE_TICK if seen[1] % 1_000_000_000 == 0 else TICK):
            del known[place]
    if changed:
        _remember(cache, known)
    return result


def _stamp(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _remembered(cache: Path) -> dict[str, dict[str, Any]]:
    """Return path -> stamp and hash, of the entries that can be read."""
    try:
        if cache.stat().st_size > LARGEST_CACHE:
            return {}
        values = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {
        place: entry
        for place, entry in values.items()
        if isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and len(entry["sha256"]) == 64
    }


def _remember(cache: Path, known: Mapping[str, Any]) -> None:
    try:
        with replacing(cache) as part:
            part.write_text(json.dumps(known, indent=0), encoding="utf-8")
    except UserError:  # the files are hashed again next time
        return
