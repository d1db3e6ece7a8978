"""A ClientApp that trains and measures by one of the algorithms, on data and a model of somebody's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, MetricRecord
from flwr.app import Message as Envelope
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.metrics import FIGURES
from fedkdx_plugin.flower.apps.models import Given
from fedkdx_plugin.flower.apps.plan import Plan, form_of, spec_of
from fedkdx_plugin.flower.apps.state import ContextState
from fedkdx_plugin.flower.apps.windows import FORMS, AppData
from fedkdx_plugin.flower.packing import pack, unpack
from fedkdx_plugin.flower.protocol import MOST_CLIENTS, Answer, Request
from fedkdx_plugin.flower.site import Site, States
from registry import catalog
from registry.errors import UserError
from registry.interface import BadMessage, Message, Server

PLAN = "fedkdx-plan"  # record and key of the server's plan in a message
NUMBER = "partition-id"  # key of a client's number in a node's configuration
METRICS = "metrics"  # record of a reply
OF_EXAMPLES = "num-examples"  # as Flower's own strategies call it
MEASURED = ("accuracy", "f1", "loss")


def client_app(
    algorithm: str | type[Server],
    model: Given,
    data: Callable[[Context], Any],
    student: Given | None = None,
) -> ClientApp:
    """Return the ClientApp for a `Strategy` of the same algorithm.

    Args:
        algorithm: name of an algorithm (see `fedkdx list`), or a `Server` class.
        model: makes the network, as of `Strategy`.
        data: function of Flower's context that returns this node's windows: (x_train, y_train, x_test, y_test), or a
            Dataset or DataLoader for training and one for testing. It is called for each message.
        student: makes the model to be shared, where the algorithm has two; by default as `model`.

    Raises:
        UserError: the algorithm is not known, or `data` is no function.
    """
    catalog.find("algorithms", spec_of(algorithm))
    if not callable(data):
        raise UserError(f"data={data!r}: give a function of Flower's context that returns {FORMS}")
    own = _Own(algorithm, model, data, student)
    app = ClientApp()
    app.query()(own.announce)
    app.train()(own.work)
    app.evaluate()(own.work)
    return app


class AppSite(Site):
    """Site whose private state lies in Flower's context."""

    context: Context

    def _states(self, run: str) -> States:
        return ContextState(self.context.state)


class _Own:
    """Own part of a client: its model and data; it answers the server's messages."""

    def __init__(
        self, algorithm: str | type[Server], model: Given, data: Callable[[Context], Any], student: Given | None
    ) -> None:
        self.algorithm, self.model, self.data, self.student = algorithm, model, data, student

    def announce(self, message: Envelope, context: Context) -> Envelope:
        """Tell the server how many windows there are, of which shape; or why they cannot be used."""
        try:
            plan, _ = self._plan(message)
            answer = self._loaded(plan, context).announcement().to_message()
        except UserError as error:
            return _refusal(error, message)
        return Envelope(pack(answer.to_bytes()), reply_to=message)

    def work(self, message: Envelope, context: Context) -> Envelope:
        """Train, or measure, or say why not."""
        try:
            request = Request.from_message(Message.from_bytes(unpack(message.content)))
            plan, form = self._plan(message)
            data = self._loaded(plan, context)
            site = _site(plan, data)
            site.context = context
            if form_of(site.workspace) != form:
                raise UserError("this client's model is another than the server's; give both the same function")
            answer = site.handle(request)
        except (UserError, BadMessage, ValueError) as error:
            return _refusal(error, message)
        content = pack(answer.to_message().to_bytes())
        if record := _metrics(answer, len(data.train.y)):
            content[METRICS] = record
        return Envelope(content, reply_to=message)

    def _plan(self, message: Envelope) -> tuple[Plan, str]:
        record = message.content.config_records.get(PLAN, ConfigRecord())
        return Plan.read(record.get(PLAN), self.algorithm, self.model, self.student)

    def _loaded(self, plan: Plan, context: Context) -> AppData:
        return AppData(_number(context), self.data(context), plan.own, plan.classes, _device())


def _site(plan: Plan, data: AppData) -> AppSite:
    about = data.setup, plan.choice.server, plan.task(), plan.choice.params, plan.settings()
    return AppSite(*about, data, data.setup.client + 1)


def _number(context: Context) -> int:
    """Return the client's number. Raises UserError: the node's configuration has none."""
    number = context.node_config.get(NUMBER)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MOST_CLIENTS:
        raise UserError(
            f"this node has no number: start its SuperNode with --node-config '{NUMBER}=0', each with its own"
        )
    return number


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _metrics(answer: Answer, samples: int) -> MetricRecord | None:
    """Return what Flower's own strategies and logs read; None where nothing was done."""
    if answer.reply is not None:
        return MetricRecord({OF_EXAMPLES: samples, "train-loss": answer.loss})
    if SERVED not in answer.metrics:
        return None
    values = dict(zip(FIGURES, answer.metrics[SERVED].row.tolist(), strict=False))  # more follow in the row
    return MetricRecord({OF_EXAMPLES: int(values["samples"]), **{name: values[name] for name in MEASURED}})


def _refusal(error: Exception, message: Envelope) -> Envelope:
    return Envelope(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
