"""Files that hold anything: each ends in one clear line of UserError; none in a traceback, a hang or much memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pathlib
import pickle
import socket
import struct
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import wfdb
import yaml

from dataset_utils import describe, generate, limits, pfllib, shards
from dataset_utils.arrays import read_npy, read_npz
from dataset_utils.files import check_listable, expanded, parsing, read_yaml, sha256, state_of
from dataset_utils.reading import read
from dataset_utils.safe_pickle import load_npy, load_npz, read_pickle
from dataset_utils.sources.own import load_source
from dataset_utils.sources.own.labels import class_names
from dataset_utils.sources.own.matlab import check_mat
from dataset_utils.spec import shards_folder
from registry.errors import UserError

BASE = {"name": "mine", "folder": "rec", "rate": 50, "window": "8 samples", "columns": ["ax", "ay"], "label": "y"}
ROWS = "".join(f"{n},{n % 7},{'ab'[n // 40 % 2]}\n" for n in range(160))
CSV = f"ax,ay,y\n{ROWS}"
SIGNALS = np.arange(320, dtype=np.float64).reshape(160, 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "rec").mkdir()
    return tmp_path / "rec"


def outcome(recorded: Path, **changes: object) -> str:
    """Return what reading a folder of recordings ends in: 'read', or the error's one line."""
    path = recorded.parent / "mine.yaml"
    path.write_text(yaml.safe_dump(BASE | changes), encoding="utf-8")
    return outcome_of(path)


def outcome_of(path: Path) -> str:
    try:
        source = load_source(path)
        read(source, source.find(None, path.parent, False), source.preprocessing, str)
    except UserError as error:
        assert str(error).isprintable()
        return str(error)
    return "read"


def test_what_the_cases_start_from_is_read(folder):
    (folder / "s1.csv").write_text(CSV)
    assert outcome(folder) == "read"


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_numbers_of_hundreds_of_digits(folder, digits):
    long = "9" * digits
    (folder / "s1.csv").write_text(CSV.replace("\n7,", f"\n{long},"))
    # 1e30 is a number; one of 400 digits is infinite, which a signal cannot be, or none, by pandas' version
    expected = {30: ["read"], 400: ["infinite values in channel ax", "is no number"], 5000: ["is no number"]}[digits]
    assert any(text in outcome(folder) for text in expected)
    (folder / "s1.csv").write_text(CSV.replace("\n7,", f"\n-{long}.5,"))
    assert outcome(folder) == "read" if digits == 30 else "s1.csv: " in outcome(folder)
    (folder / "s1.csv").write_text(CSV.replace(",b\n", f",{long}\n"))
    assert outcome(folder) == "read" if digits == 30 else "cannot be a class" in outcome(folder)


@pytest.mark.parametrize("key", ["rate", "window", "overlap", "purity", "max_gap", "resample"])
@pytest.mark.parametrize("value", ["9" * 150, "9" * 400, "9" * 5000, "0x" + "f" * 5000, "1e308", ".inf", ".nan", "-1"])
def test_absurd_numbers_in_a_description(folder, key, value):
    (folder / "s1.csv").write_text(CSV)
    path = folder.parent / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in BASE.items() if k != key}) + f"{key}: {value}\n")
    assert str(path) in outcome_of(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": {"median": 1_000_000_001}}, "'median' must be a number of at least 0 and below 10002"),
        ({"resample": 1e9}, r"'resample' must be a number of at least 0.001 and below 1e\+06"),
        ({"window": 1e9}, "is more than 10000000 samples at 50 Hz"),
        ({"max_gap": 1e9}, "'max_gap' must be a number of at least 0 and below 3600"),
        ({"columns": ["ax", "a\0y"]}, "must be a list of column names"),
        ({"columns": ["ax", "a\ny"]}, "must be a list of column names"),
        ({"label": "y\0"}, "'label' must name a column"),
        ({"files": "*\0.csv"}, "'files' must be a pattern"),
        ({"folder": "rec\0"}, "'folder' must be a word"),
        ({"folder": "x" * 5000}, "File name too long"),
        ({"folder": "x/" * 5000}, "File name too long"),
        ({"classes": ["a", "b\nerror: forged"]}, "cannot be a name"),
        ({"classes": [f"c{n}" for n in range(10_000)]}, "10000 classes, but at most 1000"),
        ({"columns": [f"c{n}" for n in range(10_001)]}, "10001 channels, but at most 10000"),
    ],
)
def test_absurd_descriptions(folder, changes, message):
    (folder / "s1.csv").write_text(CSV)
    with pytest.raises(UserError, match=message):
        raise UserError(outcome(folder, **changes))


