"""Shards on disk: arrays for each client, and a manifest that describes them and their origin.

    folder/manifest.json
    folder/train/0.npz    x: (n, channels, 1, time), float32; y: (n,), int64
    folder/test/0.npz     the same for client 0's test windows
    ...

The same data and parameters give the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset_utils import limits
from dataset_utils.arrays import read_npz
from dataset_utils.files import check_regular, is_folder, parsing, replacing, state_of
from dataset_utils.scaling import Statistics
from dataset_utils.spec import EVALUATE_ON, LAYOUT, SCALES
from registry import __version__
from registry.errors import UserError
from registry.text import can_be_shown, is_plain_name

FORMAT = "fedkdx-shards"
PARTS = ("train", "test")
LARGEST = 2**53  # of a manifest's whole numbers: a larger one is no longer exact as a float
UNKNOWN = "as they came"  # scaling of windows that were imported


class Shard(NamedTuple):
    """Windows of one client.

    Attributes:
        x: (n, channels, 1, time), float32.
        y: (n,), int64, class index.
    """

    x: np.ndarray
    y: np.ndarray


class ClientData(NamedTuple):
    """Windows of one client and their description, as `write` takes them.

    Attributes:
        train, test: the client's windows.
        about: further entries of the client's part of the manifest.
    """

    train: Shard
    test: Shard
    about: dict[str, Any]


@dataclass(frozen=True)
class ShardSet:
    """The loaded, validated shards of all clients.

    Attributes:
        name: name of the data set.
        folder: folder of the shards.
        manifest: see `write`.
        train, test: one shard for each client.
    """

    name: str
    folder: Path
    manifest: dict[str, Any]
    train: list[Shard]
    test: list[Shard]

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.train)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def evaluated_on(self) -> str:
        """'test' or 'validation' (see the function `evaluated_on`)."""
        return evaluated_on(self.manifest)

    @property
    def statistics(self) -> list[Statistics] | None:
        """Statistics of each client's training windows, if the windows are still to be scaled by pooled statistics."""
        found = [statistics_of(self.manifest, k) for k in range(self.num_clients)]
        return [own for own in found if own is not None] or None  # all clients state theirs, or none does

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return tuple(self.manifest["classes"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, 1, time) of a window."""
        channels, one, time = self.manifest["shape"]
        return channels, one, time

    def facts(self) -> dict[str, Any]:
        """Return the facts about the data that a run records with its environment."""
        digest = hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()
        return facts(self.manifest, self.folder, digest)


def facts(manifest: dict[str, Any], folder: Path, digest: str) -> dict[str, Any]:
    """Return the facts about data that a run records with its environment.

    Args:
        folder: folder of the shards.
        digest: SHA-256 of the manifest's file.
    """
    return {
        "name": manifest["name"],
        "folder": os.fspath(folder),
        "evaluated_on": evaluated_on(manifest),
        "manifest_sha256": digest,
        "drawn_from": str(manifest.get("drawn_from", "")),
    }


def evaluated_on(manifest: dict[str, Any]) -> str:
    """Return what `test/` holds: 'test', or 'validation' if these windows were held out of the training windows."""
    spec = manifest.get("spec")
    return spec.get("evaluate_on", "test") if isinstance(spec, dict) else "test"


def scale_of(manifest: dict[str, Any]) -> str:
    """Return how the windows are scaled: one of `spec.SCALES`, or `UNKNOWN`."""
    spec = manifest.get("spec")
    return spec.get("scale", UNKNOWN) if isinstance(spec, dict) else UNKNOWN


def write(folder: Path, about: dict[str, Any], clients: Iterable[ClientData]) -> None:
    """Write shards and manifest; the folder appears whole or not at all.

    Args:
        folder: folder to make; it must not exist yet.
        about: entries of the manifest; `name`, `classes` and `channels` are required. Format, layout, shape and
            versions are added, and for each client its entries with samples, histogram and SHA-256 of both shards.
        clients: the clients' windows, taken one after the other, so that only one client need be in memory.

    Raises:
        UserError: the folder cannot be written, or the shards are such that they could not be loaded.
    """
    manifest = {
        "format": FORMAT,
        "layout": LAYOUT,
        **about,
        "shape": None,
        "clients": [],
        "versions": versions(),
    }
    with replacing(folder) as part:
        for name in PARTS:
            (part / name).mkdir(parents=True)
        for k, client in enumerate(clients):
            if manifest["shape"] is None:
                manifest["shape"] = list(client.train.x.shape[1:])
            entry = dict(client.about)
            for name in PARTS:
                shard: Shard = getattr(client, name)
                _check_shard(folder / name / f"{k}.npz", shard, manifest)
                content = _pack(shard)
                (part / name / f"{k}.npz").write_bytes(content)
                entry[name] = {
                    "samples": len(shard.y),
                    "histogram": np.bincount(shard.y, minlength=len(manifest["classes"])).tolist(),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            manifest["clients"].append(entry)
        if wrong := _wrong_entry(manifest):
            raise UserError(f"{folder}: its manifest would be invalid ('{wrong}'); correct the data set's description")
        (part / "manifest.json").write_text(manifest_text(manifest), encoding="utf-8")


def manifest_text(manifest: dict[str, Any]) -> str:
    """Return the content of a manifest's file."""
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load(folder: Path) -> ShardSet:
    """Read and validate every shard of a folder.

    Raises:
        UserError: a file is missing, damaged, not finite or disagrees with the manifest; the text names it.
    """
    manifest = read_manifest(folder)
    parts = {name: [_read(folder, name, k, manifest) for k in range(len(manifest["clients"]))] for name in PARTS}
    return ShardSet(manifest["name"], folder, manifest, parts["train"], parts["test"])


def load_client(folder: Path, k: int) -> tuple[dict[str, Any], Shard, Shard]:
    """Read the manifest and one client's training and test windows; other clients' files are not read.

    Raises:
        UserError: as `load`, or there is no such client.
    """
    manifest = read_manifest(folder)
    count = len(manifest["clients"])
    if not 0 <= k < count:
        raise UserError(f"{folder}: holds shards 0 to {count - 1}, no shard {k}")
    train, test = (_read(folder, name, k, manifest) for name in PARTS)
    return manifest, train, test


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder and validate its structure. Raises UserError."""
    path = folder / "manifest.json"
    if not is_folder(folder):
        raise UserError(f"{folder}: no such folder of shards")
    if state_of(path) is None:
        raise UserError(f"{path}: missing; {folder} is no folder of shards, or was damaged: make the shards again")
    if (size := check_regular(path)) > limits.MANIFEST_BYTES:
        raise UserError(f"{path}: has {size} bytes, which no manifest of shards has")
    with parsing(path, "readable JSON", f"remove {folder} and make it again"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of shards (its 'format' should be '{FORMAT}')")
    if manifest.get("layout") != LAYOUT:
        raise UserError(
            f"{path}: layout {manifest.get('layout')!r}, but this version reads layout {LAYOUT}; make the shards again"
        )
    wrong = _wrong_entry(manifest)
    if wrong:
        raise UserError(f"{path}: '{wrong}' is missing or damaged; remove {folder} and make it again")
    return manifest


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the software that the bytes of shards depend on."""
    found = {"python": platform.python_version()}
    for package in ("numpy", "scipy"):
        found[package] = importlib.metadata.version(package)
    return found | {"fedkdx": __version__}


def _pack(shard: Shard) -> bytes:
    """Return an uncompressed .npz; NumPy gives its entries a fixed date, so equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ascontiguousarray(shard.x), y=np.ascontiguousarray(shard.y, dtype=np.int64))
    return buffer.getvalue()


def _read(folder: Path, part: str, k: int, manifest: dict[str, Any]) -> Shard:
    path = folder / part / f"{k}.npz"
    again = f"remove {folder} and make it again"
    if state_of(path) is None:
        raise UserError(f"{path}: missing; {again}")
    check_regular(path)
    with parsing(path, "shard", again):
        content = path.read_bytes()
    try:
        arrays = read_npz(io.BytesIO(content), path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    if {"x", "y"} - set(arrays):
        raise UserError(f"{path}: not a shard, which holds two arrays, x and y; {again}")
    shard = Shard(arrays["x"], arrays["y"])
    _check_shard(path, shard, manifest)
    shard = Shard(shard.x, shard.y.astype(np.int64, copy=False))
    expected = manifest["clients"][k][part]
    histogram = np.bincount(shard.y, minlength=len(manifest["classes"])).tolist()
    if len(shard.y) != expected["samples"] or histogram != expected["histogram"]:
        raise UserError(f"{path}: its windows are not the manifest's; remove {folder} and make it again")
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise UserError(f"{path}: changed since it was written (SHA-256 differs); remove {folder} and make it again")
    return shard


def _check_shard(path: Path, shard: Shard, manifest: dict[str, Any]) -> None:
    """Raise UserError unless x and y match the manifest and can be trained on."""
    x, y = shard
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    if x.ndim != 4 or x.shape[1:] != shape or x.shape[2] != 1:
        raise UserError(f"{path}: x has shape {x.shape}, it should be (n, channels, 1, time) = (n, {str(shape)[1:-1]})")
    if x.dtype != np.float32:
        raise UserError(f"{path}: x is {x.dtype}, it should be float32")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{path}: y is {y.dtype} of shape {y.shape}, it should be (n,) whole numbers")
    if len(x) != len(y):
        raise UserError(f"{path}: x has {len(x)} windows, but y has {len(y)} labels")
    if not len(x):
        raise UserError(f"{path}: empty; every client needs at least one window to train on and one to test on")
    if y.min() < 0 or y.max() >= classes:
        raise UserError(f"{path}: labels from {y.min()} to {y.max()}, they should lie in 0 to {classes - 1}")
    wrong = x.size - np.count_nonzero(np.isfinite(x))
    if wrong:
        raise UserError(f"{path}: {wrong} of {x.size} values are NaN or infinite")


def _wrong_entry(manifest: dict[str, Any]) -> str:
    """Return the first entry that does not have the form that `load` relies on, or ''."""

    def is_whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST

    def is_names(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(can_be_shown(item) for item in value)

    shape, clients = manifest.get("shape"), manifest.get("clients")
    if not is_plain_name(manifest.get("name")):
        return "name"
    if not _is_spec(manifest.get("spec")):
        return "spec"
    for key, most in (("classes", limits.CLASSES), ("channels", limits.CHANNELS)):
        if not is_names(manifest.get(key)) or len(manifest[key]) > most:
            return key
    if not isinstance(shape, list) or len(shape) != 3 or not all(is_whole(n) for n in shape):
        return "shape"
    if shape[0] != len(manifest["channels"]):
        return "channels"
    if not isinstance(clients, list) or not 0 < len(clients) <= limits.SUBJECTS:
        return "clients"
    for k, client in enumerate(clients):
        for name in PARTS:
            part = client.get(name) if isinstance(client, dict) else None
            if not isinstance(part, dict) or not is_whole(part.get("samples")):
                return f"clients/{k}/{name}/samples"
            histogram = part.get("histogram")
            if not isinstance(histogram, list) or len(histogram) != len(manifest["classes"]):
                return f"clients/{k}/{name}/histogram"
            if not all(is_whole(n) for n in histogram) or sum(histogram) != part["samples"]:
                return f"clients/{k}/{name}/histogram"
            if not isinstance(part.get("sha256"), str):
                return f"clients/{k}/{name}/sha256"
        try:
            statistics_of(manifest, k)
        except (ValueError, OverflowError):
            return f"clients/{k}/statistics"
    if len({"statistics" in client for client in clients}) > 1:
        return "statistics"
    return ""


def statistics_of(manifest: dict[str, Any], k: int) -> Statistics | None:
    """Return the statistics of a client's training windows; None if the windows are not to be scaled by pooled ones.

    Raises:
        ValueError: the manifest's entry cannot be statistics of these windows.
    """
    client, (channels, _, time) = manifest["clients"][k], manifest["shape"]
    if "statistics" not in client:
        return None
    return Statistics.from_dict(client["statistics"], channels, client["train"]["samples"] * time)


def _is_spec(spec: Any) -> bool:
    """Return whether the manifest's parameters have the form that readers rely on."""
    if spec is None:
        return True
    if not isinstance(spec, dict) or spec.get("evaluate_on", "test") not in EVALUATE_ON:
        return False
    if spec.get("scale", UNKNOWN) not in (*SCALES, UNKNOWN):
        return False
    fraction = spec.get("train_fraction", 1.0)
    return isinstance(fraction, int | float) and not isinstance(fraction, bool) and 0 < fraction <= 1
