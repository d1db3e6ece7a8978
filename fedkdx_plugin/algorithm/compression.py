"""Low-rank compression of updates with a threshold on the energy kept (FedKDX paper §3.5, eq. 9-10).

A payload is a dict of tensors like the update itself. A matrix that takes fewer bytes as factors is sent as
`<name>.U` (P, R), `<name>.S` (R,) and `<name>.V` (R, Q); all else unchanged, under its own name. `.dense` is added to a
name that itself ends like a factor, so that the end of a name in a payload is unambiguous. U and V may be sent as 8-bit
integers; the quantisation steps are then part of Σ. A matrix whose factors could leave the range of its type, near the
largest or the smallest value that it holds, is sent unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # exported, but without `as`

from registry.interface import BadMessage, NonFinite
from registry.tensors import first_nonfinite

FACTORS = (".U", ".S", ".V")
DENSE = ".dense"
INTEGERS = torch.int8
LARGEST = torch.iinfo(INTEGERS).max
HEADER = 200  # bytes; see `_saves`
AT_ONCE = 1 << 24  # values of matrices decomposed in one call: 128 MB as float64, plus the memory of the call

Key = tuple[int, str]  # (position of the update, name of the tensor)


class Compressed(NamedTuple):
    """Payload, and R of eq. 9 of every matrix that was decomposed, whether it is sent as factors or not."""

    payload: dict[str, Tensor]
    ranks: dict[str, int]


class _Spectra(NamedTuple):
    """Energies and one-sided bases of matrices of one shape and type; one more product gives the other side.

    Attributes:
        keys: keys of the n matrices.
        matrices: (n, P, Q), float64, each divided by its scale.
        scales: largest absolute values, (n,).
        kind: data type of the tensors.
        energy: squared singular values in descending order, (n, min(P, Q)), on the CPU.
        basis: singular vectors of the shorter side as columns, in the same order, (n, min(P, Q), min(P, Q)).
    """

    keys: list[Key]
    matrices: Tensor
    scales: Tensor
    kind: torch.dtype
    energy: Tensor
    basis: Tensor


def linear(progress: float, start: float, end: float) -> float:
    """Return start + (end − start)·ρ, the schedule of ε in eq. 10. Raises ValueError unless ρ is in [0, 1]."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} must be between 0 and 1")
    return start + (end - start) * progress


def compress(tensors: Mapping[str, Tensor], epsilon: float, quantise: bool = False) -> Compressed:
    """Factorise each matrix with the smallest rank that keeps more than ε of its energy, if that saves bytes.

    A tensor of two or more dimensions is treated as the matrix of its first dimension by all others. The relative error
    of the result of `decompress`, in the Frobenius norm, is at most √(1 − ε), up to rounding in the tensor's own type.
    A message is never larger than with all tensors unchanged: factors of rank R are sent only if PR + R + RQ < PQ,
    counted in bytes, with what they add to the header. All else is sent unchanged: vectors, integers, everything if
    ε ≥ 1 (only the full matrix keeps all), matrices that no method can decompose, and those of `_out_of_range`. Tensors
    sent unchanged share the memory of the original.

    Quantised, a column of U and a row of V are integers from -127 to 127: a quarter of the bytes of float32, with an
    error of at most half a step, 1/254 of the largest value in the column or row.

    Args:
        tensors: name -> tensor.
        epsilon: energy threshold ε, at least 0.
        quantise: send U and V as 8-bit integers.

    Raises:
        NonFinite: a tensor holds NaN or infinity; raised before anything is decomposed.
        ValueError: epsilon is negative or NaN.
    """
    return compress_together([tensors], epsilon, quantise)[0]


