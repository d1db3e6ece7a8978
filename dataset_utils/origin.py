"""What shards are made from, told apart by contents: the key that stale shards do not have."""

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
LARGEST_CACHE = 64 << 20  # bytes; nothing that is larger is a cache of ours
# A file changed within this time of being hashed may show the same times afterwards: clocks of file systems tick.
TICK, COARSE_TICK = 50_000_000, 2_000_000_000  # ns; the coarse one is of file systems that keep whole seconds


@dataclass(frozen=True)
class Origin:
    """All that shards depend on besides the parameters in `ShardSpec`.

    Attributes:
        description: what the data set says of itself, plain: its classes and channels, or the user's whole YAML.
        preprocessing: the settings, resolved.
        files: name (relative to where they lie), size in bytes and SHA-256 of every original file.
    """

    description: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    files: list[dict[str, Any]]

    @staticmethod
    def of(source: Source, settings: Preprocessing, path: Path, cache: Path) -> Origin:
        """The origin of a data set whose files lie in `path`. Raises UserError for a file that cannot be read."""
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
        """Hex SHA-256 of everything that makes the shards; without the seed it is the same for every draw."""
        values = {name: value for name, value in spec.counted().items() if seed or name != "seed"}
        content = [LAYOUT, values, self.description, self.preprocessing, self.files]
        # in the order given: that of the classes numbers them
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: mappings keep their order, and what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(name): plain(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    known = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def hashed(files: Iterable[Path], cache: Path) -> dict[Path, str]:
    """Hex SHA-256 of each file; one whose path, size, times and inode are as at the last call is not read again.

    Args:
        cache: file that remembers them; a damaged one, or one that cannot be written, costs time alone.

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
    """Path -> stamp and hash, as far as they can be made out."""
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
    except UserError:  # then it is hashed again next time
        return
