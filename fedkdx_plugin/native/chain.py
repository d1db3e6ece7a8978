"""Chains of layers as one operation."""

from __future__ import annotations

import copy
import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedkdx_plugin.native import library, twin
from registry.interface import Model, Output

VECTOR = 16  # numbers of inputs and filters are multiples of it, as in vectors.h
HELD = 1 << 24  # most values that a thread keeps for the next call, 64 MB
THREADS = 2  # most threads: with more, PyTorch's operations, which divide the work among them, may be faster
CONVOLUTION_BLOCK, FLATTEN, DENSE, DENSE_RELU = range(4)  # `enum kind` of chain.c
LAYER = struct.Struct("@4n2d7P")  # `struct layer` of chain.c
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)  # a chain would not call them
WINDOWS = 3  # windows on which both implementations are compared

# a module's own dictionary, as tensors are looked up at every step, and a name
Slot = tuple[Mapping[str, Tensor | None], str]


class Layer(NamedTuple):
    """A layer, or several that are computed as one.

    Attributes:
        kind: as in chain.c.
        inputs, outputs: numbers of channels, filters or neurons.
        taps: kernel size of a convolution.
        main: the convolution or linear layer.
        norm: batch norm of a block.
    """

    kind: int
    inputs: int
    outputs: int
    taps: int = 0
    main: nn.Module | None = None
    norm: nn.BatchNorm2d | None = None

    def parameters(self) -> list[Slot]:
        """Return the slots of the parameters, in the order of chain.c."""
        modules = [module for module in (self.main, self.norm) if module is not None]
        return [(module._parameters, name) for module in modules for name in ("weight", "bias")]

    def statistics(self) -> list[Slot]:
        """Return the slots of the statistics of a block's batch norm."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        return [] if self.norm is None else [(self.norm._buffers, name) for name in names]

    def shapes(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return the shapes of the parameters, and of the statistics."""
        weight, each = (self.outputs, self.inputs), (self.outputs,)
        if self.kind == CONVOLUTION_BLOCK:
            return [(*weight, 1, self.taps), each, each, each], [each, each, ()]
        return [] if self.main is None else [weight, each], []

    def packed(self, pointers: Sequence[int] = ()) -> bytes:
        """Return the bytes of `struct layer`, with tensors at these addresses."""
        rates = (0.0, 0.0) if self.norm is None else (self.norm.eps, self.norm.momentum)
        sizes = self.kind, self.inputs, self.outputs, self.taps
        return LAYER.pack(*sizes, *rates, *pointers, *[0] * (7 - len(pointers)))


class Layout(NamedTuple):
    """Sizes of a chain's results for windows of one shape.

    Attributes:
        n, time: number of windows and their samples.
        kept, scratch: numbers of values to allocate: until backward, and during either pass.
        shapes: shape of each layer's result.
    """

    n: int
    time: int
    kept: int
    scratch: int
    shapes: list[tuple[int, ...]]

    @staticmethod
    def of(layers: Sequence[Layer], shape: Sequence[int]) -> Layout | None:
        """Return the layout for windows of a shape; None if they do not fit."""
        n, inputs, *rest = shape
        flat = layers[0].kind != CONVOLUTION_BLOCK
        if n < 1 or (rest != [] if flat else len(rest) != 2 or rest[0] != 1):
            return None
        samples = time = 1 if flat else rest[1]
        shapes: list[tuple[int, ...]] = []
        for layer in layers:
            if layer.inputs != inputs:
                return None
            if layer.kind == CONVOLUTION_BLOCK:
                inputs, time = layer.outputs, (time - layer.taps + 1) // 2
                if time < 1:
                    return None
            else:
                inputs, time = (inputs * time if layer.kind == FLATTEN else layer.outputs), 1
            shapes.append((n, inputs, 1, time) if layer.kind == CONVOLUTION_BLOCK else (n, inputs))
        kept, scratch = ctypes.c_ssize_t(), ctypes.c_ssize_t()
        unset = b"".join(layer.packed() for layer in layers)
        library.required().chain_sizes(unset, len(layers), n, samples, ctypes.byref(kept), ctypes.byref(scratch))
        return Layout(n, samples, kept.value, scratch.value, shapes)


