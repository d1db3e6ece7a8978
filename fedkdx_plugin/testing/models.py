"""Check a model, whosever it is, as the built-in ones are checked."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.fedavg import FedAvg
from fedkdx_plugin.testing.backends import require_stacked_alike
from fedkdx_plugin.testing.case import AlgorithmCase
from fedkdx_plugin.testing.running import Check, Checks, require, run_all
from registry.interface import Model, Output

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((9, 1, 128), (3, 1, 100), (1, 1, 32), (6, 1, 301))
CLASSES = (2, 12)
ROWS = 4
CHECKS = Checks()


@dataclass(frozen=True)
class ModelCase:
    """A model to check.

    Attributes:
        model: the class.
        shapes: (channels, 1, time) of windows that it must take; the first one serves where one is enough.
    """

    model: type[Model]
    shapes: Sequence[Shape] = SHAPES

    def build(self, seed: int = 0, shape: Shape | None = None, classes: int = 5) -> Model:
        """Make the model, initialised from a seed, in evaluation mode."""
        torch.manual_seed(seed)
        return self.model(shape or self.shapes[0], classes).eval()

    def windows(self, rows: int = ROWS, shape: Shape | None = None) -> Tensor:
        """Draw windows, the same ones each time: (rows, channels, 1, time)."""
        return torch.randn(rows, *(shape or self.shapes[0]), generator=torch.Generator().manual_seed(0))


def model_checks() -> list[Check]:
    """Return the checks of a model, each a function of a `ModelCase`, for pytest to run one by one."""
    return list(CHECKS)


def check_model(model: type[Model], *, shapes: Sequence[Shape] = SHAPES, skip: Mapping[str, str] | None = None) -> None:
    """Check that a model is what algorithms and backends rely on, on the CPU.

    Args:
        model: the class, made by `model(shape, classes)`.
        shapes: (channels, 1, time) of windows that it must take.
        skip: name of a check -> why it does not apply to this model.

    Raises:
        AssertionError: names the class, and every check that failed with what is wrong and what to do.
        ValueError: a name in `skip` is unknown, or has no reason.
    """
    run_all(model.__name__, CHECKS, ModelCase(model, shapes), skip)


@CHECKS
def check_shapes(case: ModelCase) -> None:
    """Require features and logits of the right shape and type, from windows of any shape and any number of classes."""
    for shape in case.shapes:
        for classes in CLASSES:
            model, where = case.build(0, shape, classes), f"windows of {shape}, {classes} classes"
            for rows in (1, ROWS):
                output = model(case.windows(rows, shape))
                require(isinstance(output, Output), f"{where}: forward gives {type(output).__name__}, not Output")
                for name, width in (("features", getattr(model, "feature_size", None)), ("logits", classes)):
                    found, size = getattr(output, name), (rows, width)
                    require(found.shape == size, f"{where}: {name} are {tuple(found.shape)}, and should be {size}")
                    require(found.dtype == torch.float32 and found.isfinite().all(), f"{where}: {name} are not finite")


@CHECKS
def check_features_and_head(case: ModelCase) -> None:
    """Require that logits are what `head` makes of `features`: algorithms ask and share the two apart."""
    model, x = case.build(), case.windows()
    output = model(x)
    require(torch.equal(output.features, model.features(x)), "`forward` gives other features than `features`")
    require(torch.equal(output.logits, model.head(output.features)), "logits are not what `head` makes of the features")


@CHECKS
def check_gradients(case: ModelCase) -> None:
    """Require that every parameter gets a gradient, finite and not all zeros, from a training step."""
    model = case.build().train()
    _loss(model, case.windows(16)).backward()
    for name, parameter in model.named_parameters():
        got = parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        require(got, f"parameter '{name}' gets no gradient: use it in `forward`, or make it a buffer")


@CHECKS
def check_modes(case: ModelCase) -> None:
    """Require that a model in evaluation mode changes none of its state and answers the same twice."""
    model, x = case.build(), case.windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again = model(x).logits, model(x).logits
    require(torch.equal(first, again), "in evaluation mode the same windows give other logits: leave chance out there")
    for name, tensor in model.state_dict().items():
        require(torch.equal(tensor, before[name]), f"in evaluation mode a forward pass changes '{name}'")


@CHECKS
def check_seed(case: ModelCase) -> None:
    """Require that PyTorch's seed decides all initial weights, and that another seed gives others."""
    x = case.windows()
    first, again, other = (case.build(seed)(x).logits for seed in (1, 1, 2))
    require(torch.equal(first, again), "the same seed gives other weights: initialise by PyTorch's global generator")
    require(not torch.equal(first, other), "another seed gives the same weights: initialise them at random")


@CHECKS
def check_rows(case: ModelCase) -> None:
    """Require that in evaluation mode what is said of a window does not depend on the others of its batch."""
    model, x = case.build().double(), case.windows().double()
    together = model(x).logits
    for row in range(len(x)):
        alone = model(x[row : row + 1]).logits[0]
        same = torch.allclose(alone, together[row], rtol=1e-9, atol=1e-9)
        require(same, "in evaluation mode a window's logits depend on the others of its batch")


@CHECKS
def check_state(case: ModelCase) -> None:
    """Require that all that a model has learnt is in its state: loaded into another one, both say the same."""
    model, x = case.build(1), case.windows()
    _step(model, case.windows(16))
    other = case.build(2)
    other.load_state_dict(model.state_dict())
    require(
        torch.equal(model.eval()(x).logits, other(x).logits),
        "with the same state_dict another model says something else: keep what is learnt in parameters and buffers",
    )


@CHECKS
def check_copy(case: ModelCase) -> None:
    """Require that a deep copy says the same, and that training it leaves the original alone."""
    model, x = case.build(), case.windows()
    before = model(x).logits
    other = copy.deepcopy(model)
    require(torch.equal(other(x).logits, before), "a deep copy says something else than the original")
    _step(other, case.windows(16))
    require(torch.equal(model(x).logits, before), "training a deep copy changes the original: share no tensors")


@CHECKS
def check_stacked_training(case: ModelCase) -> None:
    """Require that clients trained together with this model end as each does alone, or a line that says why not."""
    average = AlgorithmCase(FedAvg)
    shape = min(case.shapes, key=math.prod)
    require_stacked_alike(average, replace(average.task(), shape=shape, model_class=case.model))


def _loss(model: Model, x: Tensor) -> Tensor:
    output = model(x)
    return F.cross_entropy(output.logits, torch.arange(len(x)) % output.logits.shape[1])


def _step(model: Model, x: Tensor) -> None:
    """Make a step of training."""
    model.train()
    _loss(model, x).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    model.eval()
