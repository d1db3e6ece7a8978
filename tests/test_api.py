"""The Python interface: the same runs as the command line makes, and classes of the caller's own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import fedkdx_plugin as fedkdx
from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.models.cnn import CNNSmall
from registry import catalog

COMMON = {"model": "cnn_small", "rounds": 2, "join_ratio": 0.5, "local_epochs": 1, "device": "cpu", "progress": False}
FLAGS = "-m cnn_small -gr 2 -jr 0.5 -ls 1 -dev cpu".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalog, "_registered", {})  # what is registered here is no other test's


def test_the_import_loads_no_torch_and_lists_its_names():
    code = "import fedkdx_plugin as f, sys; print(dir(f), 'torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'compare'" in out and out.strip().endswith("False False")
    with pytest.raises(AttributeError, match="no attribute 'compere'"):
        fedkdx.compere  # noqa: B018


def test_every_name_is_there():
    assert all(getattr(fedkdx, name) for name in fedkdx.__all__)


def test_compare_makes_the_runs_of_the_command_line(shard_folder, capsys):
    results = fedkdx.compare(shard_folder, ["Local", "FedAvg"], seeds=2, out="a", **COMMON)
    printed = capsys.readouterr()
    assert not printed.out and not printed.err
    assert main(["-data", str(shard_folder), "-algo", "Local,FedAvg", "-t", "2", "-o", "b", *FLAGS]) == 0
    (typed,) = Path("b").iterdir()
    for name in ("Local-seed0", "FedAvg-seed1"):
        states = [(folder / name / "state.safetensors").read_bytes() for folder in (results.folder, typed)]
        assert states[0] == states[1]
    assert [run.name for run in results.runs] == ["Local", "FedAvg", "Local", "FedAvg"]
    assert "| FedAvg " in repr(results)
    everyone = (results, fedkdx.load_runs(results.folder), fedkdx.load_runs(typed))
    tables = [found.table.sort_index() for found in everyone]
    first, *others = (table.drop(columns=[name for name in table if "seconds" in name]) for table in tables)
    assert all(first.equals(other) for other in others)


def test_tables_hold_what_the_runs_hold(shard_folder):
    results = fedkdx.compare(shard_folder, "FedAvg", seeds=2, eval_gap=2, **COMMON | {"rounds": 3})
    one, other = (run.evaluated[-1].metrics["served"] for run in results.runs)
    row = results.table.loc[("made", "FedAvg")]
    assert row["accuracy"] == pytest.approx((one.accuracy + other.accuracy) / 2)
    assert row["accuracy_std"] == pytest.approx(abs(one.accuracy - other.accuracy) / 2**0.5)
    assert row["seeds"] == 2
    rounds = results.rounds
    assert rounds[["seed", "round"]].to_numpy().tolist() == [[s, r] for s in (0, 1) for r in (1, 2, 3)]
    assert rounds["accuracy"].isna().tolist() == [True, False, False] * 2  # evaluated after 2 and after the last
    clients = results.clients
    assert len(clients) == 2 * 3 and clients["windows"].tolist() == [12] * 6
    assert clients["subject"].tolist() == [""] * 6  # these shards name nobody
    assert clients[clients["seed"] == 0]["accuracy"].tolist() == one.client_accuracy.tolist()


def test_a_plot_and_a_report(shard_folder):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    results = fedkdx.compare(shard_folder, ["Local", "FedAvg"], **COMMON)
    left, right = results.plot().axes
    assert [line.get_label() for line in left.lines] == ["Local", "FedAvg"]
    assert len(right.lines) == 1  # Local sends nothing
    f1 = results.plot("f1").axes[0]
    last = results.rounds.query("method == 'FedAvg' and view == 'served'")["f1"].iloc[-1]
    assert f1.get_ylabel() == "test f1, %" and f1.lines[1].get_ydata()[-1] == pytest.approx(100 * last)
    assert results.plot("loss").axes[0].get_ylabel() == "test loss"
    with pytest.raises(
        fedkdx.UserError, match=r"metric: 'acuracy' is unknown \(did you mean accuracy\?\); choose from"
    ):
        results.plot("acuracy")
    assert "FedAvg" in results.report().read_text()


def test_a_text_with_commas_names_several_algorithms(shard_folder):
    results = fedkdx.compare(shard_folder, "FedAvg, Local", **COMMON)
    assert sorted(results.table.index.get_level_values("method")) == ["FedAvg", "Local"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"join_ratio": 2}, "compare: join_ratio: 2 is out of range"),
        ({"seeds": 0}, "compare: seeds: 0 is out of range"),
        ({"rounds": 0}, "compare: rounds: 0 is out of range"),
        ({"bn": "local", "norm": "none"}, "bn (--bn) local: norm (--norm) none leaves no batch norm"),
        ({"goal": "a/b"}, "goal (-go): 'a/b' may hold letters"),
        ({"roundz": 3}, "compare: unknown key 'roundz' (did you mean rounds?)"),
        ({"join_ration": 0.4}, "compare: unknown key 'join_ration' (did you mean join_ratio?)"),
        ({"nothing_like_it": 3}, "compare: unknown key 'nothing_like_it'"),
        ({"max_share": 0.1, "aggregate": "krum"}, "max_share (--max-share): aggregate (--aggregate) krum gives"),
    ],
)
def test_errors_name_options_as_python_does(shard_folder, options, says):
    with pytest.raises(fedkdx.UserError) as caught:
        fedkdx.compare(shard_folder, "FedAvg", **COMMON | options)
    assert str(caught.value).startswith(says)


class Mine(FedAvg):
    """Averages models, and starts from zeros."""

    class Client(FedAvgClient):
        """Trains with the class indices reversed."""


class Tiny(CNNSmall):
    """A model of the caller's own."""


