"""`fedkdx data init`: descriptions drafted from files; the right ones are worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataset_utils import describe
from dataset_utils.draft import command
from dataset_utils.draft.drafting import draft
from dataset_utils.sources.own.description import read_description
from registry.errors import UserError

ROWS = 600  # 12 s at 50 Hz: each label is held for 300 rows


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def signals(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, channels)).round(4)


def table(path: Path, names, columns, separator=",", decimal=".", before="") -> None:
    """Write a table; `names` None: without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(before)
        writer = csv.writer(file, delimiter=separator)
        if names is not None:
            writer.writerow(names)
        for row in zip(*columns, strict=True):
            writer.writerow([str(cell).replace(".", decimal) if isinstance(cell, float) else cell for cell in row])


def seconds(step: float = 0.02) -> list[float]:
    return [round(n * step, 6) for n in range(ROWS)]


def halves(first: str = "walk", second: str = "sit") -> list[str]:
    return [first] * (ROWS // 2) + [second] * (ROWS // 2)


def init(capsys, *words: str) -> tuple[dict, str]:
    """Return the values of the file that the command writes, and what it prints."""
    assert command.main(words) == 0
    out, err = capsys.readouterr()
    assert not err
    path = Path(words[words.index("-o") + 1] if "-o" in words else f"{Path(words[0]).name}.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8")), out


