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
from dataset_utils.counts import some
from dataset_utils.files import is_folder, state_of
from dataset_utils.interrupts import stopping_as_ctrl_c
from dataset_utils.origin import CACHE, Origin, plain
from dataset_utils.partition import Partition, left_out, partition
from dataset_utils.reading import read
from dataset_utils.recording import Preprocessing, Source, Windows
from dataset_utils.reduction import reduced
from dataset_utils.spec import OVERRIDES, Files, ShardSpec, check_used, is_own_data, shards_folder, window_samples
from dataset_utils.split import MOST, Split, gap, split
from dataset_utils.subjects import Subjects
from registry.blame import naming
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse
from registry.text import in_one_line, is_plain_name, shown

IMPORT = "import-pfllib"


def prepare(
    spec: ShardSpec,
    data_root: Path,
    raw: Path | None,
    download: bool,
    report: Callable[[str], None] = print,
    source: Source | None = None,
) -> Path:
    """Return the folder of the shards that `spec` describes, after making it where it is missing.

    Args:
        spec: parameters of the shards.
        data_root: shards are written to `data_root`/NAME/`spec.folder_name()`.
        raw: the original files, or None for the data set's usual location.
        download: whether the original files may be downloaded.
        report: called with one line of text for each step.
        source: the data set itself, where it is not to be looked up by the name that `spec` gives.

    Raises:
        UserError: unknown data set, files not found or damaged, values out of range, or shards that were made
            from other files than these.
        PluginError: the data set's class is of another package, and failed.
    """
    if source is None and not is_own_data(spec.data) and is_folder(Path(spec.data)):
        report(f"-data {spec.data} is the data set; the folder of that name is meant by ./{spec.data}")
    source = source or find_source(spec.data)
    with naming(source):
        return _prepared(source, spec, data_root, raw, download, report)


def _prepared(
    source: Source, spec: ShardSpec, data_root: Path, raw: Path | None, download: bool, report: Callable[[str], None]
) -> Path:
    settings = resolve(source.preprocessing, spec)
    try:
        path = source.find(raw, data_root, False)
    except UserError:
        made = None if raw is not None or is_own_data(spec.data) else _made_before(source, spec, settings, data_root)
        if made:
            report(f"the original files of {source.name} are not there; using the shards that were made of them")
            return made
        path = source.find(raw, data_root, download)
    origin = Origin.of(source, settings, path, data_root / CACHE)
    key = origin.key(spec)
    folder = data_root / source.name / f"{spec.folder_name()}-{key[:8]}"
    if state_of(folder) is not None:
        if shards.read_manifest(folder).get("key") != key:
            raise UserError(f"{folder}: is not what its name says; remove it, so that it is made again")
        return folder
    report(f"reading {path}")
    reading = read(source, path, settings, report, spec.allow_missing, subjects=Subjects.of(spec))
    windows = reading.windows
    for line in reading.counts.lines():
        report(in_one_line(line))
    if windows is None:
        raise UserError(f"{path}: holds no recording of {source.name}; give the folder of its original files (--raw)")
    divided = split(windows, spec.test_fraction, spec.split, spec.seed)
    parts = partition(spec, windows.y, windows.subject, divided.train, divided.test, windows.subjects)
    parts = reduced(windows, parts, divided.test, spec, report)
    about = {
        "name": source.name,
        "paper": source.paper,
        "key": key,
        "drawn_from": origin.key(spec, seed=False),
        "files": origin.files,
        "spec": {**asdict(spec), "data": source.name},
        "description": origin.description,
        "preprocessing": origin.preprocessing,
        "recorded": {"channels": list(source.channels), "acceleration": list(source.acceleration)},
        "rate": settings.rate,
        "classes": list(source.classes),
        "channels": list(reading.channels),
        "counts": reading.counts.to_dict(),
        "dropped": len(divided.dropped),
        "moved": dict(zip(shards.PARTS, parts.moved, strict=True)),
    }
    if parts.left_out:
        about["left_out"] = [windows.subjects[number] for number in parts.left_out]
    if Origin.of(source, settings, path, data_root / CACHE) != origin:
        raise UserError(f"{path}: changed while it was being read; run the same command again")
    try:
        shards.write(folder, about, _clients(windows, parts, spec.scale))
    except UserError:
        if not (folder / "manifest.json").exists():  # else another process has made the same folder in the meantime
            raise
    _report_losses(report, spec, windows, divided, parts)
    return folder


