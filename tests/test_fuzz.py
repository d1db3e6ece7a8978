"""Mutated files, messages and run folders: each is read or refused by a UserError, in bounded time and memory.

Files are mutated by a seeded generator and read in a process of their own, whose memory is limited, and which an alarm
ends: a hang or a crash inside a library is a failure that names the mutation's number.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import yaml

from dataset_utils import shards
from dataset_utils.files import read_yaml
from dataset_utils.reading import read
from dataset_utils.safe_pickle import load_npy, load_npz, read_pickle
from dataset_utils.sources.own import load_source
from registry.errors import UserError
from tests.fuzzed_runs import RUN_FORMATS

ROOT = Path(__file__).parents[1]
SEED = 22
NUMBER = 24
"""Mutations of each format of data in the default run."""
BUDGET = "FEDKDX_FUZZ_SECONDS"
"""Names the variable with the seconds of the long run, all formats together: five minutes by default."""
MEMORY = 6 << 30
"""Bytes of address space; reading one of these files takes some MB on top of the libraries."""
SECONDS = 20
"""After so long a mutation counts as a hang."""
NUMBERS = (b"99999999", b"-1", b"1e400", b"0", b"NaN", b"9" * 400)
SIGNALS = np.arange(320, dtype=np.float64).reshape(160, 2)
LABELS = np.repeat([1, 2], 80)
OWN = {"name": "mine", "rate": 50, "window": "8 samples", "columns": ["ax", "ay"], "label": "y"}
BY_NAME = {"label": {"table": "marks.csv"}}
MARKS = "start,end,label\n0,1,a\n1,3,b\n"


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Return a copy with some bytes, a number in text, a length or a piece of it changed."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(len(data) + 1))
        if random.random() < 0.6:  # headers are at the beginning or the end
            at = int(random.integers(min(len(data), 400) + 1))
            at = at if random.random() < 0.7 else len(data) - at
        kind = int(random.integers(7))
        if kind == 0:
            data[at : at + 1] = bytes([int(random.integers(256))])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << int(random.integers(8))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at : at + 4] = (0x7FFFFFFF, 0xFFFFFFFF, 0, 1 << 24)[int(random.integers(4))].to_bytes(4, "little")
        elif kind == 4:
            data[at:at] = NUMBERS[int(random.integers(len(NUMBERS)))]
        elif kind == 5:
            data[at : at + 20] = b""
        else:
            piece = data[at : at + 50]
            data[at:at] = piece * int(random.integers(1, 5))
    return bytes(data)


def describe(folder: Path, file: str, **changes: object) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump(OWN | {"folder": file} | changes))


def read_own(path: Path) -> None:
    """Read the recordings that mine.yaml describes, in the folder of `path`."""
    source = load_source(path.parent / "mine.yaml")
    source.files(source.find(None, path.parent, False))
    read(source, source.find(None, path.parent, False), source.preprocessing, str)


def make_csv(folder: Path) -> Path:
    describe(folder, "s1.csv", time="t")
    rows = "".join(f"{n / 50},{n},{n % 7}.5,{'ab'[n // 80]}\n" for n in range(160))
    (folder / "s1.csv").write_text(f"t,ax,ay,y\n{rows}")
    return folder / "s1.csv"


def make_zip(folder: Path) -> Path:
    table = make_csv(folder)
    describe(folder, "s1.csv.zip", time="t")
    with zipfile.ZipFile(folder / "s1.csv.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.write(table, "s1.csv")
    table.unlink()
    return folder / "s1.csv.zip"


def make_npy(folder: Path) -> Path:
    describe(folder, "s1.npy")
    np.save(folder / "s1.npy", np.rec.fromarrays([*SIGNALS.T, LABELS], names="ax,ay,y"))
    return folder / "s1.npy"


def make_npz(folder: Path) -> Path:
    describe(folder, "s1.npz")
    np.savez_compressed(folder / "s1.npz", x=SIGNALS, y=LABELS)
    return folder / "s1.npz"


def make_mat(folder: Path) -> Path:
    describe(folder, "s1.mat")
    scipy.io.savemat(folder / "s1.mat", {"x": SIGNALS, "y": LABELS, "more": {"a": [1, 2], "b": "text"}})
    return folder / "s1.mat"


def make_packed_mat(folder: Path) -> Path:
    describe(folder, "s1.mat")
    scipy.io.savemat(folder / "s1.mat", {"x": SIGNALS, "y": LABELS}, do_compression=True)
    return folder / "s1.mat"


def make_hdf5(folder: Path) -> Path:
    import h5py

    describe(folder, "s1.h5")
    with h5py.File(folder / "s1.h5", "w") as file:
        file.create_dataset("x", data=SIGNALS, chunks=(40, 2), compression="gzip")
        file["y"] = LABELS
    return folder / "s1.h5"


def make_parquet(folder: Path) -> Path:
    describe(folder, "s1.parquet")
    pd.DataFrame({"ax": SIGNALS[:, 0], "ay": SIGNALS[:, 1], "y": LABELS}).to_parquet(folder / "s1.parquet")
    return folder / "s1.parquet"


def make_edf(folder: Path) -> Path:
    from pyedflib import highlevel

    (folder / "marks.csv").write_text(MARKS)
    describe(folder, "s1.edf", **BY_NAME)
    headers = [
        highlevel.make_signal_header(name, sample_frequency=50, physical_min=0, physical_max=500)
        for name in ("ax", "ay")
    ]
    highlevel.write_edf(str(folder / "s1.edf"), [np.arange(500.0), np.arange(500.0)], headers)
    return folder / "s1.edf"


def make_wfdb(folder: Path) -> Path:
    import wfdb

    (folder / "marks.csv").write_text(MARKS)
    describe(folder, "s1.hea", **BY_NAME)
    wfdb.wrsamp("s1", 50, ["mV", "mV"], ["ax", "ay"], SIGNALS, fmt=["16", "16"], write_dir=str(folder))
    return folder / "s1.hea"


def make_annotations(folder: Path) -> Path:
    import wfdb

    make_wfdb(folder)
    describe(folder, "s1.hea", label={"events": "{file}.atr", "before": 0.04}, classes=["N", "V"])
    wfdb.wrann("s1", "atr", np.arange(10, 150, 10), symbol=["N", "V"] * 7, fs=50, write_dir=str(folder))
    return folder / "s1.atr"


def make_yaml(folder: Path) -> Path:
    describe(make_csv(folder).parent, "s1.csv", time="t", classes={"a": "one", "b": "two"}, filters={"median": 3})
    return folder / "mine.yaml"


def make_pickle(folder: Path) -> Path:
    content = {"signal": {"chest": SIGNALS, "names": ["a", "b"]}, "label": LABELS, "subject": "S2", "rate": 700.0}
    (folder / "s.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return folder / "s.pkl"


def make_object(folder: Path) -> Path:
    np.save(folder / "s.npy", {"X": SIGNALS, "y": LABELS, "names": np.array(["a", "b"], dtype=object)})  # type: ignore[arg-type]
    return folder / "s.npy"


def make_objects(folder: Path) -> Path:
    np.savez(folder / "s.npz", data={"x": SIGNALS, "y": LABELS})  # type: ignore[arg-type]
    return folder / "s.npz"


def make_shards(folder: Path) -> Path:
    x, y = np.ones((3, 2, 1, 4), np.float32), np.array([0, 1, 0])
    client = shards.ClientData(shards.Shard(x, y), shards.Shard(x, y), {"subjects": {"a": 1}})
    about = {"name": "x", "classes": ["a", "b"], "channels": ["p", "q"], "spec": {"evaluate_on": "test"}}
    shards.write(folder / "made", about, [client, client])
    return folder / "made" / "manifest.json"


def make_shard(folder: Path) -> Path:
    return make_shards(folder).parent / "train" / "1.npz"


def read_pickled(path: Path) -> None:
    with path.open("rb") as file:
        read_pickle(file, path.name)


FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "csv": (make_csv, read_own),
    "zip": (make_zip, read_own),
    "npy": (make_npy, read_own),
    "npz": (make_npz, read_own),
    "mat": (make_mat, read_own),
    "packed mat": (make_packed_mat, read_own),
    "hdf5": (make_hdf5, read_own),
    "parquet": (make_parquet, read_own),
    "edf": (make_edf, read_own),
    "wfdb": (make_wfdb, read_own),
    "annotations": (make_annotations, read_own),
    "yaml": (make_yaml, read_own),
    "description": (make_yaml, read_yaml),
    "pickle": (make_pickle, read_pickled),
    "object npy": (make_object, load_npy),
    "object npz": (make_objects, load_npz),
    "manifest": (make_shards, lambda path: shards.load(path.parent)),
    "shard": (make_shard, lambda path: shards.load(path.parents[1])),
}


def attempts(name: str, folder: Path, first: int) -> Iterator[tuple[int, str]]:
    """Yield each mutation's number and what reading it ends in, from number `first` on, without end."""
    make, reader = (FORMATS | RUN_FORMATS)[name]
    path = make(folder)
    content = path.read_bytes()
    reader(path)  # the file itself can be read
    number = first
    while True:
        path.write_bytes(mutated(content, np.random.default_rng([SEED, sum(map(ord, name)), number])))
        try:
            reader(path)
            yield number, "read"
        except UserError as error:
            yield number, "refused" if str(error).isprintable() else f"not one line: {error!r}"
        except Exception as error:
            import traceback

            yield number, f"{type(error).__name__}: {error} in {traceback.format_exc()[-1500:]}"
        number += 1


