"""A federation over TLS in which everything goes wrong: sites late, killed, stopped, wrong, and the server killed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedkdx_plugin.results.records import read_results

pytest.importorskip("flwr")
h5py = pytest.importorskip("h5py")
psutil = pytest.importorskip("psutil")

from fedkdx_plugin.flower import certificates  # noqa: E402

pytestmark = pytest.mark.flower
ROOT = Path(__file__).parent.parent.parent
ROUNDS, DEADLINE = 20, 60  # rounds enough for what a site takes to start
PATIENCE = 600  # seconds, for anything a test waits for
# a site that answers rubbish from round 6 on: its own process spoils what it sends
SPOIL = """
import sys
if "fedkdx_plugin.flower.worker" in sys.orig_argv:
    from fedkdx_plugin.flower import site
    train = site.Site._train
    def spoilt(self, sent, round, answer, folder):
        answer = train(self, sent, round, answer, folder)
        if round.index >= 6 and answer.reply:
            for tensor in answer.reply.tensors.values():
                tensor[...] = float("nan")
        return answer
    site.Site._train = spoilt
"""


@pytest.fixture
def free_tcp_port() -> int:
    from fedkdx_plugin.flower.processes import free_port

    return free_port()


class Program:
    """A command of ours, as an operator starts it, and all that it starts."""

    def __init__(self, folder: Path, *arguments: object, path: Path | None = None) -> None:
        self.log = folder / "out.log"
        python_path = os.pathsep.join([str(ROOT), *([str(path)] if path else [])])
        env = dict(os.environ) | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as out:
            command = [sys.executable, "-m", "fedkdx_plugin.cli.main", *map(str, arguments)]
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out)

    def signal_all(self, number: int) -> None:
        """To it and to all that it started, at once."""
        own = psutil.Process(self.process.pid)
        for process in [own, *own.children(recursive=True)]:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def wait_for(what: Callable[[], object], meanwhile: Program) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert meanwhile.process.poll() is None, meanwhile.said()
        assert time.monotonic() < until, meanwhile.said()
        time.sleep(0.3)


@pytest.mark.slow
def test_everything_goes_wrong_and_the_run_is_finished(shard_folder, tmp_path, free_tcp_port):
    fedkdx = [sys.executable, "-m", "fedkdx_plugin.cli.main"]
    made = [*fedkdx, "certificates", "keys", "--host", "localhost", "--sites", "3"]
    subprocess.run(made, cwd=tmp_path, env=dict(os.environ) | {"PYTHONPATH": str(ROOT)}, check=True)
    for name in ("server", "site-0", "site-1", "site-2", "impostor", "spoil"):
        (tmp_path / name).mkdir()
    (tmp_path / "spoil" / "sitecustomize.py").write_text(SPOIL)
    here = ["--sites", 3, "--min-clients", 1, "--min-updates", 1, "--deadline", DEADLINE, "--port", free_tcp_port]
    here += ["--certificates", tmp_path / "keys" / "server"]
    run = ["-algo", "FedKDX", "-gr", ROUNDS, "-jr", 1, "-ls", 1]

    def join(client: int, key: int | None = None, path: Path | None = None) -> Program:
        folder = tmp_path / (f"site-{client}" if key is None else "impostor")
        key = client if key is None else key
        whose = ["--client", client, "-data", shard_folder, "--shard", client, "--state", "state"]
        there = ["--server", f"localhost:{free_tcp_port}", "--certificates", tmp_path / "keys" / f"site-{key}"]
        return Program(folder, "join", *whose, *there, path=path)

    def done(count: int) -> Callable[[], bool]:
        return lambda: any(f"round {count}: clients" in log.read_text() for log in logs())

    def logs() -> list[Path]:
        return list((tmp_path / "server").glob("runs/*/FedKDX-seed0/log.txt"))

    def happened(event: str, client: int) -> list[dict[str, str]]:
        """Rows of the journal, which is there before the first of them."""
        (journal,) = (tmp_path / "server").glob("runs/*/FedKDX-seed0/sites.csv")
        with journal.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["event"] == event and row["client"] == str(client)]

    programs = [Program(tmp_path / "server", "serve", *here, *run)]
    server = programs[0]
    try:
        sites = [join(0), join(1, path=tmp_path / "spoil")]
        impostor = join(0, key=2)  # site 2's key, but it calls itself client 0
        programs += [*sites, impostor]
        wait_for(done(1), server)
        wait_for(
            lambda: "refused by the server: calls itself client 0, but its key is client-2's" in impostor.said(), server
        )
        assert impostor.end() == 130
        sites.append(join(2))  # late
        programs.append(sites[2])
        wait_for(done(2), server)
        # until it was missed: the round that runs may have its answer already
        sites[0].signal_all(signal.SIGKILL)
        wait_for(lambda: happened("silent", 0), server)
        sites[0] = join(0)
        programs.append(sites[0])
        wait_for(lambda: happened("joined", 2), server)
        sites[2].signal_all(signal.SIGSTOP)
        wait_for(lambda: happened("silent", 2), server)
        sites[2].signal_all(signal.SIGCONT)
        wait_for(lambda: any("dropped an update: client 1" in log.read_text() for log in logs()), server)
        server.signal_all(signal.SIGKILL)
        (folder,) = (tmp_path / "server" / "runs").iterdir()
        server = Program(tmp_path / "server", "serve", *here, "--resume", folder)
        programs.append(server)
        assert server.process.wait(PATIENCE) == 0, server.said()
        for site in sites:
            assert site.end() == 130, site.said()
    finally:
        for program in programs:
            if program.process.poll() is None:
                program.signal_all(signal.SIGKILL)

    place = folder / "FedKDX-seed0"
    with h5py.File(place / "results.h5") as file:
        records, _ = read_results(file)
    assert [record.round for record in records] == list(range(1, ROUNDS + 1))
    assert any("its key is client-2's" in row["detail"] for row in happened("refused", -1))
    assert int(happened("joined", 2)[0]["round"]) >= 2
    assert len(happened("joined", 0)) > 1
    assert "client 1: student." in (place / "log.txt").read_text()
    assert "missing; the server goes on" not in (place / "sites.csv").read_text()  # private state survived
    assert any(0 in record.selected for record in records[4:])
    for record in records:  # also one in which nobody's work counted
        worked = set(record.selected) - record.rejected.keys() - record.lost.keys()
        assert bool(worked) == bool(np.isfinite(record.train_loss))
    assert "ended early" not in (place / "log.txt").read_text().splitlines()[-1]


def test_too_few_sites_end_with_one_line(tmp_path, free_tcp_port):
    options = [
        "--sites",
        2,
        "--min-updates",
        1,
        "--wait",
        3,
        "--insecure",
        "--port",
        free_tcp_port,
        "-algo",
        "FedAvg",
        "-gr",
        1,
    ]
    server = Program(tmp_path, "serve", *options)
    try:
        assert server.process.wait(PATIENCE) == 2
    finally:
        if server.process.poll() is None:
            server.signal_all(signal.SIGKILL)
    assert "error: 0 of at least 2 sites are there after 3 s of waiting (--min-clients, --wait)" in server.said()
    assert "INSECURE" in server.said()


@pytest.mark.slow
def test_a_site_whose_key_is_not_registered_is_told_so(shard_folder, tmp_path, free_tcp_port):
    certificates.make(tmp_path / "keys", ["localhost"], 2)
    certificates.make(tmp_path / "others", ["localhost"], 1)
    (tmp_path / "keys" / "site-0" / "site.key").write_bytes((tmp_path / "others" / "site-0" / "site.key").read_bytes())
    for name in ("server", "site"):
        (tmp_path / name).mkdir()
    here = ["--sites", 2, "--min-updates", 1, "--port", free_tcp_port, "--certificates", tmp_path / "keys" / "server"]
    whose = ["--client", 0, "-data", shard_folder, "--shard", 0, "--state", "state"]
    there = ["--server", f"localhost:{free_tcp_port}", "--certificates", tmp_path / "keys" / "site-0"]
    server = Program(tmp_path / "server", "serve", *here, "-algo", "FedAvg", "-gr", 1)
    site = Program(tmp_path / "site", "join", *whose, *there)
    try:
        assert site.process.wait(PATIENCE) == 2
    finally:
        for program in (server, site):
            if program.process.poll() is None:
                program.signal_all(signal.SIGKILL)
    assert "error: cannot stay in the federation: fedkdx site 0: error: the server does not accept" in site.said()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(shard_folder, tmp_path):
    program = Program(tmp_path, "-data", shard_folder, "-algo", "FedAvg", "--engine", "flower", "-gr", 50)
    wait_for(lambda: len(psutil.Process(program.process.pid).children(recursive=True)) >= 8, program)
    started = psutil.Process(program.process.pid).children(recursive=True)
    for process in started:
        try:
            settings = process.environ()
        except psutil.NoSuchProcess:  # it had little to do
            continue
        assert settings["FLWR_TELEMETRY_ENABLED"] == "0" and settings["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert settings["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert program.end() == 130
    assert "to go on: fedkdx resume" in program.said()
    _, alive = psutil.wait_procs(started, 5)
    assert not alive
