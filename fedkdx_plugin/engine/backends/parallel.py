"""Backend of worker processes on a CPU, one thread each: small networks run faster in processes than in threads."""

from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset_utils.interrupts import STOPPING, end_with
from fedkdx_plugin.engine.backends.base import Backend, Trained
from fedkdx_plugin.engine.backends.sequential import Sequential
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.native.twin import collected, pass_on
from registry.interface import Message, NonFinite, Round

ATTEMPTS = 3  # attempts at one client's work before a worker's death is an error
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
ALIGNED = 64  # bytes; alignment of tensors in shared memory
SPARE = 16 << 20  # bytes of shared memory beyond those for the networks; only used pages take memory


class Parallel(Backend):
    """Backend that trains the selected clients in forked workers, which share the data; the longest work comes first.

    All client state stays in this process: a worker receives the message and the client's kept state through shared
    memory, and returns the reply and the new kept state. If a worker dies, no state is lost: another one is forked and
    repeats the client's work, with the same result.
    """

    name = "parallel"

    def __init__(self, workspace: Any, data: Any, settings: Any, workers: int) -> None:
        super().__init__(workspace, data, settings)
        self._sequential = Sequential(workspace, data, settings)
        self._count = workers
        self._workers: list[_Worker] = []

    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """Train, the longest work first. Raises ClientError: an algorithm fails; RuntimeError: workers keep dying."""
        clients = self.workspace.clients
        queue = deque(sorted(messages, key=lambda id: (-clients[id].samples, id)))
        attempts = dict.fromkeys(messages, 0)
        results: dict[int, Trained | NonFinite] = {}
        while len(self._workers) < self._count:
            self._workers.append(_Worker(self._sequential))
        busy: dict[_Worker, int] = {}
        try:
            while queue or busy:
                for worker in [worker for worker in self._workers if worker not in busy][: len(queue)]:
                    id = busy[worker] = queue.popleft()
                    attempts[id] += 1
                    worker.begin(self._task(id, messages[id], round))
                for worker in _ready(busy):
                    id = busy.pop(worker)
                    answer = worker.answer()
                    if answer is None:
                        self._replace(worker, id, attempts[id])
                        queue.appendleft(id)
                    elif isinstance(answer, _Failed):
                        self._again_here(id, messages[id], round, answer)
                    else:
                        results[id] = self._take(id, answer)
        except BaseException:
            self.close()  # a busy worker would answer in the next round
            raise
        return results

    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        """Predict in this process; see `Backend.predict`."""
        return self._sequential.predict(net, predictions)

    def close(self) -> None:
        """Stop all workers."""
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def _task(self, id: int, message: Message, round: Round) -> Message:
        client, kept = self.workspace.clients[id], self.workspace.kept[id]
        tensors = _joined(message=message.tensors, kept=kept, memory=client.memory)
        meta = {"id": id, "round": list(round), "trained": client.trained, "meta": dict(message.meta)}
        return Message(tensors, meta)

    def _take(self, id: int, answer: Message) -> Trained | NonFinite:
        pass_on(answer.meta["lines"])
        if "dropped" in answer.meta:
            return NonFinite(answer.meta["dropped"])
        client, parts = self.workspace.clients[id], _parted(answer.tensors, "reply", "kept", "memory")
        self.workspace.kept[id], client.memory = parts["kept"], parts["memory"]
        client.trained += 1
        return Trained(Message(parts["reply"], answer.meta["meta"]), answer.tensors["loss"])

    def _replace(self, worker: _Worker, id: int, attempts: int) -> None:
        worker.stop()
        if attempts == ATTEMPTS:
            raise RuntimeError(
                f"client {id}: its worker process died {ATTEMPTS} times ({worker.how_it_ended()}); "
                "if memory ran out, --backend sequential takes the least"
            )
        self._workers[self._workers.index(worker)] = _Worker(self._sequential)

    def _again_here(self, id: int, message: Message, round: Round, failed: _Failed) -> None:
        """Repeat the work in this process, so that the error keeps its type and a debugger can reach it."""
        self._sequential.train_one(id, message, round)
        raise RuntimeError(f"client {id}: failed in a worker process, but not here:\n{failed.trace}")


@dataclass(frozen=True)
class _Failed:
    """A worker's error."""

    trace: str


