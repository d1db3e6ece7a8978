"""Mixed precision: the products of a training step in bfloat16, all that is kept and added up in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

FULL, MIXED = "float32", "bf16"  # of `--precision`; "tf32" is between them


def mixed(on: bool, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a step's losses are computed in mixed precision, if `on`.

    PyTorch's autocast chooses the operations: matrix products and convolutions in bfloat16, sums, norms, softmax and
    losses in float32. Weights, gradients, optimiser and batch-norm statistics stay in float32. Gradients need no
    scaling (Micikevicius et al. 2018, arXiv:1710.03740), as bfloat16 has float32's range (Kalamkar et al. 2019,
    arXiv:1905.12322). Cast weights are not cached: in a CUDA graph they would be those of the recorded step.
    """
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if on else nullcontext()