def test_the_median_of_the_command_line_is_limited_too(folder, capsys):
    (folder / "s1.csv").write_text(CSV)
    outcome(folder)
    given = [str(folder.parent / "mine.yaml"), "--median", "1000000001"]
    assert (
        describe.main(given) == 2 and capsys.readouterr().err == "error: --median 1000000001: at most 10001 samples\n"
    )


def test_ten_thousand_labels_are_refused_before_anything_is_cut(folder):
    rows = "".join(f"{n},0,label {n}\n" for n in range(10_000))
    (folder / "s1.csv").write_text(f"ax,ay,y\n{rows}")
    assert "10000 distinct labels, but at most 1000 can be handled; is 'label' the right column?" in outcome(folder)


def test_labels_have_one_order_whatever_they_are():
    labels = ["nan", "1e400", "inf", "2", "10", "2.5", "2.50", "b"]
    assert list(class_names(labels, frozenset(), "x")) == ["2", "2.5", "2.50", "10", "1e400", "b", "inf", "nan"]


@pytest.mark.parametrize("name", ["s1\nerror: forged", "s1\x1b[31m", "s" * 120])
def test_a_subject_that_cannot_be_shown_is_refused(folder, name):
    (folder / f"{name}.csv").write_text(CSV)
    assert "cannot be the name of a subject" in outcome(folder)


def test_a_file_name_forges_no_line(folder, capsys):
    (folder / "s1.csv").write_text(CSV)
    (folder / "notes\nerror: forged").write_text("x")
    (folder / "s2\nerror: forged.csv").write_bytes(b"\xff\0\0")
    outcome(folder)
    assert describe.main([str(folder.parent / "mine.yaml")]) == 2
    out, err = capsys.readouterr()
    assert "?error: forged" in out and "?error: forged" in err
    assert not any(line.startswith("error: forged") for line in [*out.splitlines(), *err.splitlines()])


def test_an_error_is_one_line():
    assert str(UserError("a\nerror: b\x1b[31m\u2028")) == "a?error: b?[31m?"
    assert pickle.loads(pickle.dumps(UserError("a\nb"))).args == ("a?b",)


# --- arrays


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(160, "V4"),
        np.zeros(160, [("a", "i4"), ("b", "U3")]),
        np.zeros((160, 2)),
        np.zeros(160, "m8[s]"),
        np.zeros(160, complex),
        np.array(1),
    ],
)
def test_void_and_structured_labels(folder, labels):
    np.savez(folder / "s1.npz", x=SIGNALS, y=labels)
    assert "s1.npz" in outcome(folder)
    scipy.io.savemat(folder / "s2.mat", {"x": SIGNALS})
    with h5py.File(folder / "s3.h5", "w") as file:
        file["x"] = SIGNALS
        if labels.dtype.kind not in "mUV":
            file["y"] = labels
    (folder / "s1.npz").unlink()
    assert "s2.mat" in outcome(folder) or "s3.h5" in outcome(folder)


def test_structured_tables_of_npy(folder):
    table = np.zeros(160, [("ax", "f8", (2,)), ("ay", "f8"), ("y", "V3")])
    np.save(folder / "s1.npy", table)
    assert "s1.npy" in outcome(folder)


def test_an_npz_that_is_something_else(folder):
    np.save(folder / "s1.npy", SIGNALS)
    (folder / "s1.npy").rename(folder / "s1.npz")
    assert "s1.npz: is no .npz file" in outcome(folder)
    np.savez(folder / "s1.npz", x=SIGNALS, y=np.repeat([1, 2], 80))
    content = bytearray((folder / "s1.npz").read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag of encrypted members
        at = content.find(signature)
        while at >= 0:
            content[at + place] |= 1
            at = content.find(signature, at + 4)
    (folder / "s1.npz").write_bytes(content)
    assert "is encrypted" in outcome(folder)
    with zipfile.ZipFile(folder / "s1.npz", "w") as zipped:
        zipped.writestr("x.npy", b"no array")
        zipped.writestr("y.npy", b"")
    assert "is no .npy file" in outcome(folder)


def npy(header: str, values: bytes = b"") -> bytes:
    """Return a .npy file with a header of one's own."""
    text = header.encode() + b" " * (118 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values


CLAIMS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1024, 1024, 1024)}",  # 4.3 GB
    "{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4)}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 4611686018427387904, 4611686018427387904)}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 4)}",
    "{'descr': '|S0', 'fortran_order': False, 'shape': (4611686018427387904,)}",
    "{'descr': '(i4,', 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (4611686018427387904, 9)}",
    "(",
    "((((((((((((((((((((((((((((((",
    "{",
    "",
]


