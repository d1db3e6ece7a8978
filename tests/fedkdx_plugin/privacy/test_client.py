"""The mechanism: its noise, its bounds, what it records, and how it goes on after a restart."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2

from baselines.fedavg import FedAvg
from baselines.fedprox import FedProx
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.engine.attacks import Attack
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.randomness import draw_clients
from fedkdx_plugin.privacy import clipping
from fedkdx_plugin.privacy.accounting import FIXED, POISSON, Sampling, gaussian, noise_multiplier, spent
from fedkdx_plugin.privacy.client import Plan, Protection
from fedkdx_plugin.privacy.noise import SecretNoise, SeededNoise
from fedkdx_plugin.privacy.options import DISTRIBUTED, Privacy
from registry.errors import UserError
from registry.interface import Message, Round
from tests.conftest import Recorder, same_state
from tests.fedkdx_plugin.privacy.cases import BUDGET, SIZES, NoNoise, private

AUTO = replace(BUDGET, clip=None)
LIKE = {"a": torch.zeros(100, 50), "b": torch.zeros(5000)}


def protection(privacy=BUDGET, kind=FIXED, source=None, members=30, selected=12):
    plan = Plan(Sampling(members, selected, kind), 10, 1e-3, 1.5)
    made = Protection(privacy, plan, source or SeededNoise(0))
    made.begin(1)
    return made


def run(federation, backend_rounds=None):
    with closing(federation):
        federation.run([recorder := Recorder()])
    return recorder.records


def drawn_with(values: torch.Tensor, deviation: float) -> bool:
    """Tell whether independent values of mean 0 have this deviation: the two-sided test at 1e-6."""
    statistic = float((values / deviation).square().sum())
    low, high = chi2.ppf([5e-7, 1 - 5e-7], values.numel())
    return bool(low < statistic < high)


def flat(state) -> torch.Tensor:
    return torch.cat([t.flatten() for t in state.values()])


@pytest.mark.parametrize(("kind", "unit"), [(FIXED, 2), (POISSON, 1)])
@pytest.mark.parametrize("source", [SeededNoise(3), SecretNoise()], ids=["seeded", "secret"])
def test_the_mean_has_noise_of_the_stated_deviation(kind, unit, source):
    values = flat(protection(kind=kind, source=source).release([], LIKE))
    deviation = 1.5 * unit * BUDGET.clip / 12
    assert drawn_with(values, deviation)
    assert not drawn_with(values, 1.1 * deviation) and not drawn_with(values, deviation / 1.1)


def test_noise_is_of_one_seed_round_and_tensor():
    def drawn(seed=0, round=1, name="a"):
        made = protection(source=SeededNoise(seed))
        made.begin(round)
        return made.release([], {name: LIKE["a"]})[name]

    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=1), drawn(round=2), drawn(name="b")):
        assert abs(float(torch.corrcoef(torch.stack([drawn().flatten(), other.flatten()]))[0, 1])) < 0.08


def test_secret_noise_never_repeats():
    one, other = (SecretNoise().normal(torch.Size([1000]), 1, "a") for _ in range(2))
    assert not torch.equal(one, other) and one.dtype == torch.float64 and bool(one.isfinite().all())


def test_updates_are_clipped_together_and_divided_by_the_planned_number():
    """Three of 12 clients reply: norms 5, 0.1 and 0 over both tensors, C = 0.5."""
    made = protection(source=NoNoise())
    updates = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([0.1]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])},
    ]
    updates = [{name: t.double() for name, t in own.items()} for own in updates]
    mean = made.release(updates, {"a": torch.zeros(1), "b": torch.zeros(1)})
    assert mean["a"].item() == pytest.approx((0.3 + 0.1) / 12) and mean["b"].item() == pytest.approx(0.4 / 12)


def test_a_mean_may_be_taken_once_and_only_around_something():
    made = protection()
    with pytest.raises(RuntimeError, match="around"):
        made.average([{"a": torch.ones(3)}], [1.0])
    made.average([{"a": torch.ones(3)}], [1.0], around={"a": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="twice"):
        made.average([{"a": torch.ones(3)}], [1.0], around={"a": torch.zeros(3)})


def test_the_bound_follows_the_median_as_andrew_et_al_say():
    """C ← C exp(-0.2 (b - 0.5)), b the share of 12 planned clients with a norm of at most C; others count as half."""
    made = protection(AUTO, source=NoNoise())
    assert made.clip == 0.1
    updates = [{"a": torch.full((1,), value, dtype=torch.float64)} for value in (0.05, 0.1, 3.0)]
    made.release(updates, {"a": torch.zeros(1)})
    assert made.clip == pytest.approx(0.1 * math.exp(-0.2 * ((2 - 1.5) / 12)))


def test_the_bound_comes_to_the_median():
    made = protection(AUTO, source=NoNoise(), members=5, selected=5)
    updates = [{"a": torch.full((1,), value, dtype=torch.float64)} for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    for index in range(300):
        made.begin(index)
        made.release(updates, {"a": torch.zeros(1)})
    assert 2 <= made.clip <= 4


@pytest.mark.parametrize(("kind", "unit"), [(FIXED, 2), (POISSON, 1)])
@pytest.mark.parametrize("selected", [12, 2000])
def test_the_count_takes_its_part_of_the_budget_and_no_more(kind, unit, selected):
    noise = 1.5
    bits = clipping.bits_noise(noise, selected, unit)
    updates = clipping.updates_noise(noise, bits)
    assert updates**-2 + bits**-2 == pytest.approx(noise**-2)  # both together are as private as one sum with z
    assert bits**-2 <= clipping.BITS_SHARE * noise**-2 * (1 + 1e-12)
    if selected == 2000:  # the paper's m/20 of a count whose sensitivity is half that of the updates
        assert bits * unit / 2 == pytest.approx(100)
    values = flat(protection(AUTO, kind, members=9 * selected, selected=selected).release([], LIKE))
    assert drawn_with(values, updates * unit * 0.1 / selected)


@pytest.mark.parametrize(
    ("privacy", "expected"),
    [
        (BUDGET, 3.0),  # zΔ/C = 1.5 · 2
        # Andrew et al. 2021, theorem 1: z^-2 = z_Δ^-2 + z_b^-2. With z_b^-2 = z^-2 / 10, z_Δ = z/√0.9, and
        # 2 · 1.5/√0.9 = √10
        (AUTO, 10**0.5),
        (replace(BUDGET, noise=DISTRIBUTED), 3 * (12 / 11) ** 0.5),  # twelve shares of zΔ/√11 each
    ],
    ids=["fixed", "auto", "distributed"],
)
def test_the_deviation_that_is_written_down_is_that_of_the_noise_added(privacy, expected):
    made = protection(privacy)
    assert made.table()["deviation_of_sum"] == pytest.approx(expected)
    added = [made.noised(LIKE, client) for client in range(12)] if privacy.noise == DISTRIBUTED else []
    assert drawn_with(12 * flat(made.release(added, LIKE)), expected * (0.1 if privacy is AUTO else BUDGET.clip))


def test_the_count_has_noise_of_the_stated_deviation():
    """With nobody there, log C moves by -0.2 times the noise of the share: the paper's 1/20 with 2000 clients."""
    steps = []
    for seed in range(400):
        made = protection(AUTO, source=SeededNoise(seed), members=2000, selected=2000)
        made.release([], {"a": torch.zeros(1)})
        steps.append(math.log(made.clip / 0.1))
    assert drawn_with(torch.tensor(steps), 0.2 / 20)


