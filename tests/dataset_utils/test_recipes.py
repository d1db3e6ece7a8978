"""Recipes of public data sets, on files made in their documented formats, with their known peculiarities."""

import pickle
import zipfile

import numpy as np
import pytest

from dataset_utils.generate import prepare
from dataset_utils.reading import read
from dataset_utils.recording import UNLABELLED
from dataset_utils.shards import load
from dataset_utils.spec import ShardSpec
from registry import catalog
from registry.errors import UserError


def recordings(name, raw):
    source = catalog.load("datasets", name)()
    return source, list(source.load(source.find(raw, raw, False)))


def reading(name, raw):
    source = catalog.load("datasets", name)()
    lines = []
    made = read(source, source.find(raw, raw, False), source.preprocessing, lines.append, allow_missing=True)
    return made, lines


WISDM = ["Walking", "Jogging", "Upstairs", "Downstairs", "Sitting", "Standing"]


def wisdm(root, rows=220):
    lines = []
    for user in (33, 7):
        for a, activity in enumerate(WISDM):
            for i in range(rows):
                time = 0 if a == 5 else 49105962326000 + a * 10**13 + i * 50_000_000
                lines.append(f"{user},{activity},{time},{i},{user},{a}.5;")
    lines[3] = lines[3] + lines[4]  # two records in a line
    lines[4] = ""
    lines[10] = "33,Walking,49106462326000,0.1,;"  # a value is missing
    lines[11] = lines[11][:-1] + ",;"  # a comma before the semicolon
    (root / "WISDM_ar_v1.1").mkdir()
    (root / "WISDM_ar_v1.1" / "WISDM_ar_v1.1_raw.txt").write_text("\n".join(lines) + "\n")


def test_wisdm(tmp_path):
    wisdm(tmp_path)
    with pytest.warns(UserWarning, match="1 records are not of six cells"):
        source, found = recordings("WISDM", tmp_path)
    assert [(r.subject, source.classes[r.labels[0]]) for r in found] == [(u, a) for u in ("33", "7") for a in WISDM]
    assert [len(r.labels) for r in found] == [219] + [220] * 11
    np.testing.assert_array_equal(found[0].signals[:, 0], np.delete(np.arange(220), 10))
    assert set(found[3].signals[:, 2]) == {3.5} and found[0].time is None
    made, lines = reading("WISDM", tmp_path)
    assert [line.rpartition(": ")[2] for line in lines] == ["1 records are not of six cells, and are left out"]
    # windows of 100 every 50: at 0, 50 and 100 of 219 or 220 rows
    assert made.counts.windows == {"7": [3] * 6, "33": [3] * 6}
    assert made.channels == (
        "body_acc_x",
        "body_acc_y",
        "body_acc_z",
        "gravity_acc_x",
        "gravity_acc_y",
        "gravity_acc_z",
    )


def test_motionsense(tmp_path):
    header = ",attitude.roll,attitude.pitch,attitude.yaw," + ",".join(
        f"{kind}.{axis}" for kind in ("gravity", "rotationRate", "userAcceleration") for axis in "xyz"
    )
    with zipfile.ZipFile(tmp_path / "A_DeviceMotion_data.zip", "w") as zipped:
        for folder in ("dws_1", "dws_2", "ups_3", "wlk_7", "jog_9", "sit_5", "std_6"):
            for who in (1, 12):
                rows = [",".join(map(str, [i, 9, 9, 9, *(who * 10 + c for c in range(9))])) for i in range(300)]
                name = f"A_DeviceMotion_data/{folder}/sub_{who}.csv"
                zipped.writestr(name, "\n".join([header, *rows]) + "\n")
    source, found = recordings("MotionSense", tmp_path)
    assert len(found) == 14 and [r.subject for r in found[:2]] == ["1", "12"]
    assert source.classes[found[-1].labels[0]] == "sitting" and found[-1].name == "sit_5/sub_12.csv"
    np.testing.assert_array_equal(found[1].signals[5], 120 + np.arange(9))
    made = load(prepare(ShardSpec("MotionSense", min_samples=1), tmp_path / "data", tmp_path, False, lambda line: None))
    assert made.num_clients == 2 and made.shape == (9, 1, 128)
    # windows of 128 every 64: 3 of 300 rows, of two files of dws
    assert made.manifest["counts"]["windows"] == {"1": [6, 3, 3, 3, 3, 3], "12": [6, 3, 3, 3, 3, 3]}
    with zipfile.ZipFile(tmp_path / "A_DeviceMotion_data.zip", "w") as zipped:
        zipped.writestr("dws_1/sub_1.csv", "a,b\n1,2\n")
    with pytest.raises(UserError, match="no table of MotionSense"):
        recordings("MotionSense", tmp_path)