@pytest.mark.parametrize("header", CLAIMS)
def test_what_an_npy_header_claims_is_checked_against_the_file(folder, tmp_path, header):
    path = folder / "s1.npy"
    path.write_bytes(npy(header))
    tracemalloc.start()
    try:
        assert "s1.npy" in outcome(folder)
        for reader in (load_npy, lambda path: read_npy(path.open("rb"), path.stat().st_size, "s1.npy")):
            with pytest.raises(UserError, match=r"s1\.npy"):
                reader(path)
        with zipfile.ZipFile(tmp_path / "s1.npz", "w") as zipped:
            zipped.writestr("data.npy", path.read_bytes())
        for reader in (load_npz, lambda path: read_npz(path, path)):
            with pytest.raises(UserError, match=r"s1\.npz"):
                reader(tmp_path / "s1.npz")
        (folder / "s1.npy.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        assert "s1.npy.gz" in outcome(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_by_their_ratio(folder, monkeypatch):
    monkeypatch.setattr(limits, "RATIO_FROM", 1 << 20)
    zeros = np.zeros((1 << 19, 2))  # 8 MB, packed to 8 kB
    np.savez_compressed(folder / "s1.npz", x=zeros, y=np.zeros(len(zeros), np.int8))
    assert "a zip bomb?" in outcome(folder)
    with pytest.raises(UserError, match="a zip bomb"):
        load_npz(folder / "s1.npz")
    (folder / "s1.npz").unlink()
    scipy.io.savemat(folder / "s1.mat", {"x": zeros, "y": zeros[:, 0]}, do_compression=True)
    assert "a zip bomb?" in outcome(folder)
    (folder / "s1.mat").unlink()
    with h5py.File(folder / "s1.h5", "w") as file:
        file.create_dataset("x", (1 << 40, 2), np.float64, chunks=(1 << 10, 2))  # no chunk is stored
        file["y"] = np.zeros(160)
    assert "a zip bomb?" in outcome(folder)
    (folder / "s1.h5").unlink()
    pytest.importorskip("pyarrow")
    zeros = np.zeros(1 << 20)
    pd.DataFrame({"ax": zeros, "ay": zeros, "y": zeros}).to_parquet(folder / "s1.parquet")
    assert "a zip bomb?" in outcome(folder)
    (folder / "s1.parquet").unlink()
    buffer = io.BytesIO()
    with gzip.open(buffer, "wb") as packed:
        packed.write(CSV.encode() + b" " * (1 << 26))
    (folder / "s1.csv.gz").write_bytes(buffer.getvalue())
    assert "a zip bomb?" in outcome(folder) or "unpacks to more" in outcome(folder)


def test_a_first_line_without_an_end(folder):
    (folder / "s1.csv").write_bytes(b"ax,ay,y" + b"," * (1 << 19))
    assert "its first line has more than 262144 bytes" in outcome(folder)


def test_hdf5_reads_no_other_file(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(SIGNALS.tobytes())
    with h5py.File(folder / "s1.h5", "w") as file:
        file.create_dataset("x", SIGNALS.shape, np.float64, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        file["y"] = np.zeros(160)
    assert "'x' in it lies in another file" in outcome(folder)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = SIGNALS
    layout = h5py.VirtualLayout(SIGNALS.shape, np.float64)
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", SIGNALS.shape)
    with h5py.File(folder / "s1.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
        file["y"] = np.zeros(160)
    assert "'x' in it lies in another file" in outcome(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("s1.dat", "../../secret.dat", "which is not beside it|is no WFDB record"),
        ("s1.dat", "/dev/zero", "which is not beside it|is no WFDB record"),
        ("s1.dat", "gone.dat", "there is no such file"),
        ("s1.dat", "pipe.dat", "is a pipe, not a file"),
        (" 160\n", " 99999999999\n", "a zip bomb|WFDB"),
        (" 50 ", " 0 ", "rate|WFDB"),
    ],
)
def test_a_wfdb_header_is_believed_as_far_as_its_files_go(folder, old, new, message):
    os.mkfifo(folder / "pipe.dat")
    wfdb.wrsamp("s1", 50, ["mV", "mV"], ["ax", "ay"], SIGNALS, fmt=["16", "16"], write_dir=str(folder))
    text = (folder / "s1.hea").read_text()
    assert old in text
    (folder / "s1.hea").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        raise UserError(outcome(folder, label={"pattern": "(s)"}, classes=["s", "t"], files="*.hea"))


def test_an_edf_header_is_believed_as_far_as_its_file_goes(folder):
    pyedflib = pytest.importorskip("pyedflib")
    signals = [np.arange(500.0), np.arange(500.0)]
    headers = [pyedflib.highlevel.make_signal_header(name, sample_frequency=50) for name in ("ax", "ay")]
    for header in headers:
        header |= {"physical_min": 0, "physical_max": 500}
    path = folder / "s1.edf"
    pyedflib.highlevel.write_edf(str(path), signals, headers)
    content = path.read_bytes()
    for place, width, value in ((236, 8, "99999999"), (252, 4, "9999"), (184, 8, "99999999"), (236, 8, "-1")):
        path.write_bytes(content[:place] + value.ljust(width).encode() + content[place + width :])
        message = outcome(folder, label={"pattern": "(s)"}, classes=["s", "t"])
        assert "s1.edf: is damaged, its header announces" in message or "where a number belongs" in message


# place in the file, the byte there, the byte in its place; the signals' numbers begin with the tag at 176
@pytest.mark.parametrize(
    ("place", "old", "new", "message"),
    [
        (176, 9, 175, "an element of type 175"),  # ended the process: the library takes it as an index
        (176, 9, 14, "an element of type 14"),
        (177, 0, 8, "an element of type 2057"),
        (182, 0, 255, "passes the end of its variable"),
        (145, 0, 8, "an element that is cut off"),  # complex, and no imaginary part
        (156, 8, 0, "0 bytes where flags, dimensions or a length belong"),  # ended the process, too
        (156, 8, 4, "4 bytes where flags, dimensions or a length belong"),
        (163, 0, 128, "a negative dimension"),
        (144, 6, 2, "an element of type 9"),  # a struct, which has names of fields
        (144, 6, 1, "an element of type 9"),  # cells
        (163, 0, 64, "fewer values than its dimensions say"),
    ],
)
def test_a_mat_file_is_believed_as_far_as_its_elements_are_sound(folder, place, old, new, message):
    scipy.io.savemat(folder / "s1.mat", {"x": SIGNALS, "y": np.repeat([1, 2], 80)})
    assert outcome(folder) == "read"
    content = bytearray((folder / "s1.mat").read_bytes())
    assert content[place] == old
    content[place] = new
    (folder / "s1.mat").write_bytes(content)
    assert "s1.mat: is no .mat file, or a damaged one" in outcome(folder) and message in outcome(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_variable_passes_the_check_of_a_mat_file(tmp_path, packed):
    from scipy.sparse import csc_matrix

    values = {
        "numbers": SIGNALS,
        "complex": np.array([1 + 2j, 3]),
        "small": np.arange(3, dtype=np.int8),
        "text": "äö",
        "logical": np.array([True, False]),
        "empty": np.zeros((0, 3)),
        "cells": np.array([1, "a", np.zeros((2, 2))], dtype=object),
        "struct": {"a": [1, 2], "inner": {"b": "text", "c": 1j}},
        "structs": np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f8")]),
        "sparse": csc_matrix(np.eye(3)),
        "sparse_complex": csc_matrix(np.eye(3) * 1j),
    }
    scipy.io.savemat(tmp_path / "all.mat", values, do_compression=packed)
    with (tmp_path / "all.mat").open("rb") as stream:
        check_mat(stream, tmp_path / "all.mat")
        assert stream.read() == b""  # to its end


# --- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("x: " + "9" * 5000, "a whole number of 5000 digits"),
        ("x: 0x" + "f" * 5000, "a whole number of 5002 digits"),
        ("a: &a [*a]", "nested too deeply"),
        ("- x\n" * 200_000, "at most 524288 are read"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [a, b]\n: 1", "unknown key|found unhashable"),
        ("{1: 2}", "unknown key '1'"),
        ("'a\\nerror: b': 2", "unknown key"),
        ("\xff\0", "is no YAML"),
    ],
)
def test_absurd_yaml(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        raise UserError(outcome_of(path))


def test_aliases_that_expand_are_refused_before_they_do(tmp_path):
    path = tmp_path / "mine.yaml"
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 100000 values"):
        read_yaml(path)
    merged = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)]
    path.write_text("\n".join(merged))
    with pytest.raises(UserError, match="more than 100000 values"):
        read_yaml(path)
    path.write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    path.write_text("")
    assert read_yaml(path) is None


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    for text in ("rate: 50\nname: x\nrate: 60", "name: x\nset: {mu: 1, 'mu': 2}", "name: x\na: {x: 1}\na: {y: 1}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"the key '(rate|mu|a)' stands twice, in lines \d and \d; remove one"):
            read_yaml(path)


def test_expanded_counts_shared_values_as_often_as_they_are_referred_to():
    inner = [1, 2]
    assert expanded([inner, inner, 3], lambda own: own if isinstance(own, list) else ()) == 1 + 3 + 3 + 1


# --- what is no file


def special(kind: str, path: Path) -> None:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as one:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's path may have a hundred letters only
            one.bind(path.name)
            os.chdir(here)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder"])
@pytest.mark.parametrize("name", ["s1.csv", "s1.csv.gz", "s1.zip", "s1.npz", "s1.npy", "s1.mat", "s1.h5", "s1.edf"])
def test_only_regular_files_are_opened(folder, kind, name):
    special(kind, folder / name)
    message = outcome(folder, folder=f"rec/{name}", label={"pattern": "(s)"}, classes=["s", "t"])
    assert kind in message if kind != "a folder" else "holds no file that can be read" in message
    with pytest.raises(UserError, match=f"is {kind}, not a file"):
        sha256(folder / name)


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder"])
def test_only_regular_files_are_opened_elsewhere(folder, kind):
    path = folder / "watch_dataset.npy"
    special(kind, path)
    for reader in (load_npy, load_npz, read_yaml, load_source):
        with pytest.raises(UserError, match=f"is {kind}, not a file"):
            reader(path)
    spec = generate.ShardSpec("SPAR")
    with pytest.raises(UserError, match="there is no such file"):
        generate.prepare(spec, folder.parent / "data", path, False)
    with pytest.raises(UserError, match=f"is {kind}, not a file" if kind != "a folder" else "UCI-HAR is not in"):
        generate.prepare(generate.ShardSpec("UCI-HAR"), folder.parent / "data", path, False)


def test_what_is_not_read_for_being_no_file_is_said(folder, capsys):
    (folder / "s1.csv").write_text(CSV)
    os.mkfifo(folder / "s2.csv")
    assert outcome(folder) == "read"
    assert describe.main([str(folder.parent / "mine.yaml")]) == 0
    assert "ignored: s2.csv: is no regular file" in capsys.readouterr().out


def barred(monkeypatch, path: Path, *names: str) -> None:
    """Make operations of `os` refuse a path, as file permissions do for users other than root."""
    for name in names:
        real = getattr(os, name)

        def refusing(given, *args, real=real, **options):
            if isinstance(given, str | Path) and (Path(given) == path or path in Path(given).parents):
                raise PermissionError(13, "Permission denied", str(given))
            return real(given, *args, **options)

        monkeypatch.setattr(os, name, refusing)
        if hasattr(accessor := getattr(pathlib, "_NormalAccessor", None), name):  # of Python 3.10, by which paths ask
            monkeypatch.setattr(accessor, name, staticmethod(refusing))


def test_an_unreadable_folder_cannot_be_read_and_is_not_damaged(folder, monkeypatch):
    (folder / "s1.csv").write_text(CSV)
    assert outcome(folder) == "read"
    barred(monkeypatch, folder, "scandir", "listdir")
    with pytest.raises(UserError, match=r"rec: cannot be read \(Permission denied\)"):
        check_listable(folder)
    assert "rec: cannot be read (Permission denied)" in outcome(folder)
    monkeypatch.undo()
    barred(monkeypatch, folder, "stat")
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        state_of(folder / "s1.csv")
    for reader in (shards.read_manifest, lambda path: pfllib.import_folder(path, "x", path)):
        with pytest.raises(UserError) as caught:
            reader(folder)
        assert "Permission denied" in str(caught.value) and "remove" not in str(caught.value)


def test_parsing_tells_a_barred_file_from_a_damaged_one():
    cases = [
        (PermissionError(13, "Permission denied"), "x: cannot be read (Permission denied)"),
        (OSError(5, "Input/output error"), "x: cannot be read (Input/output error)"),
        (OSError(22, "Invalid argument"), "x: is no zip, or a damaged one ([Errno 22] Invalid argument); get it again"),
        (SyntaxError("odd\n  sign"), "x: is no zip, or a damaged one (odd sign); get it again"),
        (KeyError(), "x: is no zip, or a damaged one (KeyError); get it again"),
        (UserError("as it is"), "as it is"),
    ]
    for raised, message in cases:
        with pytest.raises(UserError) as caught, parsing("x", "zip", "get it again"):
            raise raised
        assert str(caught.value) == message


# --- shards


@pytest.fixture
def made(tmp_path) -> Path:
    x, y = np.ones((3, 2, 1, 4), np.float32), np.array([0, 1, 0])
    client = shards.ClientData(shards.Shard(x, y), shards.Shard(x, y), {})
    shards.write(tmp_path / "made", {"name": "x", "classes": ["a", "b"], "channels": ["p", "q"]}, [client, client])
    return tmp_path / "made"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [2, 1, 10**400]),
        ("shape", [2, 1, -4]),
        ("shape", [2**62, 2**62, 2**62]),
        ("shape", {"a": 1}),
        ("name", "a\nerror: forged"),
        ("name", "../../x"),
        ("classes", [f"class {n}" for n in range(10_000)]),
        ("classes", ["a", "b\0"]),
        ("channels", ["p", "\x1b[31m"]),
        ("clients", [{"train": {"samples": 10**400}}]),
        ("clients", [[]]),
        ("clients", 10**9),
        ("spec", {"train_fraction": 10**400}),
        ("spec", {"evaluate_on": ["test"]}),
        ("format", ["fedkdx-shards"]),
        ("layout", {"a": [1]}),
    ],
)
def test_an_absurd_manifest(made, key, value):
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(UserError, match=r"manifest\.json"):
        shards.load(made)


