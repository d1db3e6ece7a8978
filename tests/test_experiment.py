"""Experiments: what a grid means, and how its runs are made, continued and reported."""

from __future__ import annotations

import csv
import functools
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.experiments import pool
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.results.runs import FAILED
from registry.errors import UserError
from tests.dataset_utils.pamap2_files import write as write_pamap2
from tests.registry.test_catalog import install
from tests.test_cli import fails

ROOT = Path(__file__).parent.parent
BASE = {"data": "SPAR", "model": "cnn_small", "global_rounds": 3, "device": "cpu"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(grid: dict, **base: object) -> str:
    Path("mine.yaml").write_text(yaml.safe_dump({"title": "Mine", "base": BASE | base, "grid": grid}, sort_keys=False))
    return "mine.yaml"


def names(grid: dict, given: dict | None = None, only: tuple[str, ...] = (), **base: object) -> list[str]:
    return [job.name for job in Experiment.grid(written(grid, **base), given or {}, only).runs]


def test_every_combination_is_a_run():
    assert names({"data": ["SPAR", "SLEEP"], "algorithm": ["Local", "FedAvg"], "join_ratio": [0.2, 0.5]}) == [
        "SPAR,join_ratio=0.2: Local",
        "SPAR,join_ratio=0.5: Local",
        "SPAR,join_ratio=0.2: FedAvg",
        "SPAR,join_ratio=0.5: FedAvg",
        "SLEEP,join_ratio=0.2: Local",
        "SLEEP,join_ratio=0.5: Local",
        "SLEEP,join_ratio=0.2: FedAvg",
        "SLEEP,join_ratio=0.5: FedAvg",
    ]


def test_one_seed_is_whole_before_the_next_begins():
    assert names({"algorithm": ["Local", "FedAvg"]}, {"times": 2, "seed": 4}) == [
        "SPAR: Local seed 4",
        "SPAR: FedAvg seed 4",
        "SPAR: Local seed 5",
        "SPAR: FedAvg seed 5",
    ]


def test_an_axis_of_mappings_sets_several_keys_and_merges_hyper_parameters():
    grid = {"terms": [{"label": "base", "set": {"use": ["kd"]}}, {"partition": "dirichlet", "alpha": 0.5}]}
    first, second = Experiment.grid(written(grid, algorithm="FedKDX", set={"gamma": 0.5}), {}).runs
    assert (first.name, second.name) == ("SPAR: FedKDX base", "SPAR,partition=dirichlet,alpha=0.5: FedKDX")
    assert first.settings["set"]["FedKDX.use"] == ["kd"] and first.settings["set"]["FedKDX.gamma"] == 0.5
    assert second.settings["set"]["FedKDX.gamma"] == 0.5 and second.settings["alpha"] == 0.5


def test_a_sweep_labels_its_runs():
    assert names({"set.FedKDX.gamma": [0.1, 0.9]}, algorithm=["FedKDX"]) == [
        "SPAR: FedKDX gamma=0.1",
        "SPAR: FedKDX gamma=0.9",
    ]


def test_what_is_given_replaces_an_axis_and_leaves_nothing_twice():
    grid = {"algorithm": ["Local", "FedAvg"], "join_ratio": [0.2, 0.5]}
    assert names(grid, {"algorithm": "FedKDX"}) == ["SPAR,join_ratio=0.2: FedKDX", "SPAR,join_ratio=0.5: FedKDX"]
    (job,) = Experiment.grid(written(grid), {"algorithm": "FedKDX", "join_ratio": "1", "global_rounds": "7"}).runs
    assert (job.settings["join_ratio"], job.rounds) == (1.0, 7)


def test_only_keeps_what_meets_all_conditions():
    grid = {"data": ["SPAR", "SLEEP"], "algorithm": ["Local", "FedAvg", "FedKDX"]}
    assert names(grid, only=("data=sleep", "algorithm=FedKDX,Local")) == ["SLEEP: Local", "SLEEP: FedKDX"]


def test_other_settings_get_another_folder_and_where_it_runs_does_not():
    def place(**given: str) -> Path:
        (job,) = Experiment.grid(written({"algorithm": ["FedAvg"]}), given).runs
        return job.folder

    assert place() == place(backend="sequential") == place(data_root="elsewhere")
    assert len({place(), place(global_rounds="4"), place(local_learning_rate="0.1"), place(scale="none")}) == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"data": "SPAR"}, "sets data and exclude_subjects together, so data alone cannot be replaced; pick entries"),
        ({"exclude_subjects": "1,2"}, "sets data and exclude_subjects together, so exclude_subjects alone cannot"),
    ],
)
def test_half_of_what_an_axis_sets_together_cannot_be_replaced(given, says):
    """Else SPAR would be run without the subjects of another data set, and UCI-HAR without nobody."""
    grid = {"setting": [{"data": "SPAR"}, {"data": "UCI-HAR", "exclude_subjects": [3]}], "algorithm": ["FedAvg"]}
    with pytest.raises(UserError, match=re.escape(says)):
        names(grid, given)
    assert len(names(grid, {"algorithm": "Local", "global_rounds": "3"})) == 2
    assert len(names(grid, only=("data=UCI-HAR",))) == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml")))
