"""Let a compiled operation run only where it gives what PyTorch's operations give, which people read and edit.

Before first use in a process both are asked for values and gradients on a small random batch. Where they differ, or
where a function was replaced at run time, PyTorch's are used and a line on standard error says so.
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
TRIALS = 8  # of one operation, before it is given up
Results = Mapping[str, Tensor]  # values and gradients by what they are called in a message


class _Verdict(NamedTuple):
    """What was found out, and of what: these objects must live for as long as their ids are compared."""

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
    """Whether a compiled operation is to be used: found out once a process, and again where functions are other ones.

    Args:
        name: of the operation, for the message.
        kind: settings and sizes that its result depends on.
        functions: that both sides are made of; a verdict is on these very objects.
        reasons: finds out what speaks against it (`replaced`, `difference`). An error is a reason. Random numbers of
            the caller are left as they are.
        variables: that the functions may look up. Where one is another object, what agreed must do so again.
    """
    key = (name, kind, *map(id, functions))
    known = _verdicts.get(key)
    if known is None or (known.agrees and list(map(id, known.variables)) != list(map(id, variables))):
        trials = 1 + (known.trials if known else 0)
        against = _found(reasons) if trials <= TRIALS else ["what it stands for changes again and again"]
        if against:
            _say(f"compiled {name}: {', '.join(against)}; PyTorch's operations are used instead")
        _verdicts[key] = known = _Verdict(not against, functions, variables, trials)
    return known.agrees


def _found(reasons: Callable[[], list[str]]) -> list[str]:
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            return reasons()
    except Exception as error:  # of whatever somebody has written: where it is used, it comes up by itself
        return [f"cannot be compared ({' '.join(f'{type(error).__name__}: {error}'.split())[:LONGEST]})"]


def replaced(where: str, namespace: Mapping[str, object], names: Sequence[str], own: Mapping[str, object]) -> list[str]:
    """Say which of the names have another function than a module's file gives them: wrapped, patched, or gone.

    However alike the values on a batch may be, such a function may do something else besides, or do so later.

    Args:
        where: what to call the namespace in the message.
        namespace: where the functions are looked up: of the module, or of a class in it.
        own: the module's variables.
    """
    foreign = [name for name in names if getattr(namespace.get(name), "__globals__", None) is not own]
    return [f"{where}.{name} was replaced" for name in foreign]


def made_of(namespace: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """The functions, and what may be changed within them: code and defaults."""
    functions = [namespace.get(name) for name in names]
    code = [getattr(function, "__code__", None) for function in functions]
    return [*functions, *code, *(getattr(function, "__defaults__", None) for function in functions)]


class Side(NamedTuple):
    """One of the two sides.

    Attributes:
        values: gives them by what they are called in a message.
        by: the tensors, likewise, by which gradients of the values are compared; none where values have none.
    """

    values: Callable[[], Results]
    by: Results

    def results(self, rounding: AbstractContextManager[object] | None = None) -> dict[str, Tensor]:
        """The values, and the gradients of a weighted sum of them."""
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
    """Normal numbers in float32 on the CPU, whatever the global generator and defaults are."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float32, device="cpu")


def difference(pytorchs: Side, compiled: Side, terms: int) -> list[str]:
    """Say what differs most between the two sides, if anything does.

    Args:
        pytorchs: PyTorch's operations on float64.
        compiled: the compiled operation on the same numbers in float32.
        terms: of the longest sum in it. A result may be as far off as PyTorch's moves where each of its operations, on
            the way back too, is off by up to the bound of float32's rounding error for such a sum.
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
    """λ √n u: what the relative error of a float32 sum of n products is below in all likelihood.

    Higham and Mary, A new approach to probabilistic rounding error analysis, 2019: with probability 1 - 2 exp(-λ²/2).
    """
    return CERTAINTY * math.sqrt(terms) * UNIT


class Rounding(TorchFunctionMode):
    """Within, all that gradients go back through is off by a random relative error, and so are the gradients.

    Monte Carlo arithmetic (Parker 1997): how far final results move is what rounding may do to them.

    Args:
        size: of the largest error.
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
    """Within, messages are put into the list: in a worker process, whose parent says them (`pass_on`)."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


def pass_on(lines: Sequence[str]) -> None:
    """Say what workers have found out, each line once, as all of them find out the same."""
    for line in lines:
        if line not in _passed_on:
            _passed_on.add(line)
            _say(line)
