"""Check a data set's source, whosever it is, from its original files to shards that can be trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils import generate, preprocessing, shards
from dataset_utils.recording import Preprocessing, Recording, Source, Windows
from dataset_utils.spec import ShardSpec
from fedkdx_plugin.testing.running import Check, Checks, require, run_all
from registry.text import is_plain_name

CHECKS = Checks()


@dataclass(frozen=True)
class SourceCase:
    """A data set to check.

    Attributes:
        make: makes the source: its class, or a function without arguments.
        raw: the original files; None for the data set's usual place.
        data_root: the folder of all data, below which the usual place may lie.
        options: fields of `dataset_utils.spec.ShardSpec` for making shards, where the defaults do not suit.
    """

    make: Callable[[], Source]
    raw: Path | None = None
    data_root: Path = Path("data")
    options: Mapping[str, Any] = field(default_factory=dict)

    def found(self) -> tuple[Source, Path]:
        """Make the source and find its files. Raises UserError where they are not there."""
        source = self.make()
        return source, source.find(self.raw, self.data_root, False)

    def items(self) -> Iterator[Recording | Windows]:
        """Read the recordings, or the windows where the original is cut already."""
        source, path = self.found()
        loaded = source.load(path)
        yield from [loaded] if isinstance(loaded, Windows) else loaded


def source_checks() -> list[Check]:
    """Return the checks of a data set's source, each a function of a `SourceCase`, for pytest to run one by one."""
    return list(CHECKS)


def check_source(
    source: Callable[[], Source],
    *,
    raw: Path | None = None,
    data_root: Path = Path("data"),
    options: Mapping[str, Any] | None = None,
    skip: Mapping[str, str] | None = None,
) -> None:
    """Check that a data set's source keeps what the pipeline relies on; shards are made in a temporary folder.

    Nothing is downloaded, and nothing is written where the data lie.

    Args:
        source: the class, or a function that makes an instance.
        raw: the original files, or a small part of them; None for the data set's usual place.
        data_root: the folder of all data, below which the usual place may lie.
        options: fields of `dataset_utils.spec.ShardSpec`, where few windows need others than the defaults.
        skip: name of a check -> why it does not apply to this data set.

    Raises:
        AssertionError: names the data set, and every check that failed with what is wrong and what to do.
        ValueError: a name in `skip` is unknown, or has no reason.
    """
    case = SourceCase(source, raw, data_root, options or {})
    run_all(getattr(source, "__name__", "the data set"), CHECKS, case, skip)


@CHECKS
def check_description(case: SourceCase) -> None:
    """Require a name, classes, channels and preprocessing that fit together."""
    source = case.make()
    require(is_plain_name(getattr(source, "name", None)), "`name` must be a short text that can name a folder")
    for noun, least in (("classes", 2), ("channels", 1)):
        names = tuple(getattr(source, noun, ()))
        require(
            len(names) >= least and all(isinstance(name, str) and name.strip() for name in names),
            f"`{noun}` must be at least {least} texts, not {names}",
        )
        require(len(set(names)) == len(names), f"`{noun}` names one of {names} twice")
    foreign = [name for name in source.acceleration if name not in source.channels]
    require(not foreign, f"`acceleration` names {foreign}, which are no `channels`")
    require(isinstance(getattr(source, "preprocessing", None), Preprocessing), "`preprocessing` is no Preprocessing")
    preprocessing.check(source.preprocessing)


@CHECKS
def check_files(case: SourceCase) -> None:
    """Require that `files` lists files that are there, sorted, each once: they tell versions of the data apart."""
    source, path = case.found()
    files = list(source.files(path))
    require(files, "`files` is empty: list all that `load` reads")
    require(all(file.is_file() for file in files), "`files` lists something that is no file")
    require(files == sorted(set(files)), "`files` is not sorted, or lists a file twice")


@CHECKS
def check_contents(case: SourceCase) -> None:
    """Require recordings or windows of the described shape, with labels of the described classes and named subjects."""
    source, labelled, count = case.make(), 0, 0
    for item in case.items():
        count += 1
        if isinstance(item, Windows):
            _require_windows(source, item)
            labelled += len(item.y)
        else:
            require(isinstance(item, Recording), f"`load` gives {type(item).__name__}, not Recording or Windows")
            require(isinstance(item.subject, str) and item.subject.strip(), f"recording {count} names no subject")
            require(np.asarray(item.signals).dtype.kind == "f", f"{item.where}: signals must be floating-point numbers")
            preprocessing.check_recording(item, source.channels, len(source.listed))
            labelled += int((np.asarray(item.labels) >= 0).sum())
    require(count, "`load` gives no recording at all")
    require(labelled, "no sample has a label: give the index of its class, UNLABELLED for what is to be discarded")


@CHECKS
def check_reading_twice(case: SourceCase) -> None:
    """Require that reading the same files twice gives the same recordings in the same order."""
    first, second = list(case.items()), list(case.items())
    require(len(first) == len(second), f"read twice, the same files give {len(first)} and {len(second)} recordings")
    for one, other in zip(first, second, strict=True):
        for own in fields(one):
            same = _same(getattr(one, own.name), getattr(other, own.name))
            where = one.where if isinstance(one, Recording) else "the windows"
            require(same, f"read twice, {where} differ in '{own.name}': sort what a folder lists, seed what is drawn")


@CHECKS
def check_shards(case: SourceCase) -> None:
    """Require that shards can be made and read back, the same bytes each time, with windows of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        made = [_shards(case, Path(folder) / name) for name in ("one", "two")]
        contents = [_contents(place) for place in made]
        require(contents[0].keys() == contents[1].keys(), "made twice, the shards are other files")
        for name, data in contents[0].items():
            require(data == contents[1][name], f"made twice, the shards differ in {name}: a source must not draw")
        read = shards.load(made[0])
        source = case.make()
        for shard in (*read.train, *read.test):
            require(shard.x.shape[1:] == read.shape, f"a shard holds windows of {shard.x.shape[1:]}, not {read.shape}")
        require(read.class_names == tuple(source.classes), f"the shards know the classes {read.class_names}")
        seen = {int(label) for shard in (*read.train, *read.test) for label in np.unique(shard.y)}
        absent = [name for index, name in enumerate(source.classes) if index not in seen]
        require(not absent or case.options.get("allow_missing"), f"no window has the class {', '.join(absent)}")


def _require_windows(source: Source, windows: Windows) -> None:
    """Require windows that fit the description of their data set, and each other."""
    x, count = windows.x, len(windows.y)
    width = source.preprocessing.window
    require(
        x.shape == (count, len(source.channels), 1, width),
        f"windows are {x.shape}, and should be ({count}, {len(source.channels)}, 1, {width})",
    )
    require(x.dtype == np.float32 and np.isfinite(x).all(), "windows must be finite float32")
    for name, end in (("y", len(source.classes)), ("subject", len(windows.subjects))):
        values = getattr(windows, name)
        inside = values.dtype.kind in "iu" and values.shape == (count,) and ((values >= 0) & (values < end)).all()
        require(inside, f"`{name}` must be {count} whole numbers from 0 to {end - 1}")
    for name in ("stretch", "start"):
        require(getattr(windows, name).shape == (count,), f"`{name}` must be {count} whole numbers")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return True if is_dataclass(one) else bool(one == other)  # tallies of files compare by what they are made of


def _shards(case: SourceCase, data_root: Path) -> Path:
    source, path = case.found()
    spec = ShardSpec(source.name, **{"min_samples": 1, **case.options})
    return generate.prepare(spec, data_root, path, False, lambda line: None, source)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
