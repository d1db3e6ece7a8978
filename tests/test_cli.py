"""The command line: what it resolves, what it writes, and what it says of wrong input."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from dataset_utils.spec import Files
from fedkdx_plugin.api import compare
from fedkdx_plugin.cli.main import COMMANDS, main
from fedkdx_plugin.cli.options import GROUPS, Making, read_config
from fedkdx_plugin.cli.run import parser
from fedkdx_plugin.configuration import choice
from fedkdx_plugin.configuration.config import Options, from_dict, read_yaml
from fedkdx_plugin.experiments.setting import prepare_shards
from registry.errors import UserError
from registry.flags import given

ROOT = Path(__file__).parent.parent
RUN = ["-m", "cnn_small", "-gr", "2", "-jr", "0.5", "-ls", "1", "-dev", "cpu"]


@pytest.fixture
def data(shard_folder) -> Path:
    return shard_folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def resolved(*argv: str) -> dict:
    arguments = parser().parse_args(argv)
    given(arguments, Making)
    return choice.resolve(config := read_config(arguments), choice.choose(config))


def fails(capsys, *argv: str) -> str:
    """Return the one line that a wrong command line gets."""
    assert main(argv) == 2
    printed = capsys.readouterr()
    line = printed.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in printed.err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
    return line


def test_pfllibs_flags_keep_their_names_and_meaning():
    short = resolved(
        *(
            "-data SPAR -algo fedavg,LOCAL -m CNN -gr 7 -jr 0.5 -lbs 8 -lr 0.1 -ls 2 -nc 4 -nb 7 "
            "-t 3 -dev cpu -did 1 -eg 2 -ld False -go mine"
        ).split()
    )
    long = resolved(
        *(
            "--dataset SPAR --algorithm FedAvg,Local --model CNN --global_rounds 7 --join_ratio "
            "0.5 --batch_size 8 --local_learning_rate 0.1 --local_epochs 2 --num_clients 4 "
            "--num_classes 7 --times 3 --device cpu --device_id 1 --eval_gap 2 "
            "--learning_rate_decay 0 --goal mine"
        ).split()
    )
    assert short == long
    assert short["algorithm"] == ["FedAvg", "Local"]
    assert short["learning_rate_decay"] is False
    assert (short["data"], short["num_clients"], short["times"], short["goal"]) == ("SPAR", 4, 3, "mine")


def test_the_defaults_are_the_papers_protocol():
    found = resolved("-data", "SPAR")
    wanted = {"algorithm": ["FedKDX"], "model": "cnn", "batch_size": 32, "local_learning_rate": 0.01, "join_ratio": 0.4}
    wanted |= {"global_rounds": 500, "local_epochs": 4, "learning_rate_decay_gamma": 0.99, "clip_norm": 10.0}
    assert {key: found[key] for key in wanted} == wanted
    assert found["set"]["FedKDX.gamma"] == 0.9
    assert found["set"]["FedKDX.tau"] == 0.8


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults():
    Path("c.yaml").write_text(
        "data: SPAR\nglobal_rounds: 9\njoin_ratio: 0.9\nset: {gamma: 0.1, tau: 2}\nmin_samples: 5\n"
    )
    found = resolved("--config", "c.yaml", "-jr", "0.3", "--set", "gamma=0.2")
    assert (found["global_rounds"], found["join_ratio"], found["min_samples"]) == (9, 0.3, 5)
    assert (found["set"]["FedKDX.gamma"], found["set"]["FedKDX.tau"]) == (0.2, 2.0)


def test_a_preset_sets_hyper_parameters_of_several_algorithms():
    Path("preset.yaml").write_text(
        "set: {FedKDX.gamma: 0.3, FedKDX+.serve: teacher, FedKD.serve: student, FedProx.mu: 0.1, FedKDX.tau_ctl: 2}"
    )
    found = resolved("--config", "preset.yaml", "-data", "SPAR", "-algo", "FedKDX,FedKDX+,FedKD,FedProx")["set"]
    wanted = {"FedKDX.gamma": 0.3, "FedKDX+.serve": "teacher", "FedKD.serve": "student", "FedProx.mu": 0.1}
    assert wanted.items() <= found.items()
    assert found["FedKDX.tau_ctl"] == 2.0 and found["FedKDX.serve"] == "teacher" and found["FedKDX+.tau_ctl"] is None


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--alpha 0.3", "--alpha: --partition subject does not use it; leave it out, or take --partition dirichlet"),
        ("--alpha 0.1", "--alpha: --partition subject does not use it"),  # which is the default
        ("--partition pathological --alpha 0.3", "--alpha: --partition pathological does not use it"),
        (
            "--partition iid --classes-per-client 3",
            "--classes-per-client: --partition iid does not use it; leave it out, or take --partition pathological",
        ),
        (
            "--split loso --test-fraction 0.3",
            "--test-fraction: --split loso does not use it; leave it out, or take --split shuffled or blocked",
        ),
    ],
)
def test_an_option_that_the_partition_or_split_does_not_use_is_refused(words, line, capsys):
    """On the command line, in a file, from Python, and where shards are made or described."""
    assert f"error: {line}" in fails(capsys, "-data", "SPAR", *words.split())
    options = dict(zip(*[(word.lstrip("-").replace("-", "_") for word in words.split())] * 2, strict=True))
    Path("c.yaml").write_text(yaml.safe_dump({"data": "SPAR"} | options))
    assert f"error: {line}" in fails(capsys, "--config", "c.yaml")
    with pytest.raises(UserError, match="does not use it"):
        compare("SPAR", "FedAvg", rounds=1, **options)
    for command in ("make", "describe"):
        data = ["-data", "SPAR"] if command == "make" else ["SPAR"]
        assert f"error: {line}" in fails(capsys, "data", command, *data, *words.split())


def test_a_runs_own_file_names_every_option_and_is_not_refused(capsys):
    """Its alpha is the default, or of another partition before; what is asked for now is refused all the same."""
    Path("whole.yaml").write_text(
        yaml.safe_dump(resolved("-data", "SPAR", "--partition", "dirichlet", "--alpha", "0.3"))
    )
    assert resolved("--config", "whole.yaml", "--partition", "iid")["partition"] == "iid"
    line = fails(capsys, "--config", "whole.yaml", "--partition", "iid", "--alpha", "0.5")
    assert "--alpha: --partition iid does not use it" in line


@pytest.mark.parametrize("now", ["FedProx: {mu: 3}", "no mapping", None])
def test_a_run_needs_its_preset_no_more(shard_folder, now, capsys):
    """It is repeated and resumed with the values of its own file, whatever became of the preset."""
    Path("p.yaml").write_text("FedAvg: {local_learning_rate: 0.2}\nFedProx: {mu: 0.5}\n")
    fast = ["-m", "cnn_small", "-gr", "1", "-jr", "1", "-ls", "1", "-dev", "cpu"]
    assert main(["-data", str(shard_folder), "-algo", "FedAvg,FedProx", *fast, "--preset", "p.yaml", "-o", "one"]) == 0
    Path("p.yaml").unlink() if now is None else Path("p.yaml").write_text(now)
    (folder,) = Path("one").iterdir()
    for name in ("FedAvg", "FedProx"):
        assert main(["run", "--config", str(folder / f"{name}-seed0" / "config.yaml"), "-o", f"again-{name}"]) == 0
        (again,) = Path(f"again-{name}").glob("*/*-seed0")
        with h5py.File(again / "results.h5") as file, h5py.File(folder / again.name / "results.h5") as before:
            assert file["train_loss"][:].tolist() == before["train_loss"][:].tolist()
    assert main(["resume", str(folder), "-gr", "2"]) == 0
    kept = {name: read_yaml(folder / f"{name}-seed0" / "config.yaml") for name in ("FedAvg", "FedProx")}
    assert [own["local_learning_rate"] for own in kept.values()] == [0.2, 0.01]
    assert {own["preset"] for own in kept.values()} == {"p.yaml"}
    assert kept["FedProx"]["set"] == {"FedProx.mu": 0.5} and kept["FedProx"]["global_rounds"] == 2


def test_a_preset_is_needed_where_a_file_has_not_all_values(shard_folder, capsys):
    """The options of every run, but not the values of another algorithm; a file by hand; a preset that is asked for."""
    Path("p.yaml").write_text("FedProx: {mu: 0.5}\n")
    whole = resolved("-data", str(shard_folder), "-algo", "FedProx", "--preset", "p.yaml")
    Path("p.yaml").unlink()
    Path("whole.yaml").write_text(yaml.safe_dump(whole))
    Path("part.yaml").write_text("data: SPAR\nalgorithm: FedAvg\nlocal_learning_rate: 0.1\npreset: p.yaml\n")
    assert resolved("--config", "whole.yaml") == whole
    missing = "--preset p.yaml: no such preset"
    assert missing in fails(capsys, "--config", "whole.yaml", "-algo", "FedProx,MOON")
    assert missing in fails(capsys, "--config", "part.yaml")
    assert "--preset q.yaml: no such preset" in fails(capsys, "--config", "whole.yaml", "--preset", "q.yaml")


def test_a_scoped_hyper_parameter_is_one_algorithms_own():
    found = resolved("-data", "SPAR", "-algo", "FedAvg,FedKDX", "--set", "fedkdx.gamma=0.3", "--set", "gamma=0.5")
    assert found["set"]["FedKDX.gamma"] == 0.3


def test_what_dry_run_prints_reads_back_as_the_same(capsys):
    argv = ["-data", "SPAR", "-algo", "Local,FedKDX", "--set", "use=kd,ctl", "--partition", "iid"]
    assert main([*argv, "--dry-run"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert resolved("--config", "printed.yaml") == resolved(*argv)
    assert not Path("runs").exists()
    assert not Path("data").exists()


def own_data(rate=50):
    """Write a folder of two subjects' recordings at 50 Hz, described with this rate."""
    Path("rec").mkdir(exist_ok=True)
    for name in ("anna", "ben"):
        rows = [f"{i / 50},{i % 7},{'ab'[i // 300]}" for i in range(600)]
        Path(f"rec/{name}.csv").write_text("\n".join(["t,x,label", *rows]))
    described = f"name: Mine\nfolder: rec\nrate: {rate}\nwindow: 1\ncolumns: [x]\nlabel: label\ntime: t\n"
    Path("mine.yaml").write_text(described)
    return "mine.yaml"


