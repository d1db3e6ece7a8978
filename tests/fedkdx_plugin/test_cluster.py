"""Runs as jobs of a cluster: submitit as it is, with commands of Slurm that start the jobs on this machine."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from dataset_utils.files import locked
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.experiments import cluster
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.pool import RunError
from fedkdx_plugin.results.runs import FAILED, rounds_done
from registry.errors import UserError
from tests.test_cli import fails

ROOT = Path(__file__).parent.parent.parent
SLURM = {
    "sbatch": """
number, path = len(list(HERE.glob("*.sh"))) + 1, pathlib.Path(sys.argv[1])
text = path.read_text()
if "--partition=closed" in text:
    sys.exit("sbatch: error: invalid partition specified: closed")
(HERE / f"{number}.sh").write_text(text)
job = {"SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0",
       "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
shell = f"bash {HERE}/{number}.sh; touch {HERE}/{number}.ended"
quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
subprocess.Popen(["bash", "-c", shell], env=os.environ | job, start_new_session=True, **quiet)
print("Submitted batch job", number)
""",
    "srun": """
job, words = os.environ["SLURM_JOB_ID"], sys.argv[1:]
for flag, number in (("--output", 1), ("--error", 2)):
    at = words.index(flag)
    os.dup2(os.open(words[at + 1].replace("%j", job).replace("%t", "0"), os.O_WRONLY | os.O_CREAT), number)
    del words[at : at + 2]
words = words[next(place for place, word in enumerate(words) if not word.startswith("--")) :]
(HERE / f"{job}.pid").write_text(str(os.getpid()))
os.execvp(words[0], words)
""",
    "sacct": """
print("JobID|State|NodeList")
for path in HERE.glob("*.sh"):
    print(f"{path.stem}|{'FAILED' if path.with_suffix('.ended').exists() else 'RUNNING'}|here")
""",
    "scancel": """
os.kill(int((HERE / f"{sys.argv[1]}.pid").read_text()), 15)
""",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put the four commands on the path, and return the folder in which they keep the jobs."""
    pytest.importorskip("submitit")
    from submitit.slurm.slurm import SlurmJob

    jobs, commands = tmp_path / "slurm", tmp_path / "bin"
    jobs.mkdir()
    commands.mkdir()
    for name, program in SLURM.items():
        head = f"#!{sys.executable} -IS\nimport os, pathlib, subprocess, sys\nHERE = pathlib.Path({str(jobs)!r})\n"
        (commands / name).write_text(head + program)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(SlurmJob.watcher, "_delay_s", 0.5)
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.1)
    return jobs


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the jobs, as of the tests


def written(data: Path, *algorithms: str, **base: object) -> str:
    base = {"data": str(data), "model": "cnn_small", "global_rounds": 3, "device": "cpu"} | base
    content = {"title": "Mine", "base": base, "grid": {"algorithm": list(algorithms)}}
    Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "mine.yaml"


def figures(out: str) -> dict[str, dict[str, object]]:
    """Run folder -> dataset of results.h5 -> its values, but for what took how long."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(Path(out).rglob("results.h5")):
        own = found.setdefault(str(path.parent.relative_to(out)), {})
        with h5py.File(path) as file:
            file.visititems(lambda name, item, own=own: own.update({name: item[()]} if hasattr(item, "dtype") else {}))
        for name in [name for name in own if name.startswith("seconds")]:
            del own[name]
    return found


def assert_same(one: str, other: str) -> None:
    ours, theirs = figures(one), figures(other)
    assert ours.keys() == theirs.keys() and ours
    for folder in ours:
        assert ours[folder].keys() == theirs[folder].keys() and "rs_test_acc" in ours[folder]
        for name, values in ours[folder].items():
            np.testing.assert_array_equal(values, theirs[folder][name])


def local(folder, slurm):
    """Return submitit's executor that starts jobs on this machine, without any Slurm."""
    from submitit import LocalExecutor

    return LocalExecutor(folder)


