"""Runs with secure aggregation in one process: the mean to the stated error, the same bits, faults, wrong input."""

from __future__ import annotations

import math
import re
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.engine import secure_sums
from fedkdx_plugin.engine.attacks import Attack
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.experiments import setting
from fedkdx_plugin.privacy.secure_aggregation.fixed_point import MOST_WEIGHT, Layout, largest_error
from fedkdx_plugin.testing.case import AlgorithmCase
from fedkdx_plugin.testing.sums import why_no_sum
from registry import catalog
from registry.aggregation import Averaging
from registry.errors import UserError
from registry.interface import Message, Round, Server
from tests.conftest import Recorder, make_data, make_task, same_state

NAMES = catalog.BUILT_IN["algorithms"]
SUMS = {name for name in NAMES if catalog.load("algorithms", name).sums}
SIZES = (40, 7, 65, 20, 31, 12)


def federation(
    algorithm: type[Server] = FedAvg,
    secure: bool = True,
    rounds: int = 2,
    join_ratio: float = 1.0,
    averaging: Averaging | None = None,
    outliers: float | None = None,
    backend: str = "sequential",
    sizes: tuple[int, ...] = SIZES,
    unseen: int = 0,
    **settings,
) -> Federation:
    settings = {"batch_size": 16, "local_epochs": 1, "learning_rate": 0.05} | settings
    return Federation(
        algorithm,
        replace(make_task(), averaging=averaging or Averaging()),
        algorithm.Params(),
        make_data(sizes),
        Settings(**settings),
        Schedule(rounds, join_ratio, participation=Participation(unseen), outliers=outliers, secure=secure),
        backend,
    )


def run(one: Federation):
    with closing(one):
        one.run([recorder := Recorder()])
    return recorder.records


def state_of(one: Federation) -> dict[str, torch.Tensor]:
    return dict(one.save().tensors)


def test_who_sums():
    """All but those whose servers look at single replies; the check of algorithms proves each that says so."""
    assert set(NAMES) - SUMS == {
        "Centralised", "SCAFFOLD", "FedNova", "FedDyn", "IFCA", "CFL", "FedAMP", "FedAS", "FedFomo", "FedMTL", "FedFTL",
        "FedDistill", "FedProto", "FedPAC", "FedGH", "FedKD", "FedKD+", "FedKDX", "FedKDX+",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(NAMES) - SUMS))
def test_no_other_algorithm_could_say_so_and_each_is_refused_by_name(name):
    with pytest.raises(UserError, match=rf"--secure-aggregation: {re.escape(name)} (needs|pools)"):
        setting.check(config(algorithm=[name]))
    assert why_no_sum(AlgorithmCase(catalog.load("algorithms", name)))


def test_a_class_with_an_aggregation_of_its_own_says_so_anew():
    class Median(FedAvg):
        def aggregate(self, replies, round):
            pass

    class Mean(Median):
        sums = True

    class Named(Mean):
        averages = False

    assert [each.sums for each in (Server, FedAvg, Median, Mean, Named)] == [False, True, False, True, True]
    with pytest.raises(UserError, match="Median needs more of the replies than their sum"):
        federation(Median)


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedPer", "FedDBE", "FedBABU", "Local"])
def test_a_round_is_the_plain_one_to_the_stated_error(name):
    algorithm = catalog.load("algorithms", name)
    plain, secure = (federation(algorithm, each, rounds=1) for each in (False, True))
    one, other = (run(each)[0] for each in (plain, secure))
    assert one.selected == other.selected and not other.rejected
    assert one.train_loss == other.train_loss
    error = largest_error(len(SIZES), sum(SIZES))
    rate = 2.0 if name == "FedAdam" else 1.0  # its step is at most the rate over τ times a change of the mean
    for key, tensor in plain.server.save().tensors.items():
        found = secure.server.save().tensors[key]
        float32 = float(tensor.abs().max() if tensor.numel() else 0) * 2**-22  # of the plain mean, and of the result
        if name == "FedAdam" and not key.startswith(("first/", "second/")):
            error = 0.01 / 1e-3 * (1e-6 + largest_error(len(SIZES), sum(SIZES)))
        assert torch.allclose(found, tensor, rtol=0, atol=rate * (error + float32)), key


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
def test_other_masks_give_the_same_bits(backend):
    one, other = (federation(backend=backend, rounds=3, join_ratio=0.6) for _ in range(2))
    first, second = run(one), run(other)
    assert same_state(state_of(one), state_of(other))
    for a, b in zip(first, second, strict=True):
        assert (a.bytes_up, a.bytes_down, a.train_loss) == (b.bytes_up, b.bytes_down, b.train_loss)


def test_a_resumed_run_gives_the_bits_of_the_unbroken_one():
    whole = federation(rounds=3)
    run(whole)
    broken, again = federation(rounds=3), federation(rounds=3)
    for index in (1, 2):
        broken.round(Round(index, 3, 1.0))
    again.restore(Message.from_bytes(broken.save().to_bytes()))
    again.run(done=2)
    assert same_state(state_of(whole), state_of(again))


def test_the_server_sees_zeros_and_means_alone(monkeypatch):
    one = federation(rounds=2)
    server, seen = one.server, []
    check, aggregate = server.check_reply, server.aggregate
    monkeypatch.setattr(
        one.sums, "check_reply", lambda id, reply: (seen.append(("check", id, reply)), check(id, reply))
    )
    monkeypatch.setattr(
        server, "aggregate", lambda replies, r: seen.append(("take", 0, replies)) or aggregate(replies, r)
    )
    run(one)
    checked = [reply for what, _, reply in seen if what == "check"]
    assert len(checked) == 2 * len(SIZES)
    assert not any(tensor.any() for reply in checked for tensor in reply.tensors.values())
    taken = [replies for what, _, replies in seen if what == "take"]
    assert [list(replies) for replies in taken] == [[0], [0]]
    assert all(replies[0].meta == {"samples": sum(SIZES)} for replies in taken)