@pytest.mark.parametrize("statistics", [{}, [], 3, {"count": [10**400] * 2, "mean": [0, 0], "variance": [1, 1]}])
def test_absurd_statistics(made, statistics):
    manifest = json.loads((made / "manifest.json").read_text())
    for client in manifest["clients"]:
        client["statistics"] = statistics
    (made / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="statistics"):
        shards.load(made)


@pytest.mark.parametrize("content", ["\xff\xfe", "{" * 100_000, "[" * 100_000, "9" * 5000, '{"a": NaN}', "", '"a"'])
def test_a_manifest_that_is_no_json(made, content):
    (made / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"manifest\.json"):
        shards.load(made)


def test_shards_with_other_members(made):
    path = made / "train" / "0.npz"
    x, y = np.ones((3, 2, 1, 4), np.float32), np.array([0, 1, 0])
    for arrays in ({"x": x}, {"x": x, "y": np.zeros(3, "V4")}, {"x": np.zeros(3, [("a", "f4")]), "y": y}, {}):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=r"0\.npz"):
            shards.load(made)
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("x", b"text")
        zipped.writestr("y", b"text")
    with pytest.raises(UserError, match=r"0\.npz.*remove"):
        shards.load(made)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe, not a file"):
        shards.load(made)


# --- pickles