def test_every_experiment_of_the_project_can_be_planned(name):
    planned = Experiment.grid(name, {})
    assert planned.title and planned.about and len(planned.runs) == len({job.folder for job in planned.runs}) > 1


def test_pamap2_has_all_settings_with_three_seeds_and_the_papers_protocol_with_one():
    planned = Experiment.grid("pamap2", {}).runs
    paper = [run.settings for run in planned if run.settings["global_rounds"] == 500]
    # settings, methods with two of them twice, seeds; models, the paper's methods
    assert len(planned) == 8 * (12 + 2) * 3 + 2 * 7
    assert len(paper) == 2 * 7 and {one["seed"] for one in paper} == {0}
    assert {(one["model"], one["train_fraction"], one["split"], one["join_ratio"]) for one in paper} == {
        ("cnn", 1.0, "shuffled", 0.4),
        ("cnn_lstm", 1.0, "shuffled", 0.4),
    }
    others = [run.settings for run in planned if run.settings["global_rounds"] == 100]
    assert {(one["seed"], one["data_seed"]) for one in others} == {(0, 0), (1, 1), (2, 2)}
    assert len({run.section for run in planned}) == 10


@pytest.mark.filterwarnings("ignore:.*not the original file of PAMAP2")
def test_pamap2_in_one_command_from_its_files(tmp_path):
    write_pamap2(tmp_path / "PAMAP2_Dataset", seconds=8, optional=False)
    command = ["experiment", "pamap2", "--raw", str(tmp_path / "PAMAP2_Dataset")]
    command += "--rounds 1 -ls 1 -dev cpu --jobs 1".split()
    paper = "--only train_fraction=1.0 --only model=cnn --only algorithm=FedAvg,FedKDX".split()
    assert main([*command, *paper]) == 0
    assert len(outcome("runs")) == 2
    report = Path("runs/pamap2/report/report.md").read_text()
    assert "beside the paper's tables" in report and "72.43" in report and "89.85" in report  # table 1, PAMAP2
    uneven = "--only alpha=0.5 --only partition=dirichlet --only seed=1 --only algorithm=FedAvgFT,PullAvg".split()
    assert main([*command, *uneven, "-m", "cnn_small"]) == 0
    assert len(outcome("runs")) == 2 + 2


