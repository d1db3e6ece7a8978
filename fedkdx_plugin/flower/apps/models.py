"""Any PyTorch network as a `Model`: logits alone, or features and a head where the network names its last layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from registry import catalog, contract
from registry.errors import UserError
from registry.interface import Client, Model, Output

Shape = tuple[int, int, int]
Given = str | type[Model] | Callable[[], nn.Module]
Make = Callable[[Shape, int], Model]
HEAD, NAMED = "head", "head_name"  # attributes of a network: its last layer, or that layer's name
TRIED = 3  # windows on which a network is tried


def as_shape(own: Sequence[int]) -> Shape:
    """Return the shape (channels, 1, values) of windows whose networks take them in a shape of their own.

    Raises:
        UserError: it is no shape.
    """
    whole = isinstance(own, (tuple, list)) and all(type(size) is int and size > 0 for size in own)
    if not whole or not own:
        raise UserError(f"shape={own!r}: write the shape of one window, such as (6, 128): channels, samples")
    return own[0], 1, prod(own[1:])


def maker(given: Given, own: Sequence[int]) -> Make:
    """Return a function that makes the models that a user gives.

    Args:
        given: a name of the catalog; a `Model` class; or a function (or class) that, called without arguments, returns
            any network from windows (n, *own) to logits (n, classes).
        own: shape of one window, as the user's networks take it.

    Raises:
        UserError: it is none of these; or a name or a class, and windows are not (channels, 1, time).
    """
    if isinstance(given, str) or (isinstance(given, type) and issubclass(given, Model)):
        if tuple(own) != as_shape(own):
            raise UserError(f"shape={tuple(own)}: models of this project take windows of (channels, 1, time)")
        found: Make = catalog.load("models", given) if isinstance(given, str) else given
        return found
    if isinstance(given, nn.Module) or not callable(given):
        what = f"a {type(given).__name__}" if isinstance(given, nn.Module) else repr(given)
        raise UserError(f"model: give a function or class, called without arguments, that makes a network; not {what}")

    def make(shape: Shape, classes: int) -> Model:
        if shape != as_shape(own):
            raise UserError(
                f"this algorithm makes models for windows of other shapes, too, here {shape}: give a name or a Model "
                "class, which is made for a shape"
            )
        return _adapted(given(), tuple(own), classes)

    make.__name__ = getattr(given, "__name__", type(given).__name__)  # for messages
    return make


def _adapted(module: object, own: tuple[int, ...], classes: int) -> Model:
    if isinstance(module, Model):
        return module
    if not isinstance(module, nn.Module):
        raise UserError(f"model: the function must return a network (torch.nn.Module), not {type(module).__name__}")
    windows = torch.randn(TRIED, *own, generator=torch.Generator().manual_seed(0))
    logits = _tried(module, windows)
    if not isinstance(logits, Tensor) or logits.shape != (TRIED, classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"model: {type(module).__name__} must give logits {(TRIED, classes)} for {TRIED} windows {own}, not {found}"
            f"; is classes={classes} right?"
        )
    head = getattr(module, NAMED, HEAD if isinstance(getattr(module, HEAD, None), nn.Module) else None)
    if head is None:
        return LogitsOnly(module, own, classes)
    split = Split(module, head, own, classes, windows)
    if not torch.equal(_tried(split, windows).logits, logits):
        raise UserError(
            f"model: {type(module).__name__} does not return what its layer '{head}' makes; let it return these, the "
            f"logits, or name the layer that makes them in the network, as {NAMED}"
        )
    return split


def _tried(module: nn.Module, windows: Tensor) -> Any:
    """Return what a network gives for windows, in evaluation mode. Raises UserError: it fails."""
    training = module.training
    try:
        with torch.no_grad():
            return module.eval()(windows)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model: {type(module).__name__} fails on windows of shape {tuple(windows.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        module.train(training)


def _advice(module: nn.Module, classes: int) -> str:
    """Return how to name the last layer of a network."""
    likely = [
        name for name, part in module.named_modules() if isinstance(part, nn.Linear) and part.out_features == classes
    ]
    name = likely[-1] if likely else "fc"
    return f"name it in the network: {NAMED} = {name!r}"


class Adapted(Model):
    """A user's network as a model; windows are brought into the shape that it takes.

    Args:
        own: shape of one window, as the network takes it.
    """

    def __init__(self, own: tuple[int, ...], classes: int) -> None:
        super().__init__(as_shape(own), classes)
        self.own = own

    def original(self) -> nn.Module:
        """Return a copy of the user's network, with the weights of this one."""
        raise NotImplementedError


