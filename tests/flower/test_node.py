"""A site's two processes: the worker is lost and comes back, ends with the other one, and outlasts every timeout."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fedkdx_plugin.flower.protocol import Announcement
from fedkdx_plugin.flower.site import SiteSetup
from registry.interface import Message
from tests.flower.test_federation_faults import ROOT, Program

pytestmark = pytest.mark.flower
pytest.importorskip("flwr")
psutil = pytest.importorskip("psutil")

from fedkdx_plugin.flower import node  # noqa: E402

HEARTBEAT, TRAINING = 10, 35  # seconds; the server gives a site up after two heartbeats missed
# in the connection's process heartbeats are more frequent, in the worker's the training takes long
SLOW = f"""
import sys, time
if "fedkdx_plugin.flower.node" in sys.orig_argv:
    from flwr.common import constant
    constant.HEARTBEAT_DEFAULT_INTERVAL = {HEARTBEAT}
if "fedkdx_plugin.flower.worker" in sys.orig_argv:
    from fedkdx_plugin.flower import site
    train = site.Site._train
    def slow(self, *args):
        time.sleep({TRAINING})
        return train(self, *args)
    site.Site._train = slow
"""


@pytest.fixture
def setup(shard_folder, tmp_path, monkeypatch) -> Path:
    """Return the file of a site's own settings."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    SiteSetup(1, shard_folder, 2, tmp_path / "state", torch.device("cpu")).write(tmp_path / "site.json")
    return tmp_path / "site.json"


@pytest.fixture
def worker(setup):
    worker = node.Worker(setup, 1)
    yield worker
    worker.process.kill()
    worker.process.wait()


def samples(answer: bytes | str) -> int:
    return Announcement.from_message(Message.from_bytes(answer)).samples


def test_a_worker_that_was_killed_is_started_again_and_nothing_is_lost(worker, capfd):
    first = worker.process
    threading.Timer(0.3, first.kill).start()  # while it starts: before it can have answered
    assert samples(worker.ask(b"", None)) == 60
    assert worker.process is not first and first.poll() == -signal.SIGKILL
    assert "site 1: this site's worker ended with code -9" in capfd.readouterr().err
    second = worker.process
    assert samples(worker.ask(b"why not", None)) == 60
    assert worker.process is second  # it stays
    assert "site 1: refused by the server: why not" in capfd.readouterr().err


def test_work_that_ends_every_worker_is_given_up(worker, setup):
    setup.write_text("{}")
    worker.process.kill()
    assert worker.ask(b"", None) == "this site's worker ended with code 1, 2 times in a row"


def test_a_failure_costs_one_answer_and_is_named(worker):
    answer = worker.ask(b"no message", {"run": "a", "settings": "{}", "clients": 3})
    assert "client 1: " in Message.from_bytes(answer).meta["dropped"]
    assert worker.ask("no bytes", None).startswith("AttributeError: ")
    assert samples(worker.ask(b"", None)) == 60


def test_a_worker_ends_with_the_process_that_holds_the_connection(setup):
    """Also where that one is killed, and cannot end it."""
    program = (
        "from fedkdx_plugin.flower import node; from pathlib import Path; import sys, time\n"
        "worker = node.Worker(Path(sys.argv[1]), 1); print(worker.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(setup)], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    worker.wait(30)
    assert not worker.is_running()


def test_a_message_lies_unseen_for_a_tenth_of_the_time_waited():
    assert [node.pause(waited) for waited in (0, 0.5, 10, 29, 3600)] == [0.1, 0.1, 1.0, pytest.approx(2.9), 3.0]


@pytest.mark.slow
def test_a_training_may_take_longer_than_a_silent_site_is_kept(shard_folder, tmp_path, monkeypatch):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    options = ["-data", shard_folder, "-algo", "FedAvg", "--engine", "flower", "-gr", 1, "-jr", 1, "-ls", 1]
    began = time.monotonic()
    program = Program(tmp_path, *options, path=tmp_path / "slow")
    try:
        assert program.process.wait(300) == 0, program.said()
    finally:
        if program.process.poll() is None:
            program.signal_all(signal.SIGKILL)
    assert time.monotonic() - began > TRAINING
    (journal,) = tmp_path.glob("runs/*/FedAvg-seed0/sites.csv")
    events = [row.split(",")[3] for row in journal.read_text().splitlines()[1:]]
    assert events.count("answered") == 6 and set(events) == {"joined", "answered"}
