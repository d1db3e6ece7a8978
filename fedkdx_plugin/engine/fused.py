"""What a training step on a CPU does beside its products, in few passes over memory: compiled from fused.c.

Batch norm, ReLU and pooling of a convolution block are one operation here, clipping and SGD another; each agrees with
PyTorch's to float tolerance. It takes a C compiler (`CC`, or `cc`), once a machine and for about a second; what it made
is kept in the user's cache folder. Without a compiler, or with FEDKDX_FUSED=0, PyTorch's own operations do the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("fused.c")
SWITCH = "FEDKDX_FUSED"
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
OF_THIS_PROCESSOR = "-march=native"
SECONDS = 60  # for a compiler: one that takes longer hangs

POINTER, SIZE, DOUBLE = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double
SIGNATURES = {
    "norm_relu_pool": [POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, DOUBLE, *[POINTER] * 4],
    "norm_relu_pool_backward": [POINTER, POINTER, SIZE, SIZE, SIZE, *[POINTER] * 7],
    "clip_and_move": [SIZE, POINTER, POINTER, POINTER, DOUBLE, DOUBLE],
}


@cache
def operations() -> ctypes.CDLL | None:
    """The compiled operations; None where they are switched off or cannot be had."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    return found


def _compiled() -> Path:
    """Where the library is, made if it is not there. Raises OSError or SubprocessError where it cannot be made."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        raise FileNotFoundError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    kind = "\n".join((platform.machine(), _processor(), compiler, *FLAGS)).encode()
    key = hashlib.sha256(SOURCE.read_bytes() + version + kind).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedkdx"
    path = folder / f"fused-{key}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, path)
        except OSError:  # nothing can be kept there: made anew for this process
            path = Path(tempfile.mkdtemp(prefix="fedkdx-")) / path.name
            _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        for processor in ([OF_THIS_PROCESSOR], []):  # some compilers do not know that flag
            command = [compiler, *FLAGS, *processor, "-o", str(part), str(SOURCE), "-lm"]
            if subprocess.run(command, capture_output=True, timeout=SECONDS).returncode == 0:
                part.replace(path)
                return
        raise subprocess.CalledProcessError(1, command)
    finally:
        part.unlink(missing_ok=True)


def _processor() -> str:
    """What the instructions in the library depend on: a cache folder may be seen by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))


class NormReluPool(torch.autograd.Function):
    """Batch norm by the batch's statistics, ReLU, 1×2 max pooling.

    (n, channels, 1, time) -> (n, channels, 1, time // 2), float32, on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        """`weight` and `bias` are the norm's, named so that autograd sees them; its running statistics are updated."""
        n, channels, _, time = x.shape
        x = x.contiguous(memory_format=torch.channels_last)
        out = x.new_empty(n, 1, time // 2, channels).permute(0, 3, 1, 2)
        mean, rstd, var = statistics = x.new_empty(3, channels)
        operations().norm_relu_pool(
            x.data_ptr(),
            *(n, time, channels),
            *(weight.data_ptr(), bias.data_ptr(), norm.eps),
            *(mean.data_ptr(), rstd.data_ptr(), var.data_ptr(), out.data_ptr()),
        )
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (n * time / (n * time - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, weight, bias, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        n, channels, _, time = x.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        by_x, by_weight, by_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        mean, rstd, _ = statistics
        operations().norm_relu_pool_backward(
            *(x.data_ptr(), gradient.data_ptr()),
            *(n, time, channels),
            *(weight.data_ptr(), bias.data_ptr(), mean.data_ptr(), rstd.data_ptr()),
            *(by_x.data_ptr(), by_weight.data_ptr(), by_bias.data_ptr()),
        )
        return by_x, None, by_weight, by_bias


class Block(nn.Sequential):
    """Convolution, batch norm, ReLU, 1×2 max pooling; the last three in one where it is trained in float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, relu, pool = self
        x = convolution(x)
        if norm.training and self._fits(x, norm):
            return NormReluPool.apply(x, norm, norm.weight, norm.bias)
        return pool(relu(norm(x)))

    @staticmethod
    def _fits(x: Tensor, norm: nn.BatchNorm2d) -> bool:
        tensors = x, norm.weight, norm.bias, norm.running_mean, norm.running_var
        of_a_kind = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        return of_a_kind and x.shape[2] == 1 and x.shape[3] > 1


def fuse(nets: Mapping[str, nn.Module]) -> None:
    """Make `Block`s of all such sequences in the networks; parameters, buffers and names stay as they are."""
    if operations() is None:
        return
    for net in nets.values():
        for part in net.modules():
            if type(part) is nn.Sequential and _is_block(list(part)):
                part.__class__ = Block


def _is_block(layers: Sequence[nn.Module]) -> bool:
    if [type(layer) for layer in layers] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
        return False
    _, norm, _, pool = layers
    if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):  # would not be called
        return False
    sizes = [nn.modules.utils._pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    return sizes == [(1, 2), (1, 2), (0, 0), (1, 1)] and not (pool.ceil_mode or pool.return_indices)


class ClipAndMove:
    """Plain SGD of several networks, the norm of each one's gradient bounded as `clip_grad_norm_` does.

    Args:
        groups: each network's parameters: float32, on a CPU, without gaps in memory.
        rate: learning rate.
        bound: of a gradient's norm; 0: none.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], rate: float, bound: float) -> None:
        self.rate, self.bound = rate, bound
        self._groups = [(list(group), _pointers(group), _sizes(group)) for group in groups]

    @staticmethod
    def takes(parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these can be moved so."""
        return operations() is not None and all(
            p.dtype == torch.float32 and p.device.type == "cpu" and p.untyped_storage().nbytes() == p.nbytes
            for p in parameters
        )

    def __call__(self) -> None:
        """Move all parameters that have a gradient, and forget it."""
        for parameters, places, sizes in self._groups:
            gradients = [_alike(p.grad, p) for p in parameters]
            operations().clip_and_move(len(parameters), places, _pointers(gradients), sizes, self.bound, self.rate)
            for parameter in parameters:
                parameter.grad = None


def _alike(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient laid out in memory as its parameter; autograd makes nearly all of them so."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (POINTER * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (SIZE * len(tensors))(*[tensor.numel() for tensor in tensors])
