"""FedBN, FedPer, LG-FedAvg, FedRep, FedBABU: which part of a model travels, which stays, and which is trained when."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg
from baselines.fedbabu import FedBABU
from baselines.fedbn import FedBN
from baselines.fedper import FedPer, FedPerClient
from baselines.fedrep import FedRep
from baselines.lg_fedavg import LGFedAvg, LGFedAvgClient, LGFedAvgParams
from baselines.local import Local
from registry import catalog
from registry.errors import UserError
from registry.interface import Message, Model, Round, float_state, layers, matches, private_names
from tests.conftest import TinyNet, make_federation, make_task, same_state

HEAD = {"model.head.weight", "model.head.bias"}
NORM = {f"model.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
FC = {"model.fc.weight", "model.fc.bias"}
BODY = {f"model.{layer}.{name}" for layer in ("conv", "fc") for name in ("weight", "bias")} | NORM


def run(algorithm, **options):
    federation = make_federation(algorithm, **({"rounds": 4} | options))
    federation.run()
    return federation


def sent(algorithm) -> tuple[set[str], set[str]]:
    """Names of what goes up and what goes down in a first round."""
    federation = make_federation(algorithm)
    down = federation.server.message(0, Round(1, 3))
    trained = federation.backend.train({0: federation.transport.send_down(down)}, Round(1, 3))
    return set(trained[0].reply.tensors), set(down.tensors)


@pytest.mark.parametrize(
    ("algorithm", "names"),
    [(FedBN, BODY - NORM | HEAD), (FedPer, BODY), (FedRep, BODY), (LGFedAvg, HEAD | FC), (FedBABU, BODY)],
)
def test_what_travels(algorithm, names):
    assert sent(algorithm) == (names, names)


@pytest.mark.parametrize(("algorithm", "names"), [(FedBN, NORM), (FedPer, HEAD), (FedRep, HEAD), (LGFedAvg, BODY - FC)])
def test_a_client_predicts_with_its_own_part_on_the_servers(algorithm, names):
    federation = run(algorithm, join_ratio=1)
    for id, kept in enumerate(federation.workspace.kept):
        assert set(kept) == names
        now = federation.workspace.state_for_evaluation(id, federation.server.networks())
        for name, tensor in now.items():
            assert torch.equal(tensor, kept[name] if name in names else federation.server.weights[name])


def test_fedbn_is_fedavg_with_local_batch_norm():
    one, other = run(FedBN), run(FedAvg, task=make_task(local_bn=True))
    assert same_state(dict(one.save().tensors), dict(other.save().tensors))


class Plain(TinyNet):
    """Without batch norm."""

    def __init__(self, shape, classes) -> None:
        super().__init__(shape, classes)
        self.bn = nn.Identity()


def test_fedbn_refuses_a_model_without_batch_norm():
    FedBN.check(make_task(), None)
    with pytest.raises(UserError, match="Plain has no batch norm"):
        FedBN.check(replace(make_task(), model_class=Plain), None)


@pytest.mark.parametrize(("algorithm", "client"), [(FedPer, FedPerClient), (LGFedAvg, LGFedAvgClient)])
@pytest.mark.parametrize(("private", "limit"), [((), FedAvg), (("model.*",), Local)])
def test_without_a_private_part_it_is_fedavg_and_without_a_shared_one_local(algorithm, client, private, limit):
    members = {"private": private, "private_in": classmethod(lambda cls, task, nets: private)}
    bare = type("Bare", (algorithm,), {"Client": type("BareClient", (client,), members)})
    one, other = run(bare, join_ratio=1), run(limit, join_ratio=1)
    assert same_state(dict(one.save().tensors), dict(other.save().tensors))


@pytest.mark.parametrize(("count", "names"), [(1, HEAD), (2, HEAD | FC), (3, HEAD | FC), (9, HEAD | FC)])
def test_lg_fedavg_shares_so_many_last_layers_but_never_the_first(count, names):
    made = make_federation(LGFedAvg, params={"layers": count})
    assert set(made.server.weights) == names and made.workspace.private == (BODY | HEAD) - names


def test_with_the_papers_model_lg_fedavg_shares_the_dense_layers():
    model = catalog.load("models", "cnn")((9, 1, 128), 6)
    task = replace(make_task(), params=LGFedAvgParams())
    private = private_names(LGFedAvgClient, task, {"model": model})
    assert private == {name for name in float_state({"model": model}) if name.startswith("model.convolutions.")}


@pytest.mark.parametrize("name", catalog.BUILT_IN["models"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_layers_are_a_partition_that_ends_in_the_head(name, norm):
    """All weights but those that are the model's own are in one layer; no layer is without any, or a norm alone."""
    model = replace(make_task(), shape=(6, 1, 64), model_class=catalog.load("models", name), norm=norm).model()
    found = layers(model)
    assert len(found) >= 3 and found[-1] == ("head",)
    names = [name for layer in found for path in layer for name in float_state({path: model.get_submodule(path)})]
    assert sorted(names) == sorted(n for n in model.state_dict() if "." in n and "num_batches" not in n)
    for first, *others in found:
        assert max(p.dim() for p in model.get_submodule(first).parameters()) > 1
        assert all(p.dim() == 1 for path in others for p in model.get_submodule(path).parameters())