def compress_together(
    updates: Sequence[Mapping[str, Tensor]], epsilon: float, quantise: bool = False
) -> list[Compressed]:
    """Compress several updates like `compress`; matrices of one shape are decomposed in one call.

    All ranks are copied from the device at once. Raises as `compress`, before anything is decomposed.
    """
    if not epsilon >= 0:
        raise ValueError(f"energy threshold {epsilon} must be at least 0")
    _require_finite(updates)
    matrices: dict[Key, Tensor] = {}
    if epsilon < 1:
        for place, tensors in enumerate(updates):
            worthy = {name: tensor for name, tensor in tensors.items() if _worth_a_try(name, tensor, quantise)}
            matrices |= {(place, name): tensor.detach().flatten(1) for name, tensor in worthy.items()}
    ranks: dict[Key, int] = {}
    factors: dict[Key, tuple[Tensor, Tensor, Tensor]] = {}
    for spectra in _decompose(matrices):
        found = dict(zip(spectra.keys, _ranks(spectra, epsilon), strict=True))
        ranks |= found
        barred = dict(zip(spectra.keys, _out_of_range(spectra, quantise), strict=True))
        saving = [
            key for key in found if not barred[key] and _saves(found[key], key[1], updates[key[0]][key[1]], quantise)
        ]
        factors |= _factors(spectra, {key: found[key] for key in saving}, quantise)
    return [
        Compressed(
            _payload(tensors, {name: factors[place, name] for name in tensors if (place, name) in factors}),
            {name: ranks[place, name] for name in tensors if (place, name) in ranks},
        )
        for place, tensors in enumerate(updates)
    ]


