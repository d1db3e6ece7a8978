"""People behind the clients of runs, from the manifests in run folders: are they the same with every seed?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dataset_utils.shards import read_manifest
from fedkdx_plugin.results.runs import Run
from registry.errors import UserError


def manifest_folder(run: Run) -> Path | None:
    """Return a folder with the manifest of a run's data: the run folder, or that of the shards if unchanged."""
    for folder in (run.folder, Path(run.data["folder"])):
        try:
            content = (folder / "manifest.json").read_bytes()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == run.data["manifest_sha256"]:
            return folder
    return None


def manifest_of(run: Run) -> dict[str, Any] | None:
    """Return the manifest of a run's data; None if it is not left, or damaged."""
    folder = manifest_folder(run)
    if folder is None:
        return None
    try:
        return read_manifest(folder)
    except UserError:
        return None


def subjects(run: Run) -> list[str]:
    """Return each client's subject, in the order of clients; [] if that is not known, or a client is not one subject.

    A client that is tested on another subject's windows, as with `--split loso`, is not one subject.
    """
    whose = _subjects(run)
    return [own[0] for own in whose] if all(len(own) == 1 for own in whose) else []


def whose(run: Run, count: int) -> list[str]:
    """Return the subjects of each of `count` clients, separated by commas; '' for all if that is not known."""
    found = [", ".join(own) for own in _subjects(run)]
    return found if len(found) == count else [""] * count


def _subjects(run: Run) -> list[list[str]]:
    """Return the subjects whose windows each client has; [] where the manifest is lost."""
    clients = (manifest_of(run) or {}).get("clients", ())
    return [list(mapping(client.get("subjects"))) for client in clients]


def same_clients(runs: Iterable[Run]) -> bool:
    """Return whether a number names the same client in all these runs.

    It does if all have the same data, or if each client is one subject and the subjects have the same order in all
    data. Where the data differ and a manifest is lost, that is not known, and the answer is no.
    """
    one_each = list({run.data["manifest_sha256"]: run for run in runs}.values())
    if len(one_each) < 2:
        return True
    first, *others = (subjects(run) for run in one_each)
    return bool(first) and all(own == first for own in others)


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a mapping; else an empty one."""
    return value if isinstance(value, dict) else {}