def test_pickles_that_ask_for_much():
    deep: list[object] = []
    for _ in range(60):
        deep = [deep, deep]
    shared: tuple[object, ...] = ("x",)
    for _ in range(60):
        shared = (shared, shared)
    key = pickle.dumps(shared, protocol=2)[:-1]  # without its end
    cases = {
        "more than 10000000 values": pickle.dumps(deep),
        "a key that is neither text nor a number": b"\x80\x02}" + key[2:] + b"K\x01s.",
        "no pickle of arrays|too large": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    }
    for message, content in cases.items():
        with pytest.raises(UserError, match=message):
            read_pickle(io.BytesIO(content), "x.pkl")
    assert read_pickle(io.BytesIO(b"\x80\x02]r\xff\xff\xff\x7f."), "x.pkl") == []  # 32 GB of memo in C


@pytest.mark.parametrize("code", ["(i4,", "i4,f8", "(", "V4", "{}", "O8,i4", "i4" * 10_000, "U99999999999"])
def test_dtypes_that_are_none(code):
    content = pickle.dumps(np.zeros(2, np.float64), protocol=2).replace(
        b"X\x02\x00\x00\x00f8", b"X" + struct.pack("<I", len(code)) + code.encode()
    )
    assert code.encode() in content
    with pytest.raises(UserError, match=r"x\.pkl: is no pickle of arrays"):
        read_pickle(io.BytesIO(content), "x.pkl")


