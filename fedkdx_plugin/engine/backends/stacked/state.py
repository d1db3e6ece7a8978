"""The state of several clients in a few tensors with a leading axis of clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from registry.interface import float_state, matches

ALIGNED = 16  # values; alignment of tensors in a row, so that products can read it in large words


class Part:
    """Layout of tensors one after the other in the last axis of another tensor.

    Attributes:
        shapes: name -> shape.
        width: size of the last axis, including the gaps of alignment.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self._starts, self.width = {}, 0
        for name, shape in self.shapes.items():
            self._starts[name] = self.width
            self.width += shape.numel() + -shape.numel() % ALIGNED

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return name -> (..., *shape), views of (..., width)."""
        lead = flat.shape[:-1]
        return {
            name: flat.narrow(-1, self._starts[name], shape.numel()).view((*lead, *shape))
            for name, shape in self.shapes.items()
        }

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the same views by one operation, whose gradient is one operation too."""
        sizes = [size for shape in self.shapes.values() for size in (shape.numel(), -shape.numel() % ALIGNED) if size]
        lead, parts = flat.shape[:-1], iter(flat.split_with_sizes(sizes, -1))
        tensors = {}
        for name, shape in self.shapes.items():
            own = next(parts) if shape.numel() else flat[..., :0]
            tensors[name] = own.view((*lead, *shape))
            if -shape.numel() % ALIGNED:
                next(parts)
        return tensors

    def dense(self, flat: Tensor) -> Tensor:
        """Return the values alone, one tensor's after the other's, without the gaps: (..., width) -> (..., values)."""
        if not self._gaps:
            return flat
        own = self.split(flat).items()
        return torch.cat([tensor.reshape((*flat.shape[:-1], self.shapes[name].numel())) for name, tensor in own], -1)

    def spread(self, values: Tensor) -> Tensor:
        """Return what `dense` was given, with zeros in the gaps: (..., values) -> (..., width)."""
        if not self._gaps:
            return values
        sizes = [shape.numel() for shape in self.shapes.values()]
        return torch.cat([F.pad(own, (0, -own.shape[-1] % ALIGNED)) for own in values.split(sizes, -1)], -1)

    @property
    def _gaps(self) -> bool:
        return any(shape.numel() % ALIGNED for shape in self.shapes.values())


@dataclass(frozen=True)
class Group:
    """Networks of one architecture, whose state is stored side by side.

    Attributes:
        nets: names of the networks.
        trained: layout of trained parameters.
        other: layout of other floating-point state: running statistics, fixed parameters.
    """

    nets: tuple[str, ...]
    trained: Part
    other: Part


class State(NamedTuple):
    """State of several clients: for each group, (clients, networks of the group, width of its part)."""

    trained: tuple[Tensor, ...]
    other: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return self.trained + self.other

    def clone(self) -> State:
        """Return a copy."""
        return State(tuple(t.clone() for t in self.trained), tuple(t.clone() for t in self.other))

    def copy_(self, source: State) -> None:
        """Copy the values of another state into this one."""
        for own, new in zip(self.tensors, source.tensors, strict=True):
            own.copy_(new)


class Arrangement:
    """Position of the networks of a client in a `State`.

    Args:
        nets: the networks by name.
        frozen: names of networks that are not trained.

    Attributes:
        groups: groups of networks with equal architecture and training.
    """

    def __init__(self, nets: Mapping[str, nn.Module], frozen: Sequence[str]) -> None:
        alike: dict[object, list[str]] = {}
        for name, net in nets.items():
            alike.setdefault(_kind(net, name in frozen), []).append(name)
        self.groups = tuple(Group(tuple(names), *_parts(nets[names[0]])) for names in alike.values())

    def empty(self, clients: int, like: Tensor) -> State:
        """Return zeros for so many clients, with the dtype and on the device of `like`."""

        def zeros(part: Part, group: Group) -> Tensor:
            return like.new_zeros(clients, len(group.nets), part.width)

        return State(
            tuple(zeros(group.trained, group) for group in self.groups),
            tuple(zeros(group.other, group) for group in self.groups),
        )

    def views(self, state: State) -> dict[str, Tensor]:
        """Return full name -> (clients, ...), views."""
        return {
            f"{net}.{name}": tensor.select(1, place)
            for group, trained, other in zip(self.groups, *state, strict=True)
            for part, flat in ((group.trained, trained), (group.other, other))
            for name, tensor in part.views(flat).items()
            for place, net in enumerate(group.nets)
        }

    def matching(self, patterns: Sequence[Sequence[str]], like: Tensor) -> tuple[Tensor, ...]:
        """Return which parameters match each set of patterns: for each group (sets, networks, width), bool."""
        state = self.empty(len(patterns), like.new_empty((), dtype=torch.bool))
        for place, some in enumerate(patterns):
            for name, tensor in self.row(state, place).items():
                tensor.fill_(matches(name, some))
        return state.trained

    def row(self, state: State, client: int) -> dict[str, Tensor]:
        """Return full name -> tensor of one client, views; tensors without rows are left out."""
        return {
            f"{net}.{name}": tensor
            for group, trained, other in zip(self.groups, *state, strict=True)
            for part, flat in ((group.trained, trained), (group.other, other))
            if len(flat)
            for place, net in enumerate(group.nets)
            for name, tensor in part.views(flat[client, place]).items()
        }