def test_mhealth(tmp_path):
    (tmp_path / "MHEALTHDATASET").mkdir()
    for who in (1, 10):
        labels = np.repeat([0, *range(1, 13)], 200)
        table = np.column_stack([np.tile(np.arange(23.0) * who, (len(labels), 1)), labels])
        np.savetxt(tmp_path / "MHEALTHDATASET" / f"mHealth_subject{who}.log", table, fmt="%.5g", delimiter="\t")
    source, (one, ten) = recordings("MHEALTH", tmp_path)
    assert (one.subject, ten.subject) == ("1", "10") and len(source.channels) == 23
    np.testing.assert_array_equal(ten.signals[0], np.arange(23) * 10)
    np.testing.assert_array_equal(one.labels, np.repeat([UNLABELLED, *range(12)], 200))
    assert source.channels[3] == "chest_ecg_1" and source.channels[22] == "arm_mag_z" and len(source.acceleration) == 9
    made, _ = reading("MHEALTH", tmp_path)
    assert made.counts.left_out() == {"no label": 400} and made.windows.x.shape[1:] == (32, 1, 128)
    (tmp_path / "MHEALTHDATASET" / "mHealth_subject1.log").write_text("\t".join(["0"] * 23 + ["13"]) + "\n")
    with pytest.raises(UserError, match=r"mHealth_subject1\.log: an activity that is none of 0 to 12"):
        recordings("MHEALTH", tmp_path)


def wesad(root, who, change=None, **about):
    n = 7000 * 4
    t = np.arange(n) / 700
    chest = {"ACC": np.stack([np.sin(2 * np.pi * 5 * t)] * 3, 1), "Temp": np.full((n, 1), 30, np.float32)}
    chest |= {name: np.sin(2 * np.pi * 100 * t)[:, None] for name in ("ECG", "EMG", "EDA", "Resp")}
    wrist = {"ACC": np.zeros((10, 3)), "BVP": np.zeros((20, 1))}
    label = np.repeat(np.array([0, 1, 2, 3], np.int32), 7000)
    data = {"signal": {"chest": chest, "wrist": wrist}, "label": label, "subject": who} | about
    if change:
        change(data)
    (root / "WESAD" / who).mkdir(parents=True)
    (root / "WESAD" / who / f"{who}.pkl").write_bytes(pickle.dumps(data, protocol=2))


def test_wesad(tmp_path):
    wesad(tmp_path, "S2")
    wesad(tmp_path, "S10")
    _, found = recordings("WESAD", tmp_path)
    assert sorted(r.subject for r in found) == ["S10", "S2"] and found[0].signals.shape == (28000, 8)
    made, _ = reading("WESAD", tmp_path)
    # 10 s each of nothing, baseline, stress and amusement; windows of 10 s every 5 s: of the boundaries the lower class
    assert made.counts.windows == {"S2": [2, 2, 1], "S10": [2, 2, 1]}
    assert made.counts.left_out() == {"not defined or transient": 14000}
    whole = made.windows.x[0, :, 0]
    t = 10 + np.arange(700) / 70
    np.testing.assert_allclose(whole[0], np.sin(2 * np.pi * 5 * t), atol=5e-3)
    np.testing.assert_allclose(whole[6], 30, rtol=1e-6)
    assert abs(whole[3]).max() < 2e-3  # 100 Hz, which 70 Hz cannot hold