def test_dry_run_reads_the_data_and_says_what_is_wrong_with_them(capsys):
    argv = ["-data", own_data(), "-algo", "FedAvg", "--dry-run"]
    assert main(argv) == 0
    out, errors = capsys.readouterr()
    assert "# 46 windows of 2 subjects and 2 classes:" in out and not errors  # of 50 samples every 25
    assert yaml.safe_load(out)["data"] == "mine.yaml"
    own_data(rate=40)
    assert main(argv) == 2
    assert "error: anna.csv: measured rate 50 Hz, but the rate is said to be 40 Hz" in capsys.readouterr().err
    assert not Path("data").exists()


WRONG_TOGETHER = {
    "-data SPAR --dp client --epsilon 8 --delta 1e-3 --norm group": "--scale federated: not with --dp client",
    "-data SPAR --dp example --epsilon 8 --delta 1e-6 --clip 1 --scale client": "--scale client: not with --dp example",
    "-data SPAR --engine flower --attack sign-flip --attackers 0.3": "--attackers: attacks are simulated in",
    "-data SPAR --engine flower --jobs 2": "do not work with --engine flower",
    "-data SPAR --slurm time=60": "--slurm: is for --launcher slurm only",
    "-data SPAR --assumed-bad 0.3": "--assumed-bad 0.3: --aggregate mean does not use it; leave it out, or take",
    "-data SPAR --backend parallel": "it takes two clients a round and two threads (OMP_NUM_THREADS)",
    "-data {shards} --vary data": "holds shards, which cannot be divided again",
    "-data {shards} --max-share 0.4": "--max-share 0.4: a round has 2 clients, whose weights cannot all stay below",
    "-data {shards} -nb 7": "-nb 7: ",
}