def test_bytes_of_all_steps_are_counted():
    plain, secure = (run(federation(secure=each, rounds=1))[0] for each in (False, True))
    layout = Layout.of(Message(federation(secure=False).server.weights))
    clients = len(SIZES)
    boxes, digests = clients * (clients - 1) * 82, clients * (2 * clients + 1) * 32
    up = clients * ((layout.size + 2) * 8 + 2 * 32 + clients * 33) + boxes + digests
    down = clients * clients * 2 * 32 + boxes + clients * (clients - 1) * 2 * 32
    for more, exact in ((secure.bytes_up, up), (secure.bytes_down - plain.bytes_down, down)):
        assert exact < more < exact + 4 * clients * 1200  # headers, and the layout in one of them


def test_a_client_whose_values_arrive_damaged_is_named_and_the_others_are_summed():
    one = federation(rounds=6, faults=Faults(corrupt=0.1))
    records = run(one)
    named = {id for record in records for id in record.rejected}
    assert named and not any("undone" in reason for record in records for reason in record.rejected.values())
    assert all(not math.isnan(record.train_loss) for record in records)


def test_values_that_are_no_number_never_leave_their_client():
    one = federation(rounds=1)
    original = one.backend.train

    def train(messages, round):
        results = original(messages, round)
        results[2].reply.tensors["model.fc.weight"][0, 0] = torch.nan
        return results

    one.backend.train = train
    (record,) = run(one)
    assert record.rejected == {2: "client 2: model.fc.weight holds NaN or infinity"}
    assert all(tensor.isfinite().all() for tensor in state_of(one).values())


def test_too_few_undo_the_round_with_one_line(capsys):
    one = federation(rounds=1, sizes=(20, 20, 20), faults=Faults(corrupt=0.99))
    before = {name: tensor.clone() for name, tensor in one.server.weights.items()}
    (record,) = run(one)
    assert sorted(record.rejected) == [0, 1, 2] and math.isnan(record.train_loss)
    lines = [line for line in capsys.readouterr().err.splitlines() if "undone" in line]
    assert lines == ["FedAvg, round 1: the round is undone: 0 of 3 clients took step 'mask'; 2 are needed"]
    assert same_state(before, dict(one.server.weights))


def test_a_client_with_too_many_windows_is_named(monkeypatch):
    one = federation(rounds=1)
    one.workspace.clients[1].samples = MOST_WEIGHT + 1
    (record,) = run(one)
    assert "at most 1048576" in record.rejected[1] and list(record.rejected) == [1]


def test_simulated_attacks_get_through():
    """Nobody looks at single replies any more, so a false one has its full weight."""
    honest, attacked = (federation(rounds=1, attack=attack) for attack in (Attack(), Attack("scaling", 0.2)))
    run(honest), run(attacked)
    assert not same_state(dict(honest.server.weights), dict(attacked.server.weights))


def test_clipped_values_are_said(capsys):
    one = federation(rounds=1)
    original = one.backend.train

    def train(messages, round):
        results = original(messages, round)
        results[2].reply.tensors["model.fc.bias"][:] = 1e6
        return results

    one.backend.train = train
    (record,) = run(one)
    (note,) = record.notes
    assert "16 of 6 x" in note and "beyond ±65536 and were clipped" in note
    assert note in capsys.readouterr().err


def config(**options):
    return from_dict(
        {"data": "SPAR", "algorithm": ["FedAvg"], "secure_aggregation": True, "device": "cpu"} | options, ""
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"algorithm": ["FedAvg", "FedKDX"]}, "--secure-aggregation: FedKDX needs more of the replies than their sum"),
        ({"algorithm": ["FedKD", "FedNova"]}, "FedKD, FedNova need more of"),
        ({"algorithm": ["FedAvg", "Centralised"]}, "Centralised pools everybody's data"),
        ({"aggregate": "median"}, "--aggregate median: needs single replies"),
        ({"max_share": 0.5}, "--max-share 0.5: needs single replies"),
        ({"outliers": 10}, "--outliers 10: with --secure-aggregation"),
    ],
)
def test_options_that_need_single_replies_are_refused_before_anything_runs(options, reason):
    with pytest.raises(UserError, match=reason):
        setting.check(config(**options))


def test_options_that_change_nothing_are_not_refused():
    for options in ({"outliers": 0}, {"aggregate": "mean"}, {"algorithm": sorted(SUMS)}):
        setting.check(config(**options))
    assert setting.schedule(config()).secure


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(secure_sums, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package cryptography: pip install 'fedkdx\[privacy\]'"):
        setting.check(config())


def test_a_sum_of_a_single_reply_is_refused():
    with pytest.raises(UserError, match="a round selects 1 client"):
        federation(join_ratio=0.2)
    with pytest.raises(UserError, match="a round selects 1 client"):  # of those that are not unseen
        federation(join_ratio=0.4, unseen=3)


def test_nothing_is_imported_without_it():
    """Secure aggregation costs nothing where it is not used, and needs no library."""
    import subprocess
    import sys

    script = (
        "import sys; sys.modules['cryptography'] = None; from fedkdx_plugin.engine.rounds import Federation; "
        "print([name for name in sys.modules if 'secure_aggregation' in name])"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert made.stdout.strip() == "[]", made.stderr
