"""The algorithms in somebody's own Flower app: the numbers of one process, by Flower's own loop over the rounds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from fedkdx_plugin.engine.data import DeviceData, memory_format
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.flower import roster
from fedkdx_plugin.testing.made import Recorder, same_state
from registry import catalog, interface
from registry.errors import UserError

pytest.importorskip("flwr")
pytestmark = pytest.mark.flower

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord  # noqa: E402

from fedkdx_plugin.flower import Strategy, client_app  # noqa: E402
from fedkdx_plugin.flower.apps.client import PLAN  # noqa: E402
from fedkdx_plugin.flower.packing import pack, unpack  # noqa: E402
from tests.flower.grid import FakeGrid  # noqa: E402

SHAPE, CLASSES, SIZES, TESTS = (3, 16), 4, (40, 7, 25), 12
SOON = 1.0  # seconds to wait for clients that are there at once, or never
OPTIONS = {"local_epochs": 2, "batch_size": 16, "local_learning_rate": 0.05}
NOT_IN_AN_APP = {"Centralised": "pools everybody's data", "Local": "needs no server"}
ANY_SHAPE = {"FedMAT": "makes models for windows of other shapes"}  # of functions, which make one for theirs
PAPERS = [name for name in catalog.BUILT_IN["algorithms"] if name not in NOT_IN_AN_APP | ANY_SHAPE]


class Net(nn.Module):
    """A network as anybody writes one: windows (n, channels, time) to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 5, stride=2)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(48, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.hidden(self.norm(self.conv(x)).relu().flatten(1)).relu())


def windows(client: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((client, seed))
    y = rng.integers(0, CLASSES, count)
    wave = np.sin(2 * np.pi * (y[:, None, None] + 1) * np.arange(16) / 16) + 0.1 * client
    return wave + 0.4 * rng.normal(size=(count, *SHAPE)), y


def load(context):
    client = context.node_config["partition-id"]
    return (*windows(client, SIZES[client % len(SIZES)], 0), *windows(client, TESTS, 1))


def in_one_process(strategy: Strategy, rounds: int) -> tuple[Federation, Recorder]:
    """Return the same rounds by the engine's own loop, done."""

    def all_of(sizes, seed):
        parts = [windows(client, size, seed) for client, size in enumerate(sizes)]
        layout = memory_format(torch.device("cpu"))
        x = [torch.from_numpy(x).float().unsqueeze(2).contiguous(memory_format=layout) for x, _ in parts]
        return x, [torch.from_numpy(y) for _, y in parts]

    train_x, train_y = all_of(SIZES, 0)
    test_x, test_y = all_of([TESTS] * len(SIZES), 1)
    data = DeviceData(
        train_x=train_x,
        train_y=train_y,
        test_x=torch.cat(test_x),
        test_y=torch.cat(test_y),
        test_client=torch.arange(len(SIZES)).repeat_interleave(TESTS),
        test_slices=[slice(TESTS * k, TESTS * (k + 1)) for k in range(len(SIZES))],
    )
    plan = strategy.plan
    about = plan.choice.server, plan.task(), plan.choice.params, data, plan.settings()
    federation, recorder = Federation(*about, Schedule(rounds, strategy.fraction_train), "sequential"), Recorder()
    federation.run([recorder])
    return federation, recorder


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(roster, "LOOK_SECONDS", 0.001)  # between two looks at who is there


def make(name: str = "FedAvg", model=Net, fraction: float = 1.0, **options) -> tuple[Strategy, FakeGrid]:
    function = (lambda: model()) if isinstance(model, type) else model
    strategy = Strategy(
        name, function, SHAPE, CLASSES, fraction_train=fraction, min_available_nodes=3, **OPTIONS | options
    )
    return strategy, FakeGrid(client_app(name, function, load))


QUICK = ("FedAvg", "FedKDX", "IFCA")  # one model, a student and what stays, a model for each cluster


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PAPERS])
def test_an_app_gives_the_bits_of_one_process(name):
    strategy, grid = make(name, fraction=0.7)
    result = strategy.start(grid, num_rounds=2, timeout=SOON)
    federation, recorder = in_one_process(strategy, 2)
    theirs = strategy._coordinator.server
    assert same_state(dict(theirs.save().tensors), dict(federation.server.save().tensors))
    for here, there in zip(recorder.records, strategy.records, strict=True):
        for field in ("selected", "rejected", "lost", "bytes_up", "bytes_down", "train_loss", "server"):
            assert getattr(here, field) == getattr(there, field), field
        served = here.metrics["served"]
        means = result.evaluate_metrics_clientapp[here.round]
        assert means["num-examples"] == TESTS * len(SIZES) and means["clients"] == len(SIZES)
        assert means["accuracy"] == pytest.approx(served.accuracy, abs=1e-12)
        assert means["f1"] == pytest.approx(served.client_f1.mean(), abs=1e-12)  # as many windows each
        assert result.train_metrics_clientapp[here.round]["train-loss"] == here.train_loss
    assert result.arrays.keys() == federation.server.networks().keys()


