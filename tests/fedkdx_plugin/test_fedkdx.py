"""FedKDX as a whole: Algorithm 1, what travels, what stays, what each part does."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from fedkdx_plugin.algorithm.additions import OFF
from fedkdx_plugin.algorithm.compression import compress, decompress, linear
from fedkdx_plugin.algorithm.fedkdx import FedKDX, FedKDXClient, FedKDXParams
from fedkdx_plugin.algorithm.fedkdx_plus import FedKDXPlus
from registry.interface import BadMessage, Batch, Message, Round, copy_state, float_state
from tests.conftest import (
    CLASSES,
    SHAPE,
    Recorder,
    TinierNet,
    TinyNet,
    make_data,
    make_federation,
    make_task,
    same_state,
)


def batch(count: int = 24) -> Batch:
    data = make_data(sizes=(count,))
    return Batch(data.train_x[0], data.train_y[0])


def client(student=TinyNet, **params) -> FedKDXClient:
    torch.manual_seed(0)
    one = FedKDXClient(0, make_task(student), FedKDXParams(**params), 24)
    one.nets = FedKDXClient.build(one.task)
    return one


def gradient_norms(one: FedKDXClient, loss: str) -> dict[str, float]:
    for net in one.nets.values():
        net.zero_grad(set_to_none=True)
    one.losses(one.nets, batch(), {})[loss].backward()
    return {
        name: sum(float((p.grad**2).sum()) for p in net.parameters() if p.grad is not None)
        for name, net in one.nets.items()
    }


@pytest.mark.parametrize("use", [(), ("kd",), ("nkd",), ("ctl",), ("kd", "nkd", "ctl")])
@pytest.mark.parametrize("direction", ["mutual", "literal"])
def test_each_network_feels_its_own_loss_alone(use, direction):
    one = client(TinierNet, use=use, nkd_direction=direction)
    of_teacher, of_student = gradient_norms(one, "teacher"), gradient_norms(one, "student")
    assert of_teacher["teacher"] > 0
    assert of_teacher["student"] == 0
    assert of_student["student"] > 0
    assert of_student["teacher"] == of_student["projection"] == 0
    assert (of_teacher["projection"] > 0) == ("ctl" in use)


WEIGHTS = {"kd_weight": 0.3, "nkd_weight": 1.7, "ctl_weight": 0.6, "tau_ctl": 0.4}


@pytest.mark.parametrize("params", [{}, WEIGHTS])
@pytest.mark.parametrize("student", [TinyNet, TinierNet])
def test_losses_are_the_sum_of_equations_3_and_4(student, params):
    """Against float64, term by term as printed; the terms' own values are tested in test_losses."""
    one, data = client(student, **params), batch()
    for net in one.nets.values():
        net.double().eval()
    x, y = data.x.double(), data.y
    teacher, student_out = one.nets["teacher"](x), one.nets["student"](x)
    h_t = one.nets["projection"](teacher.features) if "projection" in one.nets else teacher.features

    def cross_entropy(z):
        return -(z - z.exp().sum(1, keepdim=True).log())[range(len(y)), y].mean()

    tau, gamma = 0.8, 0.9
    p_t, p_s = (torch.softmax(out.logits / tau, 1) for out in (teacher, student_out))

    def kl(p, q):
        return tau**2 * (p * (p / q).log()).sum(1).mean()

    def equation_8(p, q):
        total = 0
        for i, c in enumerate(y.tolist()):
            others = [k for k in range(CLASSES) if k != c]
            n_p, n_q = p[i, others] / p[i, others].sum(), q[i, others] / q[i, others].sum()
            total += -(1 - gamma) * p[i, c] * q[i, c].log() - gamma * tau**2 * (n_p * n_q.log()).sum()
        return total / len(y)

    cosine = torch.cosine_similarity(h_t[:, None], student_out.features[None], dim=2) / params.get("tau_ctl", tau)
    info_nce = -(cosine.diag() - cosine.exp().sum(1).log()).mean()
    a, b, c = (params.get(f"{term}_weight", 1) for term in ("kd", "nkd", "ctl"))
    expected = {
        "teacher": cross_entropy(teacher.logits) + a * kl(p_s, p_t) + b * equation_8(p_s, p_t) + c * info_nce,
        "student": cross_entropy(student_out.logits) + a * kl(p_t, p_s) + b * equation_8(p_t, p_s) + c * info_nce,
    }
    found = one.losses(one.nets, Batch(x, y), {})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_padding_rows_change_nothing(double):
    one, data = client(), batch(10)
    for net in one.nets.values():
        net.eval()
    rows = torch.cat([data.x, 100 * torch.ones(3, *SHAPE)])
    mask = torch.arange(13) < 10
    padded = one.losses(one.nets, Batch(rows, torch.cat([data.y, data.y[:3]]), mask), {})
    plain = one.losses(one.nets, data, {})
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value)


