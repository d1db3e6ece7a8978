"""Recordings with one flaw each, from the command line to the shards: right, or refused with the reason; never wrong.

Each set has four subjects of 6,000 rows at 50 Hz, 2,000 each of walk, run and sit. Windows of 128 samples every 64 are
(6000 - 128) // 64 + 1 = 92 a subject: 31 of walk and of run, 30 of sit (the tie goes to the first of run, sit, walk).
Of each round(n / 5) = 6 are tested on, so that there are 4 · 74 = 296 to train and 4 · 18 = 72 to test on.
"""

import json
import re
from datetime import datetime, timedelta

import numpy as np
import pytest

from dataset_utils import describe, generate
from dataset_utils.spec import ShardSpec

HEADER = "t,ax,ay,az,activity"
YAML = "name: {name}\nfolder: {name}\nrate: 50\nwindow: 2.56\ncolumns: [ax, ay, az]\nlabel: activity\ntime: t\n"
START = datetime(2024, 3, 1, 9)
READ = "4 clients, 296 training and 72 test windows"


def rows(subject):
    time = np.arange(6000) / 50
    x = np.sin(6 * time)[:, None] + np.random.default_rng(subject).normal(0, 0.1, (6000, 3))
    labels = np.repeat(["walk", "run", "sit"], 2000)
    return [[f"{a:.3f}", *(f"{v:.4f}" for v in b), str(c)] for a, b, c in zip(time, x, labels, strict=True)]


ROWS = [rows(subject) for subject in range(4)]