@pytest.mark.parametrize(("name", "reason"), (NOT_IN_AN_APP | ANY_SHAPE).items())
def test_what_cannot_run_in_an_app_is_refused_at_once(name, reason):
    with pytest.raises(UserError, match=f"^{name}.*{reason}"):
        make(name)


def test_models_of_this_project_run_by_name_of_any_shape():
    strategy = Strategy("FedMAT", "cnn_small", (3, 1, 64), CLASSES, min_available_nodes=1, **OPTIONS)

    def longer(context):
        rng = np.random.default_rng(0)
        return (
            rng.normal(size=(20, 3, 1, 64)),
            np.arange(20) % CLASSES,
            rng.normal(size=(5, 3, 1, 64)),
            np.arange(5) % 4,
        )

    grid = FakeGrid(client_app("FedMAT", "cnn_small", longer), 1)
    assert strategy.start(grid, num_rounds=1, timeout=SOON).evaluate_metrics_clientapp[1]["num-examples"] == 5


def test_what_is_private_stays_in_the_context_and_in_no_message():
    strategy, grid = make("FedKDX")
    strategy.start(grid, num_rounds=2, timeout=SOON)
    own = [context.state.array_records["fedkdx.2.kept"] for context in grid.contexts.values()]
    teachers = [array.numpy().tobytes() for kept in own for name, array in kept.items() if name.startswith("teacher")]
    assert len(teachers) > 12
    for message in grid.sent + grid.came:
        content = b"".join(array.data for record in message.content.array_records.values() for array in record.values())
        assert b"teacher." not in content
        assert not any(len(tensor) > 64 and tensor in content for tensor in teachers)


def test_a_network_of_the_users_own_comes_back_with_the_shared_weights():
    seen = []

    def evaluate(round, arrays):
        seen.append((round, strategy.model(arrays)))

    strategy, grid = make("FedAvg")
    result = strategy.start(grid, num_rounds=2, timeout=SOON, evaluate_fn=evaluate)
    assert [round for round, _ in seen] == [0, 1, 2]
    network = strategy.model(result.arrays)
    assert type(network) is Net and network(torch.zeros(2, *SHAPE)).shape == (2, CLASSES)
    state = result.arrays.to_torch_state_dict()
    assert torch.equal(network.head.weight, state["model.head.weight"])
    assert torch.equal(network.conv.weight, state["model.body.conv.weight"])
    assert not torch.equal(seen[0][1].head.weight, network.head.weight)
    strategy, grid = make("FedPer")
    with pytest.raises(UserError, match="FedPer shares no whole network"):
        strategy.model(strategy.start(grid, num_rounds=1, timeout=SOON).arrays)


def test_a_client_that_was_not_heard_goes_on_from_its_last_reply_that_was():
    """A training whose reply was lost leaves no trace in what the client keeps."""
    strategy, grid = make("FedKDX")
    strategy.begin(grid, 3, 1.0)
    for round in (1, 2, 3):
        if round == 2:
            grid.spoil[1] = lambda reply: None
        arrays = strategy.arrays()
        strategy.aggregate_train(
            round, grid.send_and_receive(strategy.configure_train(round, arrays, ConfigRecord(), grid))
        )
        grid.spoil.clear()
        asked = strategy.configure_evaluate(round, arrays, ConfigRecord(), grid)
        strategy.aggregate_evaluate(round, grid.send_and_receive(asked))
    assert [list(record.lost) for record in strategy.records] == [[], [1], []]
    states = {grid.client_of[id]: context.state for id, context in grid.contexts.items()}
    assert [states[client].config_records["fedkdx.3.trained"]["trained"] for client in range(3)] == [3, 2, 3]
    assert "fedkdx.2.kept" not in states[1]