def test_wesad_files_of_python_2_and_hostile_ones(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    wesad(tmp_path, "S2")
    path = tmp_path / "WESAD" / "S2" / "S2.pkl"
    # Python 2 wrote its strings, and the bytes of arrays, as the opcode U
    two = (
        b"}(U\x05labelcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n(I2\ntcnumpy\ndtype\n"
    )
    two += b"(U\x02i4I0\nI1\ntR(I3\nU\x01<NNNI-1\nI-1\nI0\ntbI00\nU\x08\xff\x00\x00\x00\x01\x00\x00\x00tbu."
    from dataset_utils.safe_pickle import read_pickle

    path.write_bytes(two)
    with path.open("rb") as file:
        np.testing.assert_array_equal(read_pickle(file, "here")["label"], [255, 1])
    with pytest.raises(UserError, match=r"S2\.pkl: is no file of WESAD"):
        recordings("WESAD", tmp_path)
    path.write_bytes(pickle.dumps({"signal": Evil()}, protocol=2))
    with pytest.raises(UserError, match=r"S2\.pkl: refused, it asks for '__builtin__\.print'"):
        recordings("WESAD", tmp_path)
    path.write_bytes(b"\x80\x02}q\x00(X")
    with pytest.raises(UserError, match=r"S2\.pkl: is no pickle of arrays, or a damaged one"):
        recordings("WESAD", tmp_path)


def test_mit_bih(tmp_path):
    wfdb = pytest.importorskip("wfdb")
    folder = tmp_path / "mitdb"
    folder.mkdir()
    for record, leads in (
        ("100", ["MLII", "V5"]),
        ("114", ["V5", "MLII"]),
        ("102", ["V5", "V2"]),
        ("202", ["MLII", "V1"]),
    ):
        signal = np.column_stack([np.arange(3600.0) / 3600 + (lead == "MLII") for lead in leads])
        wfdb.wrsamp(record, 360, ["mV", "mV"], leads, signal, fmt=["212", "212"], write_dir=str(folder))
        places, symbols = [18, 50, 400, 800, 1200, 1600, 2000, 3500], ["+", "N", "L", "A", "V", "F", "/", "N"]
        wfdb.wrann(record, "atr", np.array(places), symbols, fs=360, write_dir=str(folder))
    with pytest.warns(UserWarning, match="pacemakers are left out: 102"):
        source, found = recordings("MIT-BIH", tmp_path)
    assert [(r.subject, r.name) for r in found] == [("100", "100"), ("114", "114"), ("201", "202")]
    for recording in found:
        assert np.flatnonzero(recording.labels >= 0).tolist() == [50, 400, 800, 1200, 1600, 3500]
        assert [source.classes[k] for k in recording.labels[recording.labels >= 0]] == ["N", "N", "S", "V", "F", "N"]
        np.testing.assert_allclose(recording.signals[:, 0], 1 + np.arange(3600) / 3600, atol=2e-3)
        assert recording.left_out == {"beats of class Q": 1}
    made, _ = reading("MIT-BIH", tmp_path)
    # 90 samples before a beat and 162 from it on: the first begins, and the last ends, outside of the record
    assert made.counts.windows == {name: [1, 1, 1, 1] for name in ("100", "114", "201")}
    np.testing.assert_allclose(made.windows.x[0, 0, 0], 1 + np.arange(310, 562) / 3600, atol=2e-3)
    assert made.counts.total("possible") == 18 and made.counts.total("at_gaps") == 6


def edf(path, signals=(), rate=100, annotations=()):
    pyedflib = pytest.importorskip("pyedflib")
    with pyedflib.EdfWriter(str(path), len(signals), file_type=pyedflib.FILETYPE_EDFPLUS) as writer:
        for k, (label, _) in enumerate(signals):
            about = {
                "label": label,
                "dimension": "uV",
                "sample_frequency": rate,
                "physical_max": 200,
                "physical_min": -200,
            }
            writer.setSignalHeader(
                k, about | {"digital_max": 2047, "digital_min": -2048, "transducer": "", "prefilter": ""}
            )
        if signals:
            writer.writeSamples([values for _, values in signals])
        for onset, seconds, text in annotations:
            writer.writeAnnotation(onset, seconds, text)
    return path


def night(folder, name, hypnogram):
    seconds = 9000
    values = np.repeat(np.arange(seconds // 30) % 200, 3000).astype(float)  # the number of the epoch
    edf(folder / name, [(label, values) for label in ("EEG Fpz-Cz", "EEG Pz-Oz", "EOG horizontal")])
    marks = [
        *((0, 3600, "Sleep stage W"), (3600, 300, "Sleep stage 1"), (3900, 600, "Sleep stage 2")),
        *((4500, 300, "Sleep stage 3"), (4800, 300, "Sleep stage 4"), (5100, 30, "Movement time")),
        *((5130, 570, "Sleep stage R"), (5700, 2400, "Sleep stage W"), (8100, 900, "Sleep stage ?")),
    ]
    # a file of annotations needs a signal to be as long as the night
    edf(folder / hypnogram, [("none", np.zeros(seconds))], 1, marks)


def test_sleep_edf(tmp_path):
    folder = tmp_path / "sleep-cassette"
    folder.mkdir()
    night(folder, "SC4001E0-PSG.edf", "SC4001EC-Hypnogram.edf")
    night(folder, "SC4121E0-PSG.edf", "SC4121EC-Hypnogram.edf")
    _, found = recordings("Sleep-EDF", tmp_path)
    assert [r.subject for r in found] == ["00", "12"]
    made, _ = reading("Sleep-EDF", tmp_path)
    # awake: half an hour before and after sleep, 60 epochs each; N1 300 s, N2 600 s, N3 300 + 300 s, REM 570 s
    assert made.counts.windows == {"00": [120, 10, 20, 20, 19], "12": [120, 10, 20, 20, 19]}
    assert made.counts.purity() == 1  # windows and epochs begin together
    np.testing.assert_allclose(made.windows.x[0, :, 0], 60, atol=0.1)
    # awake too early 1800 s, too late 600 s; unscored: 30 s of movement and 900 s
    assert made.counts.left_out() == {
        "awake for more than 30 min before or after sleep": 2 * 240_000,
        "no label": 2 * 93_000,
    }
    (folder / "SC4001EC-Hypnogram.edf").unlink()
    with pytest.raises(UserError, match=r"SC4001E0-PSG\.edf: 0 files SC4001\*-Hypnogram\.edf beside it"):
        recordings("Sleep-EDF", tmp_path)


def test_own_edf_and_wfdb_files(tmp_path):
    """The same formats as own data: labels from annotations, signals of another rate refused."""
    from tests.dataset_utils.test_own_layouts import recordings as own
    from tests.dataset_utils.test_own_layouts import source_of

    (tmp_path / "rec").mkdir()
    values = np.repeat(np.arange(60.0), 100)
    edf(tmp_path / "rec" / "s1.edf", [("Fpz", values), ("Cz", -values)], annotations=[(0, 30, "W"), (30, 30, "N1")])
    about = {"columns": ["Fpz", "Cz"], "drop": ["time"], "rate": 100}
    (one,) = own(source_of(tmp_path, label={"table": "{file}.edf"}, files="*.edf", **about))
    np.testing.assert_allclose(one.signals[:, 0], values, atol=0.1)
    assert np.bincount(one.labels).tolist() == [3000, 3000] and one.labels[0] == 1  # N1, W
    with pytest.raises(UserError, match=r"s1\.edf: has no signal 'Oz'; it has: Fpz, Cz"):
        own(source_of(tmp_path, label={"table": "{file}.edf"}, files="*.edf", **(about | {"columns": ["Oz"]})))
    (tmp_path / "rec" / "s1.edf").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"s1\.edf: is no EDF or BDF file"):
        own(source_of(tmp_path, label={"table": "{file}.edf"}, files="*.edf", classes=["a", "b"], **about))


def test_own_wfdb_records_with_beats(tmp_path):
    wfdb = pytest.importorskip("wfdb")
    from tests.dataset_utils.test_own_layouts import recordings as own
    from tests.dataset_utils.test_own_layouts import source_of

    (tmp_path / "rec").mkdir()
    folder = str(tmp_path / "rec")
    wfdb.wrsamp("p1", 250, ["mV"], ["II"], np.arange(1000.0)[:, None] / 1000, fmt=["16"], write_dir=folder)
    wfdb.wrann("p1", "atr", np.array([200, 500, 800]), ["N", "V", "N"], fs=250, write_dir=folder)
    label = {"events": "{file}.atr", "before": 0.2}
    source = source_of(tmp_path, columns=["II"], drop=["time"], rate=250, window=0.6, label=label)
    (one,) = own(source)
    assert one.subject == "p1" and np.flatnonzero(one.labels >= 0).tolist() == [200, 500, 800]
    assert [source.classes[k] for k in one.labels[[200, 500, 800]]] == ["N", "V", "N"]
    np.testing.assert_allclose(one.signals[:, 0], np.arange(1000) / 1000, atol=1e-4)
    assert [file.name for file in source.files(tmp_path / "rec")] == ["p1.atr", "p1.dat", "p1.hea"]
    assert source.ignored(tmp_path / "rec") == {}
    with pytest.raises(UserError, match=r"p1\.hea: measured rate 250 Hz, but the rate is said to be 360 Hz"):
        wrong = source_of(tmp_path, columns=["II"], drop=["time"], rate=360, window=0.6, label=label)
        read(wrong, wrong.find(None, tmp_path, False), wrong.preprocessing, print)
