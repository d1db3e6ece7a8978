"""FedDistill: Algorithm 1's averages and distances, the classes that nobody has, how little travels."""

from __future__ import annotations

import pytest
import torch

from baselines.feddistill import OUTPUTS, FedDistill, FedDistillClient, FedDistillParams
from baselines.local import Local
from registry.interface import Batch, Message, Round
from tests.baselines.checks import awkward_data, goes_on_identically, overheard, run, travels
from tests.conftest import CLASSES, SHAPE, make_data, make_federation, make_task, same_state


def client(gamma: float = 1.0, data: Batch | None = None) -> FedDistillClient:
    torch.manual_seed(0)
    one = FedDistillClient(0, make_task(), FedDistillParams(gamma), 24)
    one.nets, one.data = FedDistillClient.build(one.task), data
    return one


def batch(count: int = 24) -> Batch:
    data = make_data(sizes=(count,))
    return Batch(data.train_x[0], data.train_y[0])


def server() -> FedDistill:
    return FedDistill(make_task(), FedDistillParams(), {})


def outputs(seed: int, absent: tuple[int, ...] = ()) -> torch.Tensor:
    rows = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(seed)).softmax(1)
    rows[list(absent)] = 0
    return rows


def test_the_loss_is_line_5_of_algorithm_1():
    one, data = client(gamma=0.7), batch()
    one.nets["model"].double().eval()
    x, teacher = data.x.double(), outputs(0, absent=(2,)).double()
    p = one.nets["model"](x).logits.softmax(1)
    expected = 0
    for i, y in enumerate(data.y.tolist()):
        expected -= p[i, y].log()
        if y != 2:  # nobody else has it: no term
            expected -= 0.7 * sum(teacher[y, c] * p[i, c].log() for c in range(CLASSES))
    found = one.losses(one.nets, Batch(x, data.y), {OUTPUTS: teacher})["model"]
    torch.testing.assert_close(found, expected / len(data.y))


def test_padding_rows_change_nothing(double):
    one, data, context = client(), batch(10), {OUTPUTS: outputs(0)}
    one.nets["model"].eval()
    rows = torch.cat([data.x, 100 * torch.ones(3, *SHAPE)])
    padded = Batch(rows, torch.cat([data.y, data.y[:3]]), torch.arange(13) < 10)
    plain = one.losses(one.nets, data, context)["model"]
    torch.testing.assert_close(one.losses(one.nets, padded, context)["model"], plain)


def test_a_client_sends_the_mean_of_its_outputs_for_each_class_it_has(double):
    data = batch(700)  # more than a chunk
    data.y[data.y == 1] = 0
    one = client(data=data)
    reply = one.reply()
    p = one.nets["model"].double().eval()(data.x.double()).logits.softmax(1)
    for label in range(CLASSES):
        rows = p[data.y == label]
        expected = rows.mean(0) if len(rows) else torch.zeros(CLASSES, dtype=torch.float64)
        torch.testing.assert_close(reply.tensors[OUTPUTS][label].double(), expected, rtol=1e-9, atol=1e-9)
    assert not reply.tensors[OUTPUTS].requires_grad


def test_the_server_averages_over_the_others_that_have_the_class():
    one = server()
    parts = {0: outputs(0, absent=(1,)), 3: outputs(1, absent=(1, 2)), 5: outputs(2, absent=(1,))}
    one.aggregate({id: Message({OUTPUTS: part}) for id, part in parts.items()}, Round(1, 2))
    sent = one.message(0, Round(2, 2)).tensors[OUTPUTS]
    assert not sent[1].any()  # a class nobody has
    torch.testing.assert_close(sent[2], parts[5][2])  # client 3 has none
    torch.testing.assert_close(sent[0], (parts[3][0] + parts[5][0]) / 2)  # its own is left out
    newcomer = one.message(9, Round(2, 2)).tensors[OUTPUTS]
    torch.testing.assert_close(newcomer[0], (parts[0][0] + parts[3][0] + parts[5][0]) / 3)


def test_what_a_client_sent_last_counts_until_it_sends_again():
    one = server()
    for index, parts in enumerate([{0: 0, 1: 1}, {1: 2}], 1):
        one.aggregate({id: Message({OUTPUTS: outputs(seed)}) for id, seed in parts.items()}, Round(index, 3))
    torch.testing.assert_close(one.message(7, Round(3, 3)).tensors[OUTPUTS], (outputs(0) + outputs(2)) / 2)


def test_sums_are_taken_in_the_order_of_clients_not_of_arrival():
    one, two = server(), server()
    for order, target in (((0, 1, 2), one), ((2, 0, 1), two)):
        for id in order:
            target.aggregate({id: Message({OUTPUTS: outputs(id)})}, Round(1, 1))
    assert torch.equal(one.message(9, Round(1, 1)).tensors[OUTPUTS], two.message(9, Round(1, 1)).tensors[OUTPUTS])


def test_gamma_0_is_local_bit_for_bit_and_gamma_matters():
    alone, without, with_it = (
        make_federation(Local, params={"local_rounds": "selected"}),
        make_federation(FedDistill, params={"gamma": 0.0}),
        None,
    )
    with_it = make_federation(FedDistill)
    for federation in (alone, without, with_it):
        federation.run()
    kept = [federation.workspace.kept for federation in (alone, without, with_it)]
    assert all(same_state(*pair) for pair in zip(kept[0], kept[1], strict=True))
    assert not all(same_state(*pair) for pair in zip(kept[0], kept[2], strict=True))


def test_a_message_has_classes_squared_numbers_and_no_weight_or_window():
    federation = make_federation(FedDistill, join_ratio=1)
    seen = overheard(federation)
    run(federation)
    assert seen and {tensor.shape for tensor in seen} == {(CLASSES, CLASSES)}
    private = [tensor for kept in federation.workspace.kept for tensor in kept.values()]
    assert not any(travels(tensor, seen) for tensor in private)


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(FedDistill, rounds=4))


@pytest.mark.parametrize("local_bn", [False, True])
def test_awkward_and_late_clients(local_bn):
    """One window, one class, a class missing; client 3 is first seen in the last round."""
    federation = make_federation(FedDistill, awkward_data(), task=make_task(local_bn=local_bn), rounds=6)
    run(federation, [(0, 1, 2)] * 4 + [(1, 2), (0, 3)])
    assert federation.server.outputs.keys() == {0, 1, 2, 3}
    assert (federation.server.outputs[1].sum(1) > 0).tolist() == [True, False, False, False]


def test_it_learns():
    assert run(make_federation(FedDistill, rounds=15, join_ratio=1))[-1].metrics["served"].accuracy > 0.8
