"""Interface of algorithms: a Server and a Client that exchange Messages and share nothing else.

The algorithm defines what to optimise: the networks it trains, their losses, and what is sent. The engine defines how:
epochs, batches, optimiser, clipping, schedule, devices, bytes. See docs/extend/algorithm.md for a worked example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from registry.aggregation import Average, Averaging

# re-exported for algorithms
from registry.batch import Batch as Batch
from registry.blame import wrong
from registry.messages import BadMessage as BadMessage
from registry.messages import Message as Message
from registry.messages import NonFinite as NonFinite
from registry.messages import check_state
from registry.networks import Model as Model
from registry.networks import Networks as Networks
from registry.networks import Output as Output
from registry.networks import copy_state as copy_state
from registry.networks import float_state as float_state
from registry.networks import last_layers as last_layers
from registry.networks import layers as layers
from registry.networks import matches as matches
from registry.networks import mixture as mixture
from registry.networks import outputs as outputs
from registry.networks import parameter_names as parameter_names
from registry.normalisation import is_batch_norm, with_norm
from registry.parameters import Params as _Params

if TYPE_CHECKING:
    from typing_extensions import Self

UNSTATED = "what its author has not stated"


class Round(NamedTuple):
    """Number of a round: `index` counts from 1 to `total`; `share` is the join ratio, of clients selected in each.

    It is no number: what `round < 2` raises for any tuple, `round == 2` raises here, where a tuple would say False.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    total: int
    share: float = 1.0

    @property
    def progress(self) -> float:
        """Progress of the run, ρ = t/R, in (0, 1]."""
        return self.index / self.total

    @property
    def expected(self) -> float:
        """Mean number of rounds of the whole run in which a client takes part."""
        return self.total * self.share

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same round. Raises TypeError: the other is a number."""
        if isinstance(other, (int, float)):
            raise TypeError(f"a Round cannot be compared with the number {other}; write round.index == {other}")
        return tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        """Return whether they are not the same round. Raises TypeError: the other is a number."""
        return not self == other

    def __hash__(self) -> int:
        """Return the hash of the three values."""
        return tuple.__hash__(self)


@dataclass(frozen=True)
class Task:
    """Learning task, which all clients and the server know.

    Attributes:
        shape: (channels, 1, time) of a window.
        classes: number of classes.
        model_class: makes a newly initialised model of (shape, classes) (`-m`).
        student_class: makes the model to be shared where an algorithm has two (`-sm`; by default as `-m`).
        local_bn: whether batch-norm layers stay on the client (FedBN, arXiv:2102.07623) instead of being averaged.
        seed: seed for an algorithm's own random numbers; derive them from it, the round and the client, never from
            call order.
        norm: what takes the place of the models' batch norm (see `registry.normalisation`).
        params: the algorithm's hyper-parameters, for a `build` that depends on them.
        averaging: how servers take the mean of their clients; servers do so by `Server.average`.
    """

    shape: tuple[int, int, int]
    classes: int
    model_class: Callable[[tuple[int, int, int], int], Model]
    student_class: Callable[[tuple[int, int, int], int], Model]
    local_bn: bool = False
    seed: int = 0
    norm: str = "batch"
    params: Any = None
    averaging: Averaging = field(default_factory=Averaging)

    def model(self, shape: tuple[int, int, int] | None = None) -> Model:
        """Return a newly initialised model, for windows of another shape if one is given."""
        return self._made(self.model_class, shape or self.shape)

    def student(self) -> Model:
        """Return a newly initialised model to be shared."""
        return self._made(self.student_class, self.shape)

    def _made(self, model: Callable[[tuple[int, int, int], int], Model], shape: tuple[int, int, int]) -> Model:
        made = model(shape, self.classes)
        with_norm(made, self.norm)
        return made


class Client(ABC):
    """Client side of an algorithm.

    While a client works, the engine has put its networks into `nets`: the initial state, replaced by what this client
    kept, and then by what `receive` installs. Afterwards the engine keeps the state declared below and nothing else.

    Class attributes (patterns of `fnmatch` for names such as `teacher.head.weight`; see `matches`):
        private: state that never leaves the client; it is kept between rounds.
        kept: state that may be sent but also stays with the client between rounds.
        local_bn: whether batch-norm layers are private, too, as with `--bn local` (see `Task`).
        frozen: names of networks that the losses use but nothing trains: in evaluation mode, without gradients.

    Class attribute for differential privacy of single windows (`--dp example`), declared anew by each subclass with
    methods of its own:
        windows_meet: how windows of a client meet elsewhere than in losses that are means over the windows of a batch
            of terms of one window each (beside terms of none), as a verb with what follows it; '' if they do not.

    Attributes:
        id: number of the client.
        task: the learning task.
        params: an instance of the server's `Params`.
        samples: number of training windows.
        nets: the networks by name, only while the client works.
        data: its training windows, only while it works.
        validation: windows held out of them (see `holdout`); None if none are held out.
        memory: further tensors to keep between rounds; the engine never sends them.
        learning_rate: learning rate of the present round.
        steps: number of training steps of the present round, known from `receive` on.
        trained: number of earlier rounds in which this client has trained.
    """

    private: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()
    local_bn: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()
    windows_meet: ClassVar[str] = "does not declare whether its windows meet elsewhere than in means of losses"

    def __init__(self, id: int, task: Task, params: Any, samples: int) -> None:
        self.id, self.task, self.params, self.samples = id, task, params, samples
        self.nets: Mapping[str, nn.Module] = {}
        self._looked_at: Mapping[str, nn.Module] | None = None  # the networks of which `_private` holds the names
        self._private: frozenset[str] = frozenset()
        self.data: Batch | None = None
        self.validation: Batch | None = None
        self.memory: dict[str, Tensor] = {}
        self.learning_rate = 0.0
        self.steps = 0
        self.trained = 0

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the networks that this algorithm trains, by name, newly initialised."""
        return {"model": task.model()}

    @classmethod
    def private_in(cls, task: Task, nets: Mapping[str, nn.Module]) -> tuple[str, ...]:
        """Return the patterns of `private`; override it where they depend on hyper-parameters or on the networks."""
        return cls.private

    @classmethod
    def meeting(cls, params: Any) -> str:
        """Return `windows_meet` for these hyper-parameters; override it where they matter, and say what to set."""
        return cls.windows_meet

    @abstractmethod
    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the scalar losses to minimise, by name; the engine adds them up and calls backward once.

        The gradient of each loss reaches every network in its graph: detach the outputs of networks that the loss
        should not train. Reduce over the batch with `batch.mean`. Use `nets` and `context`, never `self.nets`, so that
        several clients can be trained at once.
        """

    def trains(self, epoch: int, epochs: int) -> Sequence[str]:
        """Return patterns of full names of the parameters that are trained in an epoch; by default all of them.

        For training in phases: the other parameters stay as they are in this epoch. Running statistics of batch norm
        follow the batches in every epoch.

        Args:
            epoch: from 0.
            epochs: number of epochs of the round; fewer for a straggler.
        """
        return ("*",)

    def repeats(self) -> int:
        """Return the number of training steps that are taken one after the other on each batch; by default 1.

        Running statistics of batch norm follow the first of them alone: each batch counts once in them.
        """
        return 1

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        rate: Tensor,
        step: Tensor,
        context: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Return the parameters after a training step; by default w − η g, plain SGD.

        For methods with an inner loop or another kind of step. Like `losses` it must be a pure function of its
        arguments, `task` and `params`, without branches on values: use `torch.where` with `step`.

        Args:
            weights: for each trained network, all its parameters one after the other, (values,).
            gradients: the same, after clipping; zero for parameters that no loss reaches or that are not trained now.
            rate: learning rate η, ().
            step: number of the step in this round, from 0, (), int64.
            context: result of `context`.
        """
        return {name: own - rate * gradients[name] for name, own in weights.items()}

    def holdout(self) -> float:
        """Return the share of the training windows to hold out as `validation` in all rounds; by default 0."""
        return 0.0

    def receive(self, message: Message) -> None:
        """Install what the server sent. By default, tensors named as in `state` replace those of the networks."""
        self.load(message.tensors)

    def context(self) -> Mapping[str, Tensor]:
        """Return read-only tensors that `losses` needs; called once after `receive`; none by default."""
        return {}

    @classmethod  # noqa: B027 (may be overridden, need not)
    def before_replies(cls, clients: Sequence[Self], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Prepare the replies of several clients that were trained together; by default do nothing.

        Called once before `reply`, for work on the device that is faster for all clients at once and whose results are
        stored on the clients. It is not called for a client that is trained alone, so `reply` must not rely on it.

        Args:
            clients: clients of this class, after training.
            states: the `state` of each, in the same order.
        """

    def reply(self) -> Message:
        """Return the message to the server after training. By default, all state that is not private, and `samples`."""
        return Message(self.shared(), {"samples": self.samples})

    def serves(self) -> str | Mapping[str, float]:
        """Return the name of the network with which this client predicts; by default the first one.

        Or several: name -> weight in the mean of their probabilities, above 0, adding up to 1 (see `mixture`).
        """
        return next(iter(self.nets))

    def state(self) -> dict[str, Tensor]:
        """Return all floating-point state of the networks by full name (`net.parameter`), not copied."""
        return float_state(self.nets)

    def shared(self) -> dict[str, Tensor]:
        """Return the part of `state` that is not private and so may be sent."""
        if self._looked_at is not self.nets:
            self._looked_at, self._private = self.nets, private_names(type(self), self.task, self.nets)
        return {name: tensor for name, tensor in self.state().items() if name not in self._private}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the networks by full name. Raises BadMessage for a wrong name or shape."""
        copy_state(self.nets, tensors)


class Server(ABC):
    """Server side of an algorithm, which `-algo` names; listings show the first line of the class's docstring.

    Class attributes:
        paper: citation with link.
        sends: one line for listings: what a selected client receives and sends, and which model predicts.
        Client: class of its clients.
        Params: frozen dataclass of its hyper-parameters, declared with `registry.parameters.option`.
        pools_data: whether client 0 trains on all clients' windows, which the others upload (no federation).
        averages: whether `aggregate` takes the mean of clients' states or updates, by `self.average`; otherwise options
            that ask for another mean (`--aggregate`, `--max-share`) are refused.
        beyond_average: what of its clients' replies reaches its state, or other clients, by other ways than one call of
            `self.average(..., around=...)` a round: a few words for an error message; '' where nothing does, so that
            `--dp client` can account for it. A class that overrides `aggregate` says it anew (see `beyond_average`).
        sums: whether one reply that holds the mean of all replies' tensors, weighted by `samples`, and the total of
            these, does to the server what all replies do, to rounding, whichever client it comes from. Then
            `--secure-aggregation` can show it that reply alone. Replies hold no metadata but `samples`. A class that
            defines `aggregate` does not inherit it: it says so anew.
        assumes_sgd: whether its equations hold for clients that take plain steps of SGD alone, so that `--optimizer`
            does not apply.
        accepts_partial_work: whether replies of clients that made fewer local epochs than the others are accepted
            (`--stragglers`); otherwise such a reply counts as too late and is dropped.

    Args:
        task: the learning task.
        params: an instance of `Params`.
        initial: initial values of all state that is not private, by full name.

    Attributes:
        average: mean of clients' states, to be used in `aggregate`.
    """

    paper: ClassVar[str] = ""
    sends: ClassVar[str] = ""
    Client: ClassVar[type[Client]]
    Params: ClassVar[type] = _Params
    pools_data: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    beyond_average: ClassVar[str] = UNSTATED
    sums: ClassVar[bool] = False
    assumes_sgd: ClassVar[bool] = False
    accepts_partial_work: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "aggregate" in vars(cls) and "sums" not in vars(cls):
            cls.sums = False

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        self.task, self.params = task, params
        self.weights: dict[str, Tensor] = dict(initial)
        self.average = Average(task.averaging)

    @classmethod  # noqa: B027 (may be overridden, need not)
    def check(cls, task: Task, params: Any) -> None:
        """Raise `registry.errors.UserError` if models and hyper-parameters do not fit together; by default never."""

    def messages(self, clients: Sequence[int], round: Round) -> dict[int, Message]:
        """Return `message` of all clients selected in a round; override it to make several at once."""
        return {client: self.message(client, round) for client in clients}

    @classmethod
    def trains_everyone(cls, params: Any) -> bool:
        """Return whether all clients train in every round, whoever is selected, as they need no server; by default not.

        Such clients never drop out or come too late; only unseen ones do not train.
        """
        return False

    @abstractmethod
    def message(self, client: int, round: Round) -> Message:
        """Return the message to `client` at the start of `round`. Must not change the server."""

    def check_reply(self, client: int, reply: Message) -> None:
        """Raise BadMessage if a reply does not have the form that a client of this algorithm sends.

        The reply comes from outside: only that it is a message has been checked. The engine calls this before
        `aggregate`, which never receives a refused reply, and reports the client. Must not change the server.

        By default, state as in `self.weights` and `samples` are required if clients use `Client.reply`. Override this
        method together with `Client.reply`: replies of clients that override it are otherwise not checked.
        """
        if self.Client.reply is Client.reply:
            check_state(reply, self.weights)

    def contribution(self, client: int, reply: Message) -> Mapping[str, Tensor]:
        """Return what a checked reply does to the server, so that the engine can compare the sizes of replies.

        By default the reply's tensors. Override it where these are scaled by a number in the metadata, or compressed.
        """
        return reply.tensors

    def idle(self, sent: Message) -> Mapping[str, Tensor]:
        """Return the `contribution` of a client that gives back what it was sent: where attacks start from.

        By default the tensors that it was sent. Override it together with `contribution`; tensors that are missing
        count as 0.
        """
        return sent.tensors

    def forged(self, reply: Message, contribution: Mapping[str, Tensor]) -> Message:
        """Return a reply of the same form and size with another `contribution`, for simulated attacks (`--attack`)."""
        return Message({**reply.tensors, **contribution}, reply.meta)

    @abstractmethod
    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Aggregate the round's replies, in the order of client ids; at least one, all checked and finite.

        Where `self.average` is private there may be none: their mean is noise alone then, which must be added, too.
        """

    def networks(self) -> Mapping[str, Tensor]:
        """Return the shared state that every client would use now, by full name, without what clients keep.

        Where the server has another state for some clients (a cluster's, say), theirs is beside it as
        `registry.aggregation.labelled` puts it: `<id>/<full name>`; the others use what has no label.
        """
        return self.weights

    def figures(self) -> Mapping[str, float]:
        """Return values of the last `aggregate` to record, by name (letters, digits, '_'); by default none.

        Called once after each `aggregate`; before the first one the names must be the same and the values NaN.
        """
        return {}

    def save(self) -> Message:
        """Return all state that this server needs to continue after a restart; override together with `restore`."""
        return Message(self.weights)

    def restore(self, saved: Message) -> None:
        """Restore the state that `save` returned."""
        self.weights = dict(saved.tensors)


def private_names(client: type[Client], task: Task, nets: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the full names of the state that never leaves a client: what its class declares, and local batch norm.

    Raises:
        PluginError: `private_in` returns no tuple or list of patterns; read otherwise, private state might be sent.
    """
    local_bn, private = task.local_bn or client.local_bn, client.private_in(task, nets)
    if not isinstance(private, (tuple, list)) or not all(isinstance(pattern, str) for pattern in private):
        raise wrong(client, "private_in", "a tuple of patterns of names", private)
    batch_norm = tuple(
        f"{net}.{path}." for net, module in nets.items() for path, part in module.named_modules() if is_batch_norm(part)
    )
    return frozenset(
        name for name in float_state(nets) if matches(name, private) or (local_bn and name.startswith(batch_norm))
    )


def beyond_average(server: type[Server]) -> str:
    """Return `Server.beyond_average` as the class says it that defines the `aggregate` in use.

    A class that overrides `aggregate` and says nothing may do with replies what the one it derives from cannot know.
    """
    for part in server.__mro__:
        if "beyond_average" in vars(part):
            return str(vars(part)["beyond_average"])
        if "aggregate" in vars(part):
            break
    return UNSTATED


def moves_by_sgd(client: type[Client]) -> bool:
    """Return whether a client class takes plain steps of SGD, as `Client.update` describes."""
    return client.update is Client.update
