"""Operations on many named tensors at once: on a GPU, dispatch overhead exceeds the time of a small operation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def copied(tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Copy tensors into new memory; on other devices than a CPU, as views of one piece for each dtype.

    Args:
        tensors: name -> tensor.
        device: target device; None: the device of the first tensor of each dtype.
    """
    if not any(_packed(torch.device(device or tensor.device)) for tensor in tensors.values()):
        return {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            for name, tensor in tensors.items()
        }
    names: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.dtype, []).append(name)
    copies: dict[str, Tensor] = {}
    for own in names.values():
        to = tensors[own[0]].device if device is None else device
        parts = [tensors[name].detach().to(to) for name in own]
        flat = torch.cat([part.reshape(-1) for part in parts])
        pieces = flat.split_with_sizes([part.numel() for part in parts])
        copies |= {name: piece.view(part.shape) for name, piece, part in zip(own, pieces, parts, strict=True)}
    return {name: copies[name] for name in tensors}


def of_net(net: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a state, by full name, that is one network's."""
    return {name: tensor for name, tensor in state.items() if name.startswith(f"{net}.")}


def _packed(device: torch.device) -> bool:
    """Return whether tensors are copied in one piece.

    This saves dispatch overhead on a GPU; its price is that keeping one tensor keeps the whole piece.
    """
    return device.type != "cpu"


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first floating-point tensor that holds NaN or infinity, or None; synchronise once.

    Minima and maxima are checked, which propagate NaN: `isfinite` of a large tensor takes twenty times as long.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    # PyTorch implements neither comparison nor isfinite for types of one byte
    wide = {name: t.detach() if t.itemsize > 1 else t.detach().float() for name, t in floats.items()}
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in wide.values():
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.reshape(-1))
    if all(torch.stack(torch.cat(own).aminmax()).isfinite().all() for own in alike.values()):
        return None
    return next(name for name, tensor in wide.items() if not tensor.isfinite().all())
