"""What an algorithm is: a Server and a Client that exchange Messages and share nothing else.

The algorithm says what to optimise: the networks it trains, their losses, and what is sent. The engine says how to
loop: epochs, batches, optimiser, clipping, schedule, devices, bytes. See docs/algorithm.md for a worked example.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# what algorithms import from here
from registry.messages import BadMessage as BadMessage
from registry.messages import Message as Message
from registry.messages import NonFinite as NonFinite
from registry.messages import check_state
from registry.parameters import Params as _Params


class Output(NamedTuple):
    """What a model gives for a batch: features (n, feature_size) and logits (n, classes)."""

    features: Tensor
    logits: Tensor


class Model(nn.Module):
    """A network split into a feature extractor and a head.

    A model is built as `Class(shape, classes)`, sets `feature_size` and `head`, and names its `parts` or implements
    `features`.

    Class attributes:
        paper: citation with link.
        parts: names of the layers that features are made by, one after the other, where that is all it takes.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.
    """

    paper: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    feature_size: int
    head: nn.Module

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.shape, self.classes = tuple(shape), classes

    def sequence(self) -> list[nn.Module]:
        """The layers named by `parts`."""
        return [getattr(self, name) for name in self.parts]

    def features(self, x: Tensor) -> Tensor:
        """(n, channels, 1, time) -> (n, feature_size)."""
        if not self.parts:
            raise NotImplementedError(f"{type(self).__name__}.features")
        for layer in self.sequence():
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Output:
        """(n, channels, 1, time) -> features (n, feature_size) and logits (n, classes)."""
        features = self.features(x)
        return Output(features, self.head(features))


class Batch(NamedTuple):
    """Some windows of one client.

    Attributes:
        x: (n, channels, 1, time).
        y: (n,), int64.
        mask: (n,), bool, False for rows that only fill the batch up; None when all rows are real.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Mean of (n,) values over the real rows."""
        if self.mask is None:
            return values.mean()
        return torch.where(self.mask, values, 0).sum() / self.mask.sum().clamp(min=1)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of logits (n, classes) over the real rows."""
        if self.mask is None:
            return F.cross_entropy(logits, self.y)
        return self.mean(F.cross_entropy(logits, self.y, reduction="none"))