@pytest.mark.parametrize(
    ("share", "clip", "expected"),
    [
        (0.75, 1.0, math.exp(-0.05)),  # -0.2 · (0.75 - 0.5)
        (-400.0, 1.0, math.exp(0.1)),  # as 0: 0.2 · 0.5
        (400.0, 1.0, math.exp(-0.1)),  # as 1
        (0.0, 2.0**23, 2.0**23),  # where --clip ends, too
        (1.0, 2.0**-23, 2.0**-23),
    ],
)
def test_noise_in_the_count_moves_the_bound_by_a_tenth_at_most_and_never_out_of_range(share, clip, expected):
    assert clipping.next_clip(clip, share) == pytest.approx(expected, rel=1e-12)


def test_what_is_spent_is_what_the_accountant_says():
    sampling = Sampling(5, 2, FIXED)
    noise = noise_multiplier(8.0, 1e-2, 4, sampling)
    records = run(private(FedAvg, join_ratio=0.4))
    found = [record.server["privacy_epsilon"] for record in records]
    assert found == [spent(noise, 1e-2, rounds, sampling) for rounds in (1, 2, 3, 4)]
    assert found == sorted(found) and 7.9 < found[-1] <= 8
    assert {record.server["privacy_clip"] for record in records} == {0.5}