class _Worker:
    """A forked process with its shared memory and pipe."""

    def __init__(self, backend: Sequential) -> None:
        state = sum(tensor.numel() * tensor.element_size() for tensor in backend.workspace.initial.values())
        self.memory = mmap.mmap(-1, SPARE + 8 * state)
        self.connection, far = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=(backend, self.memory, far, os.getpid()), daemon=True)
        self.process.start()
        far.close()

    def begin(self, task: Message) -> None:
        """Send a task; if the worker is dead, `answer` reports it."""
        with suppress(OSError):
            _put(self.memory, self.connection, task)

    def answer(self) -> Message | _Failed | None:
        """Return the worker's answer, or None if it has died."""
        try:
            return _get(self.memory, self.connection)
        except (EOFError, OSError):
            return None

    def how_it_ended(self) -> str:
        code = self.process.exitcode
        return f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Kill the process."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def _ready(busy: Mapping[_Worker, int]) -> list[_Worker]:
    """Wait for a worker that has answered or died; return all such workers."""
    signs: dict[Any, _Worker] = {worker.connection: worker for worker in busy}
    signs |= {worker.process.sentinel: worker for worker in busy}
    return list(dict.fromkeys(signs[sign] for sign in wait(list(signs))))


def _serve(backend: Sequential, memory: mmap.mmap, connection: Connection, parent: int) -> None:
    """Run a worker: receive tasks and send answers until the parent has ended."""
    for name in STOPPING:  # handled by the parent
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with(parent, signal.SIGKILL)
    torch.set_num_threads(1)
    keep_freed_memory()
    gc.freeze()  # objects of the parent need no collection here, which would take 2 % of a step
    while True:
        try:
            task = _get(memory, connection)
        except (EOFError, OSError):
            return
        try:
            assert isinstance(task, Message)  # the parent sends nothing else
            answer: Message | _Failed = _work(backend, task)
        except BaseException:
            answer = _Failed(traceback.format_exc())
        _put(memory, connection, answer)


def keep_freed_memory() -> None:
    """Keep glibc from giving memory back between steps: page faults cost 5 to 7 % (docs/reference/performance.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _work(backend: Sequential, task: Message) -> Message:
    id, parts = task.meta["id"], _parted(task.tensors, "message", "kept", "memory")
    client = backend.workspace.clients[id]
    backend.workspace.kept[id], client.memory, client.trained = parts["kept"], parts["memory"], task.meta["trained"]
    with collected() as lines:
        result = backend.train_one(id, Message(parts["message"], task.meta["meta"]), Round(*task.meta["round"]))
    if isinstance(result, NonFinite):
        return Message({}, {"dropped": str(result), "lines": lines})
    tensors = _joined(reply=result.reply.tensors, kept=backend.workspace.kept[id], memory=client.memory)
    backend.workspace.kept[id], client.memory = {}, {}  # kept by the parent
    return Message(tensors | {"loss": result.loss}, {"meta": dict(result.reply.meta), "lines": lines})


def _put(memory: mmap.mmap, connection: Connection, message: Message | _Failed) -> None:
    """Send tensors through the shared memory and the rest through the pipe; all through the pipe if they do not fit."""
    if isinstance(message, _Failed):
        connection.send(message)
        return
    tensors = {name: tensor.detach() for name, tensor in message.tensors.items()}
    sizes = [-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors.values()]
    if sum(sizes) > len(memory):
        connection.send(message.to_bytes())
        return
    starts = accumulate(sizes, initial=0)
    places = [_Place(name, t.dtype, t.shape, at) for (name, t), at in zip(tensors.items(), starts, strict=False)]
    for place, tensor in zip(places, tensors.values(), strict=True):
        place.view(memory).copy_(tensor)
    connection.send((places, Message({}, message.meta).to_bytes()))


def _get(memory: mmap.mmap, connection: Connection) -> Message | _Failed:
    what = connection.recv()
    if isinstance(what, _Failed):
        return what
    if isinstance(what, bytes):
        return Message.from_bytes(what)
    places, rest = what
    tensors = {place.name: place.view(memory).clone() for place in sorted(places)}
    return Message(tensors, Message.from_bytes(rest).meta)


class _Place(NamedTuple):
    """A tensor in shared memory: `start` in bytes."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    def view(self, memory: mmap.mmap) -> Tensor:
        count = self.shape.numel()
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.start).view(self.shape)


def _joined(**parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _parted(tensors: Mapping[str, Tensor], *parts: str) -> dict[str, dict[str, Tensor]]:
    return {
        part: {n.removeprefix(f"{part}/"): tensor for n, tensor in tensors.items() if n.startswith(f"{part}/")}
        for part in parts
    }
