"""Tables of the data of a section's runs, from the manifest in a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dataset_utils.counts import many
from dataset_utils.shards import PARTS, scale_of
from fedkdx_plugin.reports.people import manifest_of, mapping
from fedkdx_plugin.reports.sections import Section
from fedkdx_plugin.reports.tables import NONE, Cell, Table

SCALED = {
    "federated": "federated: z-scores with mean and variance of all clients' training windows",
    "client": "client: z-scores with mean and variance of each client's own training windows",
    "minmax": "minmax: to [0, 1] with minimum and maximum of each client's own training windows",
    "none": "none",
}


def described(section: Section) -> list[Table]:
    """Return tables of how the windows were made and how many there are; none if there is no manifest."""
    manifest = manifest_of(section.first)
    if manifest is None:
        return []
    rows = [[Cell(name), Cell(value)] for name, value in _made(manifest).items()]
    caption = f"{section.title}: where the windows come from and how they were made{whose(section)}."
    return [Table(f"{section.slug}-data", caption, [("", "what"), ("", "value")], rows), _counts(section, manifest)]


def whose(section: Section) -> str:
    """Return the seed of the data described, in words, if each seed has its own data; else an empty text."""
    return f" (seed {section.first.seed})" if section.config.get("vary") == "data" else ""


def _made(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return a description of the data: property -> text."""
    preprocessing, spec = (mapping(manifest.get(name)) for name in ("preprocessing", "spec"))
    rate, (channels, _, time) = manifest.get("rate"), manifest["shape"]
    known = isinstance(rate, int | float) and rate > 0
    scale = scale_of(dict(manifest))
    overlap = f", overlap {preprocessing['overlap']:.0%}" if "overlap" in preprocessing else ""
    return {
        "source": str(manifest.get("paper") or NONE),
        **_read(mapping(manifest.get("counts")), [*_chosen(spec), *_no_clients(manifest)]),
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


def _chosen(spec: Mapping[str, Any]) -> list[str]:
    """Return whom `--subjects` or `--exclude-subjects` left out, in words; [] for nobody."""
    texts = {"subjects": "all subjects but {} (--subjects): {}", "exclude_subjects": "{} (--exclude-subjects): {}"}
    found = []
    for key, text in texts.items():
        names = spec.get(key)
        if isinstance(names, list) and names:
            count = many(len(names), "subject") if key == "exclude_subjects" else str(len(names))
            found.append(text.format(count, ", ".join(map(str, names))))
    return found


def _no_clients(manifest: Mapping[str, Any]) -> list[str]:
    """Return whom `-nc` left out, in words; [] for nobody."""
    names = manifest.get("left_out") or []
    return [f"{many(len(names), 'subject')} (-nc {len(manifest['clients'])}): {', '.join(names)}"] if names else []


def _read(counts: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, str]:
    """Return what was read and what of it was lost; for windows that were not cut here, only who was left out.

    Args:
        counts: of the manifest.
        chosen: subjects who were left out by choice, in words.
    """
    windows = mapping(counts.get("windows"))
    if not windows:
        return {"left out": "; ".join(chosen)} if chosen else {}
    recordings, rows = counts.get("recordings") or (), counts.get("rows") or 0
    whole = sum(1 for recording in recordings if not recording.get("stream"))
    read = [many(counts.get("files", 0), "file"), many(whole, "recording"), many(rows, "row")]
    lost = {
        "at gaps": counts.get("windows_at_gaps", 0),
        "that touch an unlabelled sample": counts.get("windows_unlabelled", 0),
        "below the purity asked for": counts.get("windows_impure", 0),
    }
    discarded = [f"{many(number, 'row')}, {why}" for why, number in mapping(counts.get("discarded")).items()]
    ignored = len(mapping(counts.get("ignored")))
    left_out = [*chosen, *discarded, *(f"{many(number, 'window')} {why}" for why, number in lost.items() if number)]
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
    caption = f"{section.title}: windows{whose(section)}."
    return Table(f"{section.slug}-windows", caption, [("", head) for head in heads], rows)