@pytest.mark.slow  # processes of jobs start one after the other
@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_jobs_give_the_numbers_of_one_process(slurm, executor, shard_folder, capsys, monkeypatch):
    if executor == "local":
        monkeypatch.setattr(cluster, "_executor", local)
    name = written(shard_folder, "Local", "FedKDX")
    assert main(["experiment", name, "--jobs", "1", "-o", "one"]) == 0
    argv = ["experiment", name, "--launcher", "slurm", "--slurm", "partition=gpu,time=1-00:00,cpus-per-task=1"]
    assert main([*argv, "-o", "jobs"]) == 0
    out = capsys.readouterr()
    assert "Mine: 2 runs; jobs of Slurm; results in jobs/mine" in out.out
    assert "FedKDX round 3/3" in out.err  # progress as of runs on this machine
    assert_same("jobs", "one")
    assert Path("jobs/mine/report/report.html").exists()
    assert not list(Path("jobs/mine/jobs").iterdir())  # of jobs that are done nothing is left
    assert not list(Path("jobs").rglob("state.safetensors"))
    if executor == "slurm":
        scripts = [path.read_text() for path in slurm.glob("*.sh")]
        assert len(scripts) == 2  # a job for each run
        for line in ("--partition=gpu", "--time=1-00:00", "--cpus-per-task=1", "--job-name=fedkdx"):
            assert all(f"#SBATCH {line}\n" in script for script in scripts)
        assert all(" --cpus-per-task=1 " in script.partition("# command")[2] for script in scripts)  # of srun
    assert main([*argv, "-o", "jobs"]) == 0
    assert "2 runs, 2 of them done" in capsys.readouterr().out
    assert executor == "local" or len(list(slurm.glob("*.sh"))) == 2


def test_no_time_is_set_where_none_is_given(slurm):
    executor = cluster._executor(Path("jobs"), {})
    assert "--time" not in executor._make_submission_file_text("true", "0")


def test_failed_jobs_are_told_and_made_by_the_same_command(slurm, shard_folder, capsys):
    """An algorithm that raises, a process that is killed, until what is wrong with them is mended."""
    Path("bad.py").write_text("""
import os, pathlib, signal
from baselines.fedavg import FedAvg, FedAvgClient
class Raising(FedAvg):
    "Raises."
    class Client(FedAvgClient):
        def losses(self, nets, batch, context):
            if pathlib.Path("wrong").exists():
                raise ValueError("too hot")
            return super().losses(nets, batch, context)
class Dying(FedAvg):
    "Dies."
    class Client(FedAvgClient):
        def losses(self, nets, batch, context):
            if pathlib.Path("wrong").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().losses(nets, batch, context)
""")
    Path("wrong").touch()
    name = written(shard_folder, "bad.py:Raising", "bad.py:Dying", "FedAvg", backend="sequential")
    argv = ["experiment", name, "--launcher", "slurm", "--slurm", "time=5"]
    assert main(argv) == 1
    reasons = {path.parent.name.partition("-")[0]: path.read_text() for path in Path("runs").rglob(FAILED)}
    assert len(reasons) == 2
    raising, dying = (next(text for text in reasons.values() if what in text) for what in ("too hot", "without a"))
    assert "Traceback" in raising and "job 2 ended without a result" in dying
    assert Path(dying.split("its output is in ")[1].partition("\n")[0]).exists()
    assert "2 of 3 runs are missing" in capsys.readouterr().err
    Path("wrong").unlink()
    assert main(argv) == 0
    assert len(list(slurm.glob("*.sh"))) == 5  # FedAvg was not made again
    assert not list(Path("runs").rglob(FAILED))


