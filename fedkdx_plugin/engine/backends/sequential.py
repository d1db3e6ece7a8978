"""The reference backend: one client after the other, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedkdx_plugin.engine import evaluation
from fedkdx_plugin.engine.backends.base import Backend, Trained
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.engine.training import BALANCED, Settings, hold_out, named, planned_steps, train, unseen
from fedkdx_plugin.engine.transport import check_finite
from registry import contract
from registry.batch import balanced
from registry.interface import Batch, Client, Message, NonFinite, Round


class Sequential(Backend):
    """Backend that trains the selected clients one by one; every error names client and step."""

    name = "sequential"

    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """Train the clients in the order of `messages`; see `Backend.train`."""
        return {id: self.train_one(id, message, round) for id, message in messages.items()}

    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        """Predict one after the other; see `Backend.predict`."""
        return evaluation.predict(self.workspace, self.data.test_x, net, predictions)

    def train_one(self, id: int, message: Message, round: Round) -> Trained | NonFinite:
        """Do one client's work: receive, train, reply; its state stays as before if something is not finite."""
        before = dict(self.workspace.clients[id].memory)
        try:
            with named(f"client {id}, round {round.index}"):
                client = self.begin(id, message, round)
                loss = train(client, round, self.settings)
                return self.end(client, loss)
        except NonFinite as error:
            self.workspace.clients[id].memory = before
            return error
        finally:
            release(self.workspace.clients[id])

    def begin(self, id: int, message: Message, round: Round) -> Client:
        """Return a client with networks, data and learning rate in place that has received its message."""
        client = self.workspace.enter(id)
        prepare(client, round, self.data, self.settings)
        with unseen(client, self.settings):
            contract.receive(client, message)
        return client

    def end(self, client: Client, loss: Tensor) -> Trained:
        """Return a trained client's reply and loss, and keep its state. Raises NonFinite, naming client and tensor."""
        check_finite(client.id, contract.state(client))
        reply = self.reply(client)
        self.workspace.keep(client)
        client.trained += 1
        return Trained(reply, loss)

    def reply(self, client: Client) -> Message:
        """Return a trained client's reply. Raises NonFinite, naming client and tensor."""
        with unseen(client, self.settings):
            reply = contract.reply(client).copy(self.data.test_x.device)  # the next client will use the networks
        check_finite(client.id, reply.tensors)
        return reply


def prepare(client: Client, round: Round, data: DeviceData, settings: Settings) -> None:
    """Give a client its windows, on the device of the test windows, its learning rate, and its number of steps."""
    device = data.test_x.device
    own = Batch(data.train_x[client.id].to(device), data.train_y[client.id].to(device))
    client.data, client.validation = hold_out(own, contract.holdout(client), client.id, settings.seed)
    if settings.class_weights == BALANCED:
        training = client.data
        weights = balanced(training.y, client.task.classes, training.x)
        client.data = dataclasses.replace(training, weights=weights)
    client.learning_rate = settings.learning_rate * settings.decay**client.trained
    client.steps = planned_steps(client, round, settings)


def release(client: Client) -> None:
    """Release a client's windows, which may have been fetched for it."""
    client.data = client.validation = None