def test_one_full_batch_step_is_algorithm_1(double):
    """With one step on the whole of a client's data, a round moves the student as lines 5 to 12 say, in float64."""
    data = make_data(sizes=(20, 30, 40))
    federation = make_federation(
        FedKDX, data, rounds=1, join_ratio=1, batch_size=64, local_epochs=1, clip_norm=0, params={"epsilon_end": 0.95}
    )
    rate, epsilon = 0.05, linear(1.0, 0.9, 0.95)
    initial = {name: tensor.clone() for name, tensor in federation.workspace.initial.items()}
    federation.run()

    total: dict[str, torch.Tensor] = {}
    for k in range(3):
        one = client()
        copy_state(one.nets, initial)
        found = one.losses(one.nets, Batch(data.train_x[k], data.train_y[k]), {})
        (found["teacher"] + found["student"]).backward()
        parameters = {f"student.{name}": p.grad for name, p in one.nets["student"].named_parameters()}
        sent = decompress(compress(parameters, epsilon).payload, {n: g.shape for n, g in parameters.items()})
        for name, gradient in sent.items():
            total[name] = total.get(name, 0) + gradient * (20, 30, 40)[k] / 90
        teacher = {f"teacher.{name}": p - rate * p.grad for name, p in one.nets["teacher"].named_parameters()}
        for name, tensor in teacher.items():  # line 7
            torch.testing.assert_close(federation.workspace.kept[k][name], tensor, rtol=1e-9, atol=1e-9)
    down = decompress(compress(total, epsilon).payload, {n: g.shape for n, g in total.items()})
    for name, gradient in down.items():  # line 12, eq. 2
        expected = initial[name] - rate * gradient
        torch.testing.assert_close(federation.server.weights[name], expected, rtol=1e-9, atol=1e-9)


BROADCASTS = [
    (FedKDX, {}),
    (FedKDXPlus, OFF | {"error_feedback": True}),
    (FedKDXPlus, OFF | {"quantise": True, "error_feedback": True}),
]


def students(federation) -> list[dict[str, torch.Tensor]]:
    """Return the student that each client holds after receiving the server's message of now."""
    held = []
    for id in range(federation.data.clients):
        one = federation.workspace.enter(id)
        memory = dict(one.memory)
        message = federation.server.message(id, Round(1, 1))
        one.receive(Message.from_bytes(message.to_bytes()))
        held.append({name: tensor.clone() for name, tensor in one.shared().items()})
        one.memory = memory  # only asked, not told
    return held


@pytest.mark.parametrize(("algorithm", "extra"), BROADCASTS)
def test_all_clients_hold_the_servers_student_however_rarely_they_train(algorithm, extra):
    federation = make_federation(algorithm, rounds=6, join_ratio=0.25, params=extra)
    full = set()
    for t in range(1, 7):
        full |= {"since" not in federation.server.message(id, Round(t, 6)).meta for id in range(4)}
        federation.round(Round(t, 6))
        for held in students(federation):
            assert same_state(held, dict(federation.server.weights))
    assert full == {True, False}  # both ways of telling a client were tried


def test_the_log_of_steps_is_bounded_and_a_message_never_larger_than_the_student():
    federation = make_federation(FedKDX, rounds=40, join_ratio=0.25, local_epochs=1)
    dense = sum(tensor.nbytes for tensor in federation.server.weights.values())
    for t in range(1, 41):
        federation.round(Round(t, 40))
        assert sum(step.size for step in federation.server.downlink.steps) <= dense
        for id in range(4):
            message = federation.server.message(id, Round(t, 40))
            assert sum(tensor.nbytes for tensor in message.tensors.values()) <= dense