def test_own_classes_stand_beside_names(shard_folder):
    results = fedkdx.compare(shard_folder, [Mine, "FedAvg"], **COMMON | {"model": Tiny})
    mine, average = results.runs
    assert (mine.name, average.name) == ("Mine", "FedAvg")
    assert mine.evaluated[-1].metrics["served"].accuracy == average.evaluated[-1].metrics["served"].accuracy
    assert mine.environment["algorithm"]["origin"] == "this session"
    with pytest.raises(fedkdx.UserError, match="known to this process alone"):
        fedkdx.compare(shard_folder, [Mine], **COMMON, jobs=2)
    with pytest.raises(fedkdx.UserError, match=r"algorithm 'FedAvg': built-in has one of this name; rename"):
        fedkdx.compare(shard_folder, [type("FedAvg", (FedAvg,), {})], **COMMON)
    with pytest.raises(fedkdx.UserError, match=r"model 'Mine'.* is no subclass of registry.interface.Model"):
        fedkdx.compare(shard_folder, "FedAvg", **COMMON | {"model": Mine})


OWN = """
from baselines.fedavg import FedAvg
from fedkdx_plugin.models.cnn import CNNSmall

class Half(FedAvg):
    "Sends half of each model down."
    sends = "half a model"

class Net(CNNSmall):
    "A small network."
"""