def child(names: list[str], folder: Path, count: int, first: int, seconds: float) -> None:
    """Read mutations of formats; print the number of each before it is read, what is wrong after it, then counts.

    Args:
        count: mutations of each format, at most.
        first: number of the first.
        seconds: after which the next format begins.
    """
    import faulthandler
    import resource
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for name in names:
        (folder / name).mkdir()
        end = time.monotonic() + seconds
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        results = attempts(name, folder / name, first)
        seen = {"read": 0, "refused": 0}
        for _ in range(count):
            number, result = next(results)
            if result not in seen:
                print(f"{name} {number}: {result}", flush=True)
            else:
                seen[result] += 1
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            print(f"at {name} {number + 1}", flush=True)
            if time.monotonic() > end:
                break
        assert seen["refused"] or sum(seen.values()) < NUMBER, name
        print(f"at {name}: {seen['read']} read, {seen['refused']} refused", flush=True)
    print("done", flush=True)


def run(names: list[str], folder: Path, count: int, first: int, seconds: float = 1e9) -> tuple[list[str], list[str]]:
    """Run `child` in a process; return what is wrong, one text for each fault, and the counts of finished formats."""
    code = f"from tests.test_fuzz import *; child({names!r}, Path({str(folder)!r}), {count}, {first}, {seconds})"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, errors="replace", env=environment
    )
    lines = made.stdout.splitlines()
    wrong = [line for line in lines if line != "done" and not line.startswith("at ")]
    if not lines or lines[-1] != "done":
        wrong.append(f"ended with {made.returncode} after {lines[-1:]}: {made.stderr[-3000:]}")
    return wrong, [line.removeprefix("at ") for line in lines if line.startswith("at ") and ": " in line]


def require_readers() -> None:
    for module in ("h5py", "pyarrow", "pyedflib", "wfdb"):
        pytest.importorskip(module)


def test_mutated_files_are_read_or_refused(tmp_path):
    require_readers()
    assert run(list(FORMATS), tmp_path, NUMBER, 0)[0] == []


@pytest.mark.slow
def test_mutated_files_messages_and_runs_are_read_or_refused_for_five_minutes(tmp_path, capsys):
    require_readers()
    left, wrong = [*FORMATS, *RUN_FORMATS], []
    seconds = float(os.environ.get(BUDGET, 300)) / len(left)
    while left:
        faults, counts = run(left, tmp_path, 10**9, NUMBER, seconds)
        wrong += faults
        if len(counts) < len(left):  # a crash or a hang; the format after it begins in a new process
            counts.append(f"{left[len(counts)]}: ended early")
        left = left[len(counts) :]
        with capsys.disabled():
            print("", *counts, f"{len(faults)} wrong", sep="\n")
    assert not wrong, "\n".join(wrong)