def test_rounds_in_which_replies_are_lost_are_spent_all_the_same():
    plain = run(private(FedAvg))
    lossy = run(private(FedAvg, faults=Faults(dropout=0.5, corrupt=0.3)))
    assert any(record.lost or record.rejected for record in lossy)
    for key in ("privacy_epsilon", "privacy_clip"):
        assert [r.server[key] for r in plain] == [r.server[key] for r in lossy]


def test_attackers_do_no_more_than_others_may():
    noiseless = [private(FedAvg, attack=Attack(kind, 0.2, 1e6)) for kind in ("scaling", "gaussian")]
    for federation in noiseless:
        federation.protection.source = NoNoise()
        before = {name: t.clone() for name, t in federation.server.weights.items()}
        federation.round(Round(1, 4))
        moved = flat({n: t.double() - before[n].double() for n, t in federation.server.weights.items()})
        assert float(moved.norm()) <= BUDGET.clip * (1 + 1e-6)


@pytest.mark.parametrize(("algorithm", "sampling"), [(FedAvg, FIXED), (FedKDX, POISSON)])
def test_a_resumed_run_is_the_unbroken_one(algorithm, sampling):
    def made():
        return private(algorithm, AUTO, sampling=sampling, join_ratio=0.6)

    unbroken, half, broken = made(), made(), made()
    whole = run(unbroken)
    for index in (1, 2):
        half.round(Round(index, 4, 0.6))
    saved = half.save()
    assert saved.meta["privacy"]["clip"] != 0.1
    broken.restore(Message.from_bytes(Message(saved.tensors, saved.meta).to_bytes()))
    recorder = Recorder()
    broken.run([recorder], done=2)
    assert same_state(dict(unbroken.save().tensors), dict(broken.save().tensors))
    assert unbroken.save().meta == broken.save().meta
    assert [r.server for r in whole[2:]] == [r.server for r in recorder.records]


@pytest.mark.parametrize("algorithm", [FedProx, FedKDX])
def test_backends_agree(algorithm, double):
    states = {}
    for backend in ("sequential", "stacked"):
        federation = private(algorithm, AUTO, backend=backend, sampling=POISSON, join_ratio=0.6)
        records = run(federation)
        states[backend] = flat(federation.server.weights), [r.server["privacy_clip"] for r in records]
    (one, clips), (other, others) = states.values()
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-9) and clips == others


def test_poisson_samples_differ_in_size_and_may_be_empty():
    federation = private(FedKDX, sampling=POISSON, join_ratio=0.2, rounds=10)
    records = run(federation)
    sizes = [len(record.selected) for record in records]
    assert 0 in sizes and max(sizes) > 1
    assert not any(record.rejected for record in records)
    assert federation.protection.plan.sampling.selected == pytest.approx(0.2 * len(SIZES))
    drawn = [len(draw_clients(seed, 1, 5, 0.3)) for seed in range(200)]
    assert abs(sum(drawn) - 300) < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_sampling_by_itself_needs_no_privacy():
    records = run(private(FedAvg, Privacy(), sampling=POISSON, join_ratio=0.2, rounds=12))
    assert 0 in [len(record.selected) for record in records] and not any(record.server for record in records)


SHARED = replace(BUDGET, noise=DISTRIBUTED)