def _kind(net: nn.Module, frozen: bool) -> object:
    """Return what networks of one architecture have in common; the printed module gives layers and sizes."""
    shapes = tuple((name, tensor.shape) for name, tensor in float_state({"": net}).items())
    fixed = tuple(name for name, parameter in net.named_parameters() if not parameter.requires_grad)
    return type(net), repr(net), shapes, fixed, frozen


def _parts(net: nn.Module) -> tuple[Part, Part]:
    trained = {name: parameter.shape for name, parameter in net.named_parameters() if parameter.requires_grad}
    everything = {name.removeprefix("."): tensor.shape for name, tensor in float_state({"": net}).items()}
    return Part(trained), Part({name: shape for name, shape in everything.items() if name not in trained})


class Kept(Sequence[dict[str, Tensor]]):
    """State that clients keep between rounds: a row of each `State` tensor for each client.

    `kept[id]` is full name -> tensor, as in `Workspace.kept`; {} for a client that has kept nothing yet. Rows are
    replaced, never changed in place, so that references to a client's tensors keep their values.

    Args:
        arrangement: position of the networks.
        names: full names of the kept state.
        initial: full name -> initial value of all state.
        clients: number of clients.
        device: device of the rows; another one than that of `initial` saves memory there.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        names: Sequence[str],
        initial: Mapping[str, Tensor],
        clients: int,
        device: torch.device,
    ) -> None:
        self.arrangement, self.names, self.device = arrangement, tuple(names), device
        self._start = arrangement.empty(1, next(iter(initial.values())))
        own = arrangement.row(self._start, 0)
        for name, tensor in initial.items():
            own[name].copy_(tensor)
        first = {name.partition(".")[0] for name in names}
        groups = [group for group in arrangement.groups if not first.isdisjoint(group.nets)]
        self._keeps = [group in groups for group in arrangement.groups] * 2  # of `State.tensors`
        beside = {f"{net}.{name}" for g in groups for net in g.nets for p in (g.trained, g.other) for name in p.shapes}
        self._beside = {name: initial[name] for name in sorted(beside - set(names))}  # in the rows, but not kept
        self._rows: list[tuple[Tensor, ...]] = [()] * clients  # of the tensors that are kept; () before the first time
        self._seen: list[dict[str, Tensor]] = [{}] * clients

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, id: int) -> dict[str, Tensor]:  # type: ignore[override]  # a client's, never a slice
        if self._rows[id] and not self._seen[id]:
            rows = iter(self._rows[id])
            own = self.arrangement.row(self._state(lambda start: next(rows).unsqueeze(0), lambda start: start[:0]), 0)
            self._seen[id] = {name: own[name] for name in self.names}
        return self._seen[id]

    def __setitem__(self, id: int, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            self.put_back(id, ())
            return
        state = self._state(lambda start: start.to(self.device, copy=True), lambda start: start[:0])
        own = self.arrangement.row(state, 0)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        self.put_back(id, tuple(tensor[0] for tensor, keep in zip(state.tensors, self._keeps, strict=True) if keep))

    def row(self, id: int) -> tuple[Tensor, ...]:
        """Return a client's present rows, for `put_back`."""
        return self._rows[id]

    def put_back(self, id: int, rows: tuple[Tensor, ...]) -> None:
        """Replace a client's rows."""
        self._rows[id], self._seen[id] = rows, {}

    def load(self, ids: Sequence[int], into: State) -> None:
        """Fill the first rows of `into` with the state from which each client starts a round."""
        place = 0
        for start, keep, own in zip(self._start.tensors, self._keeps, into.tensors, strict=True):
            if keep:
                here = start[0].to(self.device)
                rows = [self._rows[id][place] if self._rows[id] else here for id in ids]
                own[: len(ids)].copy_(torch.stack(rows))
                place += 1
            else:
                own[: len(ids)].copy_(start)
        if self._beside:
            views = self.arrangement.views(State(*(tuple(t[: len(ids)] for t in part) for part in into)))
            for name, tensor in self._beside.items():
                views[name].copy_(tensor)

    def save(self, ids: Sequence[int], source: State, places: Sequence[int]) -> None:
        """Keep each client's row of `source`."""
        if not self.names or not ids:
            return
        chosen = torch.tensor(places, device=source.tensors[0].device)
        rows = [t[chosen].to(self.device) for t, keep in zip(source.tensors, self._keeps, strict=True) if keep]
        # each client's rows are copied to separate memory, in one operation: a row must not keep those of all clients
        parts = [row for tensor in rows for row in tensor.unbind()]
        own = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        torch._foreach_copy_(own, parts)
        for place, id in enumerate(ids):
            self.put_back(id, tuple(own[place :: len(ids)]))

    def _state(self, kept: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> State:
        """Return a `State` made of `_start`, tensor by tensor."""
        count = len(self.arrangement.groups)
        made = [kept(t) if keep else other(t) for t, keep in zip(self._start.tensors, self._keeps, strict=True)]
        return State(tuple(made[:count]), tuple(made[count:]))