def test_a_head_of_several_layers_is_one():
    class Deep(TinyNet):
        def __init__(self, shape, classes) -> None:
            super().__init__(shape, classes)
            self.head = nn.Sequential(nn.Linear(self.feature_size, 5), nn.ReLU(), nn.Linear(5, classes))

    task = replace(make_task(), model_class=Deep, params=LGFedAvgParams(layers=2))
    deep, plain = task.model(), make_task().model()
    assert layers(deep) == layers(plain)
    shared = float_state({"model": deep}).keys() - private_names(LGFedAvgClient, task, {"model": deep})
    assert shared == FC | {f"model.head.{layer}.{what}" for layer in (0, 2) for what in ("weight", "bias")}


def test_lg_fedavg_refuses_a_model_of_a_single_layer():
    class Single(TinyNet):
        def __init__(self, shape, classes) -> None:
            Model.__init__(self, shape, classes)
            self.feature_size = math.prod(shape)
            self.head = nn.Linear(self.feature_size, classes)

    LGFedAvg.check(make_task(), LGFedAvgParams())
    with pytest.raises(UserError, match="LG-FedAvg: Single has a single layer"):
        LGFedAvg.check(replace(make_task(), model_class=Single), LGFedAvgParams())


def test_the_last_pattern_that_fits_decides():
    names = ["model.conv.weight", "model.head.weight", "other.head.weight"]
    assert [matches(name, ("model.*", "!model.head.*")) for name in names] == [True, False, False]
    assert [matches(name, ("!model.head.*", "*")) for name in names] == [True, True, True]
    assert not matches("model.conv.weight", ("!model.head.*",))


@pytest.mark.parametrize(("epochs", "body_epochs", "head_first"), [(4, 1, 3), (4, 3, 1), (4, 9, 1), (2, 1, 1)])
def test_fedrep_trains_the_head_first(epochs, body_epochs, head_first):
    made = make_federation(FedRep, params={"body_epochs": body_epochs})
    client = made.workspace.clients[0]
    trained = [{name for name in HEAD | BODY if matches(name, client.trains(e, epochs))} for e in range(epochs)]
    assert trained == [HEAD] * head_first + [BODY] * (epochs - head_first)


def test_fedreps_body_does_not_move_until_it_is_its_turn():
    seen = []
    losses = FedRep.Client.losses

    def spy(self, nets, batch, context):
        seen.append({n: p.detach().clone() for n, p in nets["model"].named_parameters()})
        return losses(self, nets, batch, context)

    client = type("Spy", (FedRep.Client,), {"losses": spy})
    made = make_federation(type("Spied", (FedRep,), {"Client": client}), rounds=1, local_epochs=2, backend="sequential")
    made.backend.train({0: made.server.message(0, Round(1, 1))}, Round(1, 1))  # 40 windows: 3 batches an epoch
    assert len(seen) == 6
    for name in ("conv.weight", "fc.weight", "bn.weight"):
        assert torch.equal(seen[0][name], seen[3][name]) and not torch.equal(seen[3][name], seen[5][name])
    assert not torch.equal(seen[0]["head.weight"], seen[3]["head.weight"])
    assert torch.equal(seen[3]["head.weight"], seen[5]["head.weight"])


def test_fedrep_with_a_single_epoch_is_fedper():
    one, other = run(FedRep, local_epochs=1), run(FedPer, local_epochs=1)
    assert same_state(dict(one.save().tensors), dict(other.save().tensors))
    assert not same_state(dict(run(FedRep).save().tensors), dict(run(FedPer).save().tensors))


def test_fedbabus_head_stays_and_its_copies_are_fine_tuned_from_what_was_sent(double):
    federation = make_federation(FedBABU, rounds=3, join_ratio=1, params={"finetune_rate": 1.0})
    initial = {n: t.clone() for n, t in federation.server.weights.items()}
    for t in (1, 2, 3):
        start = dict(federation.server.weights)
        federation.round(Round(t, 3))
    now = federation.server.weights
    assert all(torch.equal(now[name], initial[name]) for name in HEAD)
    assert all(not torch.equal(now[name], start[name]) for name in BODY)
    # the copy, at the rate of the round: FedAvg's training from the same model, with the same batches
    plain = make_federation(FedAvg, rounds=3, join_ratio=1)
    for client in plain.workspace.clients:
        client.trained = 2  # so that rates have decayed as often
    found = plain.backend.train({id: Message(start) for id in range(4)}, Round(3, 3))
    for id, kept in enumerate(federation.workspace.kept):
        for name, tensor in found[id].reply.tensors.items():
            torch.testing.assert_close(kept[name.replace("model", "personal", 1)], tensor, rtol=1e-9, atol=1e-12)