class Split(Adapted):
    """Network in two parts: the body, which computes features, and the head, the last layer.

    Args:
        module: the user's network, which is taken apart.
        name: of its last layer, with dots where it is in a part of the network.
        windows: on which the size of the features is found out.
    """

    def __init__(self, module: nn.Module, name: object, own: tuple[int, ...], classes: int, windows: Tensor) -> None:
        super().__init__(own, classes)
        kind = type(module).__name__
        if name not in dict(module.named_modules()) or not name or not isinstance(name, str):
            raise UserError(f"model: {kind} has no layer {name!r}, which {NAMED} names; {_advice(module, classes)}")
        self.name = name
        self.head = module.get_submodule(name)
        _replace(module, name, nn.Identity())
        self.body = module
        try:
            features = _tried(module, windows)
        except UserError as error:
            _replace(module, name, self.head)
            raise UserError(
                f"model: the layer '{name}' is not the last one of {kind}, which fails without it; "
                f"{_advice(module, classes)}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            _replace(module, name, self.head)
            raise UserError(
                f"model: the layer '{name}' of {kind} is given {found}, not features (n, size); "
                f"{_advice(module, classes)}"
            )
        self.feature_size = features.shape[1]

    def modules_below_head(self) -> list[str]:
        """Return the names of the modules of the user's network, in the order in which it sets them."""
        return [f"body.{name}" for name, _ in self.body.named_children()]

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, values) -> (n, feature_size)."""
        features: Tensor = self.body(x.reshape(len(x), *self.own))
        return features

    def original(self) -> nn.Module:
        """Return a copy of the user's network, with its last layer in place."""
        body, head = copy.deepcopy(self.body), copy.deepcopy(self.head)
        _replace(body, self.name, head)
        return body


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


class LogitsOnly(Adapted):
    """Network of which nothing is known but its logits; whatever asks for its features or its head is refused."""

    def __init__(self, module: nn.Module, own: tuple[int, ...], classes: int) -> None:
        super().__init__(own, classes)
        self.module = module

    def forward(self, x: Tensor) -> Output:
        """Compute logits (n, classes); in place of features there is what refuses every use."""
        # the contract's type, of which algorithms that need logits alone use logits alone
        return Output(_Unknown(self), self.module(x.reshape(len(x), *self.own)))  # type: ignore[arg-type]

    def features(self, x: Tensor) -> Tensor:
        """Raise UserError."""
        self.refuse()

    @property
    def feature_size(self) -> int:  # type: ignore[override]
        """Raise UserError."""
        self.refuse()

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """Raise UserError."""
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise UserError."""
        raise UserError(
            f"this algorithm needs the features, or the last layer, of {type(self.module).__name__}, and cannot tell "
            f"which these are; {_advice(self.module, self.classes)}"
        )

    def original(self) -> nn.Module:
        """Return a copy of the user's network."""
        return copy.deepcopy(self.module)


class _Unknown:
    """Stands for features that are not known; whatever is done with it is refused."""

    def __init__(self, model: LogitsOnly) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        self._model.refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        next(own for own in _flat((args, kwargs or {})) if isinstance(own, cls))._model.refuse()


def _flat(value: Any) -> list[Any]:
    """Return all values in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    return [own for part in value for own in _flat(part)] if isinstance(value, (list, tuple)) else [value]


def speaks_of_head(client: Client, nets: Mapping[str, nn.Module], epochs: int) -> bool:
    """Return whether a client's patterns treat the head of its networks apart, which then must be known."""
    patterns = [
        *client.private_in(client.task, nets),
        *client.kept,
        *(name for epoch in range(epochs) for name in contract.trains(client, epoch, epochs)),
    ]
    return any(f".{HEAD}" in pattern for pattern in patterns)