def _with(reply: Message, change) -> Message:
    """Return a reply with another tensor, or metadata, in place of the first of the algorithm's reply."""
    sent = interface.Message.from_bytes(unpack(reply.content))
    tensors, meta = dict(sent.tensors), dict(sent.meta)
    if meta["reply"] is None:  # it only measured
        return reply
    change(tensors, meta, next(name for name in tensors if name.startswith("reply/")))
    return Message(pack(interface.Message(tensors, meta).to_bytes()), reply_to=_asking(reply))


def _asking(reply: Message) -> Message:
    """Return a message to which a new reply has the ends of another one."""
    head = reply.metadata
    message = Message(pack(b""), dst_node_id=head.src_node_id, message_type=head.message_type)
    message.metadata.__dict__["_message_id"] = head.reply_to_message_id
    return message


HOSTILE = {
    "no records": lambda reply: Message(type(reply.content)(), reply_to=_asking(reply)),
    "no message": lambda reply: Message(pack(b"\x00" * 100), reply_to=_asking(reply)),
    "an error": lambda reply: Message(Error(2, "out of\nmemory"), reply_to=_asking(reply)),
    "no tensor": lambda reply: _with(reply, lambda tensors, meta, name: tensors.pop(name)),
    "NaN": lambda reply: _with(reply, lambda tensors, meta, name: tensors.update({name: tensors[name] * torch.nan})),
    "another shape": lambda reply: _with(reply, lambda tensors, meta, name: tensors.update({name: torch.zeros(2)})),
    "a foreign tensor": lambda reply: _with(
        reply, lambda tensors, meta, name: tensors.update({"reply/x": torch.ones(1)})
    ),
    "another client": lambda reply: _with(reply, lambda tensors, meta, name: meta.update(client=0)),
    "more samples": lambda reply: _with(reply, lambda tensors, meta, name: meta["reply"].update(samples=10**9)),
    "far away": lambda reply: _with(
        reply, lambda tensors, meta, name: tensors.update({n: t * 1e9 for n, t in tensors.items() if n[:5] == "reply"})
    ),
    "another record": lambda reply: Message(
        type(reply.content)({"fedkdx": ArrayRecord([np.ones(3)]), "m": MetricRecord({"x": 1.0})}),
        reply_to=_asking(reply),
    ),
}


@pytest.fixture(scope="module")
def without_client_1() -> ArrayRecord:
    """Return the result of a run in which client 1 never answers."""
    strategy, grid = make()
    grid.spoil[1] = lambda reply: None
    return strategy.start(grid, num_rounds=2, timeout=SOON).arrays


@pytest.mark.parametrize("what", HOSTILE)
def test_a_lying_client_is_named_and_changes_nothing_for_the_others(what, without_client_1):
    strategy, grid = make("FedAvg")
    grid.spoil[1] = HOSTILE[what]
    result = strategy.start(grid, num_rounds=2, timeout=SOON)
    for record in strategy.records:
        bad = record.rejected | record.lost
        assert record.selected == [0, 1, 2] and list(bad) == [1]
        assert bad[1].isprintable() and len(bad[1]) < 250, bad
    assert result.arrays.keys() == without_client_1.keys()
    for name, array in without_client_1.items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), array.numpy(), err_msg=name)
    assert result.train_metrics_clientapp[2]["clients"] == 2


def test_metrics_that_cannot_be_count_for_nothing():
    def spoil(reply):
        if reply.metadata.message_type == "train":
            return reply
        sent = interface.Message.from_bytes(unpack(reply.content))
        row = sent.tensors["metrics/served"].clone()
        row[1] = 7.0  # accuracy
        tensors = dict(sent.tensors) | {"metrics/served": row}
        return Message(pack(interface.Message(tensors, sent.meta).to_bytes()), reply_to=_asking(reply))

    strategy, grid = make("FedAvg")
    grid.spoil[2] = spoil
    (means,) = strategy.start(grid, num_rounds=1, timeout=SOON).evaluate_metrics_clientapp.values()
    assert means["clients"] == 2 and means["num-examples"] == 2 * TESTS and 0 <= means["accuracy"] <= 1


