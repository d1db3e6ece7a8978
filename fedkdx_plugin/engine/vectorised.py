"""Layers in a form that `torch.vmap` runs fast over many clients, and that leaves out rows which only fill a batch up.

A converted layer keeps its parameters, buffers and names; only its class is another one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Rows:
    """What layers must know of the batch at work.

    Attributes:
        mask: (n,), bool, the real rows; None where all are.
        fewest: number of real rows of the client that has the fewest.
    """

    mask: Tensor | None = None
    fewest: int = 0


def reason_against(nets: Mapping[str, nn.Module]) -> str:
    """Why networks cannot be trained stacked, as far as their layers tell; '' where nothing speaks against it."""
    for net, module in nets.items():
        for path, part in module.named_modules():
            if reason := _reason(part):
                return f"{net}.{path}: {reason}" if path else f"{net}: {reason}"
    return ""


def _reason(part: nn.Module) -> str:
    if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
        return f"{type(part).__name__} draws random numbers, which would not be each client's own"
    if isinstance(part, nn.RNNBase) and not _is_simple_lstm(part):
        return f"{type(part).__name__} of this form has no stacked counterpart (an LSTM of one layer has)"
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        if type(part) not in CONVERTED:
            return f"{type(part).__name__} has no stacked counterpart"
        if part.track_running_stats and part.momentum is None:
            return "batch norm without momentum counts batches, which is no client's own state"
    return ""


def _is_simple_lstm(part: nn.RNNBase) -> bool:
    return type(part) is nn.LSTM and part.num_layers == 1 and not part.bidirectional and part.proj_size == 0


def convert(nets: Mapping[str, nn.Module], rows: Rows) -> dict[str, nn.Module]:
    """Copies of the networks with converted layers; batch norm looks at `rows`."""
    copies = copy.deepcopy(dict(nets))
    for net in copies.values():
        for part in net.modules():
            if type(part) in CONVERTED and _convertible(part):
                part.__class__ = CONVERTED[type(part)]
                part.rows = rows
    return copies


def _convertible(part: nn.Module) -> bool:
    """Convolutions of other forms stay as they are: right, but slow, as vmap makes grouped ones of them."""
    if isinstance(part, nn.modules.conv._ConvNd):
        plain = part.groups == 1 and part.padding_mode == "zeros" and not isinstance(part.padding, str)
        along_time = part.kernel_size[:-1] == (1,) * (len(part.kernel_size) - 1)
        return plain and along_time and not any(part.padding[:-1]) and set(part.stride[:-1]) <= {1}
    return True


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> Tensor:
    """Convolution along the last axis as one matrix product: (n, inputs, height, time) -> (n, outputs, height, ...).

    Windows are laid out position first, then channel, as both input and output have channels innermost in memory.

    Args:
        weight: (outputs, inputs, kernel).
    """
    kernel = weight.shape[2]
    if padding:
        x = F.pad(x, (padding, padding))
    windows = x.unfold(3, dilation * (kernel - 1) + 1, stride)[..., ::dilation]  # (n, inputs, height, steps, kernel)
    n, _, height, steps, _ = windows.shape
    columns = windows.permute(0, 2, 3, 4, 1).reshape(n * height * steps, -1)
    matrix = weight.permute(2, 1, 0).reshape(-1, weight.shape[0])
    out = columns @ matrix if bias is None else torch.addmm(bias, columns, matrix)
    return out.unflatten(0, (n, height, steps)).permute(0, 3, 1, 2)


class Conv1d(nn.Conv1d):
    """A 1-D convolution as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(x.unsqueeze(2), self.weight, self.bias, self.stride[0], self.padding[0], self.dilation[0])
        return y.squeeze(2)


class Conv2d(nn.Conv2d):
    """A convolution with a kernel of height 1 as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.squeeze(2)
        return convolve(x, weight, self.bias, self.stride[1], self.padding[1], self.dilation[1])


class LSTM(nn.LSTM):
    """One layer, step by step: the same equations, in products that stack."""

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `nn.LSTM`: (n, time, inputs) where `batch_first`, else (time, n, inputs)."""
        gates = F.linear(x, self.weight_ih_l0)
        if self.bias:
            gates = gates + (self.bias_ih_l0 + self.bias_hh_l0)
        steps = gates.unbind(1 if self.batch_first else 0)
        hidden, cell = (
            (part.squeeze(0) for part in hx) if hx else [steps[0].new_zeros(len(steps[0]), self.hidden_size)] * 2
        )
        recurrent, outputs = self.weight_hh_l0.T, []
        for step in steps:
            enter, forget, update, leave = torch.addmm(step, hidden, recurrent).chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * update.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            outputs.append(hidden)
        out = torch.stack(outputs, 1 if self.batch_first else 0)
        return out, (hidden.unsqueeze(0), cell.unsqueeze(0))


class _Masked:
    """Batch norm over the real rows alone."""

    rows: Rows

    def forward(self, x: Tensor) -> Tensor:
        own_statistics = self.training or self.running_mean is None
        if own_statistics and self.rows.mask is not None:
            return self._over_real_rows(x)
        momentum = self.momentum or 0.0
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, own_statistics, momentum, self.eps
        )

    def _over_real_rows(self, x: Tensor) -> Tensor:
        dims, across = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        real = self._real(x).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        count = real.sum() * x[0, 0].numel()
        mean = (x * real).sum(dims) / count
        centred = x - mean.view(across)
        variance = (centred.square() * real).sum(dims) / count
        if self.training and self.running_mean is not None:
            unbiased = variance * (count / (count - 1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.mul_(1 - self.momentum).add_(new.detach(), alpha=self.momentum)
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        y = centred * scale.view(across)
        return y if self.bias is None else y + self.bias.view(across)

    def _real(self, x: Tensor) -> Tensor:
        """(rows of x,): a network may see several rows for each of the batch, one after the other (FedMAT's segments).

        Raises:
            ValueError: rows that are no such multiple, or, as PyTorch's own, a single value per channel.
        """
        mask = self.rows.mask
        several, left = divmod(len(x), len(mask))
        if left:
            raise ValueError(f"batch norm meets {len(x)} rows of a batch of {len(mask)}")
        if self.training and self.rows.fewest * several * x[0, 0].numel() == 1:
            raise ValueError("Expected more than 1 value per channel when training, got one row")
        return mask.repeat_interleave(several)


class BatchNorm1d(_Masked, nn.BatchNorm1d):
    """See `_Masked`."""


class BatchNorm2d(_Masked, nn.BatchNorm2d):
    """See `_Masked`."""


class BatchNorm3d(_Masked, nn.BatchNorm3d):
    """See `_Masked`."""


CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.LSTM: LSTM,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
