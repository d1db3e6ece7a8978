"""Tables of the data of a section's runs, from the manifest in a run folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.counts import many
from dataset_utils.shards import PARTS, read_manifest, scale_of
from fedkdx_plugin.reports.sections import Section
from fedkdx_plugin.reports.tables import NONE, Cell, Table
from registry.errors import UserError

SCALED = {
    "federated": "federated: z-scores with mean and variance of all clients' training windows",
    "client": "client: z-scores with mean and variance of each client's own training windows",
    "minmax": "minmax: to [0, 1] with minimum and maximum of each client's own training windows",
    "none": "none",
}


def manifest_folder(section: Section) -> Path | None:
    """Return a folder with the manifest of these runs' data: a run folder, or that of the shards if unchanged."""
    run = section.first
    for folder in (run.folder, Path(run.data["folder"])):
        try:
            content = (folder / "manifest.json").read_bytes()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == run.data["manifest_sha256"]:
            return folder
    return None


def described(section: Section) -> list[Table]:
    """Return tables of how the windows were made and how many there are; none if there is no manifest."""
    folder = manifest_folder(section)
    if folder is None:
        return []
    try:
        manifest = read_manifest(folder)
    except UserError:
        return []
    rows = [[Cell(name), Cell(value)] for name, value in _made(manifest).items()]
    caption = f"{section.title}: where the windows come from and how they were made{_whose(section)}."
    return [Table(f"{section.slug}-data", caption, [("", "what"), ("", "value")], rows), _counts(section, manifest)]


def subjects(section: Section) -> dict[int, str]:
    """Return client -> 'client 3 (subject 17)' where each client is one subject; {} where that is not known."""
    folder = manifest_folder(section)
    if folder is None:
        return {}
    try:
        clients = read_manifest(folder)["clients"]
    except UserError:
        return {}
    whose = [list(_mapping(client.get("subjects"))) for client in clients]
    if any(len(own) != 1 for own in whose):
        return {}
    return {id: f"{id} (subject {own[0]})" for id, own in enumerate(whose)}


def _whose(section: Section) -> str:
    """Return the seed of the data described, in words, if each seed has its own data; else an empty text."""
    return f" (seed {section.first.seed})" if section.config.get("vary") == "data" else ""


def _made(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return a description of the data: property -> text."""
    preprocessing, spec = (_mapping(manifest.get(name)) for name in ("preprocessing", "spec"))
    rate, (channels, _, time) = manifest.get("rate"), manifest["shape"]
    known = isinstance(rate, int | float) and rate > 0
    scale = scale_of(dict(manifest))
    overlap = f", overlap {preprocessing['overlap']:.0%}" if "overlap" in preprocessing else ""
    return {
        "source": str(manifest.get("paper") or NONE),
        **_read(_mapping(manifest.get("counts"))),
        "rate": f"{rate:g} Hz" if known else NONE,
        "window": f"{time} samples" + (f" ({time / rate:.3g} s)" if known else "") + overlap,
        "channels": f"{channels}: {', '.join(manifest['channels'])}",
        "filters": _filters(preprocessing) if preprocessing else NONE,
        "scaling": SCALED.get(scale, scale),
        **_kept(spec),
        "split": f"{spec['split']}, {manifest.get('dropped', 0)} windows dropped between" if "split" in spec else NONE,
        "partition": str(spec.get("partition", NONE)),
        "clients": str(len(manifest["clients"])),
    }


def _kept(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return what was left out of the training windows on purpose; {} for all of them."""
    fraction = spec.get("train_fraction", 1)
    kept = f"{fraction:.3g} of each client's (--train-fraction); the others are not used" if fraction != 1 else ""
    return {"training windows": kept} if kept else {}


def _read(counts: Mapping[str, Any]) -> dict[str, str]:
    """Return what was read and what of it was lost; {} for windows that were not cut here."""
    windows = _mapping(counts.get("windows"))
    if not windows:
        return {}
    recordings, rows = len(counts.get("recordings") or ()), counts.get("rows") or 0
    read = [many(counts.get("files", 0), "file"), many(recordings, "recording"), many(rows, "row")]
    lost = {
        "at gaps": counts.get("windows_at_gaps", 0),
        "that touch an unlabelled sample": counts.get("windows_unlabelled", 0),
        "below the purity asked for": counts.get("windows_impure", 0),
    }
    discarded = [f"{many(number, 'row')}, {why}" for why, number in _mapping(counts.get("discarded")).items()]
    ignored = len(_mapping(counts.get("ignored")))
    left_out = [*discarded, *(f"{many(number, 'window')} {why}" for why, number in lost.items() if number)]
    left_out += [many(ignored, "file")] if ignored else []
    total = sum(sum(of_class) for of_class in windows.values())
    return {
        "read": ", ".join(part for part in read if not part.startswith("0 ")),
        "cut": f"{many(total, 'window')} of {many(len(windows), 'subject')}",
        "left out": "; ".join(left_out) or "nothing",
    }


def _filters(preprocessing: Mapping[str, Any]) -> str:
    """Return the filters of a recording, in words."""
    named = {
        "median": "median of {:g} samples",
        "lowpass": "low-pass at {:g} Hz",
        "gravity": "gravity separated below {:g} Hz",
    }
    return ", ".join(text.format(preprocessing[key]) for key, text in named.items() if preprocessing.get(key)) or "none"


def _counts(section: Section, manifest: Mapping[str, Any]) -> Table:
    """Return the table of the numbers of windows of each class."""
    parts = {part: np.array([client[part]["histogram"] for client in manifest["clients"]]) for part in PARTS}
    classes = manifest["classes"]
    rows = []
    everything = list(range(len(classes)))
    for indices, name in [*(([index], name) for index, name in enumerate(classes)), (everything, "all")]:
        own = [parts[part][:, indices].sum(axis=1) for part in PARTS]
        holders = int((own[0] > 0).sum())
        rows.append([Cell(name), *(Cell(str(n), n) for n in (int(own[0].sum()), int(own[1].sum()), holders))])
    heads = ("class", "training windows", f"{section.on} windows", "clients that train on it")
    caption = f"{section.title}: windows{_whose(section)}."
    return Table(f"{section.slug}-windows", caption, [("", head) for head in heads], rows)


def _mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping; else an empty one."""
    return value if isinstance(value, dict) else {}
