"""Make shards: `python -m dataset_utils.generate -data UCI-HAR --partition dirichlet --alpha 0.1`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils import preprocessing, scaling, shards
from dataset_utils.consoles import safe_output
from dataset_utils.files import sha256
from dataset_utils.partition import Partition, partition
from dataset_utils.reading import read
from dataset_utils.recording import Preprocessing, Source, Windows
from dataset_utils.reduction import reduced
from dataset_utils.spec import OVERRIDES, Parser, ShardSpec, add_arguments, from_arguments, is_own_data, window_samples
from dataset_utils.split import Split, split
from registry.errors import UserError

DATA_ROOT = "data"
IMPORT = "import-pfllib"


def prepare(
    spec: ShardSpec, data_root: Path, raw: Path | None, download: bool, report: Callable[[str], None] = print
) -> Path:
    """The folder of the shards that `spec` describes, made first where it is missing.

    Args:
        data_root: shards lie in `data_root`/NAME/`spec.folder_name()`.
        raw: the original files, or None for the data set's usual place.
        download: whether fetching them is allowed.
        report: takes one line of text about what is being done.

    Raises:
        UserError: unknown data set, files not found or damaged, values out of range, or shards that were made
            from other files than these.
    """
    spec.check()
    source = find_source(spec.data)
    settings = resolve(source.preprocessing, spec)
    folder = data_root / source.name / spec.folder_name()
    if folder.exists():
        _check_existing(folder, source, settings)
        if raw is not None or is_own_data(spec.data):
            _check_files(folder, source, source.find(raw, data_root, download))
        return folder
    path = source.find(raw, data_root, download)
    report(f"reading {path}")
    reading = read(source, path, settings, report, spec.allow_missing)
    windows = reading.windows
    for line in reading.counts.lines():
        report(line)
    divided = split(windows, spec.test_fraction, spec.split, spec.seed)
    parts = partition(spec, windows.y, windows.subject, divided.train, divided.test)
    parts = reduced(windows, parts, spec, report)
    about = {
        "name": source.name,
        "paper": source.paper,
        "files": _listed(source, path, hashed=True),
        "spec": {**asdict(spec), "data": source.name},
        "preprocessing": asdict(settings),
        "recorded": {"channels": list(source.channels), "acceleration": list(source.acceleration)},
        "rate": settings.rate,
        "classes": list(source.classes),
        "channels": list(reading.channels),
        "counts": reading.counts.to_dict(),
        "dropped": len(divided.dropped),
        "moved": dict(zip(shards.PARTS, parts.moved, strict=True)),
    }
    try:
        shards.write(folder, about, _clients(windows, parts, spec.scale))
    except UserError:
        if not (folder / "manifest.json").exists():  # else another process made the same folder in the meantime
            raise
    _report_losses(report, spec, divided, parts)
    return folder


def find_source(data: str) -> Source:
    """The data set called `data`, or the user's own that the YAML file `data` describes. Raises UserError."""
    if is_own_data(data):
        from dataset_utils.sources.own import load_source

        source = load_source(Path(data))
    else:
        from registry import catalog

        source = catalog.load("datasets", data)()
    if Path(source.name).name != source.name or source.name in ("", ".", ".."):
        raise UserError(f"-data {data}: its name {source.name!r} cannot be the name of a folder")
    return source


def resolve(default: Preprocessing, spec: ShardSpec) -> Preprocessing:
    """The data set's own preprocessing with the changes of `spec`. Raises UserError: impossible cutoff."""
    changes = {key: getattr(spec, key) for key in OVERRIDES if getattr(spec, key) is not None}
    if "window" in changes:
        try:
            changes["window"] = window_samples(changes["window"], default.rate)
        except ValueError as error:
            raise UserError(f"--window: {error}") from error
    settings = dataclasses.replace(default, **changes)
    preprocessing.check(settings)
    return settings


def _clients(windows: Windows, parts: Partition, scale: str) -> Iterator[shards.ClientData]:
    for train, test in zip(parts.train, parts.test, strict=True):
        scaled = scaling.fit(windows.x[train], scale)
        of_subject = [np.bincount(windows.subject[pool], minlength=len(windows.subjects)) for pool in (train, test)]
        about: dict[str, Any] = {
            "subjects": {
                name: {"train": int(a), "test": int(b)}
                for name, a, b in zip(windows.subjects, *of_subject, strict=True)
                if a or b
            },
            "scaling": scaled and {"offset": scaled.offset.tolist(), "scale": scaled.scale.tolist()},
        }
        both = [
            shards.Shard(scaled(windows.x[pool]) if scaled else windows.x[pool], windows.y[pool])
            for pool in (train, test)
        ]
        yield shards.ClientData(both[0], both[1], about)


