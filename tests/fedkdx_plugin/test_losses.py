"""Each loss against its formula in NumPy float64, its gradients, and what must hold whatever the numbers."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedkdx_plugin.algorithm import fedkdx
from fedkdx_plugin.algorithm.fedkdx import contrastive
from registry import functional
from tests.bounds import gamma

N, C, TAU, GAMMA = 5, 4, 0.8, 0.9


def kd(z_learner, z_target, tau):
    return functional.kd(functional.soften(z_learner, tau), functional.soften(z_target, tau), tau)


def nkd(z_learner, z_target, y, gamma, tau):
    return fedkdx.nkd(*_both_apart(z_learner, z_target, y, tau), gamma, tau)


def nkd_teacher_literal(z_teacher, z_student, y, gamma, tau):
    return fedkdx.nkd_teacher_literal(*_both_apart(z_teacher, z_student, y, tau), gamma, tau)


def _both_apart(z_one, z_other, y, tau):
    return [fedkdx.apart(functional.soften(z, tau), y) for z in (z_one, z_other)]


def random(*shape, seed=0, **options):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), **options)


def logits(classes=C, spread=3.0):
    y = torch.arange(N) % classes
    return spread * random(N, classes, seed=1), spread * random(N, classes, seed=2), y


def softened(z, tau):
    e = np.exp(z / tau)
    return e / e.sum()


def kd_by_formula(z_learner, z_target, tau):
    p, q = softened(z_target, tau), softened(z_learner, tau)
    return tau**2 * sum(p[c] * np.log(p[c] / q[c]) for c in range(len(p)))


def nkd_by_formula(z_teacher, z_student, true, gamma, tau):
    p_t, p_s = softened(z_teacher, tau), softened(z_student, tau)
    others = [c for c in range(len(p_t)) if c != true]
    second = 0.0
    for c in others:
        n_t = p_t[c] / sum(p_t[k] for k in others)
        n_s = p_s[c] / sum(p_s[k] for k in others)
        second += n_t * np.log(n_s)
    return -(1 - gamma) * p_t[true] * np.log(p_s[true]) - gamma * tau**2 * second


def contrastive_by_formula(h_teacher, h_student, tau):
    def e(i, j):
        a, b = h_teacher[i], h_student[j]
        return np.exp(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) / tau)

    n = len(h_teacher)
    return [-np.log(e(i, i) / sum(e(i, j) for j in range(n))) for i in range(n)]


def off(z):
    """How far a log p of softened logits may be off: a difference of numbers up to |z| / τ, rounded some times."""
    return gamma(8, torch.float64) * (2 * float(z.abs().max()) / TAU + 2)


@pytest.mark.parametrize("tau", [0.8, 3.0])
def test_kd_is_its_formula(tau):
    learner, target, _ = logits()
    expected = [kd_by_formula(a, b, tau) for a, b in zip(learner.numpy(), target.numpy(), strict=True)]
    np.testing.assert_allclose(kd(learner, target, tau), expected, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize(("gamma", "tau"), [(0.9, 0.8), (0.0, 1.0), (1.0, 2.0)])
def test_nkd_is_equation_8(classes, gamma, tau):
    learner, target, y = logits(classes)
    teacher_side = zip(target.numpy(), learner.numpy(), y.tolist(), strict=True)
    expected = [nkd_by_formula(t, s, c, gamma, tau) for t, s, c in teacher_side]
    np.testing.assert_allclose(nkd(learner, target, y, gamma, tau), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(nkd_teacher_literal(target, learner, y, gamma, tau), expected, rtol=1e-12, atol=1e-15)


def test_contrastive_is_equation_7():
    teacher, student = random(6, 8, seed=3), random(6, 8, seed=4)
    expected = contrastive_by_formula(teacher.numpy(), student.numpy(), TAU)
    np.testing.assert_allclose(contrastive(teacher, student, TAU), expected, rtol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_gradients_are_those_of_the_values(classes):
    learner, target, y = logits(classes, spread=1.0)
    learner.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd(z, target, TAU), learner)
    assert torch.autograd.gradcheck(lambda z: nkd(z, target, y, GAMMA, TAU), learner)
    assert torch.autograd.gradcheck(lambda z: nkd_teacher_literal(z, target, y, GAMMA, TAU), learner)
    teacher, student = random(N, 3, seed=5, requires_grad=True), random(N, 3, seed=6, requires_grad=True)
    mask = torch.arange(N) != 2
    assert torch.autograd.gradcheck(lambda a, b: contrastive(a, b, TAU, mask), (teacher, student))


@pytest.mark.parametrize("loss", [kd, nkd, nkd_teacher_literal])
def test_the_learner_gets_a_gradient_and_the_fixed_side_none(loss):
    learner, target, y = logits()
    learner.requires_grad_()
    target.requires_grad_()
    arguments = (TAU,) if loss is kd else (y, GAMMA, TAU)
    loss(learner, target, *arguments).sum().backward()
    assert learner.grad.abs().min() > 0
    assert target.grad is None


def test_one_contrastive_loss_gives_each_side_the_gradient_of_its_own():
    def pair():
        return random(N, 3, seed=5, requires_grad=True), random(N, 3, seed=6, requires_grad=True)

    both, teacher_only, student_only = pair(), pair(), pair()
    contrastive(*both, TAU).mean().backward()
    contrastive(teacher_only[0], teacher_only[1].detach(), TAU).mean().backward()
    contrastive(student_only[0].detach(), student_only[1], TAU).mean().backward()
    assert torch.equal(both[0].grad, teacher_only[0].grad) and both[0].grad.abs().sum() > 0
    assert torch.equal(both[1].grad, student_only[1].grad) and both[1].grad.abs().sum() > 0


def test_kd_is_zero_where_predictions_agree_and_positive_elsewhere():
    learner, target, _ = logits()
    assert kd(target + 7, target, TAU).abs().max() <= TAU**2 * 2 * off(target + 7)
    assert kd(learner, target, TAU).min() > 1e-3


def test_nkd_of_the_other_classes_is_least_where_they_agree():
    learner, target, y = logits()
    agreeing = target.scatter_add(1, y[:, None], random(N, 1, seed=8))  # whatever the true class gets
    agreeing.requires_grad_()
    least = nkd(agreeing, target, y, 1.0, TAU)
    least.sum().backward()
    assert agreeing.grad.abs().max() <= TAU * 2 * off(agreeing.detach())  # γ τ (N(p) - N(q))
    assert (nkd(learner, target, y, 1.0, TAU) > least + 1e-3).all()


def test_losses_do_not_see_shifts_of_logits_nor_scales_of_features():
    learner, target, y = logits()
    for loss, arguments in ((kd, (TAU,)), (nkd, (y, GAMMA, TAU)), (nkd_teacher_literal, (y, GAMMA, TAU))):
        shifted = loss(learner + random(N, 1, seed=7), target - 3, *arguments)
        torch.testing.assert_close(shifted, loss(learner, target, *arguments), rtol=1e-10, atol=1e-12)
    scaled = contrastive(learner * 10, target * 0.1, TAU)
    torch.testing.assert_close(scaled, contrastive(learner, target, TAU), rtol=1e-10, atol=1e-12)


def test_order_of_samples_and_classes_does_not_matter():
    learner, target, y = logits()
    samples, classes = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    place = classes.argsort()
    for loss in (nkd, nkd_teacher_literal):
        plain = loss(learner, target, y, GAMMA, TAU)
        torch.testing.assert_close(loss(learner[samples], target[samples], y[samples], GAMMA, TAU), plain[samples])
        torch.testing.assert_close(loss(learner[:, classes], target[:, classes], place[y], GAMMA, TAU), plain)
    torch.testing.assert_close(kd(learner[samples], target[samples], TAU), kd(learner, target, TAU)[samples])
    torch.testing.assert_close(kd(learner[:, classes], target[:, classes], TAU), kd(learner, target, TAU))
    moved = contrastive(learner[samples], target[samples], TAU)
    torch.testing.assert_close(moved, contrastive(learner, target, TAU)[samples])


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_extreme_logits_stay_finite(classes, size):
    y = torch.arange(N) % classes
    extreme = (size * F.one_hot((y + 1) % classes, classes)).float()
    sure = (abs(size) * F.one_hot(y, classes)).float()
    for learner, target in ((extreme, sure), (sure, extreme), (sure, sure)):
        for loss, arguments in ((kd, (TAU,)), (nkd, (y, GAMMA, TAU)), (nkd_teacher_literal, (y, GAMMA, TAU))):
            z = learner.clone().requires_grad_()
            value = loss(z, target, *arguments)
            value.sum().backward()
            assert value.isfinite().all() and z.grad.isfinite().all(), loss.__name__


def test_two_classes_leave_only_the_first_term():
    learner, target, y = logits(classes=2)
    learner.requires_grad_()
    value = nkd(learner, target, y, 1.0, TAU)
    value.sum().backward()
    assert torch.equal(value, torch.zeros_like(value)) and torch.equal(learner.grad, torch.zeros_like(learner))


def test_the_literal_reading_lowers_the_teachers_true_class_and_the_mutual_one_raises_it():
    teacher, student, y = logits()
    gradients = {}
    for loss in (nkd, nkd_teacher_literal):
        z = teacher.clone().requires_grad_()
        loss(z, student, y, GAMMA, TAU).sum().backward()
        gradients[loss] = z.grad.gather(1, y[:, None])
    assert (gradients[nkd_teacher_literal] > 0).all()  # a descent step goes the other way
    assert (gradients[nkd] < 0).all()


def test_padding_rows_are_no_negatives_and_have_no_value():
    teacher, student = random(6, 8, seed=3), random(6, 8, seed=4)
    mask = torch.tensor([True, True, False, True, False, True])
    junk = torch.where(mask[:, None], teacher, 0), torch.where(mask[:, None], student, 99.0)
    a, b = (side.clone().requires_grad_() for side in junk)
    value = contrastive(a, b, TAU, mask)
    value.sum().backward()
    torch.testing.assert_close(value[mask], contrastive(teacher[mask], student[mask], TAU))
    assert torch.equal(value[~mask], torch.zeros(2, dtype=torch.float64))
    assert a.grad[~mask].abs().max() == 0 and b.grad[~mask].abs().max() == 0 and b.grad[mask].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_features_and_no_real_rows_stay_finite(dtype):
    for mask in (None, torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, False, False])):
        teacher = random(4, 3).to(dtype).requires_grad_()
        silent = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
        value = contrastive(teacher, silent, TAU, mask)
        value.sum().backward()
        expected = torch.full((4,), np.log(4), dtype=dtype) if mask is None else torch.zeros(4, dtype=dtype)
        torch.testing.assert_close(value, expected)
        assert teacher.grad.isfinite().all() and torch.equal(silent.grad, torch.zeros_like(silent))
