"""Networks of clients: what a model is, several of them by name, and their state by full name (`net.parameter`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from registry.messages import BadMessage
from registry.normalisation import is_batch_norm


class Output(NamedTuple):
    """Result of a model for a batch: features (n, feature_size) and logits (n, classes)."""

    features: Tensor
    logits: Tensor


class Model(nn.Module):
    """Network that consists of a feature extractor and a head.

    A model is built as `Class(shape, classes)`, sets `feature_size` and `head`, and names its `parts` or implements
    `features`.

    Class attributes:
        paper: citation with link.
        parts: names of the layers that compute the features, applied one after the other; () if `features` is
            implemented.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.
    """

    paper: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    feature_size: int
    head: nn.Module

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.shape, self.classes = tuple(shape), classes

    def sequence(self) -> list[nn.Module]:
        """Return the layers named by `parts`."""
        return [getattr(self, name) for name in self.parts]

    def modules_below_head(self) -> list[str]:
        """Return the names of the modules below the head: `parts`, or else all, as `__init__` sets them one by one."""
        return list(self.parts) or [name for name, _ in self.named_children() if name != "head"]

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, time) -> (n, feature_size)."""
        if not self.parts:
            raise NotImplementedError(f"{type(self).__name__}.features")
        for layer in self.sequence():
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Output:
        """Compute features (n, feature_size) and logits (n, classes) of windows (n, channels, 1, time)."""
        features = self.features(x)
        return Output(features, self.head(features))


class Networks(dict[str, nn.Module]):
    """Networks by name; an engine may override `outputs` to evaluate several of them in one pass."""

    def outputs(self, x: Tensor, *names: str) -> list[Output]:
        """Return the outputs of several models; see the function `outputs`."""
        return [self[name](x) for name in names]


def outputs(nets: Mapping[str, Callable[[Tensor], Output]], x: Tensor, *names: str) -> list[Output]:
    """Return the outputs of several models for the same windows.

    For use in `Client.losses`: `teacher, student = outputs(nets, batch.x, "teacher", "student")` gives the results of
    `nets["teacher"]` and `nets["student"]` up to rounding. If both have the same architecture, the engine can evaluate
    them in one pass, with half as many operations on a GPU.

    Args:
        nets: the networks, as `losses` receives them.
        x: (n, channels, 1, time).
        names: names of the models.
    """
    return nets.outputs(x, *names) if isinstance(nets, Networks) else [nets[name](x) for name in names]


def mixture(logits: Mapping[str, Tensor], serves: str | Mapping[str, float]) -> Tensor:
    """Return the logits of a client's prediction, (n, classes), whose softmax are the probabilities.

    Args:
        logits: logits (n, classes) of each network.
        serves: result of `Client.serves`.
    """
    if isinstance(serves, str):
        return logits[serves]
    weighted = [logits[name].log_softmax(1) + math.log(share) for name, share in serves.items()]
    return torch.stack(weighted).logsumexp(0)


def layers(model: Model) -> list[tuple[str, ...]]:
    """Return the layers of a model from its first to its head, each as the paths of its modules (`dense.0`).

    Sequences are taken apart; a module of another kind that has weights, a residual block for one, is a layer, together
    with the norms that follow it, and so is the head, of whatever kind. Weights that are the model's own are in none.
    The order is that of `modules_below_head`.
    """
    head = model.head
    found: list[tuple[str, ...]] = []
    for path, part in (own for name in model.modules_below_head() for own in _unpacked(model, name)):
        if not float_state({path: part}):
            continue
        if found and (is_batch_norm(part) or isinstance(part, (nn.GroupNorm, nn.LayerNorm))):
            found[-1] += (path,)
        else:
            found.append((path,))
    return [*found, *((path,) for path, part in model.named_modules() if part is head)]


def last_layers(model: Model, count: int) -> list[tuple[str, ...]]:
    """Return the last `count` of a model's `layers`, the head among them and its first layer never."""
    return layers(model)[1:][-count:]


def _unpacked(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules below a path of a model, by theirs, with sequences taken apart, or the one that is there."""
    part = model.get_submodule(path)
    if type(part) is nn.Sequential:
        for name, _ in part.named_children():
            yield from _unpacked(model, f"{path}.{name}")
    else:
        yield path, part


def float_state(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return parameters and floating-point buffers by full name, not copied; integer buffers are left out."""
    return {
        f"{net}.{name}": tensor
        for net, module in nets.items()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }


def parameter_names(nets: Mapping[str, nn.Module]) -> list[str]:
    """Return the full names of the parameters, which training moves by their gradients, unlike running statistics."""
    return [f"{net}.{name}" for net, module in nets.items() for name, _ in module.named_parameters()]


def copy_state(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into networks by full name. Raises BadMessage for a wrong one, before anything is copied."""
    state = float_state(nets)
    for name, tensor in tensors.items():
        if name not in state:
            raise BadMessage(f"tensor '{name}' belongs to no network here")
        if state[name].shape != tensor.shape:
            raise BadMessage(f"tensor '{name}' has shape {tuple(tensor.shape)}, not {tuple(state[name].shape)}")
    if tensors:
        torch._foreach_copy_([state[name] for name in tensors], list(tensors.values()))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a full name matches the patterns, of which one that begins with '!' takes names out again.

    The last pattern that fits decides: ("model.*", "!model.head.*") is all of the model but its head.
    """
    fitting = [pattern for pattern in patterns if fnmatchcase(name, pattern.removeprefix("!"))]
    return bool(fitting) and not fitting[-1].startswith("!")
