"""What a section's runs were trained and measured on, from the manifest in a run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.shards import PARTS, read_manifest, scale_of
from fedkdx_plugin.reports.sections import Section
from fedkdx_plugin.reports.tables import NONE, Cell, Table
from registry.errors import UserError

SCALED = {
    "federated": "federated: z-scores by mean and variance of the clients' training windows together",
    "client": "client: z-scores by each client's own training windows",
    "minmax": "minmax: 0 to 1 by each client's own training windows",
    "none": "none",
}


def manifest_folder(section: Section) -> Path | None:
    """A folder that holds the manifest of these runs' data: a run's own, or that of the shards if it is unchanged."""
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
    """How the windows were made, and how many there are; nothing where no manifest is left."""
    folder = manifest_folder(section)
    if folder is None:
        return []
    try:
        manifest = read_manifest(folder)
    except UserError:
        return []
    rows = [[Cell(name), Cell(value)] for name, value in _made(manifest).items()]
    caption = f"{section.title}: how the windows were made{_whose(section)}."
    return [Table(f"{section.slug}-data", caption, [("", "what"), ("", "value")], rows), _counts(section, manifest)]


def _whose(section: Section) -> str:
    """Where each seed has data of its own: which one's these are."""
    return f" (seed {section.first.seed})" if section.config.get("vary") == "data" else ""


def _made(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What -> how, in words."""
    settings, spec = (_mapping(manifest.get(name)) for name in ("preprocessing", "spec"))
    rate, (channels, _, time) = manifest.get("rate"), manifest["shape"]
    known = isinstance(rate, int | float) and rate > 0
    overlap = f", overlap {settings['overlap']:.0%}" if "overlap" in settings else ""
    return {
        "rate": f"{rate:g} Hz" if known else NONE,
        "window": f"{time} samples" + (f" ({time / rate:.3g} s)" if known else "") + overlap,
        "channels": f"{channels}: {', '.join(manifest['channels'])}",
        "filters": _filters(settings) if settings else NONE,
        "scaling": SCALED.get(scale_of(manifest), scale_of(manifest)),
        "split": f"{spec['split']}, {manifest.get('dropped', 0)} windows dropped between" if "split" in spec else NONE,
        "partition": str(spec.get("partition", NONE)),
        "clients": str(len(manifest["clients"])),
    }


def _filters(settings: Mapping[str, Any]) -> str:
    named = {
        "median": "median of {:g} samples",
        "lowpass": "low-pass at {:g} Hz",
        "gravity": "gravity split off below {:g} Hz",
    }
    return ", ".join(text.format(settings[key]) for key, text in named.items() if settings.get(key)) or "none"


def _counts(section: Section, manifest: Mapping[str, Any]) -> Table:
    parts = {part: np.array([client[part]["histogram"] for client in manifest["clients"]]) for part in PARTS}
    classes = manifest["classes"]
    rows = []
    for index, name in [*enumerate(classes), (slice(None), "all")]:
        own = [parts[part][:, index].reshape(len(manifest["clients"]), -1).sum(axis=1) for part in PARTS]
        holders = int((own[0] > 0).sum())
        rows.append([Cell(name), *(Cell(str(n), n) for n in (int(own[0].sum()), int(own[1].sum()), holders))])
    heads = ("class", "training windows", f"{section.on} windows", "clients that train on it")
    caption = f"{section.title}: windows{_whose(section)}."
    return Table(f"{section.slug}-windows", caption, [("", head) for head in heads], rows)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