class Chained(torch.autograd.Function):
    """The layers of a chain, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: bytes, layout: Layout, inner: int, *parameters: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Compute the results of layer `inner` (-1: of none) and of the last one, and update running statistics.

        `packed` are the layers, `parameters` all of theirs.
        """
        x, count = _laid_out(x), len(packed) // LAYER.size
        kept, scratch, out = x.new_empty(layout.kept), _scratch(layout.scratch), _empty(x, layout.shapes[-1])
        between = None if inner < 0 else _empty(x, layout.shapes[inner])
        library.required().chain_forward(
            *(packed, count, x.data_ptr(), layout.n, layout.time),
            *(kept.data_ptr(), scratch.data_ptr()),
            *(inner, _place(between), out.data_ptr()),
        )
        ctx.save_for_backward(x, kept, between, out, *parameters)
        ctx.set_materialize_grads(False)
        ctx.rest = packed, count, layout, inner
        return between, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_inner: Tensor | None, by_out: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients by the windows, where needed, and by all parameters."""
        x, kept, between, out, *parameters = ctx.saved_tensors
        packed, count, layout, inner = ctx.rest
        scratch, by_out = _scratch(layout.scratch), torch.zeros_like(out) if by_out is None else _laid_out(by_out)
        by_inner = None if by_inner is None else _laid_out(by_inner)
        by_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        by = [torch.empty_like(parameter) for parameter in parameters]
        library.required().chain_backward(
            *(packed, count, x.data_ptr(), layout.n, layout.time),
            *(kept.data_ptr(), scratch.data_ptr()),
            *(inner, _place(between), _place(by_inner), out.data_ptr(), by_out.data_ptr()),
            *(struct.pack(f"@{len(by)}P", *[tensor.data_ptr() for tensor in by]), _place(by_x)),
        )
        return by_x, None, None, None, *by


_own = threading.local()


def _casts() -> bool:
    """Return whether autocast would give PyTorch's operations other types."""
    try:
        return bool(torch.is_autocast_enabled("cpu"))
    except TypeError:  # before PyTorch 2.4
        return bool(torch.is_autocast_cpu_enabled())


def _scratch(values: int) -> Tensor:
    """Return memory for at least so many values, for one call; small memory is reused, as it is in the cache."""
    if values > HELD:
        return torch.empty(values, dtype=torch.float32)
    if not hasattr(_own, "scratch") or len(_own.scratch) < values:
        _own.scratch = torch.empty(values, dtype=torch.float32)
    scratch: Tensor = _own.scratch
    return scratch


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def _laid_out(tensor: Tensor) -> Tensor:
    """Return a tensor without gaps in memory, channels innermost."""
    return tensor.contiguous(memory_format=_format(tensor))