@pytest.mark.slow
@pytest.mark.parametrize("who", ["command", "job"])
def test_what_is_stopped_is_saved_and_the_same_command_ends_as_if_unbroken(slurm, shard_folder, who):
    name = written(shard_folder, "FedKDX", global_rounds=60)
    assert main(["experiment", name, "--jobs", "1", "-o", "whole"]) == 0
    command = [sys.executable, str(ROOT / "run.py"), "experiment", name, "--launcher", "slurm", "-o", "parts"]
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    broken = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=hears)
    while not any(path.read_text().count("\n") > 5 for path in Path("parts").rglob("metrics.csv")):
        assert broken.poll() is None
        time.sleep(0.05)
    if who == "command":
        time.sleep(2 * cluster.LOOK_SECONDS)
        broken.send_signal(signal.SIGINT)
    else:  # as Slurm does where the time is almost up
        os.kill(int((slurm / "1.pid").read_text()), signal.SIGUSR2)
    told = broken.communicate()[1].decode()
    assert (broken.returncode, "to go on: fedkdx resume parts" in told) == (
        (130, True) if who == "command" else (2, False)
    )
    assert (who == "command") or "stopped by the cluster, its state saved" in told
    (state,) = Path("parts").rglob("state.safetensors")
    assert 0 < rounds_done(state.parent) < 60
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_same("parts", "whole")


def test_two_jobs_never_work_in_one_run_folder(shard_folder):
    (planned,) = Experiment.grid(written(shard_folder, "Local")).runs
    info = planned.info(Path("runs/mine"))
    info.folder.mkdir(parents=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        with locked(info.folder / cluster.LOCK):
            kind, (type_, reason, _) = cluster._work(info, ["test"])
        assert kind == "failed" and type_ is UserError and "another process works in this folder" in reason
        assert cluster._work(info, ["test"]) == ("done", None)
        (info.folder / "state.safetensors").unlink()  # of a finished run of a grid it is removed
        before = (info.folder / "results.h5").stat().st_mtime_ns
        assert cluster._work(info, ["test"]) == ("done", None)
        assert (info.folder / "results.h5").stat().st_mtime_ns == before  # not made again
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_what_the_cluster_refuses_is_one_line(slurm, shard_folder, capsys):
    argv = ["experiment", written(shard_folder, "Local"), "--launcher", "slurm", "--slurm", "partition=closed"]
    assert main(argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert ": Local was refused: " in line and "invalid partition specified: closed" in line


def test_a_machine_without_slurm_is_told_in_one_line(shard_folder, capsys, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    argv = ["experiment", written(shard_folder, "Local"), "--launcher", "slurm"]
    assert "there is no 'srun' on this machine" in fails(capsys, *argv)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("partition", "--slurm partition: is no option of sbatch; write NAME=VALUE"),
        ("time=", "write NAME=VALUE"),
        ("Time=5", "write NAME=VALUE"),
        ("comment=a\nrm -rf x", "write NAME=VALUE"),
        ("nodes=2", "a run is one job of one process"),
        ("open-mode=append", "a run is one job of one process"),
        ("time=5,time=6", "'time' is given twice"),
    ],
)
def test_options_of_the_cluster_are_checked_for_form(given, says):
    with pytest.raises(UserError, match=says):
        cluster.options(given.split(","))


def test_options_of_the_cluster_keep_their_values():
    assert cluster.options(["gres=gpu:a100=1", "cpus-per-task=4"]) == {"gres": "gpu:a100=1", "cpus_per_task": "4"}


def test_what_is_missing_is_named_with_the_command(shard_folder, capsys, monkeypatch):
    name = written(shard_folder, "Local")
    assert "--slurm: is for --launcher slurm only" in fails(capsys, "experiment", name, "--slurm", "time=5")
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fedkdx[slurm]'" in fails(capsys, "experiment", name, "--launcher", "slurm")


def test_an_error_of_a_job_keeps_its_kind():
    assert type(cluster.failure("failed", (UserError, "no data", ""))) is UserError
    error = cluster.failure("failed", (RunError, "too hot", "trace"))
    assert isinstance(error, RunError) and error.trace == "trace" and cluster.failure("done", None) is None
