"""Backend that stacks networks and batches of many clients on one device, so that each operation serves all."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkdx_plugin.engine import training
from fedkdx_plugin.engine.augmentation import Augmenter
from fedkdx_plugin.engine.backends.base import Backend, Trained
from fedkdx_plugin.engine.backends.sequential import Sequential, prepare, release
from fedkdx_plugin.engine.backends.stacked import size
from fedkdx_plugin.engine.backends.stacked.agreement import disagreement, in_words
from fedkdx_plugin.engine.backends.stacked.losses import Losses
from fedkdx_plugin.engine.backends.stacked.plan import Plan, Ready, kind
from fedkdx_plugin.engine.backends.stacked.state import Kept, State
from fedkdx_plugin.engine.backends.stacked.step import COMPILE_FROM, COMPILED, EAGER, GRAPH, Step
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.engine.transport import check_finite
from fedkdx_plugin.engine.workspace import fresh
from registry import contract
from registry.errors import UserError
from registry.interface import Client, Message, Networks, NonFinite, Round

STEPS_HELD = 4  # number of steps kept, one for each number and kind of clients; bounded as their tensors take memory


class Stacked(Backend):
    """Backend that trains the selected clients together.

    The first clients with a kind of context are checked (see `agreement`). If a way of running a step fails, the next
    one is used and a line says why: a compiled step, a plain CUDA graph, operation by operation, one client after the
    other. If memory runs out, half as many clients are trained at once.

    Args:
        workspace, data, settings: see `Backend`.
        demanded: whether the backend was named, so that clients which cannot be stacked are an error.
        client_memory: memory that holds client state between rounds: 'device' or 'host'.
        selected: largest number of clients of a round.
        way: way of running a step (see `step`); None: the fastest on this device.
    """

    name = "stacked"

    def __init__(
        self,
        workspace: Any,
        data: Any,
        settings: Any,
        demanded: bool = False,
        client_memory: str = "device",
        selected: int = 1,
        way: str | None = None,
    ) -> None:
        super().__init__(workspace, data, settings)
        self.demanded, self.way, self._selected = demanded, way, selected
        self.device = data.test_x.device
        self._sequential = Sequential(workspace, data, settings)
        self._losses = Losses(workspace.clients[0], workspace.nets)
        self._nets = Networks(copy.deepcopy(dict(workspace.nets)))  # its tensors are those of the working client
        named = {
            f"{net}.{name}": tensor
            for net, module in self._nets.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        self._tensors = {name: named[name] for name in workspace.initial}  # without buffers that are no state
        self._holder = self.device if client_memory == "device" else torch.device("cpu")
        arrangement = self._losses.arrangement
        self._kept = Kept(arrangement, workspace.keeps, workspace.initial, len(workspace.clients), self._holder)
        workspace.kept = self._kept
        probe = size.probe(workspace.nets)
        self._least_values = probe.least_values
        memory = size.budget(self.device)
        self._rows_at_once = max(1, memory // probe.bytes_a_window)
        self._at_once = size.clients_at_once(memory, probe, workspace.initial, settings.batch_size)
        self._state: State | None = None  # of the working clients
        self._rows: dict[int, dict[str, Tensor]] = {}  # its rows, as full name -> tensor
        self._steps: dict[Any, Step] = {}
        self._reasons: dict[Any, str] = {}  # kind of context -> why such clients are not stacked, or ''

    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """Train together. Raises ClientError: an algorithm fails; UserError: demanded clients cannot be stacked."""
        clients = self.workspace.clients
        order = sorted(messages, key=lambda id: (-clients[id].samples, id))
        results: dict[int, Trained | NonFinite] = {}
        while order:
            portion = order[: self._at_once]
            before = {id: _Before(dict(clients[id].memory), clients[id].trained, self._kept.row(id)) for id in portion}
            try:
                results |= self._portion({id: messages[id] for id in portion}, before, round)
            except torch.cuda.OutOfMemoryError as error:
                reason = in_words(error)
            else:
                order = order[len(portion) :]
                continue
            for id, old in before.items():  # some may have finished already
                clients[id].memory, clients[id].trained = dict(old.memory), old.trained
                self._kept.put_back(id, old.kept)
            self._take_less_memory(len(portion), reason)
        return results

    def _take_less_memory(self, clients: int, reason: str) -> None:
        """Train half as many clients at once. Raises UserError if there is not enough memory for one."""
        if clients == 1:
            raise UserError(
                f"out of GPU memory with a single client ({reason}); "
                "take a smaller batch (-lbs), a smaller model (-m), --client-memory host, or -dev cpu"
            )
        self._at_once = clients // 2
        self._state, self._rows = None, {}
        for tensor in self._tensors.values():
            tensor.data = tensor.data.new_empty(0)  # the last reference to the old state
        self._steps.clear()
        torch.cuda.empty_cache()
        print(
            f"stacked: out of GPU memory with {clients} clients at once; continues with {clients // 2}", file=sys.stderr
        )

    def _portion(
        self, messages: Mapping[int, Message], before: Mapping[int, _Before], round: Round
    ) -> dict[int, Trained | NonFinite]:
        results: dict[int, Trained | NonFinite] = {}
        groups: dict[Any, list[Ready]] = {}
        self._make_room(len(messages))
        self._kept.load(list(messages), self._at_work)
        for place, (id, message) in enumerate(messages.items()):
            try:
                one = self._begin(id, place, message, round)
                groups.setdefault(kind(one.context), []).append(one)
            except NonFinite as error:
                results[id] = error
        for what, group in groups.items():
            results |= self._group(what, group, messages, before, round)
        for id, result in results.items():
            if isinstance(result, NonFinite):
                self.workspace.clients[id].memory = dict(before[id].memory)
            release(self.workspace.clients[id])
        return results

    @property
    def _at_work(self) -> State:
        assert self._state is not None  # `_make_room` comes first
        return self._state

    def _make_room(self, clients: int) -> None:
        if self._state is None or len(self._state.tensors[0]) < clients:
            like = next(iter(self.workspace.initial.values()))
            self._state, self._rows = self._losses.arrangement.empty(clients, like), {}

    def _bind(self, place: int) -> Networks:
        """Return the networks with the tensors of the client at a place in the state."""
        if place not in self._rows:
            self._rows[place] = self._losses.arrangement.row(self._at_work, place)
        row = self._rows[place]
        for name, tensor in self._tensors.items():
            tensor.data = row[name]
        return self._nets

    def _begin(self, id: int, place: int, message: Message, round: Round) -> Ready:
        with training.named(f"client {id}, round {round.index}"):
            client = self.workspace.clients[id]
            self._enter(client, place)
            client.memory = _moved(client.memory, self.device)
            prepare(client, round, self.data, self.settings)
            contract.receive(client, message)
            context = contract.context(client).items()
            on_device = {name: t.detach().to(self.device) if isinstance(t, Tensor) else t for name, t in context}
            return Ready(client, on_device, place)

    def _enter(self, client: Client, place: int) -> None:
        """Give a client its networks."""
        client.nets = self._bind(place)
        fresh(client)

    def _group(
        self,
        what: Any,
        group: Sequence[Ready],
        messages: Mapping[int, Message],
        before: Mapping[int, _Before],
        round: Round,
    ) -> dict[int, Trained | NonFinite]:
        """Do the work of clients of one kind: stacked, or one by one if stacking does not agree with the reference."""

        def one_by_one() -> dict[int, Trained | NonFinite]:
            results = {}
            for client in (one.client for one in group):
                client.memory = _moved(before[client.id].memory, self.device)
                results[client.id] = self._sequential.train_one(client.id, messages[client.id], round)
                client.memory = _moved(client.memory, self._holder)
            return results

        sizes = [len(training.windows_of(one.client).y) for one in group]
        reason = self._reason(what, group)
        if reason is None or 0 in sizes:
            return one_by_one()  # raises errors of the algorithm with client and step
        plan = Plan.of(group, round, self.settings)
        if plan.fewest * self._least_values <= 1:  # PyTorch's batch norm raises
            return one_by_one()
        losses = None if reason else self._train_together(what, group, plan, round)
        if losses is not None:
            return self._ended(group, losses, round)
        results = one_by_one()
        if self.demanded:
            raise UserError(f"--backend stacked: {self._reasons[what]}; --backend auto takes what can run")
        return results

    def _reason(self, what: Any, group: Sequence[Ready]) -> str | None:
        """Return why clients of this kind are not stacked, determined at their first training; '' if they are.

        None as long as it is not known, because no loss was finite: the reference drops such clients.
        """
        if what not in self._reasons:
            reason = disagreement(self.workspace.nets, self._losses, group, self._at_work, self.settings.clip_norm)
            if reason is None:
                return None
            self._give_up(what, reason)
        return self._reasons[what]

    def _give_up(self, what: Any, reason: str) -> None:
        self._reasons[what] = reason
        if reason and not self.demanded:
            print(f"stacked: {reason}; such clients are trained one by one", file=sys.stderr)

    def _train_together(self, what: Any, group: Sequence[Ready], plan: Plan, round: Round) -> Tensor | None:
        """Train a group by the fastest way that works; None if none does."""
        while True:
            try:
                return self._step(what, group, plan, round).train(group, plan, self._at_work)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                reason = in_words(error)
            self._steps.clear()
            if self.way == EAGER:
                self._give_up(what, f"fails only when stacked: {reason}")
                return None
            before, self.way = self.way, GRAPH if self.way == COMPILED else EAGER
            told = f"a step cannot be run {before}" if before else "a step cannot be analysed"
            print(f"stacked: {told} ({reason}); it is run {self.way}", file=sys.stderr)

    def _step(self, what: Any, group: Sequence[Ready], plan: Plan, round: Round) -> Step:
        """Return a cached or new step for the group; a graph is made for the largest number of clients of a round."""
        count, _, width = plan.index.shape
        if self.way is None:
            self.way = self._best_way(group, plan, round.total)
        clients = count if self.way == EAGER else max(count, min(self._at_once, self._selected))
        key = what, clients, width, plan.masked, plan.patterns
        if key in self._steps:
            self._steps[key] = self._steps.pop(key)  # in the order of last use
        else:
            while len(self._steps) >= STEPS_HELD:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = self._made(group, plan, clients)
            self._steps[key].way = self.way
        return self._steps[key]

    def _made(self, group: Sequence[Ready], plan: Plan, clients: int) -> Step:
        most = size.most(self.data, self.settings, clients, contract.repeats(group[0].client))
        settings, one = self.settings, group[0]
        augmenter = None
        if settings.augment.names:
            augmenter = Augmenter(settings.augment, training.windows_of(one.client).x, settings.batch_size)
        return Step(
            self._losses,
            clients,
            most.steps,
            plan,
            most.windows,
            one,
            settings.clip_norm,
            optimizer=settings.optimizer,
            augmenter=augmenter,
            mixed=settings.mixed,
        )

    def _best_way(self, group: Sequence[Ready], plan: Plan, rounds: int) -> str:
        """Return the fastest way for a whole run; resumed parts use the same way, so that the bits are equal."""
        if self.device.type != "cuda":
            return EAGER
        step = self._made(group, plan, len(group))
        step.load(group, plan, self._at_work, torch.tensor([one.place for one in group], device=self.device))
        steps = rounds * step.rows.shape[1]
        if step.operations() * steps < COMPILE_FROM:
            return GRAPH
        print(f"stacked: compiling a training step, which pays for {steps} of them; some 20 s", file=sys.stderr)
        return COMPILED

    def _ended(self, group: Sequence[Ready], losses: Tensor, round: Round) -> dict[int, Trained | NonFinite]:
        """Return the replies of the trained clients of a group, and keep their declared state."""
        clients = [one.client for one in group]
        states = [self._row(one.place) for one in group]
        with training.named(f"round {round.index}"), suppress(NonFinite):  # raised again for the client concerned
            type(clients[0]).before_replies(clients, states)
        finite = self._finite([one.place for one in group])
        results: dict[int, Trained | NonFinite] = {}
        for one, loss, sound in zip(group, losses.unbind(), finite, strict=True):
            client = one.client
            self._enter(client, one.place)
            try:
                with training.named(f"client {client.id}, round {round.index}"):
                    if not sound:
                        check_finite(client.id, contract.state(client))
                    results[client.id] = Trained(self._sequential.reply(client), loss)
            except NonFinite as error:
                results[client.id] = error
        done = [one for one in group if isinstance(results[one.client.id], Trained)]
        self._kept.save([one.client.id for one in done], self._at_work, [one.place for one in done])
        for one in done:
            one.client.trained += 1
            one.client.memory = _moved(one.client.memory, self._holder)
        return results

    def _row(self, place: int) -> dict[str, Tensor]:
        self._bind(place)
        return self._rows[place]

    def _finite(self, places: Sequence[int]) -> list[bool]:
        """Return whether all of each client's state is finite, with one synchronisation."""
        chosen = torch.tensor(places, device=self.device)
        ends = [tensor.flatten(1).abs().amax(1) for tensor in self._at_work.tensors if tensor.shape[2]]
        finite: list[bool] = torch.stack(ends).isfinite().all(0)[chosen].tolist()
        return finite

    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        """Predict as `Backend.predict` does; several states are stacked if clients are."""
        results: list[Tensor] = []
        while len(results) < len(predictions):
            portion = next(self._portions(predictions[len(results) :]))
            if len(portion) == 1 or not self._reasons or any(self._reasons.values()):
                results += self._sequential.predict(net, portion)
                continue
            try:
                results += self._predict_together(net, portion)
                continue
            except torch.cuda.OutOfMemoryError:
                pass
            self._rows_at_once = max(1, self._rows_at_once // 2)
            _empty_cache()
            print("stacked: out of GPU memory in evaluation; continues with half as many windows", file=sys.stderr)
        return results

    def _portions(self, predictions: Sequence[Prediction]) -> Iterator[Sequence[Prediction]]:
        """Yield as many predictions at a time as fit into memory, each padded to the longest."""
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
        states = {}
        for name in predictions[0].state:
            # contiguous: strides differ after a resume, and the last bits of products may depend on them
            states[name] = torch.stack([one.state[name].to(self.device).contiguous() for one in predictions])
        mask = torch.arange(width) < torch.tensor(list(map(len, windows))).unsqueeze(1)
        x = self.data.test_x[index.to(self.device)]
        logits = self._losses.logits(net, states, x, mask.to(self.device))
        return [own[: len(range_)] for own, range_ in zip(logits, windows, strict=True)]


class _Before(NamedTuple):
    """Client state before a round, to be restored."""

    memory: dict[str, Tensor]
    trained: int
    kept: tuple[Tensor, ...]


def _empty_cache() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _moved(memory: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a client's memory to a device, except single numbers, which take no room and are read soon."""
    return {name: tensor.to(device) if tensor.numel() > 1 else tensor for name, tensor in memory.items()}