def _empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an empty tensor with the dtype of x and channels innermost."""
    if len(shape) == 2:
        return x.new_empty(shape)
    _, channels, _, time = shape
    return x.new_empty_strided(shape, (time * channels, 1, time * channels, channels))


class Plan(NamedTuple):
    """Computation of a chain.

    Attributes:
        layers: the layers, in order.
        inner: index of the layer whose result is returned besides the last one's; -1: none.
    """

    layers: list[Layer]
    inner: int = -1


class Chain:
    """Replacement of a module's method, used when its layers are trained in float32 on a CPU.

    It follows the method of the module's class at every call: if layers were replaced or changed, the plan is made
    again, and if functions were replaced, both implementations are compared again (`twin`).

    Args:
        module: the module.
        name: name of the method.
        plan: returns the layers that the method applies; None if they are no chain.
    """

    def __init__(self, module: nn.Module, name: str, plan: Callable[[nn.Module], Plan | None]) -> None:
        self.module, self.name, self.plan = module, name, plan
        self._attributes: list[dict[str, Any]] = []  # attributes and submodules of all modules
        self._as_planned: list[dict[str, Any]] = []  # copies of them when the plan was made
        self._functions: list[Any] = []  # at the last comparison
        self._agrees: dict[torch.Size, bool] = {}  # by the shape of a window

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        return Chain(copy.deepcopy(self.module, memo), self.name, self.plan)

    def __call__(self, x: Tensor) -> Any:
        """Apply the layers, or call the method where they cannot replace it."""
        method, prepared = getattr(type(self.module), self.name), self._prepared(x)
        if prepared is None:
            return method(self.module, x)
        if self._may_stand(x):
            return self._run(x, *prepared)
        with library.left_out():  # also in modules that the method calls
            return method(self.module, x)

    def _run(self, x: Tensor, packed: bytes, layout: Layout, parameters: Sequence[Tensor | None]) -> Any:
        inputs = (x, packed, layout, self.inner, *parameters)
        between, out = Chained.apply(*inputs)  # type: ignore[no-untyped-call]  # PyTorch gives it none
        return out if between is None else Output(between, out)

    def _prepared(self, x: Tensor) -> tuple[bytes, Layout, Sequence[Tensor | None]] | None:
        """Return the arguments of the operation; None if PyTorch's operations are to be used."""
        if not self.module.training or library.operations() is None or torch.get_num_threads() > THREADS:
            return None
        self._look()
        layout = self._layout(x)
        if layout is None:
            return None
        parameters = [held.get(name) for held, name in self._parameters]
        packed = self._pack(parameters)
        return None if packed is None else (packed, layout, parameters)

    def _look(self) -> None:
        """Make the plan again if a module within, or one of its attributes, has changed."""
        try:
            same = self._attributes and self._attributes == self._as_planned
        except (RuntimeError, ValueError):  # an array among them has changed
            same = False
        if same:
            return
        modules = list(self.module.modules())
        self._attributes = [held for module in modules for held in (vars(module), module._modules)]
        self._as_planned = [dict(held) for held in self._attributes]
        own = [vars(module)[kind] for module in modules[1:] for kind in HOOKS]
        self._hooks = own + [getattr(nn.modules.module, f"_global{kind}") for kind in HOOKS]
        self.layers, self.inner = self.plan(self.module) or Plan([])
        kind = type(self.module)
        asked = [(kind, name) for name in ("features", "sequence") if isinstance(self.module, Model)]
        self._methods = asked + [(each, "forward") for each in dict.fromkeys(map(type, modules))]
        self._norms = [layer.norm for layer in self.layers if layer.norm is not None]
        self._parameters = [slot for layer in self.layers for slot in layer.parameters()]
        self._statistics = [slot for layer in self.layers for slot in layer.statistics()]
        self._shapes = [shape for own in (0, 1) for layer in self.layers for shape in layer.shapes()[own]]
        self._layouts: dict[torch.Size, Layout | None] = {}
        self._known: list[
            float | None
        ] = []  # what was packed: addresses of the layers' tensors, and rates of batch norms
        self._packed: bytes | None = None  # None if some tensor does not fit
        self._functions = []

    def _layout(self, x: Tensor) -> Layout | None:
        """Return the layout; None if there is no plan, hooks exist, norms are not trained, or windows do not fit."""
        if not self.layers or any(self._hooks) or not all(norm.training for norm in self._norms):
            return None
        if x.dtype != torch.float32 or not x.is_cpu or _casts():
            return None
        if x.requires_grad and self.layers[0].inputs % VECTOR:
            return None
        if x.shape not in self._layouts:
            self._layouts[x.shape] = Layout.of(self.layers, x.shape)
        return self._layouts[x.shape]

    def _pack(self, parameters: Sequence[Tensor | None]) -> bytes | None:
        """Return the packed layers; they are packed again only if a tensor has moved."""
        found = [*parameters, *(held.get(name) for held, name in self._statistics)]
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(found):
            return None
        places = [tensor.data_ptr() for tensor in tensors]
        known: list[float | None] = [*places]
        known += [rate for norm in self._norms for rate in (norm.eps, norm.momentum)]
        if known != self._known:
            self._known, self._packed = known, None
            if all(map(_fits, tensors, self._shapes)):
                own, kept = iter(places), iter(places[len(parameters) :])
                self._packed = b"".join(
                    layer.packed([*islice(own, len(layer.parameters())), *islice(kept, len(layer.statistics()))])
                    for layer in self.layers
                )
        return self._packed

    def _may_stand(self, x: Tensor) -> bool:
        """Return whether the compiled layers agree with the method; known as long as no function is replaced."""
        operations, window = library.required(), x.shape[1:]
        methods = [getattr(kind, name) for kind, name in self._methods]
        functions = [
            *(Chained.forward, Chained.backward, operations.chain_forward, operations.chain_backward),
            *(methods + [getattr(method, "__code__", None) for method in methods]),
        ]
        if functions != self._functions:
            self._functions, self._agrees = functions, {}
        if window not in self._agrees:
            self._agrees[window] = self._found_to_agree(window)
        return self._agrees[window]

    def _found_to_agree(self, window: torch.Size) -> bool:
        name = f"{type(self.module).__name__}.{self.name}"
        structure = [(layer.kind, layer.inputs, layer.outputs, layer.taps) for layer in self.layers]
        return twin.agrees(name, (*structure, self.inner, *window), self._functions, lambda: self._reasons(window))

    def _reasons(self, window: torch.Size) -> list[str]:
        """Return the reasons against the compiled layers.

        A gradient is discontinuous where ReLU cuts off a value or two pooled values are equal. That rounding decides
        such a case in two batches is unlikely.
        """
        differences = self._difference(window, seed=0) and self._difference(window, seed=1)
        return [reason for kind, name in self._methods for reason in _replaced(kind, name)] + differences

    def _difference(self, window: torch.Size, seed: int) -> list[str]:
        """Return the differences on a few windows, with random weights."""
        ours = copy.deepcopy(self.module).requires_grad_()
        _draw(ours, seed)
        theirs, x = copy.deepcopy(ours).double(), 1 + twin.random(WINDOWS, *window, seed=seed)
        chain = getattr(ours, self.name)

        def by_chain(x: Tensor) -> Any:
            return chain._run(x, *chain._prepared(x))

        def by_method(x: Tensor) -> Any:
            return getattr(type(theirs), self.name)(theirs, x)

        sums = [max(layer.inputs, layer.outputs) * max(layer.taps, 1) for layer in self.layers]
        by_x = self.layers[0].inputs % VECTOR == 0
        pytorchs, compiled = _side(theirs, by_method, x.double(), by_x), _side(ours, by_chain, x, by_x)
        return twin.difference(pytorchs, compiled, terms=max(*sums, x.numel() // x.shape[1]))


def _replaced(kind: type, name: str) -> list[str]:
    """Return messages if a class's method is not the one in the file of the class."""
    owner = next(each for each in kind.__mro__ if name in vars(each))
    module = sys.modules.get(owner.__module__)  # none if a file was run by other means than an import
    return twin.replaced(owner.__name__, vars(owner), [name], vars(module)) if module else []


def _draw(net: nn.Module, seed: int) -> None:
    """Draw parameters and statistics at random, scaled so that the results of all layers are of similar size."""
    tensors = [tensor for tensor in (*net.parameters(), *net.buffers()) if tensor.is_floating_point()]
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
            drawn = twin.random(*tensor.shape, seed=len(tensors) * seed + number) * (2 / fan_in) ** 0.5
            tensor.copy_(drawn if tensor.requires_grad else drawn.abs())


def _side(net: nn.Module, ask: Callable[[Tensor], Any], x: Tensor, by_x: bool) -> twin.Side:
    """Return a network's results, its statistics afterwards, and all gradients as a side to compare."""
    before = [buffer.clone() for buffer in net.buffers()]
    by = {"the windows": x.requires_grad_()} if by_x else {}

    def values() -> dict[str, Tensor]:
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)
        found = ask(x)
        results = {"the result": found} if isinstance(found, Tensor) else found._asdict()
        return results | dict(net.named_buffers())

    return twin.Side(values, by | dict(net.named_parameters()))


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    of_a_kind = tensor.is_cpu and tensor.dtype in (torch.float32, torch.int64)  # the latter counts batches
    return of_a_kind and tensor.shape == shape and tensor.is_contiguous(memory_format=_format(tensor))
