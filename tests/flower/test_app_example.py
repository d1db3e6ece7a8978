"""The example of somebody's own Flower app: without processes, and between those of Flower's own deployment."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.flower

from flwr.app import Context, RecordDict  # noqa: E402

from fedkdx_plugin.flower import roster  # noqa: E402
from fedkdx_plugin.flower.processes import Processes, environment, flower, free_port  # noqa: E402
from fedkdx_plugin.flower.superlink import CONNECTION, SuperLink  # noqa: E402
from tests.flower.grid import FakeGrid  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "flower-app"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "wrist"]:
        del sys.modules[name]


def test_the_example_learns(example, monkeypatch, capsys):
    monkeypatch.setattr(roster, "LOOK_SECONDS", 0.001)
    client, server = (importlib.import_module(f"wrist.{side}_app").app for side in ("client", "server"))
    server(FakeGrid(client, 3), Context(1, 1, {}, RecordDict(), {"rounds": 3, "nodes": 3}))
    accuracy = re.search(r"accuracy (\d\.\d+); the shared student has \d+ parameters", capsys.readouterr().out)
    assert float(accuracy[1]) > 0.5  # of four classes


@pytest.mark.slow
def test_the_example_runs_between_processes_of_flower(tmp_path, monkeypatch):
    """As Flower's documentation starts an app: a SuperLink, SuperNodes, and `flwr run`."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Processes() as processes:
        link = SuperLink(processes, tmp_path, secure=False)
        for client in range(3):
            command = [flower("flower-supernode"), "--insecure", "--superlink", link.address]
            command += ["--port", str(free_port()), "--node-config", f"partition-id={client}"]
            processes.start(command, tmp_path / f"node-{client}", tmp_path / f"node-{client}.log")
        command = [flower("flwr"), "run", str(EXAMPLE), CONNECTION, "-c", "rounds=2", "--stream"]
        run = subprocess.run(command, env=environment(link.home), capture_output=True, text=True, timeout=300)
    accuracy = re.search(r"accuracy (\d\.\d+); the shared student", run.stdout)
    assert accuracy and float(accuracy[1]) > 0.4, run.stdout + run.stderr
