"""FedAS: Yang, Huang and Ye, Bridging Inconsistency in Personalized Federated Learning, CVPR 2024."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.beside import PERSONAL, Beside, PersonalClient, of_model, renamed
from registry.interface import BadMessage, Batch, Message, Model, Round
from registry.messages import check_state
from registry.parameters import Params, option
from registry.prototypes import features_of
from registry.text import shown

BATCH = 32  # windows of a step of alignment, and of a term of the Fisher information
SMALLEST, LARGEST = 1e-30, 1e30  # trace that a client may state


@dataclass(frozen=True)
class FedASParams(Params):
    """Hyper-parameters of FedAS: one pass at a rate of 0.01 in the authors' code (github.com/xiyuanyang45/FedAS)."""

    align_rate: float = option(0.01, "learning rate of the alignment of the shared layers; 0: none", 0.0)
    align_passes: int = option(1, "passes over the windows for the alignment", 0)


class FedASClient(PersonalClient):
    """Keeps its head, and aligns the layers received with those that it trained last, before it trains them.

    The prototype of a class is the mean of the client's features of that class by the personal model, which is the
    client's whole model as its last round left it. The layers received take steps on Σ_c mean ‖f(x) − p_c‖²/d over the
    windows of class c in a batch (federated parameter alignment). Both are by running statistics of batch norm, which
    stay as received until training. As in the authors' code these steps are not clipped, as those of training are, so
    that a large rate may drive the layers away; batches are of 32 windows, theirs of 16.
    """

    private = ("model.head.*",)
    windows_meet = "aligns layers with its windows and states a trace of theirs, without noise"

    def receive(self, message: Message) -> None:
        """Install the shared layers and, if the client has trained before, align them."""
        self.load(message.tensors)
        if self.trained:
            self._align(self._prototypes())

    def _net(self, name: str) -> Model:
        model = self.nets[name].eval()
        assert isinstance(model, Model)  # as `build` made it
        return model

    def _windows(self) -> list[Batch]:
        assert self.data is not None  # the engine sets it while the client works
        return self.data.split(BATCH)

    @torch.no_grad()
    def _prototypes(self) -> dict[int, Tensor]:
        """Return the mean features (d,) of each class that the client has, by the personal model."""
        assert self.data is not None  # the engine sets it while the client works
        features, y = features_of(self.nets["personal"], self.data), self.data.y
        return {label: features[y == label].mean(0) for label in y.unique().tolist()}

    def _align(self, prototypes: Mapping[int, Tensor]) -> None:
        """Take steps of SGD by which the features come nearer to the prototypes, on the windows in their order."""
        model = self._net("model")
        shared = [own for name, own in model.named_parameters() if not name.startswith("head.")]
        for _ in range(self.params.align_passes):
            for part in self._windows():
                features = model.features(part.x)
                loss = torch.zeros((), device=part.x.device)
                for label in part.y.unique().tolist():
                    loss = loss + (features[part.y == label] - prototypes[label]).square().mean()
                slopes = torch.autograd.grad(loss, shared, allow_unused=True)
                _step(shared, slopes, self.params.align_rate)

    def reply(self) -> Message:
        """Return the shared layers and the trace of the Fisher information; the model is now the personal one."""
        self.load(renamed(of_model(self.state()), PERSONAL))
        return Message(of_model(self.shared()), {"samples": self.samples, "fisher": self._fisher()})

    def _fisher(self) -> float:
        """Return Σ ‖∇ F_k‖² over batches of the client's windows, for the whole model: the empirical trace."""
        parameters, total = list(self._net("model").parameters()), 0.0
        for part in self._windows():
            slopes = torch.autograd.grad(self.losses(self.nets, part, {})["model"], parameters)
            total += float(torch.stack([slope.double().square().sum() for slope in slopes]).sum())
        return min(max(total, SMALLEST), LARGEST)


class FedAS(Beside):
    """Averages all layers but the head, by the trace of clients' Fisher information; clients align what they are sent.

    W ← Σ (F_k / Σ F) W_k, F_k = tr(FIM) of client k after training (client synchronisation): a model that still has
    much to learn counts more. Following the authors' code, the trace is the sum over batches of the squared norm of the
    gradient of the batch's mean loss, whole model, head included. So F_k is also larger for clients with more windows.

    The authors' repository aligns the one global model in place, client after client; here each aligns its own copy.

    The head never leaves the client. A client predicts with its whole model as it trained it last; one that has never
    trained with the shared layers and the initial head. The server learns, beyond shared layers, a client's F_k; a lie
    about it counts as one about its number of samples does in FedAvg.
    """

    paper = "Yang et al. 2024, CVPR 2024, github.com/xiyuanyang45/FedAS"
    sends = "shared layers down, shared layers and a number up; own head"
    Client = FedASClient
    beyond_average = "traces of the Fisher information"
    Params = FedASParams

    def check_reply(self, client: int, reply: Message) -> None:
        """Require the shared layers with `samples`, and a positive finite trace."""
        check_state(reply, self.weights)
        trace = reply.meta.get("fisher")
        if not isinstance(trace, float) or not SMALLEST <= trace <= LARGEST:
            raise BadMessage(f"'fisher' must be a number from {SMALLEST:g} to {LARGEST:g}, not {shown(repr(trace))}")

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Replace the shared layers by the mean weighted by the traces."""
        states = [reply.tensors for reply in replies.values()]
        traces = [reply.meta["fisher"] for reply in replies.values()]
        self.weights = self.average(states, [own / sum(traces) for own in traces])


@torch.no_grad()
def _step(parameters: list[nn.Parameter], slopes: tuple[Tensor | None, ...], rate: float) -> None:
    for own, slope in zip(parameters, slopes, strict=True):
        if slope is not None:
            own.sub_(rate * slope)
