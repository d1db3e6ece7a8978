"""The state of several clients in a few tensors with a leading axis of clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from registry.interface import float_state

ALIGNED = 16  # values: where each tensor begins in a row, so that products may read it in large words


class Part:
    """Where tensors lie, one after the other, in the last axis of another.

    Attributes:
        shapes: name -> shape.
        width: values of the last axis, what lies between the tensors included.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.shapes = dict(shapes)
        self._starts, self.width = {}, 0
        for name, shape in self.shapes.items():
            self._starts[name] = self.width
            self.width += shape.numel() + -shape.numel() % ALIGNED

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> (..., *shape), views of (..., width), each its own."""
        lead = flat.shape[:-1]
        return {
            name: flat.narrow(-1, self._starts[name], shape.numel()).view((*lead, *shape))
            for name, shape in self.shapes.items()
        }

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """As `views`, all views of one operation: differentiated, that is one operation too."""
        sizes = [size for shape in self.shapes.values() for size in (shape.numel(), -shape.numel() % ALIGNED) if size]
        lead, parts = flat.shape[:-1], iter(flat.split_with_sizes(sizes, -1))
        tensors = {}
        for name, shape in self.shapes.items():
            own = next(parts) if shape.numel() else flat[..., :0]
            tensors[name] = own.view((*lead, *shape))
            if -shape.numel() % ALIGNED:
                next(parts)
        return tensors


@dataclass(frozen=True)
class Group:
    """Networks of one architecture, whose state lies side by side.

    Attributes:
        nets: their names.
        trained: what gradients move.
        other: all other floating-point state: running statistics, parameters that are fixed.
    """

    nets: tuple[str, ...]
    trained: Part
    other: Part


class State(NamedTuple):
    """State of several clients: of each group, (clients, networks of the group, width of its part)."""

    trained: tuple[Tensor, ...]
    other: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.trained + self.other

    def clone(self) -> State:
        return State(tuple(t.clone() for t in self.trained), tuple(t.clone() for t in self.other))

    def copy_(self, source: State) -> None:
        for own, new in zip(self.tensors, source.tensors, strict=True):
            own.copy_(new)


class Arrangement:
    """How the networks of a client lie in a `State`.

    Args:
        nets: the networks by name.
        frozen: names of those that nothing trains.

    Attributes:
        groups: networks that are built and trained alike are in one group.
    """

    def __init__(self, nets: Mapping[str, nn.Module], frozen: Sequence[str]) -> None:
        alike: dict[object, list[str]] = {}
        for name, net in nets.items():
            alike.setdefault(_kind(net, name in frozen), []).append(name)
        self.groups = tuple(Group(tuple(names), *_parts(nets[names[0]])) for names in alike.values())

    def empty(self, clients: int, like: Tensor) -> State:
        """Zeros for so many clients, of the type and on the device of `like`."""

        def zeros(part: Part, group: Group) -> Tensor:
            return like.new_zeros(clients, len(group.nets), part.width)

        return State(
            tuple(zeros(group.trained, group) for group in self.groups),
            tuple(zeros(group.other, group) for group in self.groups),
        )

    def views(self, state: State) -> dict[str, Tensor]:
        """Full name -> (clients, ...), views."""
        return {
            f"{net}.{name}": tensor.select(1, place)
            for group, trained, other in zip(self.groups, *state, strict=True)
            for part, flat in ((group.trained, trained), (group.other, other))
            for name, tensor in part.views(flat).items()
            for place, net in enumerate(group.nets)
        }

    def row(self, state: State, client: int) -> dict[str, Tensor]:
        """Full name -> tensor of one client, views; nothing of a tensor that has no rows."""
        return {
            f"{net}.{name}": tensor
            for group, trained, other in zip(self.groups, *state, strict=True)
            for part, flat in ((group.trained, trained), (group.other, other))
            if len(flat)
            for place, net in enumerate(group.nets)
            for name, tensor in part.views(flat[client, place]).items()
        }


def _kind(net: nn.Module, frozen: bool) -> object:
    """What networks of one architecture have in common: a printed module says its layers and their sizes."""
    shapes = tuple((name, tensor.shape) for name, tensor in float_state({"": net}).items())
    fixed = tuple(name for name, parameter in net.named_parameters() if not parameter.requires_grad)
    return type(net), repr(net), shapes, fixed, frozen


def _parts(net: nn.Module) -> tuple[Part, Part]:
    trained = {name: parameter.shape for name, parameter in net.named_parameters() if parameter.requires_grad}
    everything = {name.removeprefix("."): tensor.shape for name, tensor in float_state({"": net}).items()}
    return Part(trained), Part({name: shape for name, shape in everything.items() if name not in trained})


class Kept(Sequence[dict[str, Tensor]]):
    """What clients keep of their networks between rounds: a row of each `State` tensor a client.

    `kept[id]` is full name -> tensor, as in `Workspace.kept`; {} for a client that keeps nothing yet. Rows are
    replaced, never changed in place, so that who holds on to a client's tensors holds what they were.

    Args:
        arrangement: how the networks lie.
        names: full names of what is kept.
        initial: full name -> initial value of all state.
        clients: number of clients.
        device: where the rows lie; another one than that of `initial` saves memory there.
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
        """What `put_back` takes: a client's rows as they are now."""
        return self._rows[id]

    def put_back(self, id: int, rows: tuple[Tensor, ...]) -> None:
        """Let a client keep what it kept before."""
        self._rows[id], self._seen[id] = rows, {}

    def load(self, ids: Sequence[int], into: State) -> None:
        """Fill the first rows of `into` with what each of the clients starts a round from."""
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
        """Keep, of each of the clients, its row of `source`."""
        if not self.names or not ids:
            return
        chosen = torch.tensor(places, device=source.tensors[0].device)
        rows = [t[chosen].to(self.device) for t, keep in zip(source.tensors, self._keeps, strict=True) if keep]
        # each client's rows in memory of their own, in one operation: a row must not hold on to all of a round's
        parts = [row for tensor in rows for row in tensor.unbind()]
        own = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        torch._foreach_copy_(own, parts)
        for place, id in enumerate(ids):
            self.put_back(id, tuple(own[place :: len(ids)]))

    def _state(self, kept: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> State:
        """A `State` made of `_start`, tensor by tensor."""
        count = len(self.arrangement.groups)
        made = [kept(t) if keep else other(t) for t, keep in zip(self._start.tensors, self._keeps, strict=True)]
        return State(tuple(made[:count]), tuple(made[count:]))
