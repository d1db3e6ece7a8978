"""DP-SGD: training steps that hide each single window of a client (Abadi et al. 2016, arXiv:1607.00133, Algorithm 1).

A step draws a lot: every window with probability q = B/n, by itself. The gradient of each window's losses, by all
parameters that the step moves, of all networks together, is scaled down to the norm C; with noise N(0, z²C²) on their
sum, the step goes along

    g = (Σ_i g_i min(1, C/‖g_i‖) + N(0, z²C² I)) / B

Nothing else of the client's work sees its windows: they are out of reach while it receives, trains and replies
(`out_of_sight`). What the steps leave is therefore all that its reply and its state know of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedkdx_plugin.engine.backends.stacked.layers import Rows, convert, is_simple_lstm
from fedkdx_plugin.engine.randomness import generator
from fedkdx_plugin.engine.steps import Steps
from fedkdx_plugin.native.library import left_out
from registry import contract
from registry.blame import wrong
from registry.errors import UserError
from registry.interface import Batch, Client, Networks, Server
from registry.normalisation import is_batch_norm

MOST_VALUES = 1 << 24  # numbers of all gradients held at once, the same on every device: 64 MB in float32
NOT_STACKED = "gradients are taken window by window, which is not done for several clients at once"
PREFIX = "net_"  # so that no network's name equals an attribute of `nn.Module`


@dataclass(frozen=True)
class WindowPrivacy:
    """Options of DP-SGD.

    Attributes:
        clip: bound C on the norm of a window's gradient.
        noise: z; the standard deviation of the noise on a sum of gradients is z·C.
    """

    clip: float
    noise: float


def sampling_rate(windows: int, batch_size: int) -> float:
    """Return q, the probability with which a window is in a lot; 1 where a client has no more windows than a batch."""
    return min(1.0, batch_size / windows)


def lots(windows: int, batch_size: int, count: int, seed: int, round: int, client: int) -> list[Tensor]:
    """Draw lots of a client's windows: positions, ascending, each window with probability `sampling_rate` by itself.

    Args:
        windows: number of the client's windows.
        batch_size: expected size B of a lot.
        count: number of lots.
        seed, round, client: what the draw depends on.
    """
    rng, rate = generator(seed, "lots", round, client), sampling_rate(windows, batch_size)
    draws = (torch.rand(windows, generator=rng, dtype=torch.float64) for _ in range(count))
    return [(draw < rate).nonzero().squeeze(1) for draw in draws]


class PrivateSteps(Steps):
    """Steps along noisy sums of clipped gradients; a batch is a lot, which may be empty.

    How parameters move (`--optimizer`, `Client.update`) and the bound on each network's gradient (`--clip-norm`) are as
    in `Steps`, but with the noisy gradient in the place of the gradient.

    Args:
        client, nets, context, bound, optimizer: see `Steps`.
        privacy: bound and noise.
        size: B, by which the sum is divided.
        shape: shape of a window.
        rng: generator of the noise.
    """

    def __init__(
        self,
        client: Client,
        nets: Mapping[str, nn.Module],
        context: Mapping[str, Tensor],
        bound: float,
        optimizer: str,
        privacy: WindowPrivacy,
        size: float,
        shape: Sequence[int],
        rng: torch.Generator,
    ) -> None:
        super().__init__(client, nets, context, bound, optimizer)
        self.privacy, self.size, self.rng = privacy, size, rng
        self._gradients = Gradients(client, nets, context)
        named = {f"{net}.{name}": p for net, module in self.trained.items() for name, p in module.named_parameters()}
        self._reached = self._find_reached({n: p for n, p in named.items() if p.requires_grad}, shape)

    def _find_reached(self, named: Mapping[str, nn.Parameter], shape: Sequence[int]) -> dict[str, nn.Parameter]:
        """Return the parameters on which the losses depend, found on a window of zeros: only they get noise."""
        like = next(iter(named.values()))
        window = Batch(like.new_zeros(1, *shape), torch.zeros(1, dtype=torch.int64, device=like.device))
        losses = contract.losses(self.client, self.client.losses(self.nets, window, self.context))
        loss = reduce(add, losses.values())
        if not loss.requires_grad:
            raise wrong(self.client, "losses", "a loss that depends on a network that is trained", losses)
        slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {name: p for (name, p), slope in zip(named.items(), slopes, strict=True) if slope is not None}

    def take(self, batch: Batch, still: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take a step on a lot, without moving the parameters `still`; return the mean of its windows' losses.

        That of an empty lot is 0.
        """
        fixed = set(map(id, still))
        moving = {name: p for name, p in self._reached.items() if id(p) not in fixed}
        sums, losses = self._gradients.clipped_sum(moving, batch, self.privacy.clip)
        deviation = self.privacy.noise * self.privacy.clip
        for name, parameter in moving.items():
            noise = torch.randn(parameter.shape, generator=self.rng, dtype=parameter.dtype).to(parameter.device)
            parameter.grad = (sums[name] + deviation * noise) / self.size
        for parameter in self._unreached:
            if parameter.grad is None and id(parameter) not in fixed:
                parameter.grad = torch.zeros_like(parameter)
        self._move()
        return losses.mean() if len(losses) else losses.sum()


