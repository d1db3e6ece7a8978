"""FedAS: prototypes, alignment and Fisher traces against plain loops in float64, what stays, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from baselines.fedas import BATCH, FedAS, FedASClient, FedASParams
from registry.interface import BadMessage, Batch, Message, Round
from tests.baselines.checks import overheard, travels
from tests.conftest import CLASSES, SHAPE, TinyNet, make_data, make_federation, make_task

NAME = "model.fc.bias"
COUNT = BATCH + 8  # more than a batch


def client(**params) -> FedASClient:
    """With a personal model that differs from what it is sent."""
    torch.manual_seed(0)
    one = FedASClient(0, make_task(), FedASParams(**params), COUNT)
    one.nets, one.trained = FedASClient.build(one.task), 1
    data = make_data(sizes=(COUNT,))
    one.data = Batch(data.train_x[0], data.train_y[0])
    for name, own in one.state().items():
        own.add_(torch.rand(own.shape) * (0.3 if name.startswith("personal.") else 0.1))
    return one


def twin(one: FedASClient, name: str) -> TinyNet:
    net = TinyNet(SHAPE, CLASSES).eval()
    net.load_state_dict({key: own.clone() for key, own in one.nets[name].state_dict().items()})
    return net


def test_alignment_draws_features_to_the_prototypes(double):
    one = client(align_rate=0.7, align_passes=2)
    (x, y, _), net, before = one.data, twin(one, "model"), twin(one, "personal")
    prototypes = {c: before.features(x)[y == c].mean(0).detach() for c in range(CLASSES)}
    for _ in range(2):
        for part in (slice(0, BATCH), slice(BATCH, COUNT)):
            net.zero_grad()
            features = net.features(x[part])
            sum(
                F.mse_loss(features[y[part] == c], prototypes[c].expand(int((y[part] == c).sum()), -1))
                for c in y[part].unique().tolist()
            ).backward()
            for name, own in net.named_parameters():
                if not name.startswith("head."):
                    own.data -= 0.7 * own.grad
    start = {name: own.clone() for name, own in one.shared().items() if name.startswith("model.")}
    one.receive(Message(start))
    for name, own in net.state_dict().items():
        torch.testing.assert_close(one.nets["model"].state_dict()[name], own, rtol=1e-9, atol=1e-12)
    assert not torch.equal(one.state()[NAME], start[NAME])


def test_the_trace_is_the_squared_norm_of_gradients(double):
    one = client()
    (x, y, _), total = one.data, 0.0
    for part in (slice(0, BATCH), slice(BATCH, COUNT)):
        net = twin(one, "model")
        F.cross_entropy(net(x[part]).logits, y[part]).backward()
        total += sum(float((own.grad**2).sum()) for own in net.parameters())
    reply = one.reply()
    assert reply.meta["fisher"] == pytest.approx(total, rel=1e-9)
    assert not any("head" in name or "personal" in name for name in reply.tensors)
    assert all(torch.equal(own, one.state()["personal" + n[5:]]) for n, own in one.state().items() if n[:5] == "model")


def test_a_round_by_hand():
    """The traces 3 and 1 weigh 1 and 5 to 2, whatever the numbers of samples."""
    server = FedAS(make_task(), FedASParams(), {NAME: torch.zeros(16)})
    replies = {
        id: Message({NAME: torch.full((16,), value)}, {"samples": 10 + 90 * id, "fisher": trace})
        for id, (value, trace) in enumerate([(1.0, 3.0), (5.0, 1.0)])
    }
    server.aggregate(replies, Round(1, 1))
    assert server.weights[NAME].tolist() == [2.0] * 16


@pytest.mark.parametrize("trace", [0.0, -1.0, 1e31, 1, True, None, "7", [1.0]])
def test_absurd_traces_are_refused(trace):
    server = FedAS(make_task(), FedASParams(), {NAME: torch.zeros(16)})
    with pytest.raises(BadMessage, match="'fisher' must be"):
        server.check_reply(0, Message({NAME: torch.zeros(16)}, {"samples": 3, "fisher": trace}))


def test_heads_never_travel():
    federation = make_federation(FedAS, join_ratio=1)
    seen = overheard(federation)
    federation.run()
    heads = [own for one in federation.workspace.kept for name, own in one.items() if "head." in name]
    assert len(heads) == 4 * 4 and not any(travels(own, seen) for own in heads)
