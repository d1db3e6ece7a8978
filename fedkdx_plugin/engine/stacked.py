"""Many clients at once on one device: their networks and batches stacked, every operation done for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedkdx_plugin.engine import together, training
from fedkdx_plugin.engine.agreement import disagreement
from fedkdx_plugin.engine.backend import Backend, Trained
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.engine.sequential import Sequential
from fedkdx_plugin.engine.together import Ready, Together
from registry.errors import UserError
from registry.interface import Message, Model, NonFinite, Round, copy_state

CPU_MEMORY = 1 << 30  # bytes for a stack on a CPU
STATES = 4  # copies of a client's state while it trains: as it came, stacked, gradients, and what to move by


class Stacked(Backend):
    """Trains the selected clients together.

    The first clients with a kind of context are checked: where stacked losses and gradients are not those of the client
    alone, such clients are trained one by one, and a line says why.

    Args:
        demanded: asked for by name, so that clients which cannot be stacked are an error.
    """

    name = "stacked"

    def __init__(self, workspace: Any, data: Any, settings: Any, demanded: bool = False) -> None:
        super().__init__(workspace, data, settings)
        self.demanded = demanded
        self._sequential = Sequential(workspace, data, settings)
        self._together = Together(workspace.clients[0], workspace.nets)
        memory, a_window = budget(data.test_x.device), bytes_a_window(self._together.copies)
        state = sum(tensor.numel() * tensor.element_size() for tensor in workspace.initial.values())
        self._rows_at_once = max(1, memory // a_window)
        self._at_once = max(1, memory // (settings.batch_size * a_window + STATES * state))
        self._reasons: dict[Any, str] = {}  # kind of context -> why such clients are not stacked, or ''

    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """As `Backend.train`. Raises ClientError where an algorithm fails, UserError where stacking was demanded."""
        clients = self.workspace.clients
        order = sorted(messages, key=lambda id: (-clients[id].samples, id))
        results: dict[int, Trained | NonFinite] = {}
        for start in range(0, len(order), self._at_once):
            portion = order[start : start + self._at_once]
            results |= self._portion({id: messages[id] for id in portion}, round)
        return results

    def _portion(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        before = {id: dict(self.workspace.clients[id].memory) for id in messages}
        results: dict[int, Trained | NonFinite] = {}
        groups: dict[Any, list[Ready]] = {}
        for id, message in messages.items():
            try:
                one = self._begin(id, message, round)
                groups.setdefault(together.signature(one), []).append(one)
            except NonFinite as error:
                results[id] = error
        for kind, group in groups.items():
            group.sort(key=lambda one: -together.steps(one, round, self.settings))
            results |= self._group(kind, group, messages, before, round)
        for id, result in results.items():
            if isinstance(result, NonFinite):
                self.workspace.clients[id].memory = before[id]
        return results

    def _begin(self, id: int, message: Message, round: Round) -> Ready:
        with training.named(f"client {id}, round {round.index}"):
            client = self._sequential.begin(id, message)
            return Ready(client, client.context(), together.copied_state(self.workspace.nets))

    def _group(
        self,
        kind: Any,
        group: Sequence[Ready],
        messages: Mapping[int, Message],
        before: Mapping[int, Mapping[str, Tensor]],
        round: Round,
    ) -> dict[int, Trained | NonFinite]:
        """The work of clients of one kind: stacked, or one by one where they do not agree with the reference."""

        def one_by_one() -> dict[int, Trained | NonFinite]:
            ids = [one.client.id for one in group]
            for id in ids:
                self.workspace.clients[id].memory = dict(before[id])
            return {id: self._sequential.train_one(id, messages[id], round) for id in ids}

        reason = self._reason(kind, group)
        if reason != "":
            results = one_by_one()  # an error of the algorithm itself comes up here, with client and step
            if reason and self.demanded:
                raise UserError(f"--backend stacked: {reason}; auto takes what can run")
            return results
        try:
            stack, losses = together.train(self._together, group, round, self.settings)
        except torch.OutOfMemoryError as error:
            raise UserError(f"--backend stacked: {error}; --backend sequential takes the least memory") from error
        except Exception as error:
            one_by_one()
            raise RuntimeError(f"round {round.index}: fails in a stack of {len(group)} clients alone") from error
        clients, states = [one.client for one in group], [stack.state(k) for k in range(len(group))]
        with training.named(f"round {round.index}"):
            type(clients[0]).before_replies(clients, states)
        ended = zip(group, states, losses, strict=True)
        return {one.client.id: self._end(one, state, loss, round) for one, state, loss in ended}

    def _reason(self, kind: Any, group: Sequence[Ready]) -> str | None:
        """Why clients of this kind are not stacked, found out at their first training; '' if they are.

        None as long as nothing is known, since no loss was finite: the reference drops such clients.
        """
        if kind not in self._reasons:
            reason = disagreement(self.workspace.nets, group)
            if reason is None:
                return None
            self._reasons[kind] = reason
            if reason and not self.demanded:
                print(f"stacked: {reason}; such clients are trained one by one", file=sys.stderr)
        return self._reasons[kind]

    def _end(self, one: Ready, state: Mapping[str, Tensor], loss: Tensor, round: Round) -> Trained | NonFinite:
        """A client's reply, with its trained networks in place for it."""
        client = one.client
        copy_state(self.workspace.nets, state)
        client.nets = self.workspace.nets
        try:
            with training.named(f"client {client.id}, round {round.index}"):
                return self._sequential.end(client, loss)
        except NonFinite as error:
            return error

    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        """As `Backend.predict`; several states are stacked, a single one is asked as it is."""
        results: list[Tensor] = []
        for portion in self._portions(predictions):
            if len(portion) == 1:
                results += self._sequential.predict(net, portion)
            else:
                results += self._predict_together(net, portion)
        return results

    def _portions(self, predictions: Sequence[Prediction]) -> Iterator[Sequence[Prediction]]:
        """As many at a time as fit into memory, each filled up to the longest."""
        start, longest = 0, 0
        for place, prediction in enumerate(predictions):
            longest = max(longest, len(self._windows(prediction)))
            if place > start and (place + 1 - start) * longest > self._rows_at_once:
                yield predictions[start:place]
                start, longest = place, len(self._windows(prediction))
        if start < len(predictions):
            yield predictions[start:]

    def _windows(self, prediction: Prediction) -> range:
        return range(*prediction.windows.indices(len(self.data.test_x)))

    @torch.inference_mode()
    def _predict_together(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        windows = [self._windows(prediction) for prediction in predictions]
        width = max(map(len, windows))
        index = torch.zeros(len(windows), width, dtype=torch.int64)
        for place, own in enumerate(windows):
            index[place, : len(own)] = torch.arange(own.start, own.stop)
        # contiguous: after a resume strides are other ones, and the products' last bits may depend on them
        states = {n: torch.stack([one.state[n].contiguous() for one in predictions]) for n in predictions[0].state}
        logits = self._together.logits(net, states, self.data.test_x[index.to(self.data.test_x.device)])
        return [own[: len(range_)] for own, range_ in zip(logits, windows, strict=True)]


def budget(device: torch.device) -> int:
    """Bytes that a stack may take: the same on every run, so that the same clients are stacked."""
    return torch.cuda.get_device_properties(device).total_memory // 2 if device.type == "cuda" else CPU_MEMORY


def bytes_a_window(nets: Mapping[str, nn.Module]) -> int:
    """Memory that a window takes in a training step: what is kept for the way back, and as much again for that way."""
    own = {tensor.untyped_storage().data_ptr() for net in nets.values() for tensor in net.state_dict().values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    windows = 4  # batch norm needs more than one
    for net in (net for net in nets.values() if isinstance(net, Model)):
        x = next(net.parameters()).new_zeros(windows, *net.shape)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            net.train()(x)
    return 2 * sum(kept.values()) // windows
