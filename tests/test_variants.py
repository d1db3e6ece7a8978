"""FedKDX+ and FedKD+ on the command line: a name with '+' works everywhere, and what is theirs is found there."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from fedkdx_plugin.algorithm.additions import OFF
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.choice import RATE, read_preset
from fedkdx_plugin.experiments.experiment import Experiment
from registry import catalog
from tests.test_cli import RUN, fails, resolved

VARIANTS = [name for name in catalog.BUILT_IN["algorithms"] if name.endswith("+")]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [name for name in OFF if name != "serve"])
@pytest.mark.parametrize("paper", ["FedKDX", "FedKD"])
def test_asked_of_the_papers_method_an_addition_is_said_to_be_the_variants(capsys, paper, name):
    argv = ["-data", "SPAR", *RUN, "-algo", f"Local,{paper}", "--set"]
    line = fails(capsys, *argv, f"{paper}.{name}={OFF[name]}")
    assert f"{paper} has no hyper-parameter '{name}'; {paper}+ takes it (-algo {paper}+); known: " in line
    assert f"; {paper}+ takes it (-algo {paper}+)" in fails(capsys, *argv, f"{name}={OFF[name]}")
    Path("own.yaml").write_text(yaml.safe_dump({paper: {name: OFF[name]}}))
    line = fails(capsys, *argv[:-1], "--preset", "own.yaml")
    assert line.startswith(f"error: --preset own.yaml: {paper} has no hyper-parameter '{name}'; {paper}+ takes it")


def test_so_is_a_value_that_is_the_variants_alone(capsys):
    argv = ["-data", "SPAR", *RUN, "-algo", "FedKDX", "--set"]
    assert fails(capsys, *argv, "serve=both").endswith("choose from teacher, student; FedKDX+ takes it (-algo FedKDX+)")
    assert "FedKDX+" not in fails(capsys, *argv, "serve=nobody")
    assert "FedKDX+" not in fails(capsys, *argv, "gamma=7")
    assert "FedKDX+" not in fails(capsys, *argv, "pull_start=7")


def test_a_variant_and_its_hyper_parameters_are_named_with_the_plus():
    argv = [
        "-data",
        "SPAR",
        "-algo",
        "fedkdx+,FedKDX,FEDKD+",
        "--set",
        "FedKDX+.tau=2",
        "--set",
        "fedkd+.quantise=false",
    ]
    found = resolved(*argv)
    assert found["algorithm"] == ["FedKDX+", "FedKDX", "FedKD+"]
    assert (found["set"]["FedKDX+.tau"], found["set"]["FedKDX.tau"]) == (2.0, 0.8)
    assert (found["set"]["FedKDX+.quantise"], found["set"]["FedKD+.quantise"]) == (True, False)
    Path("printed.yaml").write_text(yaml.safe_dump(found))
    assert resolved("--config", "printed.yaml") == found


def test_the_preset_tuned_has_the_additions_in_the_variants_alone():
    tuned, paper = read_preset("tuned"), read_preset("paper")
    assert not set(VARIANTS) & paper.keys()
    of_variants = OFF.keys() - {"serve"}  # teacher or student predicts in the papers' methods, too
    assert not any(of_variants & tuned.get(name, {}).keys() for name in ("FedKDX", "FedKD"))
    names = ["FedKDX", "FedKD", *VARIANTS]
    found = resolved("-data", "SPAR", "-algo", ",".join(names), "--preset", "tuned")["set"]
    wanted = {f"{name}.{key}": value for name in names for key, value in tuned.get(name, {}).items() if key != RATE}
    assert wanted and wanted.items() <= found.items()


def test_a_smaller_student_is_refused_with_what_to_switch_off(capsys, shard_folder):
    argv = ["-data", str(shard_folder), *RUN, "-sm", "cnn", "-algo", "FedKDX+"]
    line = fails(capsys, *argv)
    assert "teacher_init=student: the student is a CNN, the teacher a CNNSmall; leave -sm out, or use " in line
    switched_off = line.partition("or use ")[2].split()
    assert switched_off == ["--set", "teacher_init=own", "--set", "pull_start=0.0"]
    assert main([*argv, *switched_off]) == 0


def test_a_comparison_and_its_report_name_the_variants(shard_folder):
    assert main(["-data", str(shard_folder), *RUN, "-algo", "FedKDX,FedKDX+,FedKD+", "-o", "runs"]) == 0
    (folder,) = Path("runs").iterdir()
    assert {f"{name}-seed0" for name in ("FedKDX", "FedKDX+", "FedKD+")} <= {path.name for path in folder.iterdir()}
    rows = list(csv.DictReader((folder / "comparison.csv").open(encoding="utf-8")))
    assert {"FedKDX", "FedKDX+", "FedKDX+ (student)", "FedKD+ (teacher)"} <= {row["algorithm"] for row in rows}
    assert main(["--report", str(folder)]) == 0
    (page,) = Path().rglob("report.html")
    assert ">FedKDX+<" in page.read_text(encoding="utf-8")
    (latex,) = page.parent.rglob("*-results.tex")
    assert "FedKDX+ & " in latex.read_text(encoding="utf-8")


def test_an_experiment_keeps_the_plus_in_its_folders(shard_folder):
    base = {"data": str(shard_folder), "model": "cnn_small", "global_rounds": 2, "local_epochs": 1, "device": "cpu"}
    grid = {"algorithm": ["FedKDX", "FedKDX+"], "set.tau": [2]}
    Path("plus.yaml").write_text(yaml.safe_dump({"title": "Plus", "about": "", "base": base, "grid": grid}))
    (run,) = Experiment.grid("plus.yaml", only=("algorithm=fedkdx+",)).runs
    assert run.folder.name.rpartition("-")[0] == "FedKDX+-tau=2-seed0"
    assert main(["--experiment", "plus.yaml", "--only", "algorithm=FedKDX+", "-o", "runs"]) == 0
    (folder,) = Path("runs").iterdir()
    assert (folder / run.folder / "metrics.csv").is_file()
