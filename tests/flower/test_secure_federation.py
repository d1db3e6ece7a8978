"""Secure aggregation between processes of Flower: the bits of one process, and a site whose worker dies in between."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedkdx_plugin import compare
from tests.flower.test_federation import ROOT, fedkdx, metrics

pytest.importorskip("flwr")

pytestmark = pytest.mark.flower
# client 1's worker ends in round 2, after it has trained and dealt its shares, when it is asked for masked values
DIES = """
import sys
if "fedkdx_plugin.flower.worker" in sys.orig_argv:
    import os, pathlib
    from fedkdx_plugin.flower import secure
    take, died = secure.SecureSite.take, pathlib.Path(__file__).with_name("died")
    def dying(self, step):
        if (step.client, step.round, step.step) == (1, 2, "mask") and not died.exists():
            died.touch()
            os._exit(9)
        return take(self, step)
    secure.SecureSite.take = dying
"""


def test_sites_sum_and_one_dies_between_two_steps(shard_folder, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(DIES)
    path = os.pathsep.join([str(ROOT), str(tmp_path / "path")])
    env = dict(os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = "-algo FedAvg -m cnn -gr 2 -jr 1 -ls 1 -dev cpu --secure-aggregation --engine flower".split()
    made = subprocess.run(
        fedkdx("-data", shard_folder, *words, "-o", "there"), env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    options = {"model": "cnn", "rounds": 2, "join_ratio": 1.0, "local_epochs": 1, "device": "cpu"}
    options |= {"secure_aggregation": True, "backend": "sequential", "out": str(tmp_path / "here")}
    compare(str(shard_folder), ["FedAvg"], **options)
    there, here = (next((tmp_path / out).glob("*/FedAvg-seed0")) for out in ("there", "here"))
    assert metrics(there)[0] == metrics(here)[0]
    assert [(row["clients"], row["lost"], row["rejected"]) for row in metrics(there)] == [
        ("3", "0", "0"),
        ("3", "1", "0"),
    ]
    assert "client 1 refused: this site's keys of that round are gone" in (there / "log.txt").read_text()
    with (there / "sites.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["round"] == "2" and row["client"] == "1"]
    # it trained, dealt shares, had lost its keys, and measured once more after the last round
    assert [row["event"] for row in rows] == ["answered", "answered", "refused", "answered"]
    said = (Path(there).parent / "sites" / "0" / "supernode.log").read_text()
    assert said.count("sent its update masked, to be summed with") == 2


@pytest.mark.slow
def test_a_site_that_masks_alone_refuses_a_plain_federation(shard_folder, tmp_path):
    """`fedkdx join --secure-aggregation` between machines: the server's run does not ask for it."""
    from fedkdx_plugin.flower.processes import free_port

    port = free_port()
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["serve", "--sites", 2, "--min-updates", 1, "--port", port, "--insecure", "--deadline", 60]
    server = subprocess.Popen(
        fedkdx(*words, *"-algo FedAvg -gr 2 -jr 1 -ls 1".split()), cwd=tmp_path, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    sites = []
    for client, flags in ((0, []), (1, ["--secure-aggregation"])):
        own = ["--client", client, "-data", shard_folder, "--shard", client, "--state", tmp_path / str(client)]
        join = fedkdx("join", "--server", f"localhost:{port}", "--insecure", *own, *flags)
        sites.append(subprocess.Popen(join, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=sys.stderr))
    try:
        said, _ = server.communicate(timeout=600)
    finally:
        for site in sites:
            site.terminate()
            site.wait(60)
    assert server.returncode == 0, said
    (place,) = tmp_path.glob("runs/*/FedAvg-seed0")
    assert [(row["clients"], row["rejected"]) for row in metrics(place)] == [("2", "1"), ("2", "1")]
    assert "this site sends masked updates alone" in (tmp_path / "1" / "supernode.log").read_text()