def _made_before(source: Source, spec: ShardSpec, settings: Preprocessing, data_root: Path) -> Path | None:
    """Return existing shards of these parameters and this description, made from any files; None if there are none.

    Raises:
        UserError: there are several.
    """
    wanted = plain(source.description()), asdict(settings)
    found = []
    place = data_root / source.name
    if not is_folder(place):
        return None
    for folder in sorted(place.glob(f"{spec.folder_name()}-*")):
        if (folder / "manifest.json").is_file():
            manifest = shards.read_manifest(folder)
            if (manifest.get("description"), manifest.get("preprocessing")) == wanted:
                found.append(folder)
    if len(found) > 1:
        raise UserError(
            f"the original files of {source.name} are not there, and {found[0]} and {found[1].name} were made of "
            "different ones: name one of them as -data, or say where the files are (--raw)"
        )
    return found[0] if found else None


def find_source(data: str) -> Source:
    """Return the data set called `data`, or the user's own data that the YAML file `data` describes.

    Raises:
        UserError: there is no such data set, or its name cannot be the name of a folder.
    """
    if is_own_data(data):
        from dataset_utils.sources.own import load_source

        source = load_source(Path(data))
    else:
        from registry import catalog

        try:
            source = catalog.load("datasets", data)()
        except UserError as error:
            if data and is_folder(Path(data)) and shards_folder(data) is None:
                raise UserError(f"{error}; a folder of shards is named with a separator: ./{data}") from error
            raise
    if not is_plain_name(source.name):
        raise UserError(f"-data {data}: its name {shown(repr(source.name))} cannot be the name of a folder")
    return source


def resolve(default: Preprocessing, spec: ShardSpec) -> Preprocessing:
    """Return the data set's own preprocessing with the changes of `spec`. Raises UserError for an impossible cutoff."""
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
    for pools in zip(parts.train, parts.test, strict=True):
        train, test = (windows.x[pool] for pool in pools)
        of_subject = [np.bincount(windows.subject[pool], minlength=len(windows.subjects)) for pool in pools]
        scaled = scaling.fit(train, scale)
        about: dict[str, Any] = {
            "subjects": {
                name: {"train": int(a), "test": int(b)}
                for name, a, b in zip(windows.subjects, *of_subject, strict=True)
                if a or b
            },
            "scaling": scaled and {"offset": scaled.offset.tolist(), "scale": scaled.scale.tolist()},
        }
        if scale == "federated":
            about["statistics"] = scaling.statistics(train).to_dict()
        if scaled:
            train, test = scaled(train), scaled(test)
        yield shards.ClientData(
            shards.Shard(train, windows.y[pools[0]]), shards.Shard(test, windows.y[pools[1]]), about
        )


def _report_losses(
    report: Callable[[str], None], spec: ShardSpec, windows: Windows, divided: Split, parts: Partition
) -> None:
    total = len(windows.y)
    if spec.split != "shuffled":
        report(
            f"{len(divided.test)} of {total} windows are tested on ({len(divided.test) / total:.1%}), "
            f"{len(divided.dropped)} dropped between train and test: {gap(windows)} samples lie between "
            f"(--split {spec.split})"
        )
    if spec.split == "blocked":
        there, tested = (_classes_of_subjects(windows, pool) for pool in (np.arange(total), divided.test))
        if untested := sum(count > 1 and group not in tested for group, count in there.items()):
            report(
                f"{untested} of {len(there)} classes of subjects have no test window: too little would be left to "
                "train on (--split blocked)"
            )
        most = MOST * spec.test_fraction
        if whole := sum(tested.get(group, 0) > max(most * count, 1) for group, count in there.items()):
            report(
                f"{whole} of {len(there)} classes of subjects have more than twice the test windows that "
                f"--test-fraction {spec.test_fraction:g} asks for: they are in few recordings, and whole ones are "
                "tested on (--split blocked)"
            )
    if spec.split == "loso":
        report(f"subject {windows.subjects[windows.subject[divided.test[0]]]} is left out of training (--split loso)")
    elif alone := sorted({*windows.subject[divided.test]} - {*windows.subject[divided.train]}):
        names = some(windows.subjects[number] for number in alone)
        where = "; their windows are divided equally among the clients" if spec.partition == "subject" else ""
        report(f"subjects that are tested on and not trained on (--split {spec.split}): {names}{where}")
    for line in left_out(spec, windows.subjects, parts.left_out):
        report(line)
    if any(parts.moved):
        report(
            f"{parts.moved[0]} of {len(divided.train)} training and {parts.moved[1]} of "
            f"{len(divided.test)} test windows "
            f"moved to clients that fell short (--min-samples {spec.min_samples}, one test window)"
        )