def _listed(source: Source, path: Path, hashed: bool) -> list[dict[str, Any]]:
    """Names (relative to `path`), sizes in bytes and, if wanted, hashes of a data set's original files."""
    listed = []
    for file in source.files(path):
        name = file.name if file == path else file.relative_to(path).as_posix()
        listed.append({"name": name, "size": file.stat().st_size} | ({"sha256": sha256(file)} if hashed else {}))
    return listed


def _check_existing(folder: Path, source: Source, settings: Preprocessing) -> None:
    """Raises UserError when the shards were made from a data set described otherwise."""
    manifest = shards.read_manifest(folder)
    now = {
        "classes": list(source.classes),
        "recorded": {"channels": list(source.channels), "acceleration": list(source.acceleration)},
        "preprocessing": asdict(settings),
    }
    for key, value in now.items():
        if manifest.get(key) != value:
            raise UserError(
                f"{folder} was made when the '{key}' of {source.name} were different; remove it or choose "
                "another --data-root"
            )


def _check_files(folder: Path, source: Source, path: Path) -> None:
    """Raises UserError when the shards were made from files of other names or sizes."""
    files = shards.read_manifest(folder).get("files")
    made_from = [{"name": file["name"], "size": file["size"]} for file in files or []]
    if made_from != _listed(source, path, hashed=False):
        raise UserError(f"{folder} was made from other files than {path}; remove it or choose another --data-root")


def _report_losses(report: Callable[[str], None], spec: ShardSpec, divided: Split, parts: Partition) -> None:
    total = len(divided.train) + len(divided.test) + len(divided.dropped)
    if len(divided.dropped):
        report(f"{len(divided.dropped)} of {total} windows dropped between train and test (--split blocked)")
    if any(parts.moved):
        report(
            f"{parts.moved[0]} of {len(divided.train)} training and {parts.moved[1]} of "
            f"{len(divided.test)} test windows "
            f"moved to clients that fell short (--min-samples {spec.min_samples}, one test window)"
        )


def summary(folder: Path) -> str:
    """One line: where the shards are, how many clients and windows, the smallest and the largest client."""
    manifest = shards.read_manifest(folder)
    clients = manifest["clients"]
    sizes = [client["train"]["samples"] for client in clients]
    tested = f"{sum(client['test']['samples'] for client in clients)} {shards.evaluated_on(manifest)}"
    return (
        f"{folder}: {len(clients)} clients, {sum(sizes)} training and {tested} windows; "
        f"a client trains on {min(sizes)} to {max(sizes)}"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code: 0, 2 for the user's error, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    safe_output()
    try:
        return _import_pfllib(argv[1:]) if argv[:1] == [IMPORT] else _generate(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was left half-written", file=sys.stderr)
        return 130


def _generate(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m dataset_utils.generate",
        description="Make the per-client shards of a data set.",
        epilog=f"PFLlib data: python -m dataset_utils.generate {IMPORT} FOLDER --name NAME",
        allow_abbrev=False,
    )
    parser.add_argument("-data", required=True, metavar="NAME", help="data set, or the YAML file of your own data")
    add_arguments(parser, "--seed")
    arguments = parser.parse_args(argv)
    spec = from_arguments(arguments)
    made = []

    def report(line: str) -> None:
        made.append(line)
        print(line, flush=True)

    raw = None if arguments.raw is None else Path(arguments.raw)
    folder = prepare(spec, Path(arguments.data_root or DATA_ROOT), raw, bool(arguments.download), report)
    print(summary(folder) if made else f"already there: {summary(folder)}")
    _draw(folder)
    return 0


def _import_pfllib(argv: list[str]) -> int:
    from dataset_utils.pfllib import import_folder

    parser = Parser(
        prog=f"python -m dataset_utils.generate {IMPORT}",
        description="Turn the train/ and test/ folders of PFLlib into shards; runs nothing of their pickles.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder that holds train/ and test/")
    parser.add_argument("--name", required=True, help="what to call the data set")
    parser.add_argument("--data-root", default=DATA_ROOT, metavar="DIR", help="where to put it (default: %(default)s)")
    arguments = parser.parse_args(argv)
    folder = import_folder(Path(arguments.folder), arguments.name, Path(arguments.data_root))
    print(summary(folder))
    _draw(folder)
    return 0


def _draw(folder: Path) -> None:
    """Draw the distribution beside the folder, whose bytes stay a function of data and parameters alone."""
    out = folder.with_name(f"{folder.name}.png")
    if out.exists():
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: it needs matplotlib")
        return
    from dataset_utils.figure import draw

    draw(folder, out)
    print(f"figure: {out}")


if __name__ == "__main__":
    sys.exit(main())
