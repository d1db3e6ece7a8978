"""Trial of whether stacked training gives the results of training alone, which code inspection cannot show."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkdx_plugin.engine.backends.stacked.losses import Losses
from fedkdx_plugin.engine.backends.stacked.plan import Plan, Ready
from fedkdx_plugin.engine.backends.stacked.state import State
from fedkdx_plugin.engine.backends.stacked.step import Step
from fedkdx_plugin.engine.randomness import seeded
from fedkdx_plugin.engine.steps import Steps
from fedkdx_plugin.engine.training import windows_of
from registry import contract
from registry.interface import Client, Model, copy_state, float_state

ROWS = 8  # rows of a trial batch: few, so that a padding row has much weight
STEPS = 2
CLIENTS = 2
RATE = 1e-2  # learning rate of the trial: small, so that rounding errors do not grow between the steps
# Accepted relative differences, of losses and logits, and of changes of state. The first come from rounding alone; the
# second, in types of few digits, also from decisions of ReLU or pooling that rounding changes. A wrong row is one of 9.
TOLERANCES = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-4, 1e-2)}
COARSE = (3e-2, 3e-2)  # for types of fewer digits


def disagreement(
    nets: Mapping[str, nn.Module], losses: Losses, group: Sequence[Ready], state: State, clip: float
) -> str | None:
    """Compare two steps and an evaluation of two clients, stacked and alone.

    Both use the dtype, memory layout and device of training, on a few windows of each client and padding rows.

    Args:
        nets: the networks as the algorithm built them; not changed.
        losses: the stacked losses.
        group: clients that are to be stacked.
        state: state of all working clients; not changed.
        clip: bound on each network's gradient norm.

    Returns:
        the difference or the error in words; '' if there is none; None if no client has a finite loss, so that nothing
        can be compared.

    Raises:
        torch.cuda.OutOfMemoryError: there is no room for the trial.
    """
    try:
        with seeded(0, "trial"), _full_precision():
            return _try(copy.deepcopy(dict(nets)), losses, group, state, clip)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # vmap, a layer, a loss or a kernel may raise anything
        return in_words(error)


def in_words(error: BaseException) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Trial(NamedTuple):
    """A client's trial: its input, and its result without stacking.

    Attributes:
        ready: the client with a few windows, and its place in the trial's state.
        start, end: its state before and after.
        loss: mean of its losses.
    """

    ready: Ready
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    loss: Tensor


def _try(
    nets: Mapping[str, nn.Module], losses: Losses, group: Sequence[Ready], state: State, clip: float
) -> str | None:
    trials: list[_Trial] = []
    places: list[int] = []
    for one in group:
        own = _shortened(one, ROWS - len(trials), len(trials))
        start = {name: tensor.clone() for name, tensor in losses.arrangement.row(state, one.place).items()}
        loss, end = _alone(nets, own, start, clip)
        if all(tensor.isfinite().all() for tensor in (loss, *end.values())):
            trials.append(_Trial(own, start, end, loss))
            places.append(one.place)
        if len(trials) == CLIENTS:
            break
    if not trials:
        return None
    chosen = torch.tensor(places, device=state.tensors[0].device)
    together = State(*(tuple(tensor[chosen] for tensor in part) for part in state))
    ready = [trial.ready for trial in trials]
    rows = [len(windows_of(one.client).y) for one in ready]
    plan = _plan(rows, _trained_in_trial(ready[0].client))
    step = Step(losses, len(ready), STEPS, plan, sum(rows), ready[0], clip)
    return _compare(nets, losses, trials, step.train(ready, plan, together), together)


def _shortened(one: Ready, rows: int, place: int) -> Ready:
    client = copy.copy(one.client)
    client.data, client.learning_rate = windows_of(client).rows(slice(rows)), RATE
    return Ready(client, one.context, place)


def _trained_in_trial(client: Client) -> list[tuple[str, ...]]:
    """Return what is trained in each step of the trial, which are as many epochs."""
    return [contract.trains(client, step, STEPS) for step in range(STEPS)]


def _plan(rows: Sequence[int], trains: Sequence[tuple[str, ...]]) -> Plan:
    """Plan the same batch of each client for every step, with at least one padding row."""
    index = torch.zeros(len(rows), STEPS, max(rows) + 1, dtype=torch.int64)
    start = 0
    for place, count in enumerate(rows):
        index[place] = start
        index[place, :, :count] += torch.arange(count)
        start += count
    patterns = tuple(sorted(set(trains)))
    phase = torch.tensor([patterns.index(pattern) for pattern in trains]).expand(len(rows), -1)
    no_keys = torch.zeros(len(rows), 0, dtype=torch.int64)
    return Plan(index, torch.tensor(rows).unsqueeze(1).expand(-1, STEPS), patterns, phase, no_keys)


def _alone(
    nets: Mapping[str, nn.Module], one: Ready, start: Mapping[str, Tensor], clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Train a client alone; return the mean loss of the steps, and the state after them."""
    copy_state(nets, start)
    steps = Steps(one.client, nets, one.context, clip)
    losses = [steps.take(windows_of(one.client), steps.still(patterns)) for patterns in _trained_in_trial(one.client)]
    return torch.stack(losses).mean(), {name: tensor.clone() for name, tensor in float_state(nets).items()}


