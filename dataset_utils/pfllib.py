"""Import of data sets that PFLlib generated: train/K.npz and test/K.npz, each a pickled dict of x and y."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils import limits, shards
from dataset_utils.files import check_listable, is_folder, parsing, sha256, state_of
from dataset_utils.safe_pickle import load_npz
from registry.errors import UserError
from registry.text import is_plain_name, shown

LARGEST_LABEL = limits.CLASSES - 1
PAPER = "imported from PFLlib (https://github.com/TsingZ0/PFLlib)"


def import_folder(folder: Path, name: str, data_root: Path) -> Path:
    """Write the clients of a PFLlib folder as shards; nothing in its pickles is executed.

    Windows stay as they are: they are not scaled again, and channels keep the layout of PFLlib's generator (some of
    its generators reshape where they should transpose). Class names and sampling rate are not in its files.

    Args:
        folder: holds `train/0.npz`, `train/1.npz`, ... and as many in `test/`.
        name: name of the data set.
        data_root: shards are written to `data_root`/`name`/pfllib.

    Raises:
        UserError: a file is missing, damaged or hostile, the shards exist already, or `name` is no name.
    """
    if not is_plain_name(name):
        raise UserError(f"--name {shown(repr(name))} cannot be the name of a folder")
    target = data_root / name / "pfllib"
    if state_of(target) is not None:
        raise UserError(f"{target} exists already; choose another --name or remove it")
    pairs = _files(folder)
    clients = [
        shards.ClientData(_shard(train), _shard(test), {"subjects": None, "scaling": None}) for train, test in pairs
    ]
    classes = 1 + max(int(shard.y.max()) for client in clients for shard in (client.train, client.test))
    about = {
        "name": name,
        "paper": PAPER,
        "files": _listed(folder, pairs),
        "spec": None,
        "preprocessing": None,
        "rate": None,
        "classes": [f"class {c}" for c in range(classes)],
        "channels": [f"channel {c}" for c in range(clients[0].train.x.shape[1])],
    }
    shards.write(target, about, clients)
    return target


def imported(folder: Path, name: str, data_root: Path) -> Path:
    """Return the shards of a PFLlib folder, which are made unless they are there; arguments are as of `import_folder`.

    Raises:
        UserError: as of `import_folder`, or the shards that are there are of other files, or the folder's
            `config.json` says another number of clients, or fewer classes, than its files have.
    """
    pairs, target = _files(folder), data_root / name / "pfllib"
    stated = _stated(folder / "config.json")
    if stated.get("num_clients", len(pairs)) != len(pairs):
        raise UserError(
            f"{folder}: {len(pairs)} clients, and config.json says {stated['num_clients']}; remove the files of an "
            "earlier generation, or generate the data set anew"
        )
    if state_of(target) is None:
        import_folder(folder, name, data_root)
    found = shards.load(target)
    if found.manifest["files"] != _listed(folder, pairs):
        raise UserError(f"{target}: of other files than {folder} holds now; remove it, or give another --data-root")
    if (classes := stated.get("num_classes", found.num_classes)) < found.num_classes:
        raise UserError(f"{folder}: a label is {found.num_classes - 1}, and config.json says {classes} classes")
    if classes > found.num_classes:
        print(
            f"{folder}: no window has a label from {found.num_classes} to {classes - 1}, which config.json counts; the "
            f"models have {found.num_classes} outputs",
            file=sys.stderr,
        )
    return target


def _stated(path: Path) -> dict[str, int]:
    """Return the numbers of clients and classes in PFLlib's `config.json`; none where there is no such file."""
    if state_of(path) is None:
        return {}
    with parsing(path, "config.json of PFLlib"):
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: int(content[key]) for key in ("num_clients", "num_classes") if key in content}


def _listed(folder: Path, pairs: list[tuple[Path, Path]]) -> list[dict[str, Any]]:
    """Return name, size and SHA-256 of each file, for the manifest."""
    return [
        {"name": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "sha256": sha256(file)}
        for pair in pairs
        for file in pair
    ]


def _files(folder: Path) -> list[tuple[Path, Path]]:
    """Return each client's train and test file, in the order of the clients."""
    if is_folder(folder / "train"):
        check_listable(folder / "train")
    numbers = sorted(int(file.stem) for file in (folder / "train").glob("*.npz") if file.stem.isdecimal())
    if not numbers:
        raise UserError(
            f"{folder}: no train/0.npz; give the folder that PFLlib's generator wrote train/ and test/ into"
        )
    pairs = []
    for k in range(numbers[-1] + 1):
        pair = (folder / "train" / f"{k}.npz", folder / "test" / f"{k}.npz")
        for file in pair:
            if state_of(file) is None:
                raise UserError(f"{file}: missing; clients 0 to {numbers[-1]} each need a file in train/ and test/")
        pairs.append(pair)
    return pairs


def _shard(path: Path) -> shards.Shard:
    data = load_npz(path).get("data")
    if not isinstance(data, dict) or {"x", "y"} - set(data):
        raise UserError(f"{path}: should hold one entry 'data', a dict of x and y, as PFLlib writes it")
    x, y = _array(path, "x", data["x"]), _array(path, "y", data["y"])
    if x.ndim == 3:
        x = x[:, :, None, :]
    if x.ndim != 4 or x.shape[2] != 1:
        raise UserError(f"{path}: x has shape {x.shape}; windows are (n, channels, time) or (n, channels, 1, time)")
    if y.shape != x.shape[:1] or not len(y):
        raise UserError(
            f"{path}: x has {len(x)} windows and y shape {y.shape}; they should be equally many, at least one"
        )
    if not np.array_equal(y, np.floor(y)) or y.min() < 0 or y.max() > LARGEST_LABEL:
        raise UserError(f"{path}: y should be whole numbers from 0 to {LARGEST_LABEL}, it has {y.min()} to {y.max()}")
    return shards.Shard(x.astype(np.float32), y.astype(np.int64))


def _array(path: Path, name: str, value: Any) -> np.ndarray:
    with parsing(path, f"array '{name}'"):
        array = np.asarray(value) if isinstance(value, np.ndarray | list) else np.empty(0)
    if array.dtype.kind not in "iuf" or not array.size:
        raise UserError(f"{path}: {name} should be an array of numbers")
    return array