def test_what_is_given_need_not_go_with_what_is_left_out(capsys):
    """One round is too few for clients that come late, of which none are asked for here."""
    grid = {"setting": [{"late": "0.3@2"}, {"split": "shuffled"}], "algorithm": ["Local", "FedAvg"]}
    assert names(grid, {"global_rounds": "1"}, ["late=none", "algorithm=Local"]) == ["SPAR,split=shuffled: Local"]
    assert "--late 0.3@2: the round must be" in fails(capsys, "experiment", written(grid), "--rounds", "1")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "is empty; write base and grid"),
        ({"grids": {}}, "unknown key 'grids' (did you mean grid?)"),
        ({"base": BASE, "grid": {"algorithm": "FedAvg"}}, "grid: algorithm: must be a list"),
        ({"base": BASE, "grid": {"join_ration": [1]}}, "unknown key 'join_ration' (did you mean join_ratio?)"),
        ({"base": BASE, "grid": {"algorithm": ["FedAgv"]}}, "did you mean FedAvg?"),
        ({"base": BASE, "grid": {"set.gama": [1]}}, "no hyper-parameter 'gama' (did you mean gamma?)"),
        ({"base": {}, "grid": {}}, "which data?"),
        ({"base": BASE, "grid": []}, "grid: must hold 'name: value' lines"),
        ({"base": "SPAR"}, "base: must hold 'name: value' lines"),
        ({"base": BASE | {"preset": "turned"}}, "--preset turned: no such preset (did you mean tuned?)"),
    ],
)
def test_wrong_experiments_get_one_line(content, says, capsys):
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    assert says in fails(capsys, "--experiment", "mine.yaml")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["tabel1"], "no such experiment (did you mean table1?)"),
        (["absent.yaml"], "absent.yaml: cannot be read"),
        (["quick", "--only", "SPAR"], "--only SPAR: is no condition; write KEY=VALUE"),
        (["quick", "--only", "dat=SPAR"], "runs have no option 'dat' (did you mean data?)"),
        (["quick", "--only", "data=SLEEP"], "no run meets --only data=SLEEP"),
        (["quick", "--jobs", "0"], "--jobs: 0 is out of range; it must be at least 1"),
        (["quick", "--config", "mine.yaml"], "unrecognized arguments: --config"),
    ],
)
def test_wrong_command_lines_get_one_line(argv, says, capsys):
    assert says in fails(capsys, "--experiment", *argv)


def test_options_of_experiments_alone(capsys):
    assert "unrecognized arguments: --only" in fails(capsys, "-data", "SPAR", "--only", "data=SPAR")


def outcome(out: str) -> dict[str, list[dict[str, str]]]:
    """Run folder -> every figure of every round, to the last digit, but for what took how long."""
    found = {}
    for path in sorted(Path(out).rglob("metrics.csv")):
        with path.open(newline="") as file:
            rows = [{key: row[key] for key in row if not key.startswith("seconds_")} for row in csv.DictReader(file)]
        found[str(path.parent.relative_to(out))] = rows
    return found


def checkpoints(out: str) -> list[Path]:
    return list(Path(out).rglob("state.safetensors"))


def test_runs_side_by_side_are_made_once_and_equal_a_comparisons(shard_folder, capsys, monkeypatch):
    argv = ["--experiment", written({"algorithm": ["Local", "FedAvg", "FedKDX"]}, data=str(shard_folder), times=2)]
    assert main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("0/3") == 6
    assert main([*argv, "--jobs", "2"]) == 0
    assert "Mine: 6 runs; cpu" in capsys.readouterr().out
    assert len(outcome("runs")) == 6
    assert not checkpoints("runs")  # of a finished run nothing that fills disks

    monkeypatch.setattr(pool, "_Worker", lambda *_: pytest.fail("a run was made again"))
    assert main(argv) == 0
    assert "Mine: 6 runs, 6 of them done" in capsys.readouterr().out

    common = ["-data", str(shard_folder), "-m", "cnn_small", "-gr", "3", "-dev", "cpu", "--backend", "sequential"]
    assert main([*common, "-algo", "FedKDX", "-o", "compared"]) == 0
    (compared,) = outcome("compared").values()
    (own,) = [rows for place, rows in outcome("runs").items() if "FedKDX-seed0-" in place]
    assert own == compared

    page = Path("runs/mine/report/report.html")
    assert "<title>Mine" in page.read_text()
    page.unlink()
    assert main(["--report", "runs/mine"]) == 0  # as it was called when it ran
    assert "<title>Mine" in page.read_text()


def test_a_failed_run_is_told_and_the_others_go_on(shard_folder, tmp_path, monkeypatch, capsys):
    """Data that are not there, an algorithm that raises, and a process that is killed."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    source = """
import os, signal
from baselines.fedavg import FedAvg, FedAvgClient
class Raising(FedAvg):
    "Raises."
    class Client(FedAvgClient):
        def losses(self, nets, batch, context):
            raise ValueError("too hot")
class Dying(FedAvg):
    "Dies."
    class Client(FedAvgClient):
        def losses(self, nets, batch, context):
            os.kill(os.getpid(), signal.SIGKILL)
