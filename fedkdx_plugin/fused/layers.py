"""A convolution block, as all our models begin with, as one operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedkdx_plugin.fused import native

aten = torch.ops.aten
BLOCK = 16  # filters that a convolution has a multiple of, as in vectors.h


class ConvolutionBlock(torch.autograd.Function):
    """1×k convolution, batch norm by the batch's statistics, ReLU, 1×2 max pooling.

    (n, inputs, 1, time) -> (n, filters, 1, ...), float32, on a CPU. On one thread the convolution is ours, too; on more
    it is PyTorch's, which divides it among them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.Module], *parameters: Tensor) -> Tensor:
        """`parameters` are those of the convolution and the norm, named so that autograd sees them.

        The norm's running statistics are updated.
        """
        convolution, norm, *_ = layers
        weight, bias, scale, shift = parameters
        x, weight = _channels_last(x), _channels_last(weight)
        padding = convolution.padding
        ours = torch.get_num_threads() == 1 and not any(padding)
        ours = ours and (x.shape[1] % BLOCK == 0 or not ctx.needs_input_grad[0])
        y = _convolve(x, weight, bias) if ours else _channels_last(F.conv2d(x, weight, bias, padding=padding))
        n, filters, _, time = y.shape
        statistics, out = x.new_empty(2, filters), _empty(n, time // 2, filters)
        native.operations().norm_relu_pool(
            y.data_ptr(),
            *(n, time, filters),
            *(scale.data_ptr(), shift.data_ptr(), norm.eps),
            *(norm.momentum, norm.running_mean.data_ptr(), norm.running_var.data_ptr()),
            *(*_rows(statistics), out.data_ptr()),
        )
        norm.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, weight, y, scale, shift, statistics)
        ctx.padding, ctx.ours = padding, ours
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, scale, shift, statistics = ctx.saved_tensors
        n, filters, _, time = y.shape
        gradient = _channels_last(gradient)
        margin = weight.shape[3] - 1 if ctx.ours else 0
        by_y, by_norm = _empty(n, time + 2 * margin, filters), x.new_empty(2, filters)
        native.operations().norm_relu_pool_backward(
            *(y.data_ptr(), gradient.data_ptr()),
            *(n, time, filters),
            *(scale.data_ptr(), shift.data_ptr(), *_rows(statistics)),
            *(margin, by_y.data_ptr(), *_rows(by_norm)),
        )
        # batch norm takes its input's mean away: no constant that is added before it can be felt
        by_bias = torch.zeros_like(shift)
        if ctx.ours:
            by_x, by_weight = _convolve_backward(x, weight, by_y, ctx.needs_input_grad[0])
        else:
            by_x, by_weight, _ = aten.convolution_backward(
                *(by_y, x, weight, None, [1, 1], ctx.padding, [1, 1], False, [0, 0], 1),
                [ctx.needs_input_grad[0], True, False],
            )
        return by_x, None, by_weight, by_bias, *by_norm.unbind()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1×k convolution: (n, inputs, 1, time) -> (n, filters, 1, time - k + 1)."""
    (n, inputs, _, time), (filters, _, _, taps) = x.shape, weight.shape
    turned, out = torch.empty_like(weight), _empty(n, time - taps + 1, filters)
    native.operations().convolve(
        x.data_ptr(),
        *(n, time, inputs),
        *(weight.data_ptr(), bias.data_ptr(), taps, filters),
        *(turned.data_ptr(), out.data_ptr()),
    )
    return out


def _convolve_backward(x: Tensor, weight: Tensor, by_out: Tensor, and_by_x: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients by x, where asked for, and by weight, from that by the result, k - 1 zeros around each window."""
    (n, inputs, _, time), (filters, _, _, taps) = x.shape, weight.shape
    turned, by_weight = torch.empty_like(weight), torch.empty_like(weight)
    by_x = torch.empty_like(x) if and_by_x else None
    native.operations().convolve_backward(
        *(x.data_ptr(), by_out.data_ptr()),
        *(n, time, inputs),
        *(weight.data_ptr(), taps, filters),
        *(turned.data_ptr(), None if by_x is None else by_x.data_ptr(), by_weight.data_ptr()),
    )
    return by_x, by_weight


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(n: int, time: int, channels: int) -> Tensor:
    """(n, channels, 1, time), the channels innermost."""
    shape, strides = (n, channels, 1, time), (time * channels, 1, time * channels, channels)
    return torch.empty_strided(shape, strides, dtype=torch.float32)


def _rows(pair: Tensor) -> tuple[int, int]:
    """Where the two rows of a tensor lie."""
    first = pair.data_ptr()
    return first, first + pair.element_size() * pair.shape[1]


class Block(nn.Sequential):
    """Convolution, batch norm, ReLU, 1×2 max pooling: in one where it is trained in float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm, relu, pool = self
        if norm.training and native.operations() is not None and self._fits(x, convolution, norm):
            return ConvolutionBlock.apply(x, self, convolution.weight, convolution.bias, norm.weight, norm.bias)
        return pool(relu(norm(convolution(x))))

    @staticmethod
    def _fits(x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
        tensors = x, convolution.weight, norm.weight, norm.running_mean
        of_a_kind = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        long_enough = (
            x.dim() == 4 and x.shape[2] == 1 and x.shape[3] + 2 * convolution.padding[1] > convolution.kernel_size[1]
        )
        return of_a_kind and long_enough


def fuse(nets: Mapping[str, nn.Module]) -> None:
    """Make `Block`s of all such sequences in the networks; parameters, buffers and names stay as they are."""
    if native.operations() is None:
        return
    for net in nets.values():
        for part in net.modules():
            if type(part) is nn.Sequential and _is_block(list(part)):
                part.__class__ = Block


def _is_block(layers: Sequence[nn.Module]) -> bool:
    if [type(layer) for layer in layers] != [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]:
        return False
    convolution, norm, _, pool = layers
    if not _is_plain(convolution):
        return False
    if not (norm.affine and norm.track_running_stats and norm.momentum is not None):
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers):  # would not be called
        return False
    sizes = [nn.modules.utils._pair(size) for size in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    return sizes == [(1, 2), (1, 2), (0, 0), (1, 1)] and not (pool.ceil_mode or pool.return_indices)


def _is_plain(convolution: nn.Conv2d) -> bool:
    """1×k, moved by one sample at a time, of a number of filters that vectors can be filled with."""
    height, _ = convolution.kernel_size
    plain = convolution.stride == convolution.dilation == (1, 1) and convolution.groups == height == 1
    zeros = convolution.padding_mode == "zeros" and convolution.padding[0] == 0  # not a word
    return plain and zeros and convolution.bias is not None and convolution.out_channels % BLOCK == 0
