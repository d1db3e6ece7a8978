"""Worker processes give what the reference gives, whatever happens to them."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.configuration.config import Options
from fedkdx_plugin.engine.backends import parallel, selection
from fedkdx_plugin.engine.training import ClientError
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog
from registry.errors import UserError
from registry.interface import Message, Task
from tests.conftest import CLASSES, SHAPE, Recorder, TinierNet, make_data, make_federation, same_state

NAMES = [name for name in catalog.BUILT_IN["algorithms"] if name != "Centralised"]


def run(algorithm, backend="parallel", **options):
    """Run a federation of unequal clients; return it with its records."""
    torch.set_num_threads(2 if backend == "parallel" else 1)
    data = make_data(sizes=(40, 7, 1, 65, 20))
    federation = make_federation(algorithm, data, join_ratio=0.8, backend=backend, **options)
    recorder = Recorder()
    try:
        assert federation.backend.name == backend
        federation.run([recorder])
    finally:
        federation.close()
    return federation, recorder.records


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_the_reference_on_one_thread(name):
    algorithm = catalog.load("algorithms", name)
    one, two = (run(algorithm, backend) for backend in ("sequential", "parallel"))
    assert same_state(one[0].save().tensors, two[0].save().tensors)
    for a, b in zip(one[1], two[1], strict=True):
        assert (a.bytes_up, a.bytes_down, a.train_loss) == (b.bytes_up, b.bytes_down, b.train_loss)
        # evaluation takes place in this process, on two threads
        assert a.metrics["served"].loss == pytest.approx(b.metrics["served"].loss, rel=1e-5)


@pytest.mark.parametrize("model", [CNNSmall, CNNLSTM])
def test_other_models_and_unequal_ones(model):
    algorithm = catalog.load("algorithms", "FedKDX")
    task = Task(SHAPE, CLASSES, model, TinierNet)
    one, two = (run(algorithm, backend, task=task, rounds=2)[0] for backend in ("sequential", "parallel"))
    assert same_state(one.save().tensors, two.save().tensors)


def at_first(folder: Path, id: int) -> bool:
    """Return True once for each client and folder, in any process."""
    try:
        (folder / str(id)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def failing(what) -> type[FedAvg]:
    """FedAvg whose clients do something else first when they receive a message."""

    class Client(FedAvgClient):
        def receive(self, message):
            what(self)
            super().receive(message)

    class Failing(FedAvg):
        pass

    Failing.Client = Client
    return Failing


def test_a_worker_that_dies_is_replaced_and_changes_nothing(tmp_path):
    here = os.getpid()

    def die(client):
        if client.id in (0, 3) and os.getpid() != here and at_first(tmp_path, client.id):
            os.kill(os.getpid(), signal.SIGKILL)

    died, _ = run(failing(die))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "3"}
    assert same_state(died.save().tensors, run(FedAvg)[0].save().tensors)


def test_a_client_that_kills_every_worker_is_an_error_with_its_name():
    def die(client):
        if client.id == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"client 3: .*died 3 times \(signal SIGKILL\)"):
        run(failing(die))
    assert not multiprocessing.active_children()


def test_an_error_names_client_round_and_step():
    class Client(FedAvgClient):
        def losses(self, nets, batch, context):
            if self.id == 3 and len(batch.y) == 1:  # the fifth batch of 65 windows
                raise ZeroDivisionError("mean of nothing")
            return super().losses(nets, batch, context)

    class Broken(FedAvg):
        pass

    Broken.Client = Client
    said = []
    for backend in ("sequential", "parallel"):
        with pytest.raises(ClientError) as caught:
            run(Broken, backend)
        said.append(str(caught.value))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert said[0] == said[1]
    assert re.fullmatch(r"client 3, round \d, step 5: ZeroDivisionError: mean of nothing", said[0])
    assert not multiprocessing.active_children()


def test_an_error_that_only_a_worker_has_is_shown_with_its_trace():
    here = os.getpid()

    def fail(client):
        if os.getpid() != here:
            raise MemoryError("too little")

    with pytest.raises(RuntimeError, match=r"failed in a worker process, but not here(.|\n)*MemoryError: too little"):
        run(failing(fail))


def test_a_client_with_nan_is_dropped_by_name_and_the_rest_go_on():
    def spoil(client):
        if client.id == 3:
            client.data = replace(client.data, x=client.data.x * torch.nan)

    federations = [run(failing(spoil), backend) for backend in ("sequential", "parallel")]
    assert same_state(*(federation.save().tensors for federation, _ in federations))
    for _, records in federations:
        assert all(set(record.rejected) <= {3} for record in records)
        assert any(record.rejected for record in records)
        assert all("client 3" in reason for record in records for reason in record.rejected.values())
    assert federations[1][0].workspace.clients[3].trained == 0


@pytest.mark.parametrize("size", [4096, 64])
def test_tensors_of_all_kinds_reach_a_worker_and_come_back(size):
    """Through shared memory, or the pipe where that is too small; `a` and `b` lie in the same memory."""
    memory, (near, far) = parallel.mmap.mmap(-1, size), multiprocessing.Pipe()
    whole = torch.randn(6, 4)
    tensors = {
        "b": whole.T,
        "a": whole[1:, 2:],
        "trained": torch.randn(3, requires_grad=True),
        "count": torch.tensor(7),
        "no": torch.empty(0, 3),
        "yes": torch.tensor([True, False, True]),
        "half": torch.randn(5).bfloat16(),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    meta = {"id": 3, "round": [1, 2, 0.5], "text": "é"}
    parallel._put(memory, near, Message(tensors, meta))
    found = parallel._get(memory, far)
    memory[:] = bytes(size)  # what has arrived is not looked up again
    assert found.meta == meta and list(found.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)
        assert not found.tensors[name].requires_grad


def test_what_is_too_large_for_the_shared_memory_goes_through_the_pipe(monkeypatch):
    algorithm = catalog.load("algorithms", "FedFomo")
    expected = run(algorithm)[0].save().tensors
    original = parallel.mmap.mmap
    monkeypatch.setattr(parallel.mmap, "mmap", lambda fd, size: original(fd, 4096))
    assert same_state(expected, run(algorithm)[0].save().tensors)


def test_workers_end_with_the_federation_and_with_their_parent():
    run(FedAvg)
    assert not multiprocessing.active_children()
    code = (
        "import os, signal, torch; torch.set_num_threads(2);"
        "from tests.conftest import make_federation; from baselines.fedavg import FedAvg;"
        "from registry.interface import Round;"
        "f = make_federation(FedAvg, backend='parallel'); f.round(Round(1, 3));"
        "print(*(w.process.pid for w in f.backend._workers), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_auto_takes_processes_only_where_they_can_help():
    torch.set_num_threads(2)
    assert make_federation(FedAvg).backend.name == "parallel"
    assert make_federation(FedAvg, join_ratio=0.01).backend.name == "sequential"
    assert make_federation(catalog.load("algorithms", "Centralised")).backend.name == "sequential"
    torch.set_num_threads(1)
    assert make_federation(FedAvg).backend.name == "sequential"
    with pytest.raises(UserError, match=r"--backend parallel: it takes two clients a round and two threads"):
        make_federation(FedAvg, backend="parallel")


def test_the_command_line_offers_every_backend():
    (option,) = [field for field in fields(Options) if field.name == "backend"]
    assert option.metadata["choices"] == selection.NAMES
