"""Layers that `torch.vmap` runs fast over many clients, and that leave out padding rows.

A converted layer keeps its parameters, buffers and names; only its class changes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.interface import float_state


class Rows:
    """The real rows of the current batch, which layers read.

    Attributes:
        mask: (n,), bool; None if all rows are real.
    """

    mask: Tensor | None = None


def reason_against(nets: Mapping[str, nn.Module]) -> str:
    """Return why networks cannot be stacked, as far as their layers show it; '' if nothing does."""
    types = {tensor.dtype for tensor in float_state(nets).values()}
    if len(types) > 1:
        return f"networks hold numbers of several types ({', '.join(sorted(map(str, types)))})"
    owners: dict[int, str] = {}
    for net, module in nets.items():
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            if owners.setdefault(id(tensor), f"{net}.{name}") != f"{net}.{name}":
                return f"{net}.{name}: is the same tensor as {owners[id(tensor)]}, and would be two in a stack"
        for path, part in module.named_modules():
            if reason := _reason(part):
                return f"{net}.{path}: {reason}" if path else f"{net}: {reason}"
    return ""


def _reason(part: nn.Module) -> str:
    if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
        return f"{type(part).__name__} draws random numbers, which would not be each client's own"
    if isinstance(part, nn.RNNBase) and not is_simple_lstm(part):
        return f"{type(part).__name__} of this form has no stacked counterpart (an LSTM of one layer has)"
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        if type(part) not in CONVERTED:
            return f"{type(part).__name__} has no stacked counterpart"
        if part.track_running_stats and part.momentum is None:
            return "batch norm without momentum counts batches, which is no client's own state"
    return ""


def is_simple_lstm(part: nn.RNNBase) -> bool:
    """Return whether a recurrent layer is one that `LSTM` can take the place of."""
    return type(part) is nn.LSTM and part.num_layers == 1 and not part.bidirectional and part.proj_size == 0


def convert(
    nets: Mapping[str, nn.Module], rows: Rows, kinds: Collection[type[nn.Module]] | None = None
) -> dict[str, nn.Module]:
    """Return copies of the networks with converted layers; batch norm reads `rows`.

    Args:
        kinds: of the layers that are converted; None: all that can be.
    """
    copies = copy.deepcopy(dict(nets))
    for net in copies.values():
        for part in net.modules():
            if type(part) in (CONVERTED if kinds is None else kinds) and _convertible(part):
                part.__class__ = CONVERTED[type(part)]
                vars(part)["rows"] = rows
    return copies


def _convertible(part: nn.Module) -> bool:
    """Return whether a layer can be converted.

    Other forms of convolution stay as they are: correct, but slow, as vmap turns them into grouped ones.
    """
    if isinstance(part, nn.modules.conv._ConvNd):
        plain = part.groups == 1 and part.padding_mode == "zeros" and not isinstance(part.padding, str)
        along_time = part.kernel_size[:-1] == (1,) * (len(part.kernel_size) - 1)
        return plain and along_time and not any(part.padding[:-1]) and set(part.stride[:-1]) <= {1}
    return True


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> Tensor:
    """Convolve along the last axis by one matrix product: (n, inputs, height, time) -> (n, outputs, height, ...).

    Windows are laid out position first, then channel, as both input and output have channels innermost in memory.

    Args:
        x: (n, inputs, height, time).
        weight: (outputs, inputs, kernel).
        bias: (outputs,), or None.
        stride, padding, dilation: as in `nn.Conv1d`.
    """
    kernel = weight.shape[2]
    if padding:
        x = F.pad(x, (padding, padding))
    windows = x.unfold(3, dilation * (kernel - 1) + 1, stride)[..., ::dilation]  # (n, inputs, height, steps, kernel)
    n, _, height, steps, _ = windows.shape
    columns = windows.permute(0, 2, 3, 4, 1).reshape(n * height * steps, -1)
    matrix = weight.permute(2, 1, 0).reshape(-1, weight.shape[0])
    out = columns @ matrix if bias is None else torch.addmm(bias, columns, matrix)
    result: Tensor = out.unflatten(0, (n, height, steps))
    return result.permute(0, 3, 1, 2)


class Conv1d(nn.Conv1d):
    """1-D convolution as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (n, inputs, time)."""
        padding = int(self.padding[0])  # numbers: see `_convertible`
        return convolve(x.unsqueeze(2), self.weight, self.bias, self.stride[0], padding, self.dilation[0]).squeeze(2)


class Conv2d(nn.Conv2d):
    """Convolution with a kernel of height 1 as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (n, inputs, height, time)."""
        weight, padding = self.weight.squeeze(2), int(self.padding[1])  # numbers: see `_convertible`
        return convolve(x, weight, self.bias, self.stride[1], padding, self.dilation[1])


class LSTM(nn.LSTM):
    """LSTM of one layer, computed step by step: the same equations, in products that vmap stacks."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def forward(  # type: ignore[override]  # nothing here packs sequences
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute outputs and states as `nn.LSTM` does: (n, time, inputs) if `batch_first`, else (time, n, inputs)."""
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


def _wide(x: Tensor) -> Tensor:
    """Return numbers of 16 bits in float32, in which means and variances are to be taken, and others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm by its formula over the real rows, in training and in evaluation, with a mask and without.

    `F.batch_norm` under `torch.vmap` is a different operation for each memory layout, dtype and device, and not all of
    them have a batching rule.
    """

    rows: Rows

    def forward(self, x: Tensor) -> Tensor:
        x = _wide(x)
        across = (1, -1, *[1] * (x.ndim - 2))
        running_mean, running_var = self.running_mean, self.running_var
        if not self.training and running_mean is not None and running_var is not None:
            scale = self._scale(running_var)
            shift = -running_mean * scale if self.bias is None else self.bias - running_mean * scale
            return x * scale.view(across) + shift.view(across)
        weights, count = self._weights(x)
        dims = (0, *range(2, x.ndim))
        mean = x.mean(dims) if weights is None else (x * weights).sum(dims)
        centred = x - mean.view(across)
        squares = centred.square()
        variance = squares.mean(dims) if weights is None else (squares * weights).sum(dims)
        if self.training and running_mean is not None and running_var is not None:
            others = max(count - 1, 1) if isinstance(count, int) else (count - 1).clamp(min=1)
            self._remember(running_mean, mean.detach())
            self._remember(running_var, variance.detach() * (count / others))
        y = centred * self._scale(variance).view(across)
        return y if self.bias is None else y + self.bias.view(across)

    def _scale(self, variance: Tensor) -> Tensor:
        scale = (variance + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight

    def _weights(self, x: Tensor) -> tuple[Tensor | None, Tensor | int]:
        """Return the weights of the rows in a mean, (n, 1, ...), None if equal, and the number of values per channel.

        A network may receive several consecutive rows for each row of the batch (FedMAT's segments).

        Raises:
            ValueError: the number of rows is not a multiple of the batch's.
        """
        values, mask = x[0, 0].numel(), self.rows.mask
        if mask is None:
            return None, len(x) * values
        several, left = divmod(len(x), len(mask))
        if left:
            raise ValueError(f"batch norm meets {len(x)} rows of a batch of {len(mask)}")
        real = mask.unsqueeze(1).expand(-1, several).reshape(-1).to(x.dtype)
        count = real.sum() * values
        return (real / count.clamp(min=1)).view(-1, *[1] * (x.ndim - 1)), count

    def _remember(self, running: Tensor, new: Tensor) -> None:
        """Move a running statistic towards a batch's own."""
        assert self.momentum is not None  # see `_reason`
        running.add_((new - running) * self.momentum)


class GroupNorm(nn.GroupNorm):
    """Group norm by its formula, for the reason of `_BatchNorm`; each window is normalised by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, channels, ...)."""
        x = _wide(x)
        grouped = x.reshape(len(x), self.num_groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        scaled = centred * (centred.square().mean(2, keepdim=True) + self.eps).rsqrt()
        y = scaled.reshape(x.shape)
        across = (1, -1, *[1] * (x.ndim - 2))
        return y * self.weight.view(across) + self.bias.view(across) if self.affine else y


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """See `_BatchNorm`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """See `_BatchNorm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """See `_BatchNorm`."""


CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.LSTM: LSTM,
    nn.GroupNorm: GroupNorm,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
