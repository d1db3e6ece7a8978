"""Describe what is in a data set and what is wrong with it: `python -m dataset_utils.describe my.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dataset_utils import shards
from dataset_utils.consoles import safe_output
from dataset_utils.counts import Counts, many, some
from dataset_utils.generate import find_source, resolve
from dataset_utils.partition import left_out, people
from dataset_utils.reading import Reading, read
from dataset_utils.recording import Preprocessing, Source, Windows
from dataset_utils.spec import Files, ShardSpec, check_used, shards_folder
from dataset_utils.split import split
from dataset_utils.subjects import Subjects
from registry.blame import PluginError, naming
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse
from registry.text import in_one_line

SUBJECTS = 40
"""Most subjects that have a line each; further ones are only counted."""


def described(spec: ShardSpec, data_root: Path, raw: Path | None, download: bool) -> tuple[list[str], list[str]]:
    """Describe a data set, read from its original files, and list what is wrong with it.

    Returns:
        lines of the description, and errors, one line each; shards can be made if there are no errors.

    Raises:
        UserError: its files are not found, or its description cannot be read.
    """
    if (folder := shards_folder(spec.data)) is not None:
        return _made(folder), []
    source = find_source(spec.data)
    with naming(source):
        settings = resolve(source.preprocessing, spec)
        path = source.find(raw, data_root, download)
        lines: list[str] = []
        reading = read(source, path, settings, lines.append, spec.allow_missing, True, Subjects.of(spec))
        lines[:0] = [f"{source.name}: {path}", *_settings(source, settings, reading)]
        lines += [*_files(reading.counts), *_rates(reading.counts), *reading.counts.lines(), *_windows(source, reading)]
        errors = list(reading.errors)
        try:
            lines += _no_clients(spec, reading.windows)
        except UserError as error:
            errors.append(str(error))
        return lines, errors


def _settings(source: Source, settings: Preprocessing, reading: Reading) -> list[str]:
    filters = [
        f"median of {settings.median}" if settings.median > 1 else "",
        f"low-pass {settings.lowpass:g} Hz" if settings.lowpass else "",
        f"gravity below {settings.gravity:g} Hz apart" if settings.gravity else "",
    ]
    cut = (
        f"{settings.overlap:.0%} overlap"
        if settings.before is None
        else f"around each event, from {settings.before:g} s before it"
    )
    return [
        f"channels: {', '.join(reading.channels)}",
        f"windows: {settings.window} samples, {settings.window / settings.rate:g} s at {settings.rate:g} Hz, {cut}",
        f"filters: {', '.join(filter(None, filters)) or 'none'}",
    ]


def _files(counts: Counts) -> list[str]:
    rows, recordings = counts.total("rows"), sum(1 for tally in counts.recordings if not tally.stream)
    found = [many(counts.files, "file"), *([many(recordings, "recording"), many(rows, "row")] if rows else [])]
    return [f"read: {', '.join(found)}; ignored: {many(len(counts.ignored), 'file')}"]


def _rates(counts: Counts) -> list[str]:
    timed = [(tally.rate, tally.name) for tally in counts.recordings if tally.timed and tally.rate]
    untimed = [tally.name for tally in counts.recordings if not tally.timed]
    lines = []
    if timed:
        (low, slowest), (high, fastest) = min(timed), max(timed)
        ends = [f"{low:.5g} Hz", f"{high:.5g} Hz"]
        told = ends[0] if ends[0] == ends[1] else f"{ends[0]} ({slowest}) to {ends[1]} ({fastest})"
        lines.append(f"measured rate: {told}, {many(len(timed), 'recording')}")
    if untimed:
        lines.append(f"no times, so rate and gaps cannot be checked: {some(untimed)}")
    return lines


def _windows(source: Source, reading: Reading) -> Iterator[str]:
    counts = reading.counts
    if reading.windows is None:
        yield "no windows"
        return
    subjects = many(len(counts.windows), "subject")
    yield f"{many(len(reading.windows.y), 'window')} of {subjects} and {len(source.classes)} classes:"
    total = [sum(of_class) for of_class in zip(*counts.windows.values(), strict=True)]
    for name, count in zip(source.classes, total, strict=True):
        holders = sum(1 for windows in counts.windows.values() if windows[source.classes.index(name)])
        yield f"  {name}: {many(count, 'window')} of {many(holders, 'subject')}"
    for subject, windows in list(counts.windows.items())[:SUBJECTS]:
        named = ", ".join(f"{name} {n}" for name, n in zip(source.classes, windows, strict=True) if n)
        yield f"  subject {subject}: {sum(windows)} windows ({named})"
    if len(counts.windows) > SUBJECTS:
        yield f"  and {len(counts.windows) - SUBJECTS} more subjects"
    single = [subject for subject, windows in counts.windows.items() if sum(1 for n in windows if n) == 1]
    if single:
        yield f"of one class only: {some(single)}"
    purity = counts.purity()
    if purity is not None:
        mixed = counts.total("mixed")
        some_mixed = f"{many(mixed, 'window')} {'is' if mixed == 1 else 'are'} mixed"
        yield f"purity: {purity:.1%} of a window's samples have its label on average; {some_mixed}"


def _no_clients(spec: ShardSpec, windows: Windows | None) -> list[str]:
    """Return a line on the subjects left out for `-nc`; none where nobody is. Raises UserError: fewer subjects."""
    if windows is None or spec.clients is None or spec.partition != "subject":
        return []
    divided = split(windows, spec.test_fraction, spec.split, spec.seed)
    _, others = people(spec, np.unique(windows.subject[divided.train]))
    return left_out(spec, windows.subjects, others.tolist())


def _made(folder: Path) -> list[str]:
    """Return the description of a folder of shards, from its manifest."""
    manifest = shards.read_manifest(folder)
    lines = [f"{folder}: shards of {manifest['name']}", f"channels: {', '.join(manifest['channels'])}"]
    for k, client in enumerate(manifest["clients"]):
        of_class = [a + b for a, b in zip(*(client[part]["histogram"] for part in shards.PARTS), strict=True)]
        named = ", ".join(f"{name} {n}" for name, n in zip(manifest["classes"], of_class, strict=True) if n)
        lines.append(f"  client {k}: {sum(of_class)} windows ({named})")
    return lines


def main(argv: Sequence[str] | None = None, prog: str = "python -m dataset_utils.describe") -> int:
    """Run the command line; return 0, 2 where something is wrong with the data set, 130 when interrupted."""
    safe_output()
    parser = Parser(prog=prog, description="Describe a data set and list what is wrong with it.")
    parser.add_argument("data", metavar="DATA", help="the YAML file of your own data, a data set's name, or shards")
    add_flags(parser, ShardSpec, {"seed": "--seed"})
    add_flags(parser, Files)
    try:
        arguments = parser.parse_args(argv)
        values = given(arguments, ShardSpec)
        spec, files = parse(ShardSpec, values), parse(Files, given(arguments, Files))
        check_used(values, spec)
        lines, errors = described(spec, Path(files.data_root), files.raw and Path(files.raw), files.download)
    except PluginError:
        raise  # with its traceback, for its author
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join(map(in_one_line, lines)), flush=True)
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    return 2 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
