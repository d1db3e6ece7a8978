"""The losses of a client class as a function of explicit state, vectorised over clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedkdx_plugin.engine.backends.stacked.layers import Rows, convert
from fedkdx_plugin.engine.backends.stacked.state import Arrangement, State
from fedkdx_plugin.native.library import left_out
from registry import contract
from registry.interface import Batch, Client, Networks, Output

PREFIX = "net_"  # so that no network's name equals an attribute of `nn.Module`

Ask = Callable[[Sequence[str], Sequence[Mapping[str, Tensor]], Tensor], list[Output]]


class Losses(nn.Module):
    """Losses of a client class for several clients at once.

    They are called on a stand-in client that has `task` and `params` only, which is all that losses may use.

    Args:
        client: any of the clients.
        nets: the networks; copied.

    Attributes:
        arrangement: position of the networks in the state.
    """

    def __init__(self, client: Client, nets: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.rows = Rows()
        self.copies = convert(nets, self.rows)
        for name, net in self.copies.items():
            net.train(name not in client.frozen)
            self.add_module(PREFIX + name, net)
        self.arrangement = Arrangement(nets, client.frozen)
        # one network of each group of several, called with the state of all; in a list, as it is no submodule
        firsts = {group.nets[0]: nets[group.nets[0]] for group in self.arrangement.groups if len(group.nets) > 1}
        patterns = convert(firsts, self.rows)
        for name, pattern in patterns.items():
            pattern.train(name not in client.frozen)
        self._patterns = [[patterns.get(group.nets[0])] for group in self.arrangement.groups]
        self._stand_in = object.__new__(type(client))
        self._stand_in.task, self._stand_in.params = client.task, client.params

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        context: Mapping[str, Tensor],
        groups: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """Return the sum of one client's losses on a batch.

        Args:
            x, y, mask, weights: see `Batch`.
            context: the client's context.
            groups: for each group of networks that are evaluated together, local name -> (networks, ...).
        """
        self.rows.mask = mask
        try:
            nets = _OnePass(self.copies, self._asked_together, groups)
            losses = contract.losses(self._stand_in, self._stand_in.losses(nets, Batch(x, y, mask, weights), context))
        finally:
            self.rows.mask = None
        return reduce(add, losses.values())

    def of(self, state: State, batch: Batch, context: Mapping[str, Tensor]) -> Tensor:
        """Return the losses of all clients, (clients,); running statistics in `state` are updated.

        Args:
            state, batch, context: as for one client, with a leading axis of clients.
        """
        groups: list[Mapping[str, Tensor]] = []
        own: dict[str, Tensor] = {}
        for group, trained, other in zip(self.arrangement.groups, *state, strict=True):
            tensors = group.trained.split(trained) | group.other.views(other)  # local name -> (clients, networks, ...)
            groups.append(tensors if len(group.nets) > 1 else {})
            for name, tensor in tensors.items():
                # no unbind for a single network, whose gradient would take an operation for each tensor
                parts = tensor.unbind(1) if len(group.nets) > 1 else (tensor.squeeze(1),)
                own |= {f"{PREFIX}{net}.{name}": one for net, one in zip(group.nets, parts, strict=True)}

        def one(
            own: dict[str, Tensor],
            groups: Sequence[Mapping[str, Tensor]],
            x: Tensor,
            y: Tensor,
            mask: Tensor | None,
            weights: Tensor | None,
            context: Mapping[str, Tensor],
        ) -> Tensor:
            loss: Tensor = functional_call(self, own, (x, y, mask, weights, context, groups), tie_weights=False)
            return loss

        with left_out():
            of_batch = (batch.x, batch.y, batch.mask, batch.weights)
            in_dims = (0, 0, *(None if part is None else 0 for part in of_batch), 0)
            losses: Tensor = vmap(one, in_dims)(own, groups, *of_batch, dict(context))
        return losses

    def updated(
        self,
        trained: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rates: Tensor,
        step: Tensor,
        context: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Return the parameters after a step as the client class's own `update` gives them.

        Args:
            trained, gradients: for each group of networks, (clients, networks, values).
            rates: (clients,).
            step: ().
            context: as for one client, with a leading axis of clients.
        """
        groups = self.arrangement.groups
        places = {
            net: (group, place)
            for group, one in enumerate(groups)
            for place, net in enumerate(one.nets)
            if trained[group].shape[2]
        }
        weights, slopes = (
            {net: groups[group].trained.dense(tensors[group][:, place]) for net, (group, place) in places.items()}
            for tensors in (trained, gradients)
        )
        update = vmap(partial(contract.update, self._stand_in), (0, 0, 0, None, 0))
        moved = update(weights, slopes, rates, step, dict(context))
        return [
            torch.stack([group.trained.spread(moved[net]) for net in group.nets], 1) if own.shape[2] else own
            for group, own in zip(groups, trained, strict=True)
        ]

    def _asked_together(self, names: Sequence[str], groups: Sequence[Mapping[str, Tensor]], x: Tensor) -> list[Output]:
        """Return the outputs of networks: of a whole group in one pass, of others one after the other."""
        for group, (pattern,), tensors in zip(self.arrangement.groups, self._patterns, groups, strict=True):
            if pattern is not None and sorted(names) == sorted(group.nets):

                def ask(own: Mapping[str, Tensor], x: Tensor, pattern: nn.Module = pattern) -> tuple[Tensor, ...]:
                    return tuple(functional_call(pattern, dict(own), (x,), tie_weights=False))

                features, logits = vmap(ask, (0, None))(tensors, x)
                by_name = dict(zip(group.nets, map(Output, features.unbind(0), logits.unbind(0)), strict=True))
                return [by_name[name] for name in names]
        return [self.copies[name](x) for name in names]

    def logits(self, net: str, states: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of a network in several states, each on its own windows: (clients, n, classes).

        Args:
            net: name of the network.
            states: full name -> (clients, ...).
            x: (clients, n, ...).
            mask: (clients, n), bool, the real windows.
        """
        module = self.copies[net]
        own = {name.removeprefix(f"{net}."): tensor for name, tensor in states.items()}

        def one(state: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
            self.rows.mask = mask
            output: Output = functional_call(module, dict(state), (x,), tie_weights=False)
            return output.logits

        mode = module.training
        module.eval()
        try:
            with left_out():
                logits: Tensor = vmap(one)(own, x, mask)
        finally:
            self.rows.mask = None
            module.train(mode)
        return logits


class _OnePass(Networks):
    """Networks whose `outputs` evaluates a group in one pass."""

    def __init__(self, nets: Mapping[str, nn.Module], ask: Ask, groups: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__(nets)
        self._ask, self._groups = ask, groups

    def outputs(self, x: Tensor, *names: str) -> list[Output]:
        return self._ask(names, self._groups, x)
