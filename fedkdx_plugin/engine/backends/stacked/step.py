"""One training step of several clients: fixed shapes, static tensors, nothing fetched from the device.

Every step of a round has the same shapes: all clients, the full width of a batch, a mask for padding rows. A client
that has no batch left has an empty mask: its parameters and statistics stay. So a step can be captured once as a CUDA
graph and replayed for all steps of all rounds.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedkdx_plugin.engine import precision
from fedkdx_plugin.engine.augmentation import Augmenter
from fedkdx_plugin.engine.backends.stacked.losses import Losses
from fedkdx_plugin.engine.backends.stacked.plan import Plan, Ready
from fedkdx_plugin.engine.backends.stacked.state import State
from fedkdx_plugin.engine.optimizers import NUMBERS, SGD, step
from fedkdx_plugin.engine.training import windows_of
from fedkdx_plugin.native.library import cache_folder
from registry import contract
from registry.interface import Batch, moves_by_sgd

EAGER, GRAPH, COMPILED = "operation by operation", "as a CUDA graph", "compiled, as a CUDA graph"
WARM_UPS = 3  # runs before a capture, in which CUDA's libraries initialise
# Fewest operations of a whole run for which compiling pays. On an H100 it took 16 to 23 s and then saved 1.7 µs
# an operation: 1.03 ms of a step of 600, 0.37 ms of one of 205.
COMPILE_FROM = 10_000_000
TOLERANCE = 1e-2  # relative difference of a step's results by graph and by operation; errors are far larger

Numbers = tuple[tuple[Tensor, ...], ...]  # of an optimiser, for each group of networks
Moved = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Numbers, Tensor]


class Step:
    """Static tensors of a training step, and ways to run it.

    Args:
        losses: the stacked losses.
        clients: number of clients it trains at once; if fewer are loaded, the other places have no effect.
        steps: largest number of steps of a round.
        plan: a round's batches; the width of a batch, whether there are padding rows, and the sets of parameters that
            are trained in some step are the same in all rounds for which the step is used.
        windows: largest number of training windows of all clients together.
        one: a client, for shapes and dtypes of windows and context.
        clip_norm: bound on each network's gradient norm; 0: none.
        way: EAGER, GRAPH or COMPILED.
        optimizer: how parameters move, unless the clients say so themselves.
        augmenter: what augments the windows; None: nothing does.
        mixed: whether losses are computed in mixed precision (see `engine.precision`).
    """

    def __init__(
        self,
        losses: Losses,
        clients: int,
        steps: int,
        plan: Plan,
        windows: int,
        one: Ready,
        clip_norm: float,
        way: str = EAGER,
        optimizer: str = SGD,
        augmenter: Augmenter | None = None,
        mixed: bool = False,
    ) -> None:
        own = windows_of(one.client)
        x, y, weights = own.x, own.y, own.weights
        self.losses, self.masked, self.clip_norm, self.way = losses, plan.masked, clip_norm, way
        self.optimizer = optimizer if moves_by_sgd(type(one.client)) else None
        width = plan.index.shape[2]
        self.state = losses.arrangement.empty(clients, x.new_empty((), dtype=_type(losses)))
        numbers = NUMBERS[optimizer] if self.optimizer else 0
        self.numbers = tuple(tuple(torch.zeros_like(t) for _ in range(numbers)) for t in self.state.trained)
        self.context = {name: t.detach().new_zeros(clients, *t.shape) for name, t in one.context.items()}
        self.windows, self.labels = x.new_zeros(windows, *x.shape[1:]), y.new_zeros(windows)
        self.weights = None if weights is None else weights.new_zeros(clients, len(weights))
        self.index = y.new_zeros(clients, steps, width)
        self.rows, self.phase = y.new_zeros(clients, steps), y.new_zeros(clients, steps)
        self._trains = None if plan.patterns == (("*",),) else losses.arrangement.matching(plan.patterns, x)
        self.augmenter, self.repeats, self.mixed = augmenter, contract.repeats(one.client), mixed
        self.keys = y.new_zeros(clients, plan.keys.shape[1])
        self.at = y.new_zeros(1)
        self.rates, self.total = x.new_zeros(clients), x.new_zeros(clients)
        self._places = torch.arange(width, device=y.device)
        self._move: Callable[..., Moved] = Step._moved  # of the class, as a bound method would keep the step alive
        self._graph: torch.cuda.CUDAGraph | None = None

    def train(self, ready: Sequence[Ready], plan: Plan, state: State) -> Tensor:
        """Train clients for a round.

        Args:
            ready: the clients.
            plan: their batches.
            state: state of all working clients; the rows of `ready` are read, and written at the end.

        Returns:
            for each client the mean over the round's windows of its summed losses, (clients,).
        """
        count, steps = plan.rows.shape
        places = torch.tensor([one.place for one in ready], device=self.at.device)
        self.load(ready, plan, state, places)
        for _ in range(steps):
            self.run()
        for own, theirs in zip(self.state.tensors, state.tensors, strict=True):
            theirs.index_copy_(0, places, own[:count])
        return self.total[:count] / self.rows[:count].sum(1)

    def load(self, ready: Sequence[Ready], plan: Plan, state: State, places: Tensor) -> None:
        """Load a round's clients, from their places in `state`, and their batches."""
        count, steps = plan.rows.shape
        for own, theirs in zip(self.state.tensors, state.tensors, strict=True):
            own[:count].copy_(theirs[places])
        for name, own in self.context.items():
            own[:count].copy_(torch.stack([one.context[name] for one in ready]))
        windows = [windows_of(one.client) for one in ready]
        ends = sum(len(own.y) for own in windows)
        self.windows[:ends].copy_(torch.cat([own.x for own in windows]))
        self.labels[:ends].copy_(torch.cat([own.y for own in windows]))
        if self.weights is not None:
            self.weights[:count].copy_(torch.stack([own.weights for own in windows if own.weights is not None]))
        self.index[:count, :steps].copy_(plan.index)
        self.keys[:count].copy_(plan.keys)
        self.rows.zero_()
        self.rows[:count, :steps].copy_(plan.rows)
        self.phase[:count, :steps].copy_(plan.phase)
        self.rates[:count].copy_(torch.tensor([one.client.learning_rate for one in ready], dtype=self.rates.dtype))
        for tensor in (self.at, self.total, *itertools.chain(*self.numbers)):
            tensor.zero_()

    def run(self) -> None:
        """Make the next step of the loaded round. Raises RuntimeError if a graph's results differ from the step's."""
        if self.way != EAGER and self._graph is None:
            with torch.cuda.device(self.at.device):  # a stream, and a graph, are of the current one
                self._capture()
        if self._graph is None:
            self.once()
        else:
            self._graph.replay()

    @torch.no_grad()
    def once(self) -> None:
        """Make the next step operation by operation."""
        rows = self.rows.index_select(1, self.at).squeeze(1)
        index = self.index.index_select(1, self.at).squeeze(1)
        phase = self.phase.index_select(1, self.at).squeeze(1)
        windows, labels = self.windows[index], self.labels[index]
        moved = self._move(self, self.state, self.numbers, windows, labels, rows, phase, self.at)
        trained, other, numbers, losses = moved
        before = (*self.state.tensors, *itertools.chain(*self.numbers))
        for own, new in zip(before, (*trained, *other, *itertools.chain(*numbers)), strict=True):
            own.copy_(new)
        self.total += losses
        self.at += 1

    def _moved(
        self, state: State, numbers: Numbers, x: Tensor, y: Tensor, rows: Tensor, phase: Tensor, at: Tensor
    ) -> Moved:
        """Return state and the optimiser's numbers after a step, and losses times numbers of rows, (clients,)."""
        mask = self._places < rows.unsqueeze(1) if self.masked else None
        if self.augmenter is not None:
            x = self.augmenter(x, self.keys, at // self.repeats)
        gradients_of = torch.func.grad(self._loss, has_aux=True)
        batch = Batch(x, y, mask, self.weights)
        gradients, (losses, other) = gradients_of(state.trained, state.other, batch, self.context)
        moving: tuple[Tensor | None, ...] = (None,) * len(gradients)
        if self._trains is not None:
            chosen = tuple(trains.index_select(0, phase) for trains in self._trains)
            gradients = tuple(torch.where(own, g, 0) for own, g in zip(chosen, gradients, strict=True))
            moving = chosen
        active = rows > 0
        by_client = active.view(-1, 1, 1)
        after, numbers = self._after(state.trained, gradients, numbers, moving, at)
        trained = tuple(torch.where(by_client, new, own) for own, new in zip(state.trained, after, strict=True))
        # of several steps on a batch the first alone moves running statistics, as in `Steps.take`
        first = by_client & (at % self.repeats == 0) if self.repeats > 1 else by_client
        other = tuple(torch.where(first, new, own) for own, new in zip(state.other, other, strict=True))
        return trained, other, numbers, torch.where(active, losses, 0) * rows

    def _after(
        self,
        trained: tuple[Tensor, ...],
        gradients: tuple[Tensor, ...],
        numbers: Numbers,
        moving: tuple[Tensor | None, ...],
        at: Tensor,
    ) -> tuple[Sequence[Tensor], Numbers]:
        """Return the parameters after a step, each (clients, networks, values), and the optimiser's numbers."""
        if self.optimizer == SGD:
            pairs = zip(trained, gradients, strict=True)
            return [own - bounded(gradient, self.rates, self.clip_norm) for own, gradient in pairs], numbers
        clipped = [bounded(gradient, torch.ones_like(self.rates), self.clip_norm) for gradient in gradients]
        if self.optimizer is None:
            return self.losses.updated(trained, clipped, self.rates, at.squeeze(0), self.context), numbers
        rates = self.rates.view(-1, 1, 1)
        results = [
            step(self.optimizer, own, gradient, kept, rates, chosen)
            for own, gradient, kept, chosen in zip(trained, clipped, numbers, moving, strict=True)
        ]
        return [own for own, _ in results], tuple(kept for _, kept in results)

    def _loss(
        self, trained: tuple[Tensor, ...], other: tuple[Tensor, ...], batch: Batch, context: Mapping[str, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, tuple[Tensor, ...]]]:
        other = tuple(tensor.clone() for tensor in other)  # running statistics are updated in place
        with precision.mixed(self.mixed, batch.x.device):
            losses = self.losses.of(State(trained, other), batch, context)
        return losses.sum(), (losses.detach(), other)

    def _capture(self) -> None:
        """Record the step as a CUDA graph and compare it with the step; afterwards restore all tensors."""
        before = [tensor.clone() for tensor in self._changed]
        self.once()
        expected = [tensor.clone() for tensor in self._changed]
        if self.way == COMPILED:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
            self._move = torch.compile(Step._moved, fullgraph=True, dynamic=False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._put_back(before)
                self.once()
        torch.cuda.current_stream().wait_stream(stream)
        self._put_back(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.once()
        self._put_back(before)
        graph.replay()
        differs = self._differs(expected, before)
        self._put_back(before)
        if differs:
            raise RuntimeError("its results are not those of the same step operation by operation")
        self._graph = graph

    def _differs(self, expected: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
        """Return whether the changed tensors differ by more than rounding; NaN and infinity are not compared."""
        for found, right, old in zip(self._changed, expected, before, strict=True):
            both = found.isfinite() & right.isfinite()
            off = torch.where(both, found - right, 0).double()
            moved = torch.where(both, right - old, 0).double()
            rounding = 1e-5 * torch.where(both, right, 0).double().norm()
            if (found.isfinite() != right.isfinite()).any() or off.norm() > TOLERANCE * moved.norm() + rounding:
                return True
        return False

    def operations(self) -> int:
        """Count the operations of a step, without views; all tensors are restored."""
        before = [tensor.clone() for tensor in self._changed]
        counted = _Counted()
        with counted:
            self.once()
        self._put_back(before)
        return counted.number

    @property
    def _changed(self) -> tuple[Tensor, ...]:
        return (*self.state.tensors, *itertools.chain(*self.numbers), self.total, self.at)

    def _put_back(self, before: Sequence[Tensor]) -> None:
        for own, old in zip(self._changed, before, strict=True):
            own.copy_(old)


class _Counted(TorchDispatchMode):
    """Counter of operations other than views, each of which has dispatch overhead on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch gives it none
        self.number = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not operation.is_view
        return operation(*args, **(kwargs or {}))


def bounded(gradient: Tensor, rates: Tensor, bound: float) -> Tensor:
    """Return the update: each network's gradient times its client's learning rate, clipped as `clip_grad_norm_` does.

    Args:
        gradient: (clients, networks, values).
        rates: (clients,).
        bound: bound on the norm of a network's gradient; 0: none.
    """
    rates = rates.view(-1, 1, 1)
    if bound > 0:
        norms = torch.linalg.vector_norm(gradient, dim=2, keepdim=True)
        rates = rates * (bound / (norms + 1e-6)).clamp(max=1)
    return gradient * rates


def _type(losses: Losses) -> torch.dtype:
    return next(tensor.dtype for net in losses.copies.values() for tensor in net.parameters())
