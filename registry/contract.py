"""Checks of what algorithms return to the engine; a wrong type is one line that names package, class and method."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from registry import catalog
from registry.blame import PluginError, naming, place, wrong
from registry.interface import Client, Message, Model, Output, Round, Server, Task, float_state, private_names

NAME = re.compile(r"[A-Za-z0-9_]+")


def model(made: Model) -> None:
    """Raise PluginError unless a model of another package has the parts, and an output, of the declared shapes."""
    if not catalog.origin_of(made):
        return
    for name, kind in (("feature_size", int), ("head", nn.Module)):
        if not isinstance(own := getattr(made, name, None), kind):
            what = "a whole number" if kind is int else "a network"
            raise PluginError(f"{place(made)}.__init__ must set {name}, {what}, not {type(own).__name__}")
    windows = torch.zeros(2, *made.shape)
    with torch.no_grad(), naming(made):
        found = made.eval()(windows)
    made.train()
    wanted = [(2, made.feature_size), (2, made.classes)]
    if not isinstance(found, Output) or [tuple(part.shape) for part in found] != wanted:
        raise wrong(made, "forward", f"an Output of features {wanted[0]} and logits {wanted[1]} for two windows", found)


def built(algorithm: type[Client], task: Task) -> dict[str, nn.Module]:
    """Return the networks of `Client.build`. Raises PluginError: they are none."""
    nets = algorithm.build(task)
    right = isinstance(nets, dict) and all(isinstance(n, str) and isinstance(v, nn.Module) for n, v in nets.items())
    if not right or not nets:
        raise wrong(algorithm, "build", "a dict of networks by name, at least one", nets)
    if not any(isinstance(net, Model) for name, net in nets.items() if name not in algorithm.frozen):
        raise wrong(algorithm, "build", "at least one Model that is trained, to predict with", nets)
    return nets


def private(algorithm: type[Client], task: Task, nets: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the full names of the state that never leaves a client (see `registry.interface.private_names`).

    Raises:
        PluginError: they are no patterns; or one of another package's class matches none of the state: what a misspelt
            one was to keep would be sent.
    """
    found = private_names(algorithm, task, nets)
    declares = next(part for part in algorithm.__mro__ if {"private", "private_in"} & vars(part).keys())
    if catalog.origin_of(declares):
        names = float_state(nets)
        for pattern in algorithm.private_in(task, nets):
            if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
                raise PluginError(
                    f"{place(algorithm)}.private: '{pattern}' matches no state of its networks, such as "
                    f"{', '.join(list(names)[:3])}; correct it"
                )
    return found


def losses(client: Client, found: object) -> Mapping[str, Tensor]:
    """Return what `losses` returned. Raises PluginError: it is no mapping to scalars, or an empty one."""
    if isinstance(found, Mapping) and found and all(_is_scalar(loss) for loss in found.values()):
        return found
    raise wrong(client, "losses", "scalar tensors by name, at least one", found)


@contextmanager
def using_state(client: Client) -> Iterator[None]:
    """Name `state` or `shared` as the method that is wrong, where what it returned made the block fail.

    Other methods of a client call these two; their own failure would name the caller. They are called again after a
    failure alone, since what they return may depend on what the client has received.

    Raises:
        PluginError: the block failed, and one of the two, overridden, returns no tensors by name.
    """
    try:
        yield
    except Exception:
        for method in ("state", "shared"):
            if getattr(type(client), method) is not getattr(Client, method):
                _tensors(client, method, getattr(client, method)())
        raise


def state(client: Client) -> Mapping[str, Tensor]:
    """Return the tensors of `state`. Raises PluginError: they are none."""
    return _tensors(client, "state", client.state())


def receive(client: Client, message: Message) -> None:
    """Let a client receive a message.

    Raises:
        PluginError: `receive` returns something, which nobody would use, or `state` or `shared` returns no tensors.
    """
    with using_state(client):
        found: Any = client.receive(message)  # type: ignore[func-returns-value]
    if found is not None:
        raise wrong(client, "receive", "nothing, and install what was sent in the client", found)


def context(client: Client) -> Mapping[str, Tensor]:
    """Return the tensors of `context`. Raises PluginError: they are none; plain numbers pass, but are not stacked."""
    with using_state(client):
        found: Any = client.context()
    if not isinstance(found, Mapping) or not all(isinstance(own, (Tensor, Real)) for own in found.values()):
        raise wrong(client, "context", "tensors by name", found)
    return found


def trains(client: Client, epoch: int, epochs: int) -> tuple[str, ...]:
    """Return the patterns of `trains`. Raises PluginError: they are no list of text."""
    found: Any = client.trains(epoch, epochs)
    if not isinstance(found, (list, tuple)) or not all(isinstance(pattern, str) for pattern in found):
        raise wrong(client, "trains", "a list of patterns of names", found)
    return tuple(found)


def repeats(client: Client) -> int:
    """Return the number of `repeats`. Raises PluginError: it is no whole number of at least 1."""
    found: Any = client.repeats()
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise wrong(client, "repeats", "a whole number of at least 1", found)
    return found