def test_each_client_adds_a_share_of_the_noise():
    made = protection(SHARED)
    shares = [made.noised(LIKE, client) for client in range(12)]
    own = 1.5 * 2 * BUDGET.clip / math.sqrt(11)
    assert all(drawn_with(flat(share), own) for share in shares)
    total = made.release(shares, LIKE)
    assert drawn_with(flat(total), 1.5 * 2 * BUDGET.clip / 12 * math.sqrt(12 / 11))
    # one of them takes its own noise out of the sum, and still sees no less than was accounted
    others = sum(flat(share) for share in shares[1:])
    assert drawn_with(others, 1.5 * 2 * BUDGET.clip)
    summed = made.release([total], LIKE)  # as secure aggregation gives it
    assert torch.equal(flat(summed), flat(total))
    noiseless = protection(SHARED, source=NoNoise())
    long = noiseless.noised({"a": torch.full((4,), 7.0), "b": torch.full((5,), 7.0)}, 0)
    assert float(flat(long).norm()) == pytest.approx(BUDGET.clip)


def test_distributed_noise_in_a_run():
    """The server sees noised replies; what it makes of them is what it would make of a noised mean."""
    federation = private(FedAvg, SHARED)
    central, seen = private(FedAvg), []
    send_up = federation.transport.send_up
    federation.transport.send_up = lambda id, reply, *damage: (seen.append(reply), send_up(id, reply, *damage))[1]
    federation.protection.source = central.protection.source = NoNoise()
    for one in (federation, central):
        one.round(Round(1, 4))
    assert len(seen) == len(SIZES)
    assert torch.allclose(flat(federation.server.weights), flat(central.server.weights), atol=1e-6)
    record = private(FedAvg, SHARED).round(Round(1, 4))
    figures = record.server
    assert figures["privacy_epsilon_server"] > figures["privacy_epsilon"]
    plan = federation.protection.plan
    single = plan.noise * 2 * BUDGET.clip / math.sqrt(len(SIZES) - 1)  # deviation of a reply, which moves by 2C
    assert figures["privacy_epsilon_server"] == pytest.approx(gaussian(single / (2 * BUDGET.clip), 1e-2))
    # of a sum, it sees all shares; a client that is replaced moves it by 2C, too
    summed = plan.spent_against_server(3, True)
    assert summed == pytest.approx(gaussian(single * math.sqrt(len(SIZES) / 3) / (2 * BUDGET.clip), 1e-2))
    assert summed < plan.spent_against_server(3, False)


def test_a_round_with_a_missing_share_of_noise_does_not_count(capsys):
    federation = private(FedAvg, SHARED, faults=Faults(dropout=0.5))
    before = {name: t.clone() for name, t in federation.server.weights.items()}
    record = federation.round(Round(1, 4))
    assert record.lost and same_state(before, federation.server.weights)
    assert "does not count" in record.notes[0] and "too little noise" in capsys.readouterr().err
    assert record.server["privacy_epsilon"] > 0


def test_a_client_that_failed_sends_noise_alone():
    federation = private(FedAvg, SHARED)
    federation.data.train_x[1].fill_(torch.nan)
    record = federation.round(Round(1, 4))
    assert not record.rejected and not record.notes


def test_a_budget_that_is_no_promise_is_refused():
    with pytest.raises(UserError, match=r"--delta 0.2: not below 1/5"):
        private(FedAvg, replace(BUDGET, delta=0.2))
    with pytest.raises(UserError, match="too small for one round"):
        private(FedAvg, replace(BUDGET, epsilon=1e-9, delta=1e-5))


def test_runs_of_one_seed_do_not_share_their_noise():
    """Or else the difference of two runs, of FedAvg and FedProx say, would have none."""
    made = [
        private(FedAvg),
        private(FedProx),
        private(FedProx, params={"mu": 0.5}),
        private(FedAvg, learning_rate=0.02),
        private(FedAvg, seed=1),
    ]
    drawn = [one.protection.source.normal(torch.Size((50,)), 1, "update", "model.head.weight") for one in made]
    for place, one in enumerate(drawn):
        assert all(abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.7 for other in drawn[:place])
    again = private(FedAvg).protection.source.normal(torch.Size((50,)), 1, "update", "model.head.weight")
    assert torch.equal(again, drawn[0])