@pytest.mark.parametrize("given", WRONG_TOGETHER)
def test_a_dry_run_refuses_what_the_run_refuses(given, data, capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    argv = [*given.format(shards=data).split(), "-algo", "FedAvg", *RUN, "-jr", "0.7"]
    line = fails(capsys, *argv, "--dry-run")
    assert WRONG_TOGETHER[given] in line
    assert fails(capsys, *argv) == line


def test_a_share_that_the_clients_of_a_round_can_have_is_accepted(data):
    assert main(["-data", str(data), "-algo", "FedAvg", *RUN, "-jr", "0.7", "--max-share", "0.5", "--dry-run"]) == 0


def test_a_comparison_that_cannot_begin_leaves_no_folder(data, capsys):
    Path("dropping.py").write_text(
        "from torch import nn\n\nfrom fedkdx_plugin.models.cnn import CNNSmall\n\n\n"
        "class Dropping(CNNSmall):\n    def __init__(self, shape, classes):\n"
        "        super().__init__(shape, classes)\n        self.drop = nn.Dropout(0.5)\n"
    )
    argv = ["-data", str(data), "-algo", "FedAvg", *RUN, "-m", "dropping.py:Dropping", "--backend", "stacked"]
    line = fails(capsys, *argv)
    assert "--backend stacked: model.drop: Dropout draws random numbers" in line
    assert fails(capsys, *argv, "--dry-run") == line


def test_data_describe(capsys):
    assert main(["data", "describe", own_data()]) == 0
    assert "read: 2 files, 2 recordings, 1200 rows; ignored: 0 files" in capsys.readouterr().out
    assert main(["data", "describe", own_data(rate=40)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert main(["data", "describe", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.yaml: cannot be read")


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_consoles_that_lack_letters(encoding):
    """A cp1252 or gbk console, or a pipe to one, has no letters for some papers' authors."""
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "fedkdx_plugin.cli.main", "--list"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert run.returncode == 0 and not run.stderr
    assert "UCI-HAR" in run.stdout.decode(encoding)


def test_all_means_every_algorithm():
    assert {"Local", "FedAvg", "FedKDX"} <= set(resolved("-data", "SPAR", "-algo", "all")["algorithm"])


def test_a_comparison_leaves_a_complete_folder(data, capsys):
    assert main(["-data", str(data), "-algo", "Local,FedAvg,FedKDX", "-t", "2", *RUN]) == 0
    out = capsys.readouterr().out
    (folder,) = Path("runs").iterdir()
    assert f"saved in {folder}" in out
    assert (folder / "comparison.md").read_text() in out
    runs = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert runs == [f"{name}-seed{seed}" for name in ("FedAvg", "FedKDX", "Local") for seed in (0, 1)]
    run = folder / "FedKDX-seed1"
    assert sorted(path.name for path in run.iterdir()) == [
        "SHA256SUMS",
        "config.yaml",
        "description.yaml",
        "environment.json",
        "log.txt",
        "manifest.json",
        "metrics.csv",
        "results.h5",
        "state.safetensors",
    ]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["round"] for row in rows] == ["1", "2"]
    with h5py.File(run / "results.h5") as results:
        assert results["rs_test_acc"].shape == results["rs_test_auc"].shape == results["rs_train_loss"].shape == (2,)
        assert float(rows[1]["accuracy"]) == results["rs_test_acc"][1] == results["views/served/accuracy"][1]
        assert float(rows[1]["student_f1"]) == results["views/student/f1"][1]
        assert results["views/served/client_accuracy"].shape == (2, 3)
        assert results["views/served/confusion"].shape == (3, 4, 4)
        assert results["views/served/confusion"][:].sum() == 36
        assert results["selected"][:].sum(1).tolist() == [1, 1]
        assert results["bytes_up"][0] == int(rows[0]["bytes_up"])
        assert yaml.safe_load(results.attrs["config"])["seed"] == 1
    state = load_file(run / "state.safetensors")
    assert any(name.startswith("server/weights/student.") for name in state)
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"] == torch.__version__


def test_a_runs_own_config_repeats_it_bit_for_bit(data):
    assert main(["-data", str(data), "-algo", "Local,FedKDX", "-o", "first", *RUN]) == 0
    (config,) = Path("first").glob("*/FedKDX-seed0/config.yaml")
    assert main(["--config", str(config), "-o", "second"]) == 0
    (again,) = Path("second").glob("*/FedKDX-seed0")
    for name in ("state.safetensors",):
        assert (config.parent / name).read_bytes() == (again / name).read_bytes()
    metrics = [
        [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in csv.DictReader(path.open())]
        for path in (config.parent / "metrics.csv", again / "metrics.csv")
    ]
    assert metrics[0] == metrics[1]


def test_algorithms_do_not_depend_on_who_runs_beside_them(data):
    assert main(["-data", str(data), "-algo", "FedKDX", "-o", "alone", *RUN]) == 0
    assert main(["-data", str(data), "-algo", "Local,FedAvg,FedKDX", "-o", "beside", *RUN]) == 0
    (alone,), (beside,) = (list(Path(o).glob("*/FedKDX-seed0/state.safetensors")) for o in ("alone", "beside"))
    assert alone.read_bytes() == beside.read_bytes()


def test_two_runs_in_one_second_do_not_overwrite_each_other(data):
    for _ in range(2):
        assert main(["-data", str(data), "-algo", "Local", *RUN, "-gr", "1"]) == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_evaluation_gap_leaves_cells_empty_and_results_whole(data):
    assert main(["-data", str(data), "-algo", "FedAvg", *RUN, "-gr", "3", "-eg", "2"]) == 0
    (run,) = Path("runs").glob("*/FedAvg-seed0")
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [bool(row["accuracy"]) for row in rows] == [False, True, True]
    with h5py.File(run / "results.h5") as results:
        assert results["evaluated_rounds"][:].tolist() == [2, 3]
        assert results["rs_test_acc"].shape == (2,)
        assert results["bytes_up"].shape == (3,)


def test_ctrl_c_leaves_what_was_measured(data, monkeypatch, capsys):
    from fedkdx_plugin.engine.rounds import Federation

    original = Federation.round

    def interrupted(self, round):
        if round.index == 2:
            raise KeyboardInterrupt
        return original(self, round)

    monkeypatch.setattr(Federation, "round", interrupted)
    assert main(["-data", str(data), "-algo", "FedAvg", *RUN]) == 130
    (run,) = Path("runs").glob("*/FedAvg-seed0")
    with h5py.File(run / "results.h5") as results:
        assert results["rs_test_acc"].shape == (1,)
    assert "ended early: KeyboardInterrupt" in (run / "log.txt").read_text()
    assert f"to go on: fedkdx resume {run.parent}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("-algo FedKDXX", "unknown algorithm 'FedKDXX' (did you mean FedKDX?)"),
        ("-m cnnn", "unknown model 'cnnn' (did you mean cnn?)"),
        ("-sm tiny", "unknown model 'tiny'"),
        ("-data SPARR", "unknown data set 'SPARR' (did you mean SPAR?)"),
        ("--set gama=0.5", "--set gama: FedKDX has no hyper-parameter 'gama' (did you mean gamma?)"),
        ("--set gamma=1.5", "FedKDX: gamma: 1.5 is out of range; it must be at least 0 and at most 1"),
        ("--set gamma=-0.1", "out of range"),
        ("--set gamma=high", "'high' is not a number"),
        ("--set gamma", "--set gamma: is no assignment; write NAME=VALUE"),
        ("--set use=kd,nothing", "'nothing' is unknown"),
        ("--set FedProx.mu=1", "no algorithm 'FedProx' here"),
        ("-algo FedAvg --set gamma=0.5", "FedAvg has no hyper-parameter 'gamma'"),
        ("-jr 0", "-jr: 0 is out of range; it must be above 0 and at most 1"),
        ("-jr 1.5", "-jr: 1.5 is out of range"),
        ("-gr -1", "-gr: -1 is out of range; it must be at least 1"),
        ("-gr 0", "-gr: 0 is out of range"),
        ("-gr 2.5", "-gr: '2.5' is not a whole number"),
        ("-gr many", "-gr: 'many' is not a whole number"),
        ("-lbs 0", "-lbs: 0 is out of range"),
        ("-lr 0", "-lr: 0 is out of range"),
        ("-lr nan", "-lr: 'nan' is not a number"),
        ("-ls 0", "-ls: 0 is out of range"),
        ("-eg 0", "-eg: 0 is out of range"),
        ("-t 0", "-t: 0 is out of range"),
        ("-nb 20", "-nb 20: "),
        ("-nc 20", "-nc 20: "),
        ("-ld perhaps", "-ld: 'perhaps' is neither true nor false"),
        ("-dev gpu", "-dev: 'gpu' is unknown"),
        ("--precision tf32", "--precision tf32: works on a GPU only, and this run is on the CPU; leave it out"),
        ("--client-memory host", "--client-memory host: works on a GPU only, and this run is on the CPU; leave it out"),
        ("--precision bf16", "--precision bf16: works on a GPU only, and this run is on the CPU; leave it out"),
        ("--precision half", "--precision: 'half' is unknown"),
        ("-bogus 3", "unrecognized arguments: -bogus 3; see --help"),
        ("-go a/b", "-go: 'a/b' may hold letters"),
        ("-algo ,", "-algo: no algorithm is named"),
        ("--alpha 0", "is out of range; it must be above 0"),
        ("--alpha -1", "is out of range; it must be above 0"),
        ("--config nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("--unseen 3", "--unseen 3: of 3 clients, one at least must train"),
        ("--unseen -1", "--unseen: -1 is out of range"),
        ("--late 0.3", "--late 0.3: write SHARE@ROUND"),
        ("--late 0.3@3", "--late 0.3@3: the round must be a whole number from 2 to 2"),
        ("--late 1@2", "--late 1@2: all 3 clients would be late"),
        ("--rare 0.3@2", "--rare 0.3@2: the probability must be"),
        ("--train-fraction 0", "--train-fraction: 0 is out of range; it must be above 0 and at most 1"),
        ("--subjects 1,2", "--subjects 1,2: "),
        ("--exclude-subjects 1", "was made with others; give the data set's name instead of a folder"),
        ("--train-fraction 0.5", "give the data set's name instead of a folder"),
        ("--evaluate-on validation", "holds test windows; give the data set's name instead of a folder"),
        ("--set serve=nobody", "FedKDX: serve: 'nobody' is unknown"),
        ("--set kd_weight=-1", "FedKDX: kd_weight: -1 is out of range"),
        (
            "--set teacher_init=student",
            "FedKDX has no hyper-parameter 'teacher_init'; FedKDX+ takes it (-algo FedKDX+)",
        ),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(data, capsys, argv, says):
    line = fails(capsys, "-data", str(data), *RUN, *argv.split())
    assert says in line


def test_shards_that_were_made_otherwise_than_asked_are_refused(shard_folder, tmp_path):
    folder = tmp_path / "blocked"
    shutil.copytree(shard_folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    spec = {"scale": "client", "split": "blocked", "median": None, "lowpass": 20.0, "seed": 2, "subjects": ["a", "b"]}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"spec": spec}))

    def asked(at, **options):
        return prepare_shards(from_dict({"data": str(at), **options}, "test"))

    for option, value, says in (
        ("scale", "none", "--scale none: .* was made with client; give"),
        ("split", "loso", "--split loso: .* was made with blocked; give"),
        ("median", 3, "--median 3: .* was made with the data set's own; give"),
        ("lowpass", 5, r"--lowpass 5\.0: .* was made with 20\.0; give"),
        ("data_seed", 1, "--data-seed 1: .* was made with 2; give"),
        ("subjects", ["a"], "--subjects a: .* was made with others; give"),
    ):
        with pytest.raises(UserError, match=says):
            asked(folder, **{option: value})
    same = {"scale": "client", "split": "blocked", "lowpass": 20, "data_seed": 2, "subjects": ["b", "a"]}
    assert asked(folder).num_clients == asked(folder, **same).num_clients == 3
    assert asked(shard_folder, scale="none", split="blocked").num_clients == 3  # which do not say how they were made


def test_an_unknown_command_is_named(capsys):
    assert "unknown command 'rezume' (did you mean resume?); commands: run, experiment" in fails(capsys, "rezume", "x")


def test_snake_case_is_kebab_case():
    assert resolved("-data", "SPAR", "--join_ratio=0.3", "--min_samples", "4") == resolved(
        "-data", "SPAR", "--join-ratio", "0.3", "--min-samples=4"
    )


def test_words_and_flags_are_the_same_commands(data, capsys):
    for command in (["list"], ["--list"]):
        assert main(command) == 0
    first, second = (part for part in capsys.readouterr().out.split("algorithms:\n") if part)
    assert first == second
    assert main(["run", "-data", str(data), "-algo", "Local", *RUN]) == 0
    (folder,) = Path("runs").iterdir()
    assert main(["-gr", "3", "--resume", str(folder)]) == 0
    assert len((folder / "Local-seed0" / "metrics.csv").read_text().splitlines()) == 1 + 3


def test_no_data_named(capsys):
    assert "which data?" in fails(capsys, "-algo", "FedAvg")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda(data, capsys):
    assert "-dev cuda: this PyTorch finds no CUDA device" in fails(capsys, "-data", str(data), *RUN, "-dev", "cuda")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("global_round: 3", "unknown key 'global_round' (did you mean global_rounds?)"),
        ("join_ratio: 7", "join_ratio: 7 is out of range"),
        ("join_ratio: [1]", "join_ratio: [1] is not a number"),
        ("set: 3", "'set'"),
        ("set: {gamma: [1]}", "gamma: [1] is not a number"),
        ("alpha: none", "alpha: 'none' is not a number"),
        ("- a\n- b", "must hold 'name: value' lines"),
        ("1: 2", "the key 1 is no text"),
        ("set: {1: 2}", "set: the key 1 is no text"),
        ("out: ~", "out: None is not a text"),
        ("a: [", "is no YAML"),
        ("!!python/object/apply:os.system ['touch hacked']", "is no YAML"),
        ("\x00", "is no YAML"),
    ],
)
def test_a_wrong_yaml_gets_one_line(data, capsys, text, says):
    Path("c.yaml").write_text(text)
    line = fails(capsys, "-data", str(data), "--config", "c.yaml")
    assert "c.yaml" in line or "gamma" in line
    assert says in line
    assert not Path("hacked").exists()


def test_a_damaged_shard_is_named(data, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "train" / "1.npz").write_bytes((copy / "train" / "1.npz").read_bytes()[:100])
    assert str(Path("train") / "1.npz") in fails(capsys, "-data", str(copy), *RUN)


def test_a_run_folder_that_cannot_be_made(data, capsys):
    Path("taken").write_text("a file")
    assert "taken" in fails(capsys, "-data", str(data), *RUN, "-o", "taken")


def test_a_full_disk_is_one_line(data, capsys, monkeypatch):
    import errno

    original = Path.write_bytes

    def full(path, content):
        if path.name == "results.h5":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["-data", str(data), "-algo", "FedAvg", *RUN]) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_a_model_that_cannot_take_the_windows_says_so(data, capsys, monkeypatch):
    from fedkdx_plugin.models.cnn import CNN
    from registry.errors import UserError

    def refuse(self, shape, classes):
        raise UserError(f"cnn: windows of {shape[2]} samples are too short")

    monkeypatch.setattr(CNN, "__init__", refuse)
    assert "too short" in fails(capsys, "-data", str(data), *RUN, "-m", "cnn")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-mu", "0.1"], "-mu: a hyper-parameter of an algorithm is set by --set mu=0.1"),
        (["--mu=0.1"], "--mu: a hyper-parameter of an algorithm is set by --set mu=0.1"),
        (
            ["--epsilon-start", "0.5"],
            "--epsilon-start: a hyper-parameter of an algorithm is set by --set epsilon_start=",
        ),
        (["-nothing", "1"], "unrecognized arguments: -nothing 1; see --help"),
        (["--epochs", "1"], "unrecognized arguments: --epochs 1 (did you mean --local-epochs?); see --help"),
    ],
)
def test_a_hyper_parameter_as_a_flag_is_told_how_it_is_set(capsys, words, says):
    """Argparse would read `-mu` as `-m u`."""
    assert says in fails(capsys, "-data", "SPAR", "-algo", "FedProx", *words)


def test_a_word_where_an_option_belongs_is_told_which_one(capsys):
    assert "SPAR: which option is this? write -data SPAR" in fails(capsys, "run", "SPAR", "-algo", "FedAvg")


def test_list_of_one_name_shows_its_hyper_parameters(capsys):
    assert main(["list", "fedprox"]) == 0
    shown = capsys.readouterr().out
    assert "built-in" in shown and "--set FedProx.NAME=VALUE" in shown and "\n    mu=0.01  " in shown
    assert main(["list", "SPAR"]) == 0 and "data set:" in capsys.readouterr().out
    assert "is called 'FedAvgg' (did you mean FedAvg?)" in fails(capsys, "list", "FedAvgg")


def test_help_groups_every_option_once():
    grouped = [name for names in GROUPS.values() for name in names]
    of_files = {own.name for own in dataclasses.fields(Files)}
    assert sorted(grouped) == sorted({own.name for own in dataclasses.fields(Options)} - of_files)


def test_help_names_all_other_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in shown] == ["run"]


def test_help_of_data_names_its_commands(capsys):
    assert main(["data", "--help"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")] == [
        *("init", "describe", "make", "import-pfllib")
    ]