def test_a_client_that_lost_its_student_is_told():
    federation = make_federation(FedKDX, rounds=2, join_ratio=1)
    federation.run()
    message = federation.server.message(0, Round(2, 2))
    assert "since" in message.meta
    one = federation.workspace.enter(0)
    one.memory = {}
    with pytest.raises(BadMessage, match="client 0: student is at step None"):
        one.receive(message)


def test_a_client_dropped_in_a_round_is_not_taken_for_synchronised():
    federation = make_federation(FedKDX, rounds=3, join_ratio=1)
    federation.round(Round(1, 3))
    clean = federation.data.train_x[1].clone()
    federation.data.train_x[1][0, 0, 0, 0] = float("nan")
    assert list(federation.round(Round(2, 3)).rejected) == [1]
    federation.data.train_x[1].copy_(clean)
    assert not federation.round(Round(3, 3)).rejected
    assert all(same_state(held, dict(federation.server.weights)) for held in students(federation))


def test_the_teacher_never_travels():
    """By value, not by name: no tensor in any message equals one of the teachers' or projections'."""
    federation = make_federation(FedKDX, task=make_task(TinierNet), rounds=3, join_ratio=1)
    seen: list[torch.Tensor] = []
    aggregate, message = federation.server.aggregate, federation.server.message

    def listen(replies, round):
        seen.extend(tensor for reply in replies.values() for tensor in reply.tensors.values())
        aggregate(replies, round)

    def tell(id, round):
        told = message(id, round)
        seen.extend(told.tensors.values())
        return told

    federation.server.aggregate, federation.server.message = listen, tell
    federation.run()
    private = [
        tensor
        for kept in federation.workspace.kept
        for name, tensor in kept.items()
        if name.startswith(("teacher.", "projection.")) and tensor.unique().numel() > 1
    ]
    assert private and seen
    assert not any(a.shape == b.shape and torch.equal(a, b) for a in seen for b in private)
    assert not any(name.startswith(("teacher", "projection")) for name in federation.server.weights)


def test_an_untrained_client_is_served_by_the_student():
    federation = make_federation(FedKDX, rounds=1, join_ratio=0.25)
    record = federation.round(Round(1, 1))
    served, student, teacher = (record.metrics[view].client_loss for view in ("served", "student", "teacher"))
    for id in range(4):
        assert served[id] == (teacher if id in record.selected else student)[id]
    assert (student != teacher).all()


def test_epsilon_1_is_lossless_and_feedback_then_changes_nothing():
    lossless = {"epsilon_start": 1.0, "epsilon_end": 1.0}
    plain = make_federation(FedKDX, params=lossless)
    feedback = make_federation(FedKDXPlus, params=OFF | lossless | {"error_feedback": True})
    plain.run()
    feedback.run()
    assert same_state(dict(plain.server.weights), dict(feedback.server.weights))


def test_compression_sends_less_and_never_more_than_dense():
    def total(algorithm=FedKDX, **params):
        recorder = Recorder()
        make_federation(algorithm, rounds=4, join_ratio=1, params=params).run([recorder])
        return sum(record.bytes_up for record in recorder.records)

    assert total(epsilon_start=0.5, epsilon_end=0.5) < total() < total(epsilon_start=1.0, epsilon_end=1.0)
    assert total(FedKDXPlus, **OFF | {"quantise": True}) < total()


CHANGES = {
    "epsilon_start": 0.5,
    "epsilon_end": 0.5,
    "weights": "uniform",
    "gamma": 0.3,
    "tau": 2.0,
    "use": ("kd",),
    "nkd_direction": "literal",
    "tau_ctl": 2.0,
    "kd_weight": 0.5,
    "nkd_weight": 0.5,
    "ctl_weight": 0.5,
    "serve": "student",
}


