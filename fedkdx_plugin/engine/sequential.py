"""The reference backend: one client after the other, in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkdx_plugin.engine import evaluation
from fedkdx_plugin.engine.backend import Backend, Trained
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.engine.training import hold_out, named, train
from fedkdx_plugin.engine.transport import check_finite
from registry.interface import Batch, Client, Message, NonFinite, Round


class Sequential(Backend):
    """Trains the selected clients one by one; every error names client and step."""

    name = "sequential"

    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        return {id: self.train_one(id, message, round) for id, message in messages.items()}

    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        return evaluation.predict(self.workspace, self.data.test_x, net, predictions)

    def train_one(self, id: int, message: Message, round: Round) -> Trained | NonFinite:
        """One client's work: receive, train, reply; as if it had not been asked where something is not finite."""
        before = dict(self.workspace.clients[id].memory)
        try:
            with named(f"client {id}, round {round.index}"):
                client = self.begin(id, message)
                loss = train(client, round, self.settings)
                return self.end(client, loss)
        except NonFinite as error:
            self.workspace.clients[id].memory = before
            return error

    def begin(self, id: int, message: Message) -> Client:
        """A client with networks, data and rate in place that has received its message."""
        client = self.workspace.enter(id)
        data = Batch(self.data.train_x[id], self.data.train_y[id])
        client.data, client.validation = hold_out(data, client.holdout(), id, self.settings.seed)
        client.learning_rate = self.settings.learning_rate * self.settings.decay**client.trained
        client.receive(message)
        return client

    def end(self, client: Client, loss: Tensor) -> Trained:
        """What a trained client replies and keeps. Raises NonFinite, naming client and tensor."""
        check_finite(client.id, client.state())
        reply = client.reply()
        # the networks are the next client's soon: what goes out is copied
        reply = Message({name: torch.clone(tensor) for name, tensor in reply.tensors.items()}, reply.meta)
        check_finite(client.id, reply.tensors)
        self.workspace.keep(client)
        client.trained += 1
        return Trained(reply, loss)