def _classes_of_subjects(windows: Windows, pool: np.ndarray) -> dict[tuple[int, int], int]:
    """Return (subject, class) -> number of the pool's windows."""
    pairs, counts = np.unique(np.stack([windows.subject[pool], windows.y[pool]]), axis=1, return_counts=True)
    return {(int(subject), int(c)): int(n) for (subject, c), n in zip(pairs.T, counts, strict=True)}


def summary(folder: Path) -> str:
    """Return one line: the folder, the numbers of clients and windows, the smallest and the largest client."""
    manifest = shards.read_manifest(folder)
    clients = manifest["clients"]
    sizes = [client["train"]["samples"] for client in clients]
    tested = f"{sum(client['test']['samples'] for client in clients)} {shards.evaluated_on(manifest)}"
    return (
        f"{folder}: {len(clients)} clients, {sum(sizes)} training and {tested} windows; "
        f"a client trains on {min(sizes)} to {max(sizes)}"
    )


def main(argv: list[str] | None = None, prog: str = "python -m dataset_utils.generate") -> int:
    """Run the command line. Returns its exit code: 0, 2 for the user's error, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    safe_output()
    try:
        with stopping_as_ctrl_c():
            return _import_pfllib(argv[1:], prog) if argv[:1] == [IMPORT] else _generate(argv, prog)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was left half-written", file=sys.stderr)
        return 130


def _generate(argv: list[str], prog: str) -> int:
    parser = Parser(
        prog=prog,
        description="Make the per-client shards of a data set.",
        epilog=f"PFLlib data: fedkdx data {IMPORT} FOLDER --name NAME",
    )
    parser.add_argument("-data", required=True, metavar="NAME", help="data set, or the YAML file of your own data")
    add_flags(parser, ShardSpec, {"seed": "--seed"})
    add_flags(parser, Files)
    arguments = parser.parse_args(argv)
    values = given(arguments, ShardSpec)
    spec, files = parse(ShardSpec, values), parse(Files, given(arguments, Files))
    check_used(values, spec)
    made = []

    def report(line: str) -> None:
        made.append(line)
        print(line, flush=True)

    raw = None if files.raw is None else Path(files.raw)
    folder = prepare(spec, Path(files.data_root), raw, files.download, report)
    print(summary(folder) if made else f"already there: {summary(folder)}")
    _draw(folder)
    return 0


def _import_pfllib(argv: list[str], prog: str) -> int:
    from dataset_utils.pfllib import import_folder

    parser = Parser(
        prog=prog if prog.endswith(IMPORT) else f"{prog} {IMPORT}",
        description="Turn the train/ and test/ folders of PFLlib into shards; runs nothing of their pickles.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder that holds train/ and test/")
    parser.add_argument("--name", required=True, help="what to call the data set")
    parser.add_argument(
        "--data-root", default=Files().data_root, metavar="DIR", help="where to put it (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    folder = import_folder(Path(arguments.folder), arguments.name, Path(arguments.data_root))
    print(summary(folder))
    _draw(folder)
    return 0


def _draw(folder: Path) -> None:
    """Draw the distribution beside the folder: the folder's bytes depend on data and parameters alone."""
    out = folder.with_name(f"{folder.name}.png")
    if out.exists():
        return
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return
    from dataset_utils.figure import draw

    draw(folder, out)
    print(f"plot: {out}")


if __name__ == "__main__":
    sys.exit(main())