def _compare(
    nets: Mapping[str, nn.Module], losses: Losses, trials: Sequence[_Trial], found: Tensor, together: State
) -> str:
    for trial, loss in zip(trials, found, strict=True):
        if not _close(loss, trial.loss):
            return f"its losses come out as {float(loss):.6g}, not {float(trial.loss):.6g}"
        for name, own in losses.arrangement.row(together, trial.ready.place).items():
            rounding = torch.finfo(own.dtype).eps * STEPS * torch.linalg.vector_norm(own)
            if not _close(own - trial.start[name], trial.end[name] - trial.start[name], rounding, moved=True):
                return f"'{name}' comes out different"
    for net, module in nets.items():
        if isinstance(module, Model):
            reason = _compare_logits(net, module, losses, trials)
            if reason:
                return reason
    return ""


@torch.no_grad()
def _compare_logits(net: str, module: Model, losses: Losses, trials: Sequence[_Trial]) -> str:
    """Compare evaluations of the clients' trained networks, with padding rows; return the difference or ''."""
    names = list(float_state({net: module}))
    states = {name: torch.stack([trial.end[name] for trial in trials]) for name in names}
    windows = [windows_of(trial.ready.client).x for trial in trials]
    width = 1 + max(map(len, windows))
    x = torch.stack([torch.cat([own, own[:1].expand(width - len(own), -1, -1, -1)]) for own in windows])
    mask = torch.stack([torch.arange(width, device=x.device) < len(own) for own in windows])
    found = losses.logits(net, states, x, mask)
    module.eval()
    for trial, own, logits in zip(trials, windows, found, strict=True):
        copy_state({net: module}, {name: trial.end[name] for name in names})
        if not _close(logits[: len(own)], module(own).logits):
            return f"in evaluation, logits of network '{net}' come out different"
    return ""


def _close(found: Tensor, expected: Tensor, rounding: Tensor | float = 0.0, moved: bool = False) -> bool:
    """Return whether the difference is small relative to `expected`, or in absolute terms if that is almost 0."""
    tolerance = TOLERANCES.get(expected.dtype, COARSE)[moved]
    scale = torch.linalg.vector_norm(expected.double()).clamp(min=tolerance * torch.finfo(expected.dtype).eps ** 0.5)
    return bool(torch.linalg.vector_norm((found - expected).double()) <= tolerance * scale + rounding)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Disable TF32, which `--precision tf32` allows: it would need another tolerance."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