class Round(NamedTuple):
    """Which round it is: `index` counts from 1 to `total`; `share` of the clients are selected in each."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    total: int
    share: float = 1.0

    @property
    def progress(self) -> float:
        """ρ = t/R, in (0, 1]."""
        return self.index / self.total


@dataclass(frozen=True)
class Task:
    """What is to be learnt, as every client and the server know it.

    Attributes:
        shape: (channels, 1, time) of a window.
        classes: number of classes.
        model_class: makes a freshly initialised model of (shape, classes) (`-m`).
        student_class: the same for the model to be shared where there are two (`-sm`; else as `-m`).
        local_bn: batch-norm layers stay on the client (FedBN, arXiv:2102.07623) instead of being averaged.
        seed: of what an algorithm draws itself; derive from it, the round and the client, never from call order.
    """

    shape: tuple[int, int, int]
    classes: int
    model_class: Callable[[tuple[int, int, int], int], Model]
    student_class: Callable[[tuple[int, int, int], int], Model]
    local_bn: bool = False
    seed: int = 0

    def model(self, shape: tuple[int, int, int] | None = None) -> Model:
        """A freshly initialised model, for windows of another shape if one is given."""
        return self.model_class(shape or self.shape, self.classes)

    def student(self) -> Model:
        """A freshly initialised model to be shared."""
        return self.student_class(self.shape, self.classes)


class Client(ABC):
    """One participant's side of an algorithm.

    While a client works, the engine has put its networks into `nets`: initial weights, over them what this client
    kept, and over that what `receive` installs. Afterwards the engine keeps what is declared below and nothing else.

    Class attributes (patterns as of `fnmatch`, on names such as `teacher.head.weight`):
        private: state that never leaves the client; kept between rounds.
        kept: state that may travel but also stays with the client between rounds.
        frozen: names of networks that the losses use but nothing trains: in evaluation mode, without gradients.

    Attributes:
        id: the client's number.
        task, params: see `Task`; an instance of the server's `Params`.
        samples: number of training windows.
        nets: the networks by name, only while the client works.
        data: its training windows, only while it works.
        validation: windows held out of them (see `holdout`); None where nothing is held out.
        memory: further tensors to keep between rounds; never sent as they are.
        learning_rate: of the present round.
        trained: number of rounds this client has trained, the present one not counted.
    """

    private: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, id: int, task: Task, params: Any, samples: int) -> None:
        self.id, self.task, self.params, self.samples = id, task, params, samples
        self.nets: Mapping[str, nn.Module] = {}
        self._looked_at: Mapping[str, nn.Module] | None = None  # the networks whose private names are known
        self._private: frozenset[str] = frozenset()
        self.data: Batch | None = None
        self.validation: Batch | None = None
        self.memory: dict[str, Tensor] = {}
        self.learning_rate = 0.0
        self.trained = 0

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """The networks this algorithm trains, by name, freshly initialised."""
        return {"model": task.model()}

    @abstractmethod
    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The scalar losses to minimise, by name; the engine adds them up and calls backward once.

        A network must not feel a loss that is not its own: detach there what is to be fixed. Reduce over the batch
        with `batch.mean`. Use `nets` and `context`, never `self.nets`, so that several clients can be trained at once.
        """

    def holdout(self) -> float:
        """Share of the training windows to hold out as `validation`, the same ones in every round; by default none."""
        return 0.0

    def receive(self, message: Message) -> None:
        """Install what the server sent. By default: tensors named as in `state` replace the networks' own."""
        self.load(message.tensors)

    def context(self) -> Mapping[str, Tensor]:
        """Read-only tensors that `losses` needs, called once after `receive`; none by default."""
        return {}

    @classmethod  # noqa: B027 (may be overridden, need not)
    def before_replies(cls, clients: Sequence[Client], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Called once before `reply` where several clients were trained together, with what training made of each.

        For work on the device that is better done for all at once, to be kept on the clients; by default none. A client
        that is trained by itself is not asked, so `reply` must do without.

        Args:
            clients: of this class, each after its training.
            states: of each its `state`, in the same order.
        """

    def reply(self) -> Message:
        """What goes back after training. By default: all state that is not private, and the number of samples."""
        return Message(self.shared(), {"samples": self.samples})

    def serves(self) -> str | Mapping[str, float]:
        """The network this client would use to predict, by name; by default the first one.

        Or several: name -> share in the mean of their probabilities, above 0, adding up to 1 (see `mixture`).
        """
        return next(iter(self.nets))

    def state(self) -> dict[str, Tensor]:
        """All floating-point state of the networks by full name (`net.parameter`), not copied."""
        return float_state(self.nets)

    def shared(self) -> dict[str, Tensor]:
        """The part of `state` that is not private: what may travel."""
        if self._looked_at is not self.nets:
            self._looked_at, self._private = self.nets, private_names(type(self), self.task, self.nets)
        return {name: tensor for name, tensor in self.state().items() if name not in self._private}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the networks by full name. Raises BadMessage for a wrong name or shape."""
        copy_state(self.nets, tensors)


class Server(ABC):
    """The coordinating side of an algorithm; the class is what `-algo` names, its docstring's first line says what.

    Class attributes:
        paper: citation with link.
        sends: one line for listings: what a selected client is sent and sends back, and which model predicts.
        Client: class of its clients.
        Params: frozen dataclass of its hyper-parameters (`registry.parameters.hyper` declares one).
        pools_data: client 0 trains on everybody's windows, which the others have uploaded: no federation at all.
        accepts_partial_work: takes replies of clients that made fewer local epochs than the others (`--stragglers`);
            else such a client's reply comes too late and is dropped.

    Args:
        task, params: see `Task`; an instance of `Params`.
        initial: initial values of all state that is not private, by full name.
    """

    paper: ClassVar[str] = ""
    sends: ClassVar[str] = ""
    Client: ClassVar[type[Client]]
    Params: ClassVar[type] = _Params
    pools_data: ClassVar[bool] = False
    accepts_partial_work: ClassVar[bool] = False

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        self.task, self.params = task, params
        self.weights: dict[str, Tensor] = dict(initial)

    @classmethod  # noqa: B027 (may be overridden, need not)
    def check(cls, task: Task, params: Any) -> None:
        """Raise `registry.errors.UserError` where models and hyper-parameters do not go together; by default never."""

    def messages(self, clients: Sequence[int], round: Round) -> dict[int, Message]:
        """`message` of all clients selected in a round; for servers that make several at once."""
        return {client: self.message(client, round) for client in clients}

    @abstractmethod
    def message(self, client: int, round: Round) -> Message:
        """What `client` is sent at the start of `round`. Must not change the server."""

    def check_reply(self, client: int, reply: Message) -> None:
        """Raise BadMessage where a reply is not what an honest client of this algorithm sends.

        It has come over a wire: nothing in it may be taken on trust but that it is a message. The engine asks before
        `aggregate`, which never sees a reply that was refused, and drops it by name. Must not change the server.

        By default: state as in `self.weights` and `samples`, for clients that reply as `Client.reply` does. Override it
        together with that: nothing is checked of the replies of clients that have one of their own.
        """
        if self.Client.reply is Client.reply:
            check_state(reply, self.weights)

    @abstractmethod
    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Take in the round's replies, in the order of client ids; at least one, all checked and finite."""

    def networks(self) -> Mapping[str, Tensor]:
        """The shared state that every client would use now, by full name; what a client keeps is not in it."""
        return self.weights

    def figures(self) -> Mapping[str, float]:
        """Figures of the last `aggregate` worth recording, by name (letters, digits, '_'); by default none.

        Asked once after each `aggregate`; the names must be the same before the first one, when the values are NaN.
        """
        return {}

    def save(self) -> Message:
        """All that this server must remember to go on after a restart; override together with `restore`."""
        return Message(self.weights)

    def restore(self, saved: Message) -> None:
        """Become the server that `save` described."""
        self.weights = dict(saved.tensors)


class Networks(dict[str, nn.Module]):
    """Networks by name, some of which an engine may be able to ask in one pass."""

    def outputs(self, x: Tensor, *names: str) -> list[Output]:
        """As the function `outputs`."""
        return [self[name](x) for name in names]


def outputs(nets: Mapping[str, Callable[[Tensor], Output]], x: Tensor, *names: str) -> list[Output]:
    """Ask several models about the same windows, in one pass where the engine can and they are of one architecture.

    For `Client.losses`: `teacher, student = outputs(nets, batch.x, "teacher", "student")` gives what `nets["teacher"]`
    and `nets["student"]` do, up to rounding; on a GPU it takes half as many operations.

    Args:
        nets: as `losses` was given them.
        x: (n, channels, 1, time).
        names: which models.
    """
    return nets.outputs(x, *names) if isinstance(nets, Networks) else [nets[name](x) for name in names]


def mixture(logits: Mapping[str, Tensor], serves: str | Mapping[str, float]) -> Tensor:
    """What a client predicts: (n, classes), of which a softmax gives the probabilities.

    Args:
        logits: (n, classes) of each network.
        serves: as `Client.serves` says.
    """
    if isinstance(serves, str):
        return logits[serves]
    weighted = [logits[name].log_softmax(1) + math.log(share) for name, share in serves.items()]
    return torch.stack(weighted).logsumexp(0)


def float_state(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by full name, not copied. Counters of whole numbers are left out."""
    return {
        f"{net}.{name}": tensor
        for net, module in nets.items()
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }


def copy_state(nets: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into networks by full name. Raises BadMessage, before anything is copied, for a wrong one."""
    state = float_state(nets)
    for name, tensor in tensors.items():
        if name not in state:
            raise BadMessage(f"tensor '{name}' belongs to no network here")
        if state[name].shape != tensor.shape:
            raise BadMessage(f"tensor '{name}' has shape {tuple(tensor.shape)}, not {tuple(state[name].shape)}")
    if tensors:
        torch._foreach_copy_([state[name] for name in tensors], list(tensors.values()))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a full name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def private_names(client: type[Client], task: Task, nets: Mapping[str, nn.Module]) -> frozenset[str]:
    """Full names of the state that never leaves a client: what its class declares, and local batch norm."""
    batch_norm = tuple(
        f"{net}.{path}." for net, module in nets.items() for path, part in module.named_modules() if _is_bn(part)
    )
    return frozenset(
        name
        for name in float_state(nets)
        if matches(name, client.private) or (task.local_bn and name.startswith(batch_norm))
    )


def _is_bn(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