def make(root, change=None, extra="", text_change=None, ending=".csv", name="made"):
    (root / name).mkdir()
    (root / f"{name}.yaml").write_text(YAML.format(name=name) + extra)
    for s, original in enumerate(ROWS):
        own = change(original) if change else original
        text = "\n".join([HEADER, *(",".join(row) for row in own)]) + "\n"
        text = text_change(s, text) if text_change else text
        (root / name / f"s{s}{ending}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / f"{name}.yaml"


def time(change):
    return lambda rows: [[change(float(row[0])), *row[1:]] for row in rows]


def label(names):
    return lambda rows: [[*row[:4], names.get(row[4], row[4])] for row in rows]


def swapped(rows):
    return [rows[i + 1] if i % 200 == 50 else rows[i - 1] if i % 200 == 51 else rows[i] for i in range(len(rows))]


def with_subject(s, text):
    who = "" if s == 3 else f"p{s}"
    first, *others = text.splitlines()
    return "\n".join([f"{first},who", *(f"{line},{who}" for line in others)]) + "\n"


def commas(text):
    return text.replace(",", ";").replace(".", ",")


def commas_in_channels(text):
    """Write the three channels with decimal commas, and times as they are."""
    rows = [line.split(",") for line in text.splitlines()]
    return "\n".join(";".join([t, *(cell.replace(".", ",") for cell in xyz), y]) for t, *xyz, y in rows) + "\n"


def title_case(rows):
    return [[*row[:4], row[4].title() if i % 9 else row[4]] for i, row in enumerate(rows)]


PREAMBLE = "------ Data File Created By A Device ------\nSerial Number: X1\n"
RIGHT = {  # the change of the rows, lines added to the YAML, the change of the text, what must be said
    "clean": (None, "", None, ""),
    "time in ms": (time(lambda t: str(round(1000 * t))), "", None, "times are in milliseconds (in 4 recordings)"),
    "time in ns": (time(lambda t: str(round(1e9 * t))), "", None, "times are in nanoseconds"),
    "time in us since 1970": (time(lambda t: str(round(1e6 * (t + 1.7e9)))), "", None, "times are in microseconds"),
    "time as ISO": (time(lambda t: (START + timedelta(seconds=t)).isoformat()), "", None, "times are ISO dates"),
    "time as UTC": (time(lambda t: f"{(START + timedelta(seconds=t)).isoformat()}Z"), "", None, "times are ISO dates"),
    "time as ISO with a decimal comma": (
        time(lambda t: (START + timedelta(seconds=t)).isoformat().replace(".", "_")),
        "",
        lambda s, t: t.replace(",", ";").replace("_", ","),
        "times are ISO dates",
    ),
    "German dates": (
        time(lambda t: (START + timedelta(seconds=t)).strftime("%d.%m.%Y %H:%M:%S.%f")),
        "dates",
        None,
        "",
    ),
    "out of order": (swapped, "", None, "120 rows were out of order and were sorted by time"),
    "second half first": (lambda r: r[3000:] + r[:3000], "", None, "rows were out of order"),
    "every row twice": (lambda r: [a for a in r for _ in (0, 1)], "", None, "24000 rows repeat another row"),
    "the whole twice": (lambda r: r + r, "", None, "24000 rows repeat another row"),
    "a fifth of rows missing": (
        lambda r: [a for i, a in enumerate(r) if i % 100 < 80],
        "",
        None,
        "4720 samples were missing and were interpolated",  # 4 subjects · 59 gaps of 20 rows between rows
    ),
    "a label None": (label({"walk": "None"}), "", None, ""),
    "a label NA": (label({"walk": "NA"}), "", None, ""),
    "labels nan and null": (label({"walk": "nan", "run": "null"}), "", None, ""),
    "labels with blanks": (label({"walk": " walk "}), "", None, ""),
    "semicolons": (None, "", lambda s, t: t.replace(",", ";"), "cells separated by semicolons (in 4 files)"),
    "tabs": (None, "", lambda s, t: t.replace(",", "\t"), "cells separated by tabs"),
    "blanks": (None, "", lambda s, t: t.replace(",", "  "), "cells separated by blanks"),
    "decimal commas": (None, "", lambda s, t: commas(t), "decimal commas"),
    "decimal commas and tabs": (None, "", lambda s, t: commas(t).replace(";", "\t"), "decimal commas"),
    "decimal commas and ISO dates with points": (
        time(lambda t: (START + timedelta(seconds=t)).isoformat()),
        "",
        lambda s, t: commas_in_channels(t),
        "decimal commas",
    ),
    "sep line": (None, "", lambda s, t: "sep=,\n" + t, "1 line before the header skipped"),
    "sep line of semicolons": (None, "", lambda s, t: "sep=;\r\n" + t.replace(",", ";"), "separated by semicolons"),
    "preamble": (None, "", lambda s, t: PREAMBLE + t, "2 lines before the header skipped"),
    "preamble, told": (None, "dialect: {skip: 2}\n", lambda s, t: PREAMBLE + t, ""),
    "header commented out": (None, "", lambda s, t: "# " + t, ""),
    "UTF-16": (None, "", lambda s, t: t.encode("utf-16"), "encoding utf-16"),
    "UTF-16 without a mark": (None, "", lambda s, t: t.encode("utf-16-le"), "encoding utf-16-le"),
    "UTF-8 with a mark": (None, "", lambda s, t: b"\xef\xbb\xbf" + t.encode(), ""),
    "Latin-1": (label({"walk": "schlürfen"}), "", lambda s, t: t.encode("latin-1"), "encoding latin-1"),
    "old Macintosh": (None, "", lambda s, t: t.replace("\n", "\r"), ""),
    "separators at the ends": (None, "", lambda s, t: t.replace("\n", ",\n"), ""),
    "separators at the ends of rows": (
        None,
        "",
        lambda s, t: t.replace("\n", ",\n").replace("activity,", "activity"),
        "a separator at the end of each row",
    ),
    "no header": (
        None,
        "dialect: {header: [t, ax, ay, az, activity]}\n",
        lambda s, t: t.partition("\n")[2],
        "",
    ),
    "numbers of rows before": (
        None,
        "",
        lambda s, t: "".join(f"{i - 1 if i else ''},{line}\n" for i, line in enumerate(t.splitlines())),
        "",
    ),
    "blank lines": (None, "", lambda s, t: "\n\n" + t.replace("\n", "\n\n"), ""),
}


def prepared(yaml, root):
    """Return the folder of the shards, whose number is checked, and the output."""
    lines = []
    folder = generate.prepare(ShardSpec(str(yaml)), root / "data", None, False, lines.append)
    assert READ in generate.summary(folder)
    return folder, "\n".join(lines)


@pytest.mark.parametrize("name", RIGHT)
def test_read_right(tmp_path, name):
    change, extra, text_change, said = RIGHT[name]
    yaml = make(tmp_path, change, "" if extra == "dates" else extra, text_change)
    if extra == "dates":
        yaml.write_text(yaml.read_text().replace("time: t", "time: {column: t, unit: '%d.%m.%Y %H:%M:%S.%f'}"))
    folder, out = prepared(yaml, tmp_path)
    assert said in out
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert sorted(np.sum(list(counts["windows"].values()), axis=0).tolist()) == [120, 124, 124]


def test_other_endings_are_read(tmp_path):
    for ending in (".CSV", ".tsv", ".Txt"):
        yaml = make(tmp_path, ending=ending, name=ending.strip("."))
        prepared(yaml, tmp_path)


WRONG = {
    "rate is 25": (lambda r: r[::2], "", None, r"s0\.csv: measured rate 25 Hz, .* 50 Hz"),
    "rate is 80": (time(lambda t: f"{t * 50 / 80:.5f}"), "", None, r"s0\.csv: measured rate 80 Hz"),
    "minutes": (time(lambda t: f"{t / 60:.6f}"), "", None, "measured rate 3000 Hz.* minutes"),
    "whole seconds": (time(lambda t: str(int(t))), "", None, "50 rows share each time"),
    "other dates": (time(lambda t: f"03/01/24 {t}"), "", None, "is no number and no date like .*unit: "),
    "labels of other case": (None, "classes: [Walk, Run, sit]\n", None, "label 'walk' .* is listed as 'Walk'"),
    "labels of two cases": (title_case, "", None, "'Run' and 'run' differ in upper and lower case only"),
    "a class that is not there": (
        None,
        "classes: [walk, runn, sit]\n",
        None,
        r"not listed .* 'run' \(8000 rows\) \(did you mean runn\?\).*no window has 'runn'",
    ),
    "a label that is not listed": (None, "classes: [walk, run]\n", None, r"'sit' \(8000 rows\).*ignore: \[sit\]"),
    "one class": (label({"walk": "run", "sit": "run"}), "", None, "fewer than two distinct labels"),
    "no subject": (None, "subject: {column: who}\n", with_subject, r"s3\.csv: 6000 of 6000 rows have no subject"),
    "no header": (None, "", lambda s, t: t.partition("\n")[2], r"has no header with 'ax'.*dialect: \{header: "),
    "another column": (None, "", lambda s, t: t.replace("ay", "Ay"), r"has no column 'ay' \(did you mean Ay\?\)"),
    "a column twice": (None, "", lambda s, t: t.replace("az", "ay"), "has no column 'az'"),
    "the same column twice": (None, "", lambda s, t: t.replace("t,", "ax,", 1), "has no column 't'"),
    "commas for both": (None, "", lambda s, t: t.replace(".", ","), "line 2 has 9 cells, but there are 5 columns"),
    "a torn row": (None, "", lambda s, t: t + "120.0,1,2,3,sit,4\n", "Expected 5 fields in line 6002, saw 6"),
    "a unit row": (None, "", lambda s, t: t.replace("\n", "\ns,g,g,g,\n", 1), r"line 2, column 'ax': 'g' is no number"),
    "UTF-16, told otherwise": (None, "dialect: {encoding: utf-8}\n", lambda s, t: t.encode("utf-16"), "encoding"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refused_with_the_reason(tmp_path, capsys, name):
    change, extra, text_change, reason = WRONG[name]
    yaml = make(tmp_path, change, extra, text_change)
    assert generate.main(["-data", str(yaml), "--data-root", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(reason, error), error
    assert not list((tmp_path / "data").glob("*/*"))  # only hashes of the files are remembered


def test_describe_names_every_flaw_of_a_folder(tmp_path, capsys):
    yaml = make(tmp_path)
    folder = tmp_path / "made"
    for number, name in enumerate(("rate is 25", "minutes", "whole seconds", "no header"), start=4):
        change, _, text_change, _ = WRONG[name]
        made = make(tmp_path, change, "", text_change, name=f"other{number}")
        (made.with_suffix("") / "s0.csv").rename(folder / f"s{number}.csv")
    (folder / "notes.xlsx").write_text("notes")
    (folder / "readme.txt").write_text("notes")
    (folder / "deep").mkdir()
    (folder / "deep" / "s9.csv").write_text("a")
    assert describe.main([str(yaml)]) == 2
    out, errors = capsys.readouterr()
    assert [line.partition(".csv: ")[0] for line in errors.splitlines()] == [
        "error: s4",
        "error: s5",
        "error: s6",
        f"error: {folder / 's7'}",
    ]
    for reason in ("measured rate 25 Hz", "are its times in minutes?", "50 rows share each time", "has no header"):
        assert reason in errors
    assert "ignored: notes.xlsx: the ending '.xlsx'" in out and "ignored: readme.txt: may be notes" in out
    assert "ignored: deep/s9.csv: lies in a subfolder" in out
    assert "368 windows of 4 subjects and 3 classes:" in out and "  walk: 124 windows of 4 subjects" in out
    assert "  subject s0: 92 windows (run 31, sit 30, walk 31)" in out
    assert not list((tmp_path / "data").glob("*/*"))  # only hashes of the files are remembered


def test_describe_of_a_clean_set(tmp_path, capsys):
    assert describe.main([str(make(tmp_path))]) == 0
    out, errors = capsys.readouterr()
    assert not errors
    assert "read: 4 files, 4 recordings, 24000 rows; ignored: 0 files" in out
    assert "measured rate: 50 Hz, 4 recordings" in out
    assert "windows: 128 samples, 2.56 s at 50 Hz, 50% overlap" in out
    # of a subject's windows those at 1920 (80 walk), 1984 (112 run), 3904 (96 run) and 3968 (96 sit) are mixed
    assert f"purity: {(88 + (80 + 112 + 96 + 96) / 128) / 92:.1%} of" in out and "16 windows are mixed" in out


def test_a_file_that_is_there_twice_is_said(tmp_path, capsys):
    yaml = make(tmp_path)
    (tmp_path / "made" / "s9.csv").write_bytes((tmp_path / "made" / "s2.csv").read_bytes())
    assert describe.main([str(yaml)]) == 0
    assert "the same samples twice: s9.csv as s2.csv; leave one out" in capsys.readouterr().out


def test_a_time_that_is_not_read_is_said(tmp_path, capsys):
    yaml = make(tmp_path)
    yaml.write_text(yaml.read_text().replace("time: t\n", ""))
    assert describe.main([str(yaml)]) == 0
    out = capsys.readouterr().out
    assert "column 't' looks like a time and is not read; say time: t (in 4 files)" in out
    assert "no times, so rate and gaps cannot be checked: s0.csv" in out


def test_what_is_discarded_is_counted(tmp_path, capsys):
    text = lambda s, t: t.replace(",sit\n", ",\n", 300) if s == 1 else t.replace(",sit\n", ",shake\n", 10)  # noqa: E731
    yaml = make(tmp_path, extra="ignore: [shake]\n", text_change=text)
    assert describe.main([str(yaml)]) == 0
    out = capsys.readouterr().out
    assert "discarded: 300 rows, no label" in out and "discarded: 30 rows, label 'shake' is to be ignored" in out
    # rows 4000 to 4299 touch windows from 64 · 61 = 3904 to 64 · 67 = 4288, 7 of them; 4000 to 4009: 3904, 3968 only
    assert "13 of 368 windows dropped as they touch an unlabelled sample" in out


def test_a_label_that_is_minus_one_must_be_explained(tmp_path, capsys):
    yaml = make(tmp_path, label({"walk": "-1"}))
    assert describe.main([str(yaml)]) == 2
    assert "the label -1 may be a class or mean 'no label'" in capsys.readouterr().err
    yaml.write_text(yaml.read_text() + "classes: [-1, run, sit]\n")
    assert describe.main([str(yaml)]) == 0
    assert "  -1: 124 windows" in capsys.readouterr().out
