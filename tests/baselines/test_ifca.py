"""IFCA: the choice by loss, means within clusters, FedAvg with one cluster, and clusters that are there to be found."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.ifca import IFCA, IFCAClient, IFCAParams
from registry.aggregation import labelled, of_client
from registry.interface import BadMessage, Batch, Message, Round, float_state
from tests.baselines.checks import goes_on_identically
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state

NAME = "model.head.bias"


def test_a_client_takes_the_model_with_the_lowest_loss(double):
    data = make_data(sizes=(700,))  # more than a chunk
    one = IFCAClient(0, make_task(), IFCAParams(), 700)
    one.nets, one.data = IFCAClient.build(one.task), Batch(data.train_x[0], data.train_y[0])
    models, losses = {}, []
    for cluster in range(4):
        net = IFCAClient.build(one.task)["model"].eval()
        logits = net(one.data.x).logits.detach()
        losses.append(float((logits.exp().sum(1).log() - logits[range(700), one.data.y]).mean()))
        models[cluster] = float_state({"model": net})
        found = one.loss_on(one.data, models[cluster])
        torch.testing.assert_close(float(found), losses[-1], rtol=1e-9, atol=0)
    one.receive(Message(labelled(models)))
    best = losses.index(min(losses))
    assert one.reply().meta == {"samples": 700, "cluster": best}
    assert same_state(one.state(), {name: t.detach() for name, t in models[best].items()})


def made(clusters: int = 3) -> IFCA:
    return IFCA(make_task(), IFCAParams(clusters), {NAME: torch.zeros(4)})


def reply(value: float, samples: int, cluster: int) -> Message:
    return Message({NAME: torch.full((4,), value)}, {"samples": samples, "cluster": cluster})


def test_means_and_what_each_predicts_with_by_hand():
    server = made()
    start = dict(server.models)
    server.aggregate({0: reply(1.0, 30, 0), 2: reply(5.0, 10, 0), 3: reply(7.0, 50, 2)}, Round(1, 2))
    assert server.models[0][NAME].tolist() == [2.0] * 4 and server.models[2][NAME].tolist() == [7.0] * 4
    assert server.models[1] is start[1]  # nobody's
    shared = server.networks()
    of = {id: of_client(shared, id)[NAME][0].item() for id in (0, 2, 3, 9, None)}
    assert of == {0: 2.0, 2: 2.0, 3: 7.0, 9: 7.0, None: 7.0}  # 50 samples are more than 40
    assert server.figures() == {"clients_0": 2, "clients_1": 0, "clients_2": 1}
    server.aggregate({3: reply(9.0, 50, 1)}, Round(2, 2))
    assert of_client(server.networks(), 3)[NAME][0] == 9.0 and server.models[2][NAME][0] == 7.0


def test_models_start_different_and_the_first_as_everywhere():
    one, other = make_federation(IFCA), make_federation(IFCA)
    plain = make_federation(FedAvg)
    assert same_state(dict(one.server.models[0]), dict(plain.server.weights))
    assert same_state(dict(one.server.models[1]), dict(other.server.models[1]))
    assert not torch.equal(one.server.models[0][NAME], one.server.models[1][NAME])


@pytest.mark.parametrize("local_bn", [False, True])
def test_with_one_cluster_it_is_fedavg(local_bn):
    task = make_task(local_bn=local_bn)
    plain, one = make_federation(FedAvg, task=task), make_federation(IFCA, task=task, params={"clusters": 1})
    recorders = Recorder(), Recorder()
    for federation, recorder in zip((plain, one), recorders, strict=True):
        federation.run([recorder])
    assert same_state(dict(plain.server.weights), dict(one.server.models[0]))
    losses = [[record.metrics["served"].loss for record in recorder.records] for recorder in recorders]
    assert losses[0] == losses[1]


def test_it_finds_clusters_whose_labels_contradict_each_other():
    """Of two groups with opposite labels, each names a cluster of its own, and is served its model."""
    data = make_data(sizes=(60, 60, 60, 60), tests=40)
    for id in (1, 3):
        data.train_y[id] = 3 - data.train_y[id]
        data.test_y[data.test_slices[id]] = 3 - data.test_y[data.test_slices[id]]
    accuracy = {}
    for algorithm in (FedAvg, IFCA):
        recorder = Recorder()
        federation = make_federation(algorithm, data, rounds=12, join_ratio=1, local_epochs=3, seed=1)
        federation.run([recorder])
        accuracy[algorithm] = recorder.records[-1].metrics["served"].accuracy
    clusters = [federation.server.members[id][0] for id in range(4)]
    assert clusters[0] == clusters[2] != clusters[1] == clusters[3]
    assert accuracy[IFCA] > 0.8 > 0.6 > accuracy[FedAvg]


@pytest.mark.parametrize("cluster", [-1, 3, True, 1.0, None, "1", [0]])
def test_other_clusters_are_refused(cluster):
    with pytest.raises(BadMessage, match="'cluster' must be one of"):
        made().check_reply(0, Message({NAME: torch.zeros(4)}, {"samples": 3, "cluster": cluster}))


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(IFCA, rounds=4))


def test_the_loss_on_many_windows_weighs_classes_over_all_of_them(double):
    """700 windows in two parts: Σ w_y CE / Σ w_y over all, not the mean of the parts' by their windows."""
    data = make_data(sizes=(700,))
    one = IFCAClient(0, make_task(), IFCAParams(), 700)
    one.nets = IFCAClient.build(one.task)
    order = data.train_y[0].argsort()  # the parts have other classes
    windows = Batch(data.train_x[0][order], data.train_y[0][order], weights=torch.tensor([0.5, 1.0, 2.0, 4.0]))
    logits = one.nets["model"].eval()(windows.x).logits.detach()
    losses = logits.exp().sum(1).log() - logits[range(700), windows.y]
    w = windows.weights[windows.y]
    torch.testing.assert_close(one.loss_on(windows, {}), (w * losses).sum() / w.sum())
    plain = one.loss_on(Batch(windows.x, windows.y), {})
    torch.testing.assert_close(plain, losses.mean())