class Gradients(nn.Module):
    """Gradients of a client's losses, window by window.

    The losses are called on a stand-in client that has `task` and `params` only, and see one window at a time: no
    window can reach another one's gradient.

    Args:
        client: the client.
        nets: its networks, whose tensors are used as they are when gradients are asked for.
        context: its context.
    """

    def __init__(self, client: Client, nets: Mapping[str, nn.Module], context: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._copies = convert(nets, Rows(), [nn.LSTM])  # that PyTorch cannot transform; it can all others
        for name, net in self._copies.items():
            net.train(name not in client.frozen)
            self.add_module(PREFIX + name, net)
        self._originals, self._context = dict(nets), context
        self._stand_in = object.__new__(type(client))
        self._stand_in.task, self._stand_in.params = client.task, client.params

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the losses on one window x, (channels, 1, time), of class y, ()."""
        window = Batch(x.unsqueeze(0), y.unsqueeze(0))
        losses = self._stand_in.losses(Networks(self._copies), window, self._context)
        return reduce(add, contract.losses(self._stand_in, losses).values())

    def clipped_sum(
        self, moving: Mapping[str, nn.Parameter], batch: Batch, clip: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return Σ_i g_i min(1, C/‖g_i‖) over the windows of a batch, by full name, and their losses, (n,).

        g_i is the gradient of window i by all `moving` parameters together. One that is not finite counts as 0, as
        any other value would say that there is such a window.

        Args:
            moving: parameters by full name.
            batch: the windows; there may be none.
            clip: C.
        """
        sums = {name: torch.zeros_like(p) for name, p in moving.items()}
        losses = [batch.x.new_empty(0)]
        values = max(1, sum(p.numel() for p in moving.values()))
        for part in batch.split(max(1, MOST_VALUES // values)):
            gradients, own = self.of(moving, part)
            losses.append(own)
            norms = norms_of(gradients)
            if not norms.isfinite().all():
                gradients = {name: gradient.nan_to_num(0.0, 0.0, 0.0) for name, gradient in gradients.items()}
            factors = torch.where(norms.isfinite(), (clip / norms).clamp(max=1), 0)
            for name, gradient in gradients.items():
                sums[name] += torch.tensordot(factors.to(gradient.dtype), gradient, 1)
        return sums, torch.cat(losses)

    @torch.no_grad()
    def of(self, moving: Mapping[str, nn.Parameter], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return each window's gradient, full name -> (n, ...), and its loss, (n,)."""
        tensors = {
            f"{net}.{name}": tensor
            for net, module in self._originals.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        fixed = {PREFIX + name: tensor.detach() for name, tensor in tensors.items() if name not in moving}

        def loss_of(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            state = fixed | {PREFIX + name: tensor for name, tensor in own.items()}
            loss: Tensor = functional_call(self, state, (x, y), tie_weights=False)
            return loss

        own = {name: p.detach() for name, p in moving.items()}
        with left_out():
            each = vmap(grad_and_value(loss_of), (None, 0, 0), randomness="different")
            gradients, losses = each(own, batch.x, batch.y)
        return gradients, losses


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of each window's gradient by all parameters together, (n,), float64, in which it is finite."""
    parts = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients.values()]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms


class _Withheld(Batch):
    """Stands for windows that may not be read."""

    def __init__(self, client: Client) -> None:
        vars(self)["client"] = client  # as the dataclass is frozen

    def __getattribute__(self, name: str) -> Any:
        if name in ("x", "y", "mask", "weights", "rows", "split"):
            _refuse(object.__getattribute__(self, "client"))
        return super().__getattribute__(name)


def _refuse(client: Client) -> NoReturn:
    raise UserError(
        f"--dp example: {type(client).__name__} reads its windows beside the losses, where nothing hides them; leave "
        "the algorithm or the option out"
    )


@contextmanager
def out_of_sight(client: Client) -> Iterator[None]:
    """Withhold a client's windows in the block: reading them raises UserError."""
    before = client.data, client.validation
    client.data = client.validation = _Withheld(client)
    try:
        yield
    finally:
        client.data, client.validation = before


def check(algorithms: Mapping[str, tuple[type[Server], Any]]) -> None:
    """Raise UserError that names all algorithms with clients whose windows DP-SGD does not hide.

    Args:
        algorithms: name -> server class and hyper-parameters.
    """
    refused = [
        f"{name}, which {reason}"
        for name, (server, params) in algorithms.items()
        if (reason := uncovered(server, params))
    ]
    if refused:
        raise UserError(f"--dp example: not with {'; nor with '.join(refused)}")


def uncovered(algorithm: type[Server], params: Any) -> str:
    """Return how windows are seen elsewhere than in the gradients that DP-SGD takes, after 'which'; '' if nowhere."""
    return "uploads the windows themselves" if algorithm.pools_data else _meeting(algorithm.Client, params)


def _meeting(client: type[Client], params: Any) -> str:
    """Return how windows meet elsewhere than in a mean of losses; '' if they do not.

    A class that adds methods to one that has declared it must declare it anew.
    """
    for own in client.__mro__:
        if "windows_meet" in vars(own) or "meeting" in vars(own):
            break
        methods = [n for n, value in vars(own).items() if callable(value) or isinstance(value, (classmethod, property))]
        if methods:
            return f"{Client.windows_meet} ({own.__name__} has {methods[0]}, and no windows_meet)"
    return contract.meeting(client, params)


def check_networks(nets: Mapping[str, nn.Module]) -> None:
    """Raise UserError for networks in which the windows of a batch meet, or that gradients by window cannot pass."""
    for net, module in nets.items():
        for path, part in module.named_modules():
            if isinstance(part, nn.RNNBase) and not is_simple_lstm(part):
                raise UserError(
                    f"--dp example: {net}.{path} is {type(part).__name__} of a form for which there are no gradients "
                    "by window (an LSTM of one layer has them); take another model (-m)"
                )
            if is_batch_norm(part):
                raise UserError(
                    f"--dp example: {net}.{path} is batch norm, in which the windows of a batch meet; --norm group "
                    "takes its place"
                )