def test_every_hyper_parameter_is_in_the_list_below():
    assert CHANGES.keys() == {field.name for field in fields(FedKDXParams)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_hyper_parameter_changes_the_outcome(name):
    default, changed = make_federation(FedKDX), make_federation(FedKDX, params={name: CHANGES[name]})
    recorders = Recorder(), Recorder()
    default.run([recorders[0]])
    changed.run([recorders[1]])
    if name == "serve":  # changes who predicts, and nothing else
        one, other = (recorder.records[-1].metrics["served"].loss for recorder in recorders)
        assert one != other
    else:
        assert not same_state(default.save().tensors, changed.save().tensors)


@pytest.mark.parametrize("term", ["kd", "nkd", "ctl"])
def test_every_term_changes_the_outcome(term):
    terms = tuple(t for t in ("kd", "nkd", "ctl") if t != term)
    default, changed = make_federation(FedKDX), make_federation(FedKDX, params={"use": terms})
    default.run()
    changed.run()
    assert not same_state(dict(default.server.weights), dict(changed.server.weights))
    trained = next(id for id, one in enumerate(default.workspace.clients) if one.trained)
    teachers = [
        {n: t for n, t in federation.workspace.kept[trained].items() if n.startswith("teacher")}
        for federation in (default, changed)
    ]
    assert not same_state(*teachers)


def test_a_weight_of_0_is_the_term_left_out():
    left_out = make_federation(FedKDX, params={"use": ("kd",)})
    weightless = make_federation(FedKDX, params={"nkd_weight": 0.0, "ctl_weight": 0.0})
    left_out.run()
    weightless.run()
    assert same_state(left_out.save().tensors, weightless.save().tensors)


def test_without_terms_the_teacher_is_local_training():
    from baselines.local import Local

    alone = make_federation(Local, join_ratio=1)
    teacher = make_federation(FedKDX, join_ratio=1, params={"use": ()})
    alone.run()
    teacher.run()
    for mine, theirs in zip(alone.workspace.kept, teacher.workspace.kept, strict=True):
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name.replace("model.", "teacher.")])


def test_without_terms_or_compression_the_student_is_fedavg(double):
    """Up to the rounding of (W - W_k)/η and back: the same data and order, the same initial weights put in."""
    from baselines.fedavg import FedAvg

    average = make_federation(FedAvg)
    student = make_federation(FedKDX, params={"use": (), "epsilon_start": 1.0, "epsilon_end": 1.0})
    for name, tensor in average.server.weights.items():
        student.server.weights[name.replace("model.", "student.")] = tensor.clone()
    average.run()
    student.run()
    for name, tensor in average.server.weights.items():
        found = student.server.weights[name.replace("model.", "student.")]
        torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("algorithm", "extra"), BROADCASTS)
def test_a_saved_server_goes_on_as_if_nothing_had_happened(algorithm, extra):
    federation = make_federation(algorithm, rounds=6, join_ratio=0.25, params=extra)
    for t in (1, 2, 3):
        federation.round(Round(t, 6))
    saved = Message.from_bytes(federation.server.save().to_bytes())
    old, new = federation.server, algorithm(federation.server.task, federation.server.params, {})
    new.restore(saved)
    for id in range(4):
        assert new.message(id, Round(4, 6)).to_bytes() == old.message(id, Round(4, 6)).to_bytes()
    assert same_state(new.save().tensors, saved.tensors)


def test_replies_may_arrive_in_any_order_since_the_engine_sorts_them():
    one, two = make_federation(FedKDX, join_ratio=1), make_federation(FedKDX, join_ratio=1)
    train = two.backend.train
    two.backend.train = lambda messages, round: dict(reversed(train(messages, round).items()))
    one.run()
    two.run()
    assert same_state(one.save().tensors, two.save().tensors)


def test_two_classes_and_a_single_window_work():
    data = make_data(sizes=(1, 30))
    for y in (*data.train_y, data.test_y):
        y.clamp_(max=1)
    two = replace(make_task(), classes=2)
    recorder = Recorder()
    federation = make_federation(FedKDX, data, task=two, join_ratio=1)
    federation.run([recorder])
    assert not any(record.rejected for record in recorder.records)


def test_state_names_cover_the_projection():
    one = client(TinierNet)
    assert "projection.weight" in float_state(one.nets)
    assert not any(name.startswith("projection") for name in one.shared())
    assert "projection" not in client(TinyNet).nets