# --- names


def test_a_folder_takes_no_data_sets_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SPAR").mkdir()
    (tmp_path / "other").mkdir()
    assert shards_folder("SPAR") is None
    assert shards_folder("./SPAR") == Path("SPAR") and shards_folder(str(tmp_path / "SPAR")) == tmp_path / "SPAR"
    said: list[str] = []
    generate.prepare(generate.ShardSpec("SPAR", window="128 samples"), tmp_path / "data", None, False, said.append)
    assert said[0] == "-data SPAR is the data set; the folder of that name is meant by ./SPAR"
    with pytest.raises(UserError, match=r"other.*a folder of shards is named with a separator: \./other"):
        generate.find_source("other")


def test_windows_that_do_not_fit_into_memory_are_refused(folder, monkeypatch):
    (folder / "s1.csv").write_text(CSV)
    monkeypatch.setattr(limits, "_memory", lambda: 1000)
    message = outcome(folder)
    assert "windows of 8 samples would take" in message and "choose a smaller window or overlap" in message


LONG = "x" * 5000


@pytest.mark.parametrize("data", ["", ".", "/", LONG, f"{LONG}.yaml", "x/" * 5000, "a\0b", "a\0b.yaml", "a\nerror: b"])
def test_absurd_names_of_data(tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    for main, arguments in ((describe.main, [data]), (generate.main, ["-data", data])):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-data", "UCI-HAR", "--raw", LONG],
        ["-data", "UCI-HAR", "--raw", "a\0"],
        ["-data", "UCI-HAR", "--data-root", LONG],
        ["-data", "SPAR", "--data-root", "a\0"],
        ["-data", "SPAR", "--data-root", LONG],
        ["-data", "SPAR", "--data-root", "/dev/full"],
        ["-data", "SPAR", "--window", "9" * 400],
        ["-data", "SPAR", "--median", "9" * 400],
        ["-data", "SPAR", "--seed", "9" * 400],
        ["-data", "SPAR", "--seed", "9" * 5000],
        ["import-pfllib", LONG, "--name", "x"],
        ["import-pfllib", "a\0", "--name", "x"],
        ["import-pfllib", ".", "--name", LONG],
        ["import-pfllib", ".", "--name", "x", "--data-root", LONG],
    ],
)
def test_absurd_command_lines(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert generate.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.isprintable()


def test_seeds_that_a_float_does_not_tell_apart_give_different_shards():
    one, other = (generate.ShardSpec("X", seed=seed) for seed in (2**53, 2**53 + 1))
    assert one.counted()["seed"] != other.counted()["seed"] and one.folder_name() != other.folder_name()


def test_a_member_without_a_name_is_no_reason_to_fail(folder):
    with zipfile.ZipFile(folder / "s1.zip", "w") as zipped:
        zipped.writestr(zipfile.ZipInfo(""), CSV)
    assert outcome(folder) == "read" or "s1.zip" in outcome(folder)
    with zipfile.ZipFile(folder / "UCI HAR Dataset.zip", "w") as zipped:
        zipped.writestr(zipfile.ZipInfo(""), CSV)
    with pytest.raises(UserError, match=r"no 'train/y_train\.txt' in this zip"):
        generate.prepare(generate.ShardSpec("UCI-HAR"), folder.parent / "data", folder / "UCI HAR Dataset.zip", False)