def refused(capsys, *words: str) -> str:
    """Return the one line with which the command ends."""
    assert command.main(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    return err


def of_people(folder: str = "watch") -> None:
    for n in range(2):
        columns = [seconds(), *signals(n).T.tolist(), halves()]
        table(Path(folder, f"p{n + 1}.csv"), ["t", "ax", "ay", "az", "activity"], columns)


def test_a_table_for_each_person(capsys):
    of_people()
    values, out = init(capsys, "watch")
    assert values == {
        "name": "watch",
        "folder": "watch",
        "time": {"column": "t", "unit": "s"},  # steps of 0.02: 50 Hz in seconds, 50 kHz in milliseconds
        "rate": 50,
        "columns": ["ax", "ay", "az"],
        "label": "activity",
        "subject": "file",
        "window": 2.56,  # 128 samples
        "overlap": 0.5,
    }
    assert "found: rate 50" in out and "guess: subject file" in out and "2 subjects and 2 classes" in out
    assert out.endswith("next: fedkdx data describe watch.yaml\n")
    assert describe.main(["watch.yaml"]) == 0


def test_a_run_by_a_draft_as_it_is(capsys):
    from fedkdx_plugin.cli.main import main

    of_people()
    assert main(["data", "init", "watch"]) == 0
    # 600 rows in steps of 64 are 8 windows of each person
    flags = "--min-samples 2 -algo FedAvg -m cnn_small -gr 1 -jr 1 -ls 1 -dev cpu --backend sequential".split()
    assert main(["run", "-data", "watch.yaml", *flags]) == 0


def test_each_guess_has_a_comment_beside_it(capsys):
    of_people()
    init(capsys, "watch")
    lines = Path("watch.yaml").read_text(encoding="utf-8").splitlines()
    for key in ("subject", "window", "overlap"):
        assert any(line.startswith(f"{key}:") and "# guess: " in line for line in lines), key


def test_semicolons_decimal_commas_notes_and_milliseconds(capsys):
    for n in range(2):
        columns = [[20 * row for row in range(ROWS)], *signals(n).T.tolist(), halves("gehen", "sitzen")]
        path = Path("Läufe 1", f"Müller {n}.csv")
        table(path, ["Zeit", "x", "y", "z", "label"], columns, ";", ",", "Gerät: Uhr\nversion 3\n")
    values, out = init(capsys, "Läufe 1")
    assert values["time"] == {"column": "Zeit", "unit": "ms"} and values["rate"] == 50
    assert values["columns"] == ["x", "y", "z"] and values["label"] == "label"
    assert values["folder"] == "Läufe 1" and "decimal commas (2 files)" in out
    assert "  error:" not in out and "2 subjects" in out


def test_without_a_header(capsys):
    for n in range(2):
        columns = [seconds(0.01), *signals(n).T.tolist(), [0] * 300 + [1] * 300]
        table(Path("bare", f"{n + 1}.csv"), None, columns, ";")
    values, out = init(capsys, "bare")
    assert values["dialect"] == {"header": ["c1", "c2", "c3", "c4", "c5"], "separator": ";"}
    assert values["time"] == {"column": "c1", "unit": "s"} and values["rate"] == 100
    assert values["columns"] == ["c2", "c3", "c4"] and values["label"] == "c5"
    assert values["window"] == 2  # 2 s are more than 128 samples
    assert "  error:" not in out and "2 subjects" in out


def test_a_row_for_each_window_is_told(capsys):
    for n in range(2):
        table(Path("rows", f"{n}.txt"), None, np.random.default_rng(n).normal(size=(64, 30)).round(3).tolist(), " ")
    _, out = init(capsys, "rows")
    assert "64 columns without names: is each row a window?" in out


def test_a_line_of_units_below_the_header(capsys):
    for n in range(2):
        columns = [seconds(), *signals(n).T.tolist(), halves()]
        table(Path("u", f"p{n}.csv"), None, columns, before="t,ax,ay,az,label\ns,g,g,g,-\n")
    values, out = init(capsys, "u")
    assert values["dialect"] == {"header": ["t", "ax", "ay", "az", "label"], "skip": 2}
    assert values["columns"] == ["ax", "ay", "az"] and "  error:" not in out


def test_iso_dates_and_columns_of_subject_and_session(capsys):
    start = np.datetime64("2024-03-01T09:00:00.000")
    times = [str(start + np.timedelta64(20 * n, "ms")) for n in range(ROWS)]
    names = ["timestamp", "subject", "session", "ax", "label"]
    for n in range(2):  # both persons are in each file
        who = ["a"] * 300 + ["b"] * 300
        label = (["walk"] * 150 + ["sit"] * 150) * 2
        table(Path("d", f"{n}.csv"), names, [times, who, [f"v{n}"] * ROWS, signals(n, 1)[:, 0].tolist(), label])
    values, out = init(capsys, "d")
    assert values["time"] == {"column": "timestamp", "unit": "iso"} and values["rate"] == 50
    assert values["subject"] == {"column": "subject"} and values["session"] == {"column": "session"}
    assert values["columns"] == ["ax"] and values["label"] == "label"
    assert "  error:" not in out and "2 subjects" in out


def test_dates_that_may_be_read_in_two_ways_are_left_to_the_author(capsys):
    times = [f"01/02/2024 09:00:{n / 50:09.6f}" for n in range(ROWS)]  # the first of February, or January 2nd
    table(Path("d", "p1.csv"), ["time", "ax", "label"], [times, signals(0, 1)[:, 0].tolist(), halves()])
    values, out = init(capsys, "d")
    assert values["time"] == {"column": "time", "unit": "???"} and values["rate"] == 50
    assert "'%d/%m/%Y %H:%M:%S.%f' or '%m/%d/%Y %H:%M:%S.%f'" in out
    assert describe.main(["d.yaml"]) == 2
    assert "'unit' is to be filled in" in capsys.readouterr().err


def test_labels_and_subjects_in_names_without_a_clock(capsys):
    for who in ("p1", "p2"):
        for what in ("walk", "sit"):
            table(Path("n", f"{who}_{what}_1.csv"), ["ax", "ay"], signals(0, 2).T.tolist())
    values, out = init(capsys, "n")
    assert values["label"] == {"pattern": "^[^ _.-]+[ _.-]+([^ _.-]+)"}
    assert values["subject"] == {"pattern": "^([^ _.-]+)"}
    assert values["rate"] == "???" and "time" not in values and values["window"] == "128 samples"
    assert out.endswith("next: replace ??? of rate in n.yaml, then fedkdx data describe n.yaml\n")
    assert describe.main(["n.yaml"]) == 2
    assert "n.yaml: 'rate' is to be filled in: replace ???" in capsys.readouterr().err
    text = Path("n.yaml").read_text(encoding="utf-8").replace("rate: ???", "rate: 50")
    Path("n.yaml").write_text(text, encoding="utf-8")
    assert describe.main(["n.yaml"]) == 0
    assert "2 subjects and 2 classes" in capsys.readouterr().out


def test_labels_in_the_names_of_folders(capsys):
    for what in ("walking", "sitting"):
        for who in ("anna", "bert"):
            table(Path("f", what, f"{who}.csv"), ["t", "ax"], [seconds(), signals(1, 1)[:, 0].tolist()])
    values, out = init(capsys, "f")
    assert values["files"] == "*/*.csv" and values["label"] == {"from": "folder"} and values["subject"] == "file"
    assert "  error:" not in out and "2 subjects and 2 classes" in out


def test_folders_of_training_and_test_data_are_no_labels():
    for part in ("train", "test"):
        for n in range(2):
            table(Path("s", part, f"p{n}_{part}.csv"), ["t", "ax"], [seconds(), signals(n, 1)[:, 0].tolist()])
    values = draft(Path("s")).values
    assert values["label"] == "???" and values["subject"] == {"pattern": "^([^ _.-]+)"}


def test_a_table_of_labelled_stretches_beside_each_recording(capsys):
    for n in range(2):
        table(Path("m", f"p{n}.csv"), ["t", "ax"], [seconds(), signals(n, 1)[:, 0].tolist()])
        stretches = [[0.0, 6.0], [6.0, 12.0], ["walk", "sit"]]
        table(Path("m", f"p{n}_labels.csv"), ["begin", "end", "activity"], stretches)
    values, out = init(capsys, "m")
    assert values["label"] == {"table": "{file}_labels.csv", "start": "begin", "label": "activity"}
    assert values["columns"] == ["ax"] and "files" not in values
    assert "  error:" not in out and "2 subjects and 2 classes" in out


def test_a_file_for_each_sensor(capsys):
    for who in ("anna", "bert"):
        table(Path("w", who, "ACC.csv"), ["t", "x", "y"], [seconds(), *signals(1, 2).T.tolist()])
        slow = [list(range(12)), [float(60 + n % 3) for n in range(12)]]
        table(Path("w", who, "HR.csv"), ["timestamp_s", "hr"], slow)
        table(Path("w", who, "labels.csv"), ["start", "end", "label"], [[0, 6], [6, 12], ["walk", "sit"]])
    values, out = init(capsys, "w")
    assert values["streams"] == [
        {"files": "*/ACC.csv", "columns": ["x", "y"], "rate": 50, "time": {"column": "t", "unit": "s"}},
        {"files": "*/HR.csv", "columns": ["hr"], "rate": 1, "time": {"column": "timestamp_s", "unit": "s"}},
    ]
    assert values["rate"] == 50 and values["subject"] == "folder"
    assert values["label"] == {"table": "{subject}/labels.csv"}  # the subject is the folder
    assert "  error:" not in out and "2 subjects and 2 classes" in out


def test_sensors_whose_columns_have_the_same_names(capsys):
    for who in ("p1", "p2"):
        for sensor in ("acc", "gyro"):
            columns = [seconds(), *signals(1, 2).T.tolist(), *([halves()] if sensor == "acc" else [])]
            table(Path("w", f"{who}_{sensor}.csv"), ["t", "x", "y", *(["label"] if sensor == "acc" else [])], columns)
    values, out = init(capsys, "w")
    acc, gyro = values["streams"]
    assert acc["files"] == "*_acc.csv" and acc["columns"] == ["x", "y"] and acc["label"] == "label"
    assert gyro["columns"] == ["gyro_x", "gyro_y"]
    assert gyro["dialect"] == {"header": ["t", "gyro_x", "gyro_y"], "skip": 1}
    assert "label" not in values and "  error:" not in out and "2 subjects and 2 classes" in out


@pytest.mark.parametrize("ending", [".npz", ".mat", ".h5"])
def test_arrays(ending, capsys):
    Path("a").mkdir()
    for n in range(2):
        arrays = {"acc": signals(n), "label": np.array([0] * 300 + [1] * 300), "fs": np.array([50.0])}
        path = Path("a", f"s{n}{ending}")
        if ending == ".npz":
            np.savez(path, **arrays)
        elif ending == ".mat":
            pytest.importorskip("scipy.io").savemat(path, arrays)
        else:
            with pytest.importorskip("h5py").File(path, "w") as file:
                for name, array in arrays.items():
                    file[name] = array
    values, out = init(capsys, "a")
    assert values["columns"] == ["acc[0]", "acc[1]", "acc[2]"] and values["label"] == "label"
    assert values["rate"] == 50 and "time" not in values and values["subject"] == "file"
    assert "  error:" not in out and "2 subjects and 2 classes" in out


def test_windows_that_are_cut_already(capsys):
    Path("c").mkdir()
    x = np.random.default_rng(0).normal(size=(40, 3, 64))
    np.savez(Path("c", "all.npz"), x=x, y=np.arange(40) % 2, subject=np.repeat([1, 2], 20))
    values, out = init(capsys, "c")
    assert values["cut_already"] == "channels first" and values["window"] == "64 samples"
    assert values["columns"] == ["c1", "c2", "c3"] and values["label"] == "y"
    assert values["subject"] == {"column": "subject"} and values["rate"] == values["overlap"] == "???"
    assert "to be filled in: overlap" in out


def test_parquet(capsys):
    pytest.importorskip("pyarrow")
    import pandas as pd

    Path("q").mkdir()
    for n in range(2):
        frame = pd.DataFrame(signals(n), columns=["ax", "ay", "az"])
        frame.insert(0, "t", seconds())
        frame["label"] = halves()
        frame.to_parquet(Path("q", f"{n}.parquet"))
    values, out = init(capsys, "q")
    assert values["columns"] == ["ax", "ay", "az"] and values["label"] == "label" and values["rate"] == 50
    assert "  error:" not in out and "2 subjects and 2 classes" in out


def test_edf_with_annotations(capsys):
    edf = pytest.importorskip("pyedflib")
    Path("e").mkdir()
    for n in range(2):
        with edf.EdfWriter(str(Path("e", f"p{n}.edf")), 1, file_type=edf.FILETYPE_EDFPLUS) as writer:
            about = {"label": "EEG", "dimension": "uV", "sample_frequency": 50, "physical_max": 100.0}
            about |= {"physical_min": -100.0, "digital_max": 32767, "digital_min": -32768}
            writer.setSignalHeaders([about])
            writer.writeSamples([np.random.default_rng(n).normal(size=50 * 120)])
            for at, stage in enumerate(("W", "N1", "W", "N1")):
                writer.writeAnnotation(30 * at, 30, stage)
    values, out = init(capsys, "e")
    assert values["columns"] == ["EEG"] and values["rate"] == 50
    assert values["label"] == {"table": "{file}.edf"}
    assert values["window"] == 30 and values["overlap"] == 0  # as annotated
    assert "  error:" not in out and "2 subjects and 2 classes" in out


def test_wfdb_with_annotations(capsys):
    wfdb = pytest.importorskip("wfdb")
    Path("r").mkdir()
    for name in ("100", "101"):
        signal = np.random.default_rng(int(name)).normal(size=(7200, 1))
        wfdb.wrsamp(name, 360, ["mV"], ["MLII"], signal, fmt=["16"], write_dir="r")
        beats = np.arange(500, 7000, 500)
        wfdb.wrann(name, "atr", beats, symbol=["N", "V"] * 6 + ["N"], write_dir="r")
    values, out = init(capsys, "r")
    assert values["columns"] == ["MLII"] and values["rate"] == 360 and values["label"] == {"events": "{file}.atr"}
    assert "  error:" not in out and "2 subjects and 2 classes" in out


def test_columns_that_differ_between_files_are_told(capsys):
    of_people()
    table(Path("watch", "p3.csv"), ["t", "ax", "ay", "activity"], [seconds(), *signals(3, 2).T.tolist(), halves()])
    values, out = init(capsys, "watch")
    assert values["columns"] == ["ax", "ay"] and "columns differ between files" in out and "'az'" in out


def test_what_cannot_be_read_is_counted(capsys):
    of_people()
    Path("watch", "p3.csv").write_bytes(bytes(range(256)) * 10)
    Path("watch", "p4.csv").write_text("")
    Path("watch", "notes.docx").write_text("x")
    values, out = init(capsys, "watch")
    assert values["files"] == ["p1.csv", "p2.csv"]
    assert "2 files cannot be read as a table or recording" in out and "1 of .docx" in out


def test_files_of_two_kinds_are_told(capsys):
    of_people()
    np.savez(Path("watch", "other.npz"), acc=signals(0))
    values, out = init(capsys, "watch")
    assert values["files"] == "*.csv" and "those of .csv are described, 1 of .npz are not" in out


def test_a_minus_one_is_ignored_and_numbers_of_rows_are_no_channel(capsys):
    for n in range(2):
        label = [-1] * 200 + [1] * 200 + [2] * 200
        table(
            Path("i", f"p{n}.csv"),
            ["", "t", "ax", "row", "label"],
            [range(ROWS), seconds(), signals(n, 1)[:, 0].tolist(), range(ROWS), label],
        )
    values, out = init(capsys, "i")
    assert values["ignore"] == [-1] and values["columns"] == ["ax"]
    assert "'row': numbers of rows or times, no channels" in out and "  error:" not in out


def test_a_file_is_not_replaced_without_being_told(capsys):
    of_people()
    Path("watch.yaml").write_text("mine")
    assert "watch.yaml: is there already" in refused(capsys, "watch")
    assert "x.txt: a description's name ends in .yaml" in refused(capsys, "watch", "-o", "x.txt")
    assert Path("watch.yaml").read_text() == "mine"
    assert init(capsys, "watch", "-o", "sub/other.yaml")[0]["folder"] == "../watch"
    assert init(capsys, "watch", "--overwrite")[0]["name"] == "watch"


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda f: None, "there is no such folder"),
        (lambda f: f.write_text("x"), "is a file; give the folder"),
        (lambda f: f.mkdir(), "holds no files"),
        (lambda f: (f.mkdir(), (f / "a.docx").write_text("x")), "1 file that cannot be read: 1 of .docx"),
        (lambda f: (f.mkdir(), (f / "a.csv").write_bytes(b"\0\1\2" * 50)), "a.csv: is no text"),
        (lambda f: (f.mkdir(), (f / "a.txt").write_text("Dear all,\nthese are notes.\n")), "nothing can be drafted"),
        (lambda f: (f.mkdir(), (f / "a.npz").write_bytes(b"PK")), "nothing can be drafted"),
    ],
)
def test_where_nothing_can_be_drafted_one_line_says_why(make, line, capsys):
    make(Path("x"))
    assert line in refused(capsys, "x")
    assert not Path("x.yaml").exists()


def test_the_check_reads_some_of_many_files(capsys, monkeypatch):
    for n in range(6):
        columns = [seconds(), *signals(n).T.tolist(), halves()]
        table(Path("many", f"p{n}.csv"), ["t", "ax", "ay", "az", "label"], columns)
    monkeypatch.setattr(command, "CHECKED", 3)
    _, out = init(capsys, "many")
    assert "read by this draft, 3 of 6 files:" in out and "3 subjects and 2 classes" in out


def test_what_is_to_be_filled_in_is_refused_by_reading(tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("{name: d, folder: ., rate: 50, window: 2, columns: [a], label: '???'}")
    with pytest.raises(UserError, match=r"d.yaml: 'label' is to be filled in"):
        read_description(path)


def test_real_recordings(real_data, tmp_path):
    import zipfile

    with zipfile.ZipFile(real_data("SLEEP.zip")) as zipped:
        zipped.extractall(tmp_path)
    found = draft(tmp_path / "SLEEP")
    assert found.values["time"] == {"column": "c1", "unit": "us"} and found.values["rate"] == 50
    assert found.values["columns"] == ["c2", "c3", "c4"] and found.values["label"] == "c5"