def test_clients_that_do_not_fit_are_refused_with_a_reason(caplog):
    def wrong(context):
        x, y, *rest = load(context)
        return (x[:, :, :-1], y, *rest)

    def fails(context):
        raise FileNotFoundError("no such recording")

    def net():
        network = Net()
        network.norm = nn.Identity()
        return network

    apps = [client_app("FedAvg", Net, load), client_app("FedAvg", Net, wrong), client_app("FedProx", Net, load)]
    apps += [client_app("FedAvg", Net, fails), client_app("FedAvg", Net, load), client_app("FedAvg", Net, load)]
    apps += [client_app("FedAvg", net, load)]
    grid = FakeGrid(apps, len(apps))
    for id, context in grid.contexts.items():
        context.node_config["partition-id"] = {4: "none", 5: 200, 6: 1}.get(grid.client_of[id], grid.client_of[id])
    strategy = Strategy("FedAvg", Net, SHAPE, CLASSES, min_available_nodes=2, **OPTIONS)
    with caplog.at_level("INFO", "flwr"):
        strategy.start(grid, num_rounds=1, timeout=SOON)
    for reason in (
        "training windows of shape (3, 15), but the strategy has shape=(3, 16)",
        "the server's strategy is FedAvg, but this client's app is of FedProx",
        "FileNotFoundError: no such recording",
        "this node has no number: start its SuperNode with --node-config 'partition-id=0'",
        "calls itself client 200, but the federation has clients 0 to 99",
        "this client's model is another than the server's",
    ):
        assert reason in caplog.text, reason
    assert strategy.records[0].selected == [0, 1] and list(strategy.records[0].lost) == [1]


def test_too_few_clients_are_one_line():
    strategy, grid = make()
    grid.away.add(next(iter(grid.contexts)))
    with pytest.raises(
        UserError, match=r"2 of at least 3 sites are there after 0 s .*\(min_available_nodes, timeout\)"
    ):
        strategy.start(grid, num_rounds=1, timeout=0.05)


def test_the_strategys_parts_are_called_in_their_order():
    strategy, grid = make()
    for call in (
        lambda: strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid),
        lambda: strategy.aggregate_train(1, []),
        lambda: strategy.arrays(),
    ):
        with pytest.raises(UserError, match=r"call strategy.start"):
            call()
    with pytest.raises(UserError, match="initial_arrays: leave it out"):
        strategy.start(grid, ArrayRecord())
    with pytest.raises(UserError, match="num_rounds=0"):
        strategy.start(grid, num_rounds=0, timeout=SOON)
    strategy.begin(grid, 2)
    with pytest.raises(UserError, match="server_round=3: this run has rounds 1 to 2"):
        strategy.configure_train(3, ArrayRecord(), ConfigRecord(), grid)
    with pytest.raises(UserError, match="configure"):
        strategy.aggregate_train(1, [])


def test_clients_measure_in_the_rounds_that_are_asked_for_and_get_the_users_own_values():
    strategy, grid = make(eval_gap=2)
    result = strategy.start(grid, num_rounds=3, timeout=SOON, train_config=ConfigRecord({"mine": 3}))
    assert list(result.evaluate_metrics_clientapp) == [2, 3] and list(result.train_metrics_clientapp) == [1, 2, 3]
    trained = [message for message in grid.sent if message.metadata.message_type == "train"]
    assert len(trained) == 9 and all(message.content["config"]["mine"] == 3 for message in trained)
    replies = [reply.content["metrics"] for reply in grid.came if "metrics" in reply.content]
    assert {metrics["num-examples"] for metrics in replies} == {*SIZES, TESTS}
    assert sum("train-loss" in metrics for metrics in replies) == 9
    assert sum("accuracy" in metrics for metrics in replies) == 6


def test_a_server_cannot_make_a_client_load_anything_of_its_choice():
    """A plan sets values of options; algorithm, model and data are the client's own."""
    strategy, grid = make()
    strategy.begin(grid, 1)
    app, context = next(iter(grid.apps.values())), next(iter(grid.contexts.values()))
    for change in (
        lambda plan: plan.update(algorithm="/tmp/evil.py:Server"),
        lambda plan: plan["options"].update(preset="/etc/passwd"),
        lambda plan: plan["options"].update(model="/tmp/evil.py:Model"),
        lambda plan: plan.update(classes=10**9),
        lambda plan: plan.update(shape=[3, -16]),
        lambda plan: plan.update(options=[1]),
        lambda plan: plan.clear(),
    ):
        plan = json.loads(strategy._link.plan)
        change(plan)
        content = pack(b"")
        content[PLAN] = ConfigRecord({PLAN: json.dumps(plan)})
        asked = Message(content, dst_node_id=1, message_type="query")
        assert app(asked, context).has_error()
    assert app(grid.sent[0], context).has_content()
