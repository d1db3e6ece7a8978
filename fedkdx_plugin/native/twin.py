"""Check that a compiled operation gives the results of the PyTorch operations that it replaces.

Before first use in a process, values and gradients of both are compared on a small random batch. If they differ, or if
a function was replaced at run time, PyTorch's operations are used and a line on standard error says so.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

UNIT = 2.0**-24  # unit roundoff of float32
CERTAINTY = 4  # λ of `roundoff`
LONGEST = 200  # characters of an error
TRIALS = 8  # checks of one operation before it is no longer used
Results = Mapping[str, Tensor]  # values and gradients by their names in messages


class _Verdict(NamedTuple):
    """Result of a check, and the objects checked, which must stay alive as long as their ids are compared."""

    agrees: bool
    functions: Sequence[object]
    variables: Sequence[object]
    trials: int


_verdicts: dict[Hashable, _Verdict] = {}
_collected: list[str] | None = None
_passed_on: set[str] = set()


def agrees(
    name: str,
    kind: Hashable,
    functions: Sequence[object],
    reasons: Callable[[], list[str]],
    variables: Sequence[object] = (),
) -> bool:
    """Return whether a compiled operation is to be used; checked once in a process, and again if functions change.

    Args:
        name: name of the operation, for the message.
        kind: options and sizes that its result depends on.
        functions: functions of both sides; the verdict is valid for these objects.
        reasons: returns reasons against the operation (`replaced`, `difference`). An error is a reason. The caller's
            random numbers are not affected.
        variables: variables that the functions may look up. If one is replaced, an operation that agreed is checked
            again.
    """
    key = (name, kind, *map(id, functions))
    known = _verdicts.get(key)
    if known is None or (known.agrees and list(map(id, known.variables)) != list(map(id, variables))):
        trials = 1 + (known.trials if known else 0)
        against = _found(reasons) if trials <= TRIALS else ["what it replaces changes again and again"]
        if against:
            _say(f"compiled {name}: {', '.join(against)}; PyTorch's operations are used instead")
        _verdicts[key] = known = _Verdict(not against, functions, variables, trials)
    return known.agrees


def _found(reasons: Callable[[], list[str]]) -> list[str]:
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            return reasons()
    except Exception as error:  # user code may raise anything; where it is used, the error is raised itself
        return [f"cannot be compared ({' '.join(f'{type(error).__name__}: {error}'.split())[:LONGEST]})"]


def replaced(where: str, namespace: Mapping[str, object], names: Sequence[str], own: Mapping[str, object]) -> list[str]:
    """Return messages for names whose function is not the one in the module's file: wrapped, patched, or missing.

    Even if its values on a batch are equal, such a function may have other effects, or other values later.

    Args:
        where: name of the namespace in messages.
        namespace: variables of the module, or of a class in it.
        names: names of the functions.
        own: the module's variables.
    """
    foreign = [name for name in names if getattr(namespace.get(name), "__globals__", None) is not own]
    return [f"{where}.{name} was replaced" for name in foreign]


def made_of(namespace: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """Return the functions, and the parts of them that can be changed: code and defaults."""
    functions = [namespace.get(name) for name in names]
    code = [getattr(function, "__code__", None) for function in functions]
    return [*functions, *code, *(getattr(function, "__defaults__", None) for function in functions)]


class Side(NamedTuple):
    """One side of a comparison.

    Attributes:
        values: returns the values by their names in messages.
        by: tensors, likewise, by which gradients of the values are compared; empty if the values have none.
    """

    values: Callable[[], Results]
    by: Results

    def results(self, rounding: AbstractContextManager[object] | None = None) -> dict[str, Tensor]:
        """Return the values, and the gradients of a weighted sum of them."""
        with rounding or nullcontext():
            values = self.values()
        found = {**values, **self._gradients(values)}
        return {name: tensor.detach().to(torch.float64, copy=True) for name, tensor in found.items()}

    def _gradients(self, values: Results) -> dict[str, Tensor]:
        if not self.by:
            return {}
        weights = [2 + random(*value.shape, seed=seed).to(value.dtype) for seed, value in enumerate(values.values())]
        loss = sum((weight * value).sum() for weight, value in zip(weights, values.values(), strict=True))
        assert isinstance(loss, Tensor)  # there is a value at least
        gradients = torch.autograd.grad(loss, list(self.by.values()), allow_unused=True, materialize_grads=True)
        return {f"the gradient by {name}": gradient for name, gradient in zip(self.by, gradients, strict=True)}


def random(*shape: int, seed: int) -> Tensor:
    """Draw normal numbers in float32 on the CPU, independent of the global generator and defaults."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu")


def difference(pytorchs: Side, compiled: Side, terms: int) -> list[str]:
    """Return a message about the largest difference between the two sides, if there is one.

    Args:
        pytorchs: PyTorch's operations in float64.
        compiled: the compiled operation on the same numbers in float32.
        terms: number of terms of the longest sum in it. A result may differ as much as PyTorch's result changes if each
            of its operations, in the backward pass too, has an error up to float32's rounding bound for such a sum.
    """
    bound = roundoff(terms)
    exact, found = pytorchs.results(), compiled.results()
    moved = pytorchs.results(Rounding(bound)) if pytorchs.by else exact
    most, what = 0.0, ""
    for name, right in exact.items():
        off, by_rounding, size = (_norm(tensor) for tensor in (found[name] - right, moved[name] - right, right))
        share = off / size if size else math.inf
        if not off <= bound * size + by_rounding and not share <= most:  # NaN is not
            most, what = share, f"{name} differs by {100 * share:.3g} %"
    return [what] if what else []


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def roundoff(terms: int) -> float:
    """Return λ √n u, a probabilistic bound on the relative error of a float32 sum of n products.

    Higham and Mary, A new approach to probabilistic rounding error analysis, 2019: with probability 1 - 2 exp(-λ²/2).
    """
    return CERTAINTY * math.sqrt(terms) * UNIT


class Rounding(TorchFunctionMode):
    """Context in which all differentiable results, and so their gradients, get a random relative error.

    Monte Carlo arithmetic (Parker 1997): the change of the final results shows the possible effect of rounding.

    Args:
        size: largest relative error.
    """

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size, self.rng = size, torch.Generator().manual_seed(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) in (tuple, list):
            return type(result)(map(self._off, result))
        return self._off(result)

    def _off(self, result: Any) -> Any:
        if not isinstance(result, Tensor) or result.grad_fn is None:
            return result
        factors = torch.empty(result.shape, dtype=result.dtype, device=result.device)
        return result * factors.uniform_(1 - self.size, 1 + self.size, generator=self.rng)


def _say(line: str) -> None:
    if _collected is None:
        print(line, file=sys.stderr)
    else:
        _collected.append(line)


@contextmanager
def collected() -> Iterator[list[str]]:
    """Collect messages of the block in a list, in a worker process whose parent prints them (`pass_on`)."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


def pass_on(lines: Sequence[str]) -> None:
    """Print the messages of workers, each line once, as all workers find the same."""
    for line in lines:
        if line not in _passed_on:
            _passed_on.add(line)
            _say(line)
