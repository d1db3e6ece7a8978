"""Trackers: what they record of a run, and what is said where they cannot."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from fedkdx_plugin.results.runs import Run, read
from fedkdx_plugin.tracking.callbacks import RunInfo
from fedkdx_plugin.tracking.scalars import scalars
from fedkdx_plugin.tracking.trackers import trackers
from registry.errors import UserError
from tests.fedkdx_plugin.made_runs import make_run


@pytest.fixture
def run(tmp_path) -> Run:
    return read(make_run(tmp_path / "run", "FedKDX", views=("served", "student"), server=True))


def watched(name: str, run: Run, error: BaseException | None = None) -> None:
    (tracker,), info = trackers([name]), RunInfo("FedKDX seed 0", "FedKDX", run.folder, run.config, done=1)
    tracker.on_run_start(info)
    for record in run.records:
        tracker.on_round_start(info, record.round)
        tracker.on_round_end(info, record)
    tracker.on_run_end(info, error)


def test_scalars_are_the_rounds_own_numbers(run):
    record = run.records[-1]
    found = scalars(record)
    assert found["student/accuracy"] == record.metrics["student"].accuracy
    assert found["bytes/up"] == record.bytes_up and found["seconds/train"] == record.seconds["train"]
    assert found["server/epsilon"] == record.server["epsilon"]
    assert all(value == value for value in found.values())  # no NaN, which trackers refuse


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt(), "KILLED"), (ValueError(), "FAILED")]
)
def test_mlflow_holds_settings_and_rounds(run, tmp_path, monkeypatch, error, status):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/ml.db")
    watched("mlflow", run, error)
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/ml.db")
    (made,) = client.search_runs([client.get_experiment_by_name("fedkdx").experiment_id])
    assert (made.info.run_name, made.info.status) == ("FedKDX seed 0", status)
    assert made.data.params["global_rounds"] == str(run.config["global_rounds"])
    history = client.get_metric_history(made.info.run_id, "student/accuracy")
    assert [(m.step, m.value) for m in history] == [(r.round, r.metrics["student"].accuracy) for r in run.records]


def test_wandb_is_given_settings_and_rounds(run, monkeypatch):
    """The package's own functions are stood in for: it starts processes and may ask for a login."""
    seen: list[tuple] = []

    def init(**options: object) -> SimpleNamespace:
        seen.append(("init", options["name"], options["config"]["global_rounds"]))
        return SimpleNamespace(
            log=lambda values, step: seen.append(("log", step, values["student/accuracy"])),
            finish=lambda exit_code: seen.append(("finish", exit_code)),
        )

    package = ModuleType("wandb")
    package.init, package.__spec__ = init, SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", package)
    watched("wandb", run, ValueError())
    rounds = [("log", r.round, r.metrics["student"].accuracy) for r in run.records]
    assert seen == [("init", "FedKDX seed 0", run.config["global_rounds"]), *rounds, ("finish", 1)]

    def refuse(**options: object) -> None:
        raise RuntimeError("no API key\nconfigured")

    package.init = refuse
    with pytest.raises(UserError, match=r"^--track wandb: RuntimeError: no API key configured$"):
        watched("wandb", run)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"--track {name} needs a package: pip install {name}"):
        trackers([name])
