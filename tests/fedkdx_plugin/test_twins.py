"""What people write is what runs: compiled losses and steps are used only while they give what PyTorch's give."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkdx_plugin.algorithm import fedkdx
from fedkdx_plugin.algorithm.fedkdx import FedKDX, FedKDXClient, FedKDXParams
from fedkdx_plugin.engine.steps import mover
from fedkdx_plugin.models.cnn import CNN
from fedkdx_plugin.native import library, sgd, twin
from fedkdx_plugin.native import losses as compiled_losses
from fedkdx_plugin.native.sgd import ClipAndMove
from registry import functional
from registry.interface import Batch, Output, Task
from tests.conftest import CLASSES, SHAPE, make_federation, same_state
from tests.fedkdx_plugin.wrong_library import wrong_library

pytestmark = pytest.mark.skipif(library.operations() is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(twin, "_verdicts", {})
    monkeypatch.setattr(twin, "_passed_on", set())


def a_round(algorithm: type = FedKDX, **options: object) -> dict[str, Tensor]:
    """All that a federation holds after a round of the default FedKDX."""
    federation = make_federation(algorithm, rounds=1, **options)
    try:
        federation.run()
    finally:
        federation.close()
    return federation.save().tensors


def max_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())


def lines(capsys: pytest.CaptureFixture) -> list[str]:
    """Said on standard error since this was last asked."""
    return capsys.readouterr().err.splitlines()


def a_batch(rows: int = 12, classes: int = 5, size: int = 16) -> tuple[Output, Output, Batch]:
    rng = torch.Generator().manual_seed(1)
    pair = [
        Output(torch.randn(rows, size, generator=rng).relu(), torch.randn(rows, classes, generator=rng))
        for _ in range(2)
    ]
    return *(Output(*(part.requires_grad_() for part in one)) for one in pair), Batch(
        torch.empty(rows), torch.arange(rows) % classes
    )


def a_client(kind: type[FedKDXClient] = FedKDXClient, **params: object) -> FedKDXClient:
    return kind(0, Task(SHAPE, CLASSES, CNN, CNN), FedKDXParams(**params), 12)


def is_compiled(client: FedKDXClient) -> bool:
    return "Mutual" in str(client.distil(*a_batch())["teacher"].grad_fn)


def edit(monkeypatch: pytest.MonkeyPatch, old: str, new: str, modules: Sequence[object] = (functional, fedkdx)) -> None:
    """Run a module's file once more with a text in it replaced, as it is after an edit; taken back after the test.

    Args:
        modules: of which one holds the text; those after it take its functions from it.
    """
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    assert sum(text.count(old) for text in texts) == 1
    place = next(place for place, text in enumerate(texts) if old in text)
    module, text = modules[place], texts[place]
    before = dict(vars(module))
    exec(compile(text.replace(old, new), module.__file__, "exec"), vars(module))
    for name, value in list(vars(module).items()):
        if name in before and value is not before[name]:
            vars(module)[name] = before[name]
            for each in modules[place:]:
                if vars(each).get(name) is before[name]:
                    monkeypatch.setattr(each, name, value)


def test_as_long_as_nothing_is_edited_the_compiled_losses_run_and_nothing_is_said(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(
        FedKDXClient,
        "losses",
        lambda self, *batch, losses=FedKDXClient.losses: called.append(losses(self, *batch)) or called[-1],
    )
    a_round()
    assert called and all("Mutual" in str(each["teacher"].grad_fn) for each in called)
    assert lines(capsys) == []


@pytest.mark.parametrize("name", compiled_losses.FUNCTIONS)
def test_a_loss_that_is_replaced_runs_and_one_line_says_so(name, monkeypatch, capsys):
    before = a_round()
    usual, calls = getattr(fedkdx, name), []

    def changed(*args):
        calls.append(args)
        result = usual(*args)
        return result._replace(others=1.5 * result.others) if name == "apart" else 1.5 * result + 0.1

    monkeypatch.setattr(fedkdx, name, changed)
    after = a_round()
    (line,) = lines(capsys)
    assert f"fedkdx.{name} was replaced" in line and "losses of FedKDX" in line and "PyTorch's" in line
    assert " differs by " in line and " %" in line
    assert len(calls) > 10 and not same_state(before, after)
    a_round()
    assert lines(capsys) == []
    monkeypatch.setattr(fedkdx, name, usual)
    assert same_state(a_round(), before) and lines(capsys) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return tau**2 * (log_target.exp()", "return 1.01 * tau**2 * (log_target.exp()"),
        ("return tau**2 * (log_target.exp()", "return 0.1 * log_learner[:, 0] + tau**2 * (log_target.exp()"),
        ("return -(1 - gamma) * teacher", "return -(1.01 - gamma) * teacher"),
        ("- gamma * tau**2 * others", "- gamma * others"),
        ("return F.log_softmax(z / tau, dim=1)", "return F.log_softmax(z / (1.01 * tau), dim=1)"),
        ("unit(h_student).T / tau", "unit(h_student).T / tau * 1.01"),
        ("h / length.masked_fill(length < SHORTEST_FEATURE, torch.inf)", "F.normalize(h, dim=1)"),
    ],
)
def test_a_loss_that_is_edited_by_a_percent_runs(old, new, monkeypatch, capsys):
    before = a_round()
    edit(monkeypatch, old, new)
    after = a_round()
    (line,) = lines(capsys)
    assert "losses of FedKDX" in line and "differs by" in line and "replaced" not in line
    assert not is_compiled(a_client())
    monkeypatch.setattr(library, "operations", lambda: None)
    plain = a_round()
    assert after.keys() == plain.keys()
    near, far = (max_difference(each, plain) for each in (after, before))
    assert near < far / 10


def test_an_edit_that_only_one_of_many_classes_feels_is_seen(monkeypatch, capsys):
    edit(
        monkeypatch,
        "return -(1 - gamma) * teacher.true.exp() * student.true - gamma * tau**2 * others",
        "return torch.where(teacher.true == teacher.true.max(), 1.1, 1.0) * "
        "(-(1 - gamma) * teacher.true.exp() * student.true - gamma * tau**2 * others)",
    )
    assert "Mutual" not in str(a_client().distil(*a_batch(classes=30))["teacher"].grad_fn)
    assert len(lines(capsys)) == 1


@pytest.mark.parametrize(("classes", "rows"), [(2, 8), (7, 8), (40, 40), (1000, 64)])
def test_every_class_is_a_true_one_as_far_as_there_are_rows(classes, rows):
    def values(teacher, student, batch):
        assert len(batch.y) == rows and len(batch.y.unique()) == min(classes, rows)
        return teacher.logits.sum(), student.logits.sum()

    assert len(compiled_losses._trial(values, classes, 3, torch.float32).results()) == 2 + 4


def test_an_edit_that_changes_no_value_leaves_the_compiled_losses(monkeypatch, capsys):
    edit(monkeypatch, "return tau**2 * (log_target.exp()", "return tau * tau * (log_target.exp()")
    assert is_compiled(a_client()) and lines(capsys) == []


def test_a_constant_stands_once_and_a_new_one_is_compared(monkeypatch, capsys):
    """The shortest feature with a direction is told to the compiled loss."""
    monkeypatch.setattr(functional, "SHORTEST_FEATURE", 2.0)
    teacher, student, batch = a_batch()
    teacher = Output((0.1 * teacher.features).detach().requires_grad_(), teacher.logits)
    client = a_client()
    found = client.distil(teacher, student, batch)
    assert "Mutual" in str(found["teacher"].grad_fn) and lines(capsys) == []
    (by,) = torch.autograd.grad(found["teacher"], teacher.features)
    assert torch.equal(by, torch.zeros_like(by))


def test_what_a_replaced_loss_looks_up_may_change_later(monkeypatch, capsys):
    """It agrees at first; nothing tells that it will not."""
    usual, factor = fedkdx.kd, [1.0]
    monkeypatch.setattr(fedkdx, "kd", lambda *args: factor[0] * usual(*args))
    before = a_round()
    (line,) = lines(capsys)
    assert "fedkdx.kd was replaced;" in line  # and nothing differs
    factor[0] = 2.0
    assert not same_state(before, a_round()) and lines(capsys) == []


def test_a_variable_that_an_edited_loss_looks_up_may_change_later(monkeypatch, capsys):
    monkeypatch.setattr(functional, "FACTOR", 1.0, raising=False)
    edit(monkeypatch, "return tau**2 * (log_target.exp()", "return FACTOR * tau**2 * (log_target.exp()")
    assert is_compiled(a_client()) and lines(capsys) == []
    functional.FACTOR = 2.0
    assert not is_compiled(a_client())
    (line,) = lines(capsys)
    assert "differs by" in line


def test_a_module_that_changes_at_every_step_is_not_compared_at_every_step(monkeypatch, capsys):
    monkeypatch.setattr(fedkdx, "STEPS", 0, raising=False)
    compared = []
    monkeypatch.setattr(
        twin,
        "difference",
        lambda *sides, difference=twin.difference, **more: compared.append(1) or difference(*sides, **more),
    )
    used = []
    for step in range(1000, 1000 + 3 * twin.TRIALS):
        fedkdx.STEPS = step
        used.append(is_compiled(a_client()))
    assert len(compared) == sum(used) == twin.TRIALS
    (line,) = lines(capsys)
    assert "changes again and again" in line


def test_defaults_and_code_that_are_changed_in_place_are_seen(monkeypatch, capsys):
    """As notebooks do that reload modules by themselves."""
    assert is_compiled(a_client())

    def doubled(log_learner, log_target, tau):
        return 2 * tau**2 * (log_target.exp() * (log_target - log_learner)).sum(1)

    monkeypatch.setattr(fedkdx.kd, "__code__", doubled.__code__)
    assert not is_compiled(a_client())
    (line,) = lines(capsys)
    assert "differs by" in line


def test_a_client_that_overrides_a_part_of_the_losses_gets_what_it_says(capsys):
    class Doubled(FedKDXClient):
        def distil(self, teacher, student, batch):
            return {name: 2 * loss for name, loss in super().distil(teacher, student, batch).items()}

    class Own(FedKDXClient):
        def distil(self, teacher, student, batch):
            return {"teacher": batch.cross_entropy(teacher.logits), "student": batch.cross_entropy(student.logits)}

    class Warmer(FedKDXClient):
        def _tau_ctl(self):
            return 2.0

    teacher, student, batch = a_batch()
    usual = a_client().distil(teacher, student, batch)
    doubled, own = (a_client(kind).distil(teacher, student, batch) for kind in (Doubled, Own))
    assert torch.equal(doubled["teacher"], 2 * usual["teacher"])
    assert torch.equal(own["student"], F.cross_entropy(student.logits, batch.y))
    warmer, expected = a_client(Warmer), a_client(tau_ctl=2.0)
    assert is_compiled(warmer) and not torch.equal(warmer.distil(teacher, student, batch)["teacher"], usual["teacher"])
    assert torch.equal(*(each.distil(teacher, student, batch)["teacher"] for each in (warmer, expected)))
    assert lines(capsys) == []


def test_a_client_that_has_its_own_way_replaced_runs_it(monkeypatch, capsys):
    monkeypatch.setattr(
        FedKDXClient, "distil", lambda self, t, s, b: {"teacher": t.logits.sum(), "student": s.logits.sum()}
    )
    teacher, student, batch = a_batch()
    assert torch.equal(a_client().distil(teacher, student, batch)["teacher"], teacher.logits.sum())


def test_cross_entropy_that_is_replaced_runs(monkeypatch, capsys):
    monkeypatch.setattr(F, "cross_entropy", functools.partial(F.cross_entropy, label_smoothing=0.1))
    assert not is_compiled(a_client()) and len(lines(capsys)) == 1


@pytest.mark.parametrize("error", [ValueError("no\nway"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_loss_comes_up_where_it_is_used(error, monkeypatch, capsys):
    def broken(*args):
        raise error

    monkeypatch.setattr(fedkdx, "kd", broken)
    with pytest.raises(type(error)):
        is_compiled(a_client())
    if isinstance(error, Exception):
        (line,) = lines(capsys)
        assert "cannot be compared (ValueError: no way)" in line


def test_what_is_random_is_left_as_it_was(monkeypatch):
    """The comparison draws numbers, and so does this loss."""
    usual = fedkdx.kd
    monkeypatch.setattr(fedkdx, "kd", lambda *args: usual(*args) + 0.1 * torch.rand(()))
    client, batch = a_client(), a_batch()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first = client.distil(*batch)["teacher"]  # compared before
        torch.manual_seed(7)
        second = client.distil(*batch)["teacher"]
    assert torch.equal(first, second)


@pytest.mark.parametrize("size", [3, 64, 128])
@pytest.mark.parametrize("classes", [2, 7, 40])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"use": ("kd",)},
        {"use": ("ctl",)},
        {"tau": 1e-3},
        {"tau": 50.0},
        {"tau_ctl": 0.01},
        {"gamma": 0.0},
        {"kd_weight": 1e3},
    ],
    ids=str,
)
def test_whatever_the_settings_the_compiled_losses_are_found_to_agree(params, classes, size, capsys):
    assert "Mutual" in str(a_client(**params).distil(*a_batch(classes=classes, size=size))["teacher"].grad_fn)
    assert lines(capsys) == []


def test_the_list_of_functions_is_that_of_the_paper():
    def own(module) -> set[str]:
        return {name for name, value in vars(module).items() if getattr(value, "__globals__", None) is vars(module)}

    assert own(fedkdx) - {"nkd_teacher_literal"} == set(compiled_losses.EQUATIONS)  # that one has no twin
    used = {name for name in own(functional) if getattr(fedkdx, name, None) is getattr(functional, name)}
    assert used == set(compiled_losses.SHARED)


def test_wrong_losses_and_steps_are_named_and_not_used(monkeypatch, capsys, tmp_path):
    """The gradient of KD, and the factor by which gradients are clipped."""
    edits = {
        "losses.c": ("p->plain[i] - is_true + kd", "p->plain[i] - is_true + 1.01 * kd"),
        "sgd.c": ("factor = bound /", "factor = 1.01 * bound /"),
    }
    wrong, right = wrong_library(tmp_path / "wrong", edits), a_round()
    monkeypatch.setattr(library, "_library", lambda: wrong)
    kept = a_round()
    said = lines(capsys)
    assert len(said) == 2 and "losses of FedKDX" in said[0] + said[1] and "clipping and SGD" in said[0] + said[1]
    assert not is_compiled(a_client()) and not isinstance(
        mover([list(nn.Linear(2, 2).parameters())], 0.1, 1.0), ClipAndMove
    )
    monkeypatch.setattr(library, "operations", lambda: None)
    assert same_state(kept, a_round()) and not same_state(kept, right)


@pytest.mark.parametrize(("module", "name"), [(compiled_losses, "mutual"), (compiled_losses.Mutual, "backward")])
def test_so_is_what_calls_the_library(module, name, monkeypatch, capsys):
    assert is_compiled(a_client())
    usual = getattr(module, name)

    def changed(*args):
        return tuple(1.01 * part if isinstance(part, Tensor) else part for part in usual(*args))

    monkeypatch.setattr(module, name, changed if name == "mutual" else staticmethod(changed))
    assert not is_compiled(a_client()) and len(lines(capsys)) == 1


def test_a_step_that_is_replaced_is_not_compiled(monkeypatch, capsys):
    parameters = list(nn.Linear(2, 2).parameters())
    assert ClipAndMove.takes(parameters) and lines(capsys) == []
    usual = sgd.clip_and_move
    monkeypatch.setattr(sgd, "clip_and_move", lambda groups, rate, bound: usual(groups, 0.99 * rate, bound))
    assert not ClipAndMove.takes(parameters)
    (line,) = lines(capsys)
    assert "sgd.clip_and_move was replaced" in line and "differs by" in line


@pytest.mark.parametrize("bound", [0.0, 0.5, 100.0])
def test_the_step_it_stands_for_is_pytorchs(bound):
    """In float64, with a parameter that no loss has felt."""
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 3, generator=rng, dtype=torch.float64) for _ in range(3)]
    groups = [[nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    for group in groups:
        for parameter, value in zip(group[:2], values, strict=False):
            parameter.grad = 2 * value
    sgd.clip_and_move(groups[:1], 0.3, bound)()
    if bound:
        nn.utils.clip_grad_norm_(groups[1], bound)
    torch.optim.SGD(groups[1], lr=0.3).step()
    for one, other in zip(*groups, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-15, atol=1e-15)
        assert one.grad is None
    assert torch.equal(groups[0][2], values[2]) and not torch.equal(groups[0][0], values[0])


def in_processes() -> dict[str, Tensor]:
    torch.set_num_threads(2)
    return a_round(backend="parallel", join_ratio=1.0)


def test_what_workers_find_out_is_said_once(monkeypatch, capfd):
    usual = fedkdx.kd
    monkeypatch.setattr(fedkdx, "kd", lambda *args: 2 * usual(*args))
    for _ in range(2):
        in_processes()
    (line,) = capfd.readouterr().err.splitlines()
    assert "fedkdx.kd was replaced" in line


def test_workers_do_not_compare_what_their_parent_has_compared(monkeypatch, capfd):
    expected = a_round(join_ratio=1.0)
    monkeypatch.setattr(twin, "_found", lambda reasons: ["compared once more"])
    assert same_state(in_processes(), expected)
    assert capfd.readouterr().err == ""


def test_the_bound_is_its_formula():
    assert twin.roundoff(256) == 4 * 16 * 2.0**-24


def test_rounding_moves_each_result_and_gradient_by_no_more_than_its_size():
    x = torch.arange(1.0, 1001.0, dtype=torch.float64, requires_grad=True)
    with twin.Rounding(1e-3):
        y = torch.mul(x, 3)
        places = torch.topk(y, 5).indices
    off = (y / (3 * x) - 1).abs()
    (by,) = torch.autograd.grad(y.sum(), x)
    assert 0.9e-3 < off.max() <= 1.0001e-3 and 0.3e-3 < off.mean() < 0.7e-3
    torch.testing.assert_close(by, (y / x).detach(), rtol=1e-12, atol=0)
    assert places.dtype == torch.int64
    assert torch.equal(torch.mul(x, 3), 3 * x)


def test_what_differs_by_less_than_rounding_agrees_and_by_more_does_not():
    """A sum of products, as whose reference the same in float64 stands."""
    rows = [twin.random(50, 256, seed=seed) for seed in range(2)]

    def side(dtype: torch.dtype, factor: float = 1.0, dim: int = 1) -> twin.Side:
        one, other = (each.to(dtype).requires_grad_() for each in rows)
        return twin.Side(lambda: {"the sum": factor * (one * other).sum(dim)}, {"one": one, "the other": other})

    exact, terms = side(torch.float64), 256
    assert twin.difference(exact, side(torch.float32), terms) == []
    assert twin.difference(exact, side(torch.float32, 1 + twin.roundoff(terms) / 2), terms) == []
    assert twin.difference(exact, side(torch.float32, 1.001), terms) == ["the sum differs by 0.1 %"]
    (differs,) = twin.difference(exact, side(torch.float32, torch.nan), terms)
    assert "nan" in differs
    with pytest.raises(RuntimeError, match="size"):
        twin.difference(exact, side(torch.float32, dim=0), terms)