"""
    install(site, "plug_bad", "Raising = plug_bad:Raising\nDying = plug_bad:Dying", source)
    grid = {"part": [{"algorithm": ["Raising", "Dying", "FedAvg"]}, {"data": "PAMAP2", "algorithm": "Local"}]}
    assert main(["--experiment", written(grid, data=str(shard_folder), backend="sequential"), "--jobs", "2"]) == 1
    told = capsys.readouterr().err
    reasons = {path.parent.name.partition("-")[0]: path.read_text() for path in Path("runs").rglob(FAILED)}
    assert reasons.keys() == {"Raising", "Dying", "Local"}
    first = reasons["Raising"].partition("\n")[0]
    assert first.startswith("plug-bad 1.0: Raising.Client.losses: client ")
    assert first.endswith("round 1, step 1: ValueError: too hot (plug_bad.py, line 8)")
    assert "Traceback" in reasons["Raising"]
    assert "SIGKILL" in reasons["Dying"] and "PAMAP2" in reasons["Local"]
    assert "the traceback of a run that failed is in failed.txt" in told
    assert "3 of 4 runs are missing" in told and told.count("too hot") == 2
    assert list(Path("runs").rglob("FedAvg-*/results.h5"))


def test_a_dry_run_says_which_runs_of_shards_cannot_be_made(shard_folder, capsys):
    grid = {"algorithm": ["FedAvg"], "max_share": [1.0, 0.4]}
    assert main(["experiment", written(grid, data=str(shard_folder), join_ratio=0.7), "--dry-run"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "cannot be made" not in first and "cannot be made: --max-share 0.4: a round has 2 clients" in second
    grid = {"algorithm": ["FedAvg"], "max_share": [0.3, 0.4]}
    line = fails(capsys, "experiment", written(grid, data=str(shard_folder), join_ratio=0.7), "--dry-run")
    assert "--max-share 0.3: a round has 2 clients" in line


def test_tables_of_some_runs_are_said_to_be_of_these_alone(shard_folder, capsys):
    argv = ["experiment", written({"algorithm": ["Local", "FedAvg"]}, data=str(shard_folder))]
    assert main([*argv, "--only", "algorithm=Local"]) == 0
    assert "of the runs of --only alone; the same command without it writes those of all" in capsys.readouterr().out
    assert main(argv) == 0
    assert "--only" not in capsys.readouterr().out
    assert "FedAvg" in next(Path("runs").rglob("comparison.md")).read_text()


def test_where_no_run_can_be_made_one_line_says_why(capsys):
    name = written({"algorithm": ["Local", "FedAvg"], "seed": [0, 1]}, data="PAMAP2")
    assert "PAMAP2 is not in" in fails(capsys, "experiment", name)


def test_runs_that_fail_alike_are_told_in_one_line(shard_folder, capsys):
    part = [{"data": "PAMAP2", "algorithm": ["Local", "FedAvg"]}, {"data": str(shard_folder), "algorithm": "Local"}]
    assert main(["experiment", written({"part": part, "seed": [0, 1]})]) == 1
    out, told = capsys.readouterr()
    tables = list(Path("runs").rglob("comparison.md"))
    assert len(tables) == 2  # of two seeds, which make sections where they are an axis
    assert all(f"\n{table.parent.name}\n\n{table.read_text()}" in out for table in tables)
    assert "traceback" not in told  # there is none: what went wrong is the user's to mend
    lines = [line for line in told.splitlines() if "PAMAP2" in line]
    assert len(lines) == 1 and " and 3 more: failed: PAMAP2 is not in" in lines[0]


def test_ctrl_c_and_the_same_command_end_as_if_unbroken(shard_folder):
    torch.set_num_threads(1)
    name = written({"algorithm": ["Local", "FedAvg", "FedKDX"]}, data=str(shard_folder), global_rounds=60)
    command = [sys.executable, str(ROOT / "run.py"), "--experiment", name, "--jobs", "2", "-o"]
    assert subprocess.run([*command, "whole"], capture_output=True).returncode == 0
    # a shell starts its background jobs deaf to Ctrl-C, and what these start inherits that
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    broken = subprocess.Popen([*command, "parts"], stderr=subprocess.PIPE, preexec_fn=hears)
    while not any(path.read_text().count("\n") > 5 for path in Path("parts").rglob("metrics.csv")):
        assert broken.poll() is None
        time.sleep(0.05)
    broken.send_signal(signal.SIGINT)
    assert "to go on: fedkdx resume parts" in broken.communicate()[1].decode()
    assert broken.returncode == 130
    assert checkpoints("parts")  # what had begun was saved
    assert outcome("parts") != outcome("whole")
    assert subprocess.run([*command, "parts"], capture_output=True).returncode == 0
    assert outcome("parts") == outcome("whole")


def test_an_option_must_be_used_in_one_setting_of_a_grid(capsys):
    """α of Dirichlet in one of two partitions; then in none, of the file or of the command line."""
    mixed = written({"partition": ["iid", "dirichlet"], "algorithm": ["FedAvg"]}, alpha=0.5)
    assert [run.settings["alpha"] for run in Experiment.grid(mixed).runs] == [0.5, 0.5]
    assert [run.settings["alpha"] for run in Experiment.grid(mixed, {"alpha": 0.3}, ["partition=dirichlet"]).runs] == [
        0.3
    ]
    says = "--alpha: --partition iid, subject does not use it; leave it out, or take --partition dirichlet"
    with pytest.raises(UserError, match=says):
        Experiment.grid(written({"partition": ["iid", "subject"]}, alpha=0.5))
    with pytest.raises(UserError, match=says):
        Experiment.grid(written({"partition": ["iid", "subject"]}), {"alpha": 0.5})


def test_a_preset_lies_below_what_is_set(capsys):
    Path("own.yaml").write_text("FedKDX: {gamma: 0.2, tau: 2}\nFedProx: {mu: 1}\n")
    (job,) = Experiment.grid(written({"algorithm": ["FedKDX"]}, preset="own.yaml", set={"tau": 3}), {}).runs
    assert (job.settings["set"]["FedKDX.gamma"], job.settings["set"]["FedKDX.tau"]) == (0.2, 3.0)
    Path("own.yaml").write_text("FedKDX: 3\n")
    assert "FedKDX: must be a mapping" in fails(capsys, "-data", "SPAR", "--preset", "own.yaml")


@pytest.mark.parametrize("name", ["FedKDXX", "fedkdx", "FedKDX-"])
def test_a_preset_of_no_algorithm_is_not_ignored(capsys, name):
    Path("own.yaml").write_text(f"{name}: {{tau: 2}}")
    line = fails(capsys, "-data", "SPAR", "-algo", "FedKDX", "--preset", "own.yaml")
    assert f"--preset own.yaml: there is no algorithm '{name}' (did you mean FedKDX" in line


def test_the_papers_preset_is_the_default():
    grid = {"algorithm": ["all"]}
    Path("empty.yaml").touch()
    paper, none = (Experiment.grid(written(grid, preset=preset), {}).runs for preset in ("paper", "empty.yaml"))
    assert [job.settings["set"] for job in paper] == [job.settings["set"] for job in none]


@pytest.mark.parametrize("name", ["survey", "settings", "ablation"])
def test_no_result_is_of_a_subject_on_whom_hyper_parameters_were_chosen(name):
    chosen_on: dict[str, set[str]] = {}
    for run in Experiment.grid("search").runs:
        chosen_on.setdefault(run.settings["data"], set()).update(run.settings["subjects"])
    assert {data: len(subjects) for data, subjects in chosen_on.items()} == {"UCI-HAR": 10, "SLEEP": 5}
    left_out = {
        (run.settings["data"], frozenset(run.settings["exclude_subjects"])) for run in Experiment.grid(name).runs
    }
    assert left_out == {("SPAR", frozenset()), *((data, frozenset(own)) for data, own in chosen_on.items())}


def test_fedkdx_and_fedkd_have_a_row_of_their_papers_values_in_each_setting_of_pamap2():
    """As in the other experiments, three seeds each; in the same section as the tuned runs that they are beside."""
    presets: dict[str, dict[str, list[str]]] = {}
    for run in Experiment.grid("pamap2").runs:
        if run.settings["global_rounds"] == 100 and run.settings["algorithm"][0] in ("FedKDX", "FedKD"):
            name = f"{run.settings['algorithm'][0]} {run.settings['label']}".strip()
            presets.setdefault(run.section, {}).setdefault(name, []).append(run.settings["preset"])
    paper, tuned = ["paper"] * 3, ["tuned"] * 3
    assert len(presets) == 8
    for own in presets.values():
        assert own == {"FedKD": tuned, "FedKDX": tuned, "FedKD paper": paper, "FedKDX paper": paper}
