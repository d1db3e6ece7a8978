"""What must hold on an NVIDIA GPU: run with `pytest -m cuda`; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.choice import RATE, read_preset
from fedkdx_plugin.engine.backends.stacked.backend import Stacked
from fedkdx_plugin.engine.backends.stacked.step import COMPILED, EAGER, GRAPH
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.models.cnn import CNN, CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog
from registry.interface import Message, Round, Server, Task
from registry.parameters import parse
from tests.conftest import CLASSES, Recorder, make_data, same_state
from tests.fedkdx_plugin.stacked_runs import with_client
from tests.fedkdx_plugin.test_own_steps import VARIANTS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

NAMES = list(catalog.BUILT_IN["algorithms"])
UNEQUAL = (40, 7, 65, 20, 33)  # whole batches, less than one, and one window left over (65 = 4 · 16 + 1)
SHAPE = (3, 1, 32)


def windows(device: str, dtype: torch.dtype = torch.float32) -> DeviceData:
    """`make_data`'s windows, twice as long, on a device."""

    def longer(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.flip(3)], 3).to(device, dtype)

    data = make_data(UNEQUAL)
    return replace(
        data,
        train_x=[longer(x) for x in data.train_x],
        train_y=[y.to(device) for y in data.train_y],
        test_x=longer(data.test_x),
        test_y=data.test_y.to(device),
        test_client=data.test_client.to(device),
    )


def federation(
    name: str | type[Server],
    device: str = "cuda",
    backend="auto",
    model=CNNSmall,
    student=CNNSmall,
    params=None,
    rounds=2,
):
    algorithm = catalog.load("algorithms", name) if isinstance(name, str) else name
    return Federation(
        algorithm,
        Task(SHAPE, CLASSES, model, student),
        parse(algorithm.Params, params or {}, algorithm.__name__),
        windows(device, torch.get_default_dtype()),
        Settings(batch_size=16, local_epochs=2, learning_rate=0.05),
        Schedule(rounds, 0.8),
        backend,
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
def test_a_graph_is_made_on_the_device_of_the_data_and_not_on_the_current_one(capsys):
    one = federation("FedAvg", "cuda:1")
    one.run()
    assert one.backend.way == GRAPH and "stacked: a step cannot be run" not in capsys.readouterr().err


def run(one: Federation) -> tuple[dict[str, torch.Tensor], list]:
    """All state and all records at the end."""
    recorder = Recorder()
    one.run([recorder])
    return {name: tensor.cpu() for name, tensor in one.save().tensors.items()}, recorder.records


def stacked(way: str):
    return lambda workspace, data, settings: Stacked(workspace, data, settings, demanded=True, selected=4, way=way)


@pytest.fixture
def double():
    """Networks in float64: what is left of a difference between devices is the order of sums."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", ["sequential", EAGER, GRAPH])
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_on_every_backend_is_the_cpus_reference(name, backend, double, capsys):
    reference, records = run(federation(name, "cpu", "sequential"))
    own = federation(name, backend=backend if backend == "sequential" else stacked(backend))
    found, own_records = run(own)
    assert capsys.readouterr().err == ""  # nothing was stepped down from
    assert found.keys() == reference.keys()
    for key, tensor in reference.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-8, atol=1e-8, msg=key)
    for a, b in zip(records, own_records, strict=True):
        assert (a.selected, a.rejected) == (b.selected, b.rejected)
        # a number in a message's metadata may take another digit, and its header is padded to multiples of 8
        assert abs(a.bytes_down - b.bytes_down) <= 8 * len(a.selected)
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-8)
        assert b.metrics["served"].loss == pytest.approx(a.metrics["served"].loss, rel=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits(name):
    (one, records), (two, others) = (run(federation(name)) for _ in range(2))
    assert same_state(one, two)
    assert [r.train_loss for r in records] == [r.train_loss for r in others]


@pytest.mark.parametrize("params", [{}, "tuned"])
@pytest.mark.parametrize("name", ["FedAvg", "FedKDX", "FedKDX+", "FedMTL"])
def test_a_resumed_run_ends_in_the_same_bits(name, params):
    params = {key: value for key, value in read_preset("tuned").get(name, {}).items() if key != RATE} if params else {}
    whole, _ = run(federation(name, params=params, rounds=4))
    first, second = (federation(name, params=params, rounds=4) for _ in range(2))
    for index in (1, 2):
        first.round(Round(index, 4, 0.8))
    saved = Message.from_bytes(first.save().to_bytes())
    second.restore(Message({n: t.to("cuda") for n, t in saved.tensors.items()}, saved.meta))
    second.run([], done=2)
    assert same_state(whole, {name: tensor.cpu() for name, tensor in second.save().tensors.items()})


@pytest.mark.parametrize(("model", "student"), [(CNN, CNN), (CNNLSTM, CNNLSTM), (CNN, CNNSmall)])
def test_every_model_and_a_smaller_student_run_as_graphs(model, student, double, capsys):
    reference, _ = run(federation("FedKDX", "cpu", "sequential", model, student))
    found, _ = run(federation("FedKDX", "cuda", stacked(GRAPH), model, student))
    assert capsys.readouterr().err == ""
    for key, tensor in reference.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-7, atol=1e-7, msg=key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_steps_as_graphs_are_the_cpus_reference(variant, double, capsys):
    algorithm = with_client(**VARIANTS[variant])
    reference, _ = run(federation(algorithm, "cpu", "sequential"))
    found, _ = run(federation(algorithm, "cuda", stacked(GRAPH)))
    assert capsys.readouterr().err == ""
    for key, tensor in reference.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-8, atol=1e-8, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedAvg", "FedKDX"])
def test_a_compiled_step_gives_what_the_reference_gives(name, capsys):
    _, records = run(federation(name, "cpu", "sequential"))
    _, own = run(federation(name, backend=stacked(COMPILED)))
    assert capsys.readouterr().err == ""
    assert own[-1].train_loss == pytest.approx(records[-1].train_loss, rel=1e-3)


def test_clients_state_on_the_host_changes_nothing():
    states = []
    for memory in ("device", "host"):
        one = federation("FedKDX", backend=lambda *place, memory=memory: Stacked(*place, True, memory))
        states.append(run(one)[0])
    assert same_state(*states)


@pytest.mark.parametrize(
    "more", ["", "--precision tf32", "--precision bf16", "--client-memory host", "--backend sequential"]
)
def test_a_whole_command(shard_folder, tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    command = f"-data {shard_folder} -algo FedAvg,FedKDX,Centralised -m cnn_small -gr 2 -jr 0.7 -ls 1 -dev cuda {more}"
    assert main(command.split()) == 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and "FedKDX (student)" in printed.out