def test_a_files_class_is_named_on_the_command_line_and_resumes(shard_folder, capsys):
    Path("own.py").write_text(textwrap.dedent(OWN))
    argv = ["-data", str(shard_folder), "-algo", "own.py:Half,FedAvg", *FLAGS, "-m", "own.py:Net", "--jobs", "2"]
    assert main(argv) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("made-Net-test-")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["FedAvg-seed0", "Half-seed0"]
    states = [(folder / f"{name}-seed0" / "state.safetensors").read_bytes() for name in ("Half", "FedAvg")]
    assert len(states[0]) == len(states[1])
    assert main(["resume", str(folder), "-gr", "3"]) == 0
    assert "| Half " in capsys.readouterr().out
    assert main([*argv[:3], "other.py:Half", *FLAGS]) == 2
    assert "algorithm 'other.py:Half': no such file; write path/to/file.py:Class" in capsys.readouterr().err
    assert main([*argv[:3], "own.py:Hafl", *FLAGS]) == 2
    assert "'Hafl' from file own.py cannot be loaded (own.py:Hafl): AttributeError" in capsys.readouterr().err
    Path("own.py").write_text("import nothing_like_it\n")
    assert main(argv) == 2  # the file of now, not the one that was loaded before
    assert "No module named 'nothing_like_it'" in capsys.readouterr().err