def update(
    client: Client,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    rate: Tensor,
    step: Tensor,
    context: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the parameters of `update`. Raises PluginError: they are not those of `weights`, of the same shapes."""
    found: Any = client.update(weights, gradients, rate, step, context)
    if not _are_tensors(found) or {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in weights.items()}:
        raise wrong(client, "update", f"a tensor of the shape of its weights for each of {', '.join(weights)}", found)
    return dict(found)


def meeting(client: type[Client], params: Any) -> str:
    """Return the text of `meeting`. Raises PluginError: it is none; None must not pass for '', which means safe."""
    found: Any = client.meeting(params)
    if not isinstance(found, str):
        raise wrong(client, "meeting", "text, '' where windows do not meet", found)
    return found


def reply(client: Client) -> Message:
    """Return the message of `reply`. Raises PluginError: it is none, or `state` or `shared` returned no tensors."""
    with using_state(client):
        return message(client, "reply", client.reply())


def message(owner: Client | Server, method: str, found: object) -> Message:
    """Return a message that `method` returned. Raises PluginError: it is none, or holds what cannot be sent."""
    if not isinstance(found, Message):
        raise wrong(owner, method, "a Message", found)
    if not _are_tensors(found.tensors):
        raise wrong(owner, method, "a Message whose tensors are tensors by name", found.tensors)
    if not isinstance(found.meta, Mapping) or not _is_json(found.meta):
        raise wrong(owner, method, "a Message whose metadata are finite numbers, text, lists and dicts", found.meta)
    return found


def messages(server: Server, clients: list[int], found: object) -> Mapping[int, Message]:
    """Return the messages of `messages`. Raises PluginError: it does not give one for each selected client."""
    if not isinstance(found, Mapping) or set(found) != set(clients):
        raise wrong(server, "messages", f"a message for each of the clients {clients}", found)
    return {client: message(server, "message", own) for client, own in found.items()}


def serves(client: Client, models: Collection[str]) -> str | Mapping[str, float]:
    """Return what `serves` names. Raises PluginError: none of the `models` that predict, or weights that do not fit."""
    found: Any = client.serves()
    if isinstance(found, str):
        if found in models:
            return found
    elif isinstance(found, Mapping) and found and set(found) <= set(models):
        weights = list(found.values())
        if all(_is_number(w) and w > 0 for w in weights) and math.isclose(sum(weights), 1.0, rel_tol=1e-3):
            return found
    wanted = f"one of the models that are trained ({', '.join(models)}), or their weights, which add up to 1"
    raise wrong(client, "serves", wanted, found)


def holdout(client: Client) -> float:
    """Return the share of `holdout`. Raises PluginError: it is no number from 0 to below 1."""
    share: Any = client.holdout()
    if not _is_number(share) or not 0 <= share < 1:
        raise wrong(client, "holdout", "a number from 0 to below 1", share)
    return float(share)


def contribution(server: Server, client: int, reply: Message) -> Mapping[str, Tensor]:
    """Return the tensors of `contribution`. Raises PluginError: they are none."""
    return _tensors(server, "contribution", server.contribution(client, reply))


def idle(server: Server, sent: Message) -> Mapping[str, Tensor]:
    """Return the tensors of `idle`. Raises PluginError: they are none."""
    return _tensors(server, "idle", server.idle(sent))


def forged(server: Server, reply: Message, contribution: Mapping[str, Tensor]) -> Message:
    """Return the message of `forged`. Raises PluginError: it is none."""
    return message(server, "forged", server.forged(reply, contribution))


def figures(server: Server) -> dict[str, float]:
    """Return the values of `figures`. Raises PluginError: they are no numbers by name."""
    found: Any = server.figures()
    right = isinstance(found, Mapping) and all(isinstance(name, str) and NAME.fullmatch(name) for name in found)
    try:
        if right:
            return {name: float(value) for name, value in found.items()}
    except (TypeError, ValueError):
        pass
    raise wrong(server, "figures", "numbers by name, which consists of letters, digits and '_'", found)


def aggregate(server: Server, replies: Mapping[int, Message], round: Round) -> None:
    """Let a server take in the replies. Raises PluginError: `aggregate` returns something, which nobody would use."""
    found: Any = server.aggregate(replies, round)
    if found is not None:
        raise wrong(server, "aggregate", "nothing, and assign the new state to the server (`self.weights = …`)", found)


def networks(server: Server) -> Mapping[str, Tensor]:
    """Return the state of `networks`. Raises PluginError: it is none."""
    return _tensors(server, "networks", server.networks())


def save(server: Server) -> Message:
    """Return the state of `save`. Raises PluginError: it is no message."""
    return message(server, "save", server.save())


def _tensors(owner: Client | Server, method: str, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not _are_tensors(found):
        raise wrong(owner, method, "tensors by name", found)
    return found


def _are_tensors(found: object) -> bool:
    return isinstance(found, Mapping) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items())


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_json(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_json(own) for name, own in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value))