def compress_like(payload: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a payload of `tensors` with the ranks and types of another one, and so of its size."""
    keys: list[Key] = [(0, name) for name in tensors if dense_key(name) not in payload]
    ranks = {key: len(payload[key[1] + FACTORS[1]]) for key in keys}
    quantise = any(payload[name + FACTORS[0]].dtype == INTEGERS for _, name in keys)
    factors: dict[Key, tuple[Tensor, Tensor, Tensor]] = {}
    for spectra in _decompose({key: tensors[key[1]].detach().flatten(1) for key in keys}):
        factors |= _factors(spectra, {key: ranks[key] for key in spectra.keys}, quantise)
    return _payload(tensors, {name: own for (_, name), own in factors.items()})


def _payload(tensors: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the payload of an update: factors by the name of their matrix, all other tensors unchanged."""
    payload: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in factors:
            payload |= {name + end: values for end, values in zip(FACTORS, factors[name], strict=True)}
        else:
            payload[dense_key(name)] = tensor.detach()
    return payload


def decompress(payload: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Restore the tensors from which `compress` made a payload, except for what it left out.

    Args:
        payload: as received; all of it is checked.
        shapes: names and shapes of the tensors expected.

    Raises:
        BadMessage (a ValueError): a tensor is missing or unexpected, or has the wrong shape or type.
        NonFinite: a tensor, or the product of its factors, holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, shape in shapes.items():
        dense = payload.get(dense_key(name))
        if dense is not None:
            used.add(dense_key(name))
            if dense.shape != shape:
                raise BadMessage(f"tensor '{name}' has shape {tuple(dense.shape)}, not {tuple(shape)}")
            tensors[name] = dense
        else:
            keys = [name + factor for factor in FACTORS]
            if missing := [key for key in keys if key not in payload]:
                raise BadMessage(f"tensor '{name}' is missing, or its factor '{missing[0]}'")
            used.update(keys)
            tensors[name] = _product(name, [payload[key] for key in keys], shape)
    if extra := sorted(payload.keys() - used):
        raise BadMessage(f"tensor '{extra[0]}' is not expected")
    _require_finite([tensors])
    return tensors


def left_out(tensors: Mapping[str, Tensor], payload: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensor minus restored tensor for each tensor that a payload made of `tensors` holds as factors."""
    restored = decompress(payload, {name: tensor.shape for name, tensor in tensors.items()})
    return {name: t - restored[name] for name, t in tensors.items() if dense_key(name) not in payload}


def dense_key(name: str) -> str:
    """Return the name in a payload of a tensor that is sent unchanged."""
    return name + DENSE if name.endswith((*FACTORS, DENSE)) else name


def _saves(rank: int, name: str, tensor: Tensor, quantise: bool) -> bool:
    """Return whether a message with factors of this rank is smaller than one with the tensor.

    Three tensors in place of one lengthen the header by two names and by types, shapes and offsets, for which `HEADER`
    is an upper bound: of a message of up to 1 GB, in which a label of up to eight letters is put before each name.
    """
    rows, size = tensor.shape[0], tensor.element_size()
    value_size = INTEGERS.itemsize if quantise else size
    factors = rank * ((rows + tensor.numel() // rows) * value_size + size)
    return factors + HEADER + 2 * len(name.encode()) < tensor.numel() * size


def _worth_a_try(name: str, tensor: Tensor, quantise: bool) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() > 0 and _saves(1, name, tensor, quantise)


def _require_finite(updates: Sequence[Mapping[str, Tensor]]) -> None:
    named = {f"{place}/{name}": tensor for place, tensors in enumerate(updates) for name, tensor in tensors.items()}
    if (name := first_nonfinite(named)) is not None:
        raise NonFinite(f"tensor '{name.partition('/')[2]}' holds NaN or infinity")


def _decompose(matrices: Mapping[Key, Tensor]) -> list[_Spectra]:
    """Return the spectra of all matrices that some method can decompose; one call for those of one shape and type."""
    alike: dict[Any, list[Key]] = {}
    for key, matrix in matrices.items():
        alike.setdefault((matrix.shape, matrix.dtype), []).append(key)
    spectra = []
    for keys in alike.values():
        at_once = max(1, AT_ONCE // matrices[keys[0]].numel())
        for start in range(0, len(keys), at_once):
            some = keys[start : start + at_once]
            spectra += _decompose_alike(some, torch.stack([matrices[key] for key in some]))
    return spectra


def _decompose_alike(keys: list[Key], matrices: Tensor) -> list[_Spectra]:
    """Return the spectra of (n, P, Q): in one, or one by one if the first method does not converge for all of them.

    Matrices are scaled to a largest value of 1 first, so that squares neither vanish nor overflow.
    """
    kind, matrices = matrices.dtype, matrices.double()
    scales = matrices.abs().amax((1, 2))
    matrices = matrices / torch.where(scales > 0, scales, 1)[:, None, None]
    try:
        return [_Spectra(keys, matrices, scales, kind, *METHODS[0](matrices))]
    except LinAlgError:
        halves = [(place, half) for place in range(len(keys)) if (half := _converged(matrices[place : place + 1]))]
        return [
            _Spectra([keys[place]], matrices[place : place + 1], scales[place : place + 1], kind, *half)
            for place, half in halves
        ]


def _converged(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return energies and basis of a matrix (1, P, Q) by the first method that converges; None if none does."""
    for method in METHODS:
        try:
            return method(matrix)
        except LinAlgError:
            continue
    return None


def _flat(matrices: Tensor) -> bool:
    """Return whether matrices (..., P, Q) have P ≤ Q."""
    return matrices.shape[-2] <= matrices.shape[-1]


def _by_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvectors of the Gram matrices of the shorter side on the CPU, several in parallel.

    In float64 the energies have an error of about 1e-16 of the largest, far below any 1 − ε in use. A Gram matrix of
    256 rows takes 13 ms on an H100 and 8 ms on a core of its host, and the ranks are needed on the host anyway.
    """
    shorter = matrices if _flat(matrices) else matrices.mT
    gram = (shorter @ shorter.mT).cpu()
    if gram.device == matrices.device or len(gram) == 1:
        values, vectors = torch.linalg.eigh(gram)
    else:
        with _one_thread_each():
            values, vectors = map(torch.stack, zip(*_pool().map(torch.linalg.eigh, gram), strict=True))
    return values.flip(-1).clamp(min=0), vectors.flip(-1).to(matrices.device)


@cache
def _pool() -> ThreadPoolExecutor:
    """Make the threads that find eigenvectors side by side, once for the process."""
    return ThreadPoolExecutor()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within, an operation on the CPU takes one thread: those of a pool would wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_svd(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute singular values and vectors with the default driver of torch."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    return (values**2).cpu(), left if _flat(matrices) else right.mT


def _by_gesvd(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute singular values and vectors by LAPACK's QR iteration, which is the slowest method and fails least."""
    import numpy as np
    from scipy import linalg

    energies, bases = [], []
    for matrix in matrices.cpu().numpy():
        try:
            left, values, right = linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")
        except np.linalg.LinAlgError as error:
            raise LinAlgError(str(error)) from error
        energies.append(torch.from_numpy(values**2))
        bases.append(torch.from_numpy((left if _flat(matrices) else right.T).copy()))
    return torch.stack(energies), torch.stack(bases).to(matrices.device)


# each (n, P, Q) -> energies in descending order (n, min(P, Q)) on the CPU, singular vectors of the shorter side as
# columns on the device of the matrices; raises LinAlgError if any of the n does not converge
METHODS = (_by_eigh, _by_svd, _by_gesvd)


def _ranks(spectra: _Spectra, epsilon: float) -> list[int]:
    """Return the smallest R of eq. 9 for each matrix; 0 for a matrix of zeros."""
    kept = spectra.energy.cumsum(1)
    # Counted from the largest: comparisons with NaN are false, which gives full rank.
    ranks = kept.shape[1] + 1 - (kept > epsilon * kept[:, -1:]).sum(1)
    found: list[int] = torch.where(spectra.scales.cpu() == 0, 0, ranks.clamp(max=kept.shape[1])).tolist()
    return found


def _out_of_range(spectra: _Spectra, quantise: bool) -> list[bool]:
    """Return for each matrix whether its factors or their product could leave the range of its type.

    The entries of U and V are at most 1, so no partial sum of the product exceeds the sum of the singular values, which
    has to stay below half of the largest value. Σ, with the quantisation steps of at least 1/127² in it, must be a
    normal number for a matrix's largest value times the rounding error. NaN in a spectrum is out of range.
    """
    limits, scales = torch.finfo(spectra.kind), spectra.scales.cpu()
    least = limits.tiny / limits.eps * (LARGEST**2 if quantise else 1)
    within = (scales * spectra.energy.sqrt().sum(1) <= limits.max / 2) & ((scales >= least) | (scales == 0))
    found: list[bool] = (~within).tolist()
    return found


def _factors(spectra: _Spectra, ranks: Mapping[Key, int], quantise: bool) -> dict[Key, tuple[Tensor, Tensor, Tensor]]:
    """Return U (P, R), Σ (R,), V (R, Q) of the matrices named: the projection on the leading vectors of the basis.

    Computed for all at once with the largest of the ranks; the last columns of the others are dropped.
    """
    if not ranks:
        return {}
    flat = _flat(spectra.matrices)
    basis = spectra.basis[:, :, : max(ranks.values())]
    other = basis.mT @ spectra.matrices if flat else (spectra.matrices @ basis).mT
    sizes = torch.linalg.vector_norm(other, dim=2)
    other = other / sizes.clamp(min=torch.finfo(sizes.dtype).tiny).unsqueeze(2)
    singular = sizes * spectra.scales.unsqueeze(1)
    left, right = (basis, other) if flat else (other.mT, basis.mT)
    if quantise:
        left, singular, right = _quantised(left, singular, right)
    else:
        left, right = left.to(spectra.kind), right.to(spectra.kind)
    singular = singular.to(spectra.kind)
    places = {key: place for place, key in enumerate(spectra.keys)}
    return {
        key: (
            left[places[key], :, :rank].contiguous(),
            singular[places[key], :rank],
            right[places[key], :rank].contiguous(),
        )
        for key, rank in ranks.items()
    }


def _quantised(left: Tensor, singular: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round U (n, P, R) by columns and V (n, R, Q) by rows to integers; the steps are multiplied into Σ (n, R)."""
    step_left = left.abs().amax(1) / LARGEST
    step_right = right.abs().amax(2) / LARGEST
    whole_left = left / torch.where(step_left > 0, step_left, 1).unsqueeze(1)
    whole_right = right / torch.where(step_right > 0, step_right, 1).unsqueeze(2)
    return whole_left.round().to(INTEGERS), singular * step_left * step_right, whole_right.round().to(INTEGERS)


def _product(name: str, factors: list[Tensor], shape: torch.Size) -> Tensor:
    """Return U Σ V in the given shape. Raises BadMessage if the factors do not fit each other or the shape."""
    left, singular, right = factors
    rank = len(singular) if singular.ndim == 1 else -1
    fits = len(shape) >= 2 and shape.numel() > 0
    fits = fits and left.shape == (shape[0], rank) and right.shape == (rank, shape.numel() // shape[0])
    if not fits:
        shapes = ", ".join(str(tuple(factor.shape)) for factor in factors)
        raise BadMessage(f"tensor '{name}': factors of shapes {shapes} do not give {tuple(shape)}")
    own = INTEGERS if left.dtype == INTEGERS else singular.dtype
    if not singular.is_floating_point() or not left.dtype == right.dtype == own:
        raise BadMessage(f"tensor '{name}': factors of types {left.dtype}, {singular.dtype}, {right.dtype}")
    left, right = left.to(singular.dtype), right.to(singular.dtype)
    return ((left * singular) @ right).reshape(shape)