class Watch(fedkdx.Callback):
    """Notes every event."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def on_run_start(self, run) -> None:
        self.events.append(("run start", run.name, run.done))

    def on_round_start(self, run, round) -> None:
        self.events.append(("round start", run.name, round.index))

    def on_evaluation(self, run, round, metrics) -> None:
        self.events.append(("evaluation", run.name, round, sorted(metrics)))

    def on_round_end(self, run, record) -> None:
        self.events.append(("round end", run.name, record.round))

    def on_run_end(self, run, error) -> None:
        self.events.append(("run end", run.name, error))


@pytest.mark.parametrize("jobs", [1, 2])
def test_callbacks_are_told_what_happens_in_its_order(shard_folder, jobs):
    one, other = Watch(), Watch()
    fedkdx.compare(shard_folder, ["Local", "FedAvg"], callbacks=[one, other], jobs=jobs, eval_gap=2, **COMMON)
    assert one.events == other.events
    for name in ("Local", "FedAvg"):
        assert [event for event in one.events if event[1] == name] == [
            ("run start", name, 0),
            ("round start", name, 1),
            ("round end", name, 1),
            ("round start", name, 2),
            ("evaluation", name, 2, ["served"]),
            ("round end", name, 2),
            ("run end", name, None),
        ]


class Failing(FedAvg):
    """Fails."""

    class Client(FedAvgClient):
        """Raises in training."""

        def losses(self, nets, batch, context):
            raise ValueError("too hot")


def test_what_an_algorithm_raises_comes_through(shard_folder):
    watch = Watch()
    with pytest.raises(RuntimeError, match=r"client \d, round 1, step 1: ValueError: too hot"):
        fedkdx.compare(shard_folder, [Failing, "FedAvg"], callbacks=[watch], **COMMON, backend="sequential")
    assert [event[0] for event in watch.events] == ["run start", "round start", "run end"]
    assert "too hot" in str(watch.events[-1][2])
    (folder,) = Path("runs").iterdir()
    assert [missing.reason.partition(":")[0] for missing in fedkdx.load_runs(folder).missing] == ["failed"]


def test_on_the_command_line_the_others_go_on(shard_folder, capsys):
    Path("own.py").write_text(
        "from baselines.fedavg import FedAvg, FedAvgClient\n"
        "class Bad(FedAvg):\n    class Client(FedAvgClient):\n"
        "        def losses(self, nets, batch, context):\n            raise ValueError('too hot')\n"
    )
    argv = ["-data", str(shard_folder), "-algo", "own.py:Bad,FedAvg", *FLAGS, "--backend", "sequential"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert "| FedAvg " in out and "Traceback" not in err
    assert err.count("too hot") == 2  # when it happened, and at the end
    (failed,) = Path("runs").glob("*/Bad-seed0/failed.txt")
    assert "Traceback" in failed.read_text()


def test_unknown_options_and_values_are_named(shard_folder):
    with pytest.raises(fedkdx.UserError, match=r"compare: unknown key 'join_ration' \(did you mean join_ratio\?\)"):
        fedkdx.compare(shard_folder, "FedAvg", join_ration=1)
    with pytest.raises(fedkdx.UserError, match="compare: rounds: 0 is out of range; it must be at least 1"):
        fedkdx.compare(shard_folder, "FedAvg", rounds=0)
    with pytest.raises(fedkdx.UserError, match=r"compare: seed: '1.5' is not a whole number"):
        fedkdx.compare(shard_folder, "FedAvg", seed="1.5")
    big = 9007199254740993  # 2**53 + 1, which no float64 holds
    assert fedkdx.compare(shard_folder, "Local", seed=str(big), **COMMON).runs[0].seed == big


def test_an_experiment_from_python(shard_folder):
    Path("mine.yaml").write_text(
        f"title: Mine\nbase: {{data: '{shard_folder}', model: cnn_small, global_rounds: 2, device: cpu}}\n"
        "grid: {algorithm: [Local, FedAvg], join_ratio: [0.5, 1]}\n"
    )
    experiment = fedkdx.Experiment.grid("mine.yaml", {"local_epochs": 1})
    assert [run.name for run in experiment.runs][:2] == ["made,join_ratio=0.5: Local", "made,join_ratio=1.0: Local"]
    torch.set_num_threads(1)
    results = experiment.run(progress=False)
    assert results.folder == Path("runs/mine") and len(results.sections()) == 2
    assert sorted(results.table.index.get_level_values("method").unique()) == ["FedAvg", "Local"]
    with pytest.raises(fedkdx.UserError, match="several settings"):
        results.plot()


@pytest.mark.parametrize("name", ["global_rounds", "times", "algorithm"])
def test_an_option_that_compare_names_itself_is_refused(shard_folder, name):
    with pytest.raises(fedkdx.UserError, match=f"compare: {name}: write (rounds|seeds|algorithms)="):
        fedkdx.compare(shard_folder, "FedAvg", **{name: 3})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"jobs": 0}, "jobs: 0 is out of range; it must be at least 1"),
        ({"jobs": "x"}, "jobs: 'x' is not a whole number"),
        ({"callbacks": fedkdx.Callback()}, "callbacks: must be a list of objects"),
        ({"callbacks": [print]}, "callbacks: must be a list of objects"),
        ({"callbacks": [fedkdx.Callback]}, "callbacks: must be a list of objects"),
    ],
)
def test_wrong_arguments_are_found_before_the_first_round(shard_folder, options, says):
    with pytest.raises(fedkdx.UserError, match=says):
        fedkdx.compare(shard_folder, "FedAvg", **COMMON, **options)
    assert not Path("runs").exists()


def test_numbers_of_numpy_are_numbers(shard_folder):
    options = COMMON | {"rounds": np.int64(2), "join_ratio": np.float32(0.5), "callbacks": None}
    results = fedkdx.compare(shard_folder, "Local", seed=np.int32(3), **options)
    assert results.runs[0].seed == 3 and len(results.runs[0].records) == 2
    assert (results.folder / "comparison.md").read_text().startswith("| algorithm")


def test_an_experiment_goes_on_from_python(shard_folder):
    results = fedkdx.compare(shard_folder, "Local", **COMMON)
    again = fedkdx.Experiment.resumed(str(results.folder), rounds=3)
    assert "3 rounds instead of 2" in again.remark
    assert len(again.run(progress=False).runs[0].records) == 3
    with pytest.raises(fedkdx.UserError, match="-gr: 'x' is not a whole number"):
        fedkdx.Experiment.resumed(results.folder, rounds="x")
    options = {"data": str(shard_folder), "algorithm": ["Local"], "global_rounds": 2}
    assert [run.name for run in fedkdx.Experiment.comparison(options).runs] == ["Local"]


def test_two_at_once_do_not_work_in_one_folder(shard_folder, capsys):
    results = fedkdx.compare(shard_folder, "Local", **COMMON)
    experiment = fedkdx.Experiment.resumed(results.folder, rounds=3)
    with experiment.begun(["python"]):
        written = (results.folder / "experiment.yaml").read_bytes()
        assert main(["resume", str(results.folder), "-gr", "9"]) == 2
        assert "another process works in this folder" in capsys.readouterr().err
        assert (results.folder / "experiment.yaml").read_bytes() == written
    assert main(["resume", str(results.folder)]) == 0


def test_changed_code_of_an_algorithm_is_not_mixed_in(shard_folder, capsys):
    Path("own.py").write_text(textwrap.dedent(OWN))
    assert main(["-data", str(shard_folder), "-algo", "own.py:Half", *FLAGS]) == 0
    (folder,) = Path("runs").iterdir()
    Path("own.py").write_text(textwrap.dedent(OWN) + "\n# changed\n")
    planned = (folder / "experiment.yaml").read_bytes()
    assert main(["resume", str(folder), "-gr", "3"]) == 2
    assert "a checkpoint of other code of the algorithm; " in capsys.readouterr().err
    assert (folder / "experiment.yaml").read_bytes() == planned  # the refused number of rounds is not planned


def test_changed_code_of_a_model_is_not_mixed_in_and_does_not_predict(shard_folder, capsys):
    Path("own.py").write_text(textwrap.dedent(OWN))
    assert main(["-data", str(shard_folder), "-algo", "FedAvg", *FLAGS, "-m", "own.py:Net"]) == 0
    (folder,) = Path("runs").iterdir()
    assert fedkdx.load_model(folder, 0).round == 2
    Path("own.py").write_text(textwrap.dedent(OWN) + "    filters = (16, 32)\n")  # of the same shapes, as it happens
    assert main(["resume", str(folder), "-gr", "3"]) == 2
    assert "a checkpoint of other code of the model; " in capsys.readouterr().err
    with pytest.raises(fedkdx.UserError, match=r"the code of its model own\.py:Net has changed since"):
        fedkdx.load_model(folder, 0)
    Path("own.py").write_text(textwrap.dedent(OWN))
    assert main(["resume", str(folder), "-gr", "3"]) == 0


def test_a_file_without_the_class_says_what_it_has(shard_folder, capsys):
    Path("own.py").write_text(textwrap.dedent(OWN))
    for name, says in (
        ("own.py", "algorithm 'own.py': which class of it? write own.py:Class"),
        ("own.py:Third", "it has no class 'Third'; it has Half, Net"),
    ):
        assert main(["-data", str(shard_folder), "-algo", name, *FLAGS]) == 2
        assert says in capsys.readouterr().err
    assert main(["-data", "/nonexistent/foo", "-algo", "Local", *FLAGS]) == 2
    assert "data set '/nonexistent/foo': no such file or folder, and no name" in capsys.readouterr().err


def test_an_object_in_place_of_a_class_and_a_name_given_twice_are_one_line(shard_folder):
    for wrong, name in ((object.__new__(FedAvg), "FedAvg"), (3, "int")):
        with pytest.raises(fedkdx.UserError, match=f"^compare: algorithm: an object of the class {name} is neither"):
            fedkdx.compare(shard_folder, ["Local", wrong], **COMMON)
    with pytest.raises(fedkdx.UserError, match=r"^algorithms \(-algo\): FedAvg is named 2 times; name it once"):
        fedkdx.compare(shard_folder, ["FedAvg", "Local", "fedavg"], **COMMON)
    assert not Path("runs").exists()


def test_runs_that_are_read_have_the_order_of_the_comparison(shard_folder):
    made = fedkdx.compare(shard_folder, ["Local", "FedAvg"], seeds=2, **COMMON)
    read = fedkdx.load_runs(made.folder)
    assert [(run.algorithm, run.seed) for run in read.runs] == [
        ("Local", 0),
        ("FedAvg", 0),
        ("Local", 1),
        ("FedAvg", 1),
    ]
    assert read.table.equals(made.table)
    assert read.table.index.get_level_values("method").tolist() == ["Local", "FedAvg"]
