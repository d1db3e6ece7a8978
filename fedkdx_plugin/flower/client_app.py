"""The ClientApp, a site's side: a new process for each message, which reads shards and private state from disk."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.experiments.setting import make_task, training
from fedkdx_plugin.flower.link import pack, unpack
from fedkdx_plugin.flower.options import read_settings
from fedkdx_plugin.flower.protocol import Answer, Request, printable
from fedkdx_plugin.flower.site import LocalData, Site, SiteSetup
from registry import interface
from registry.errors import UserError
from registry.interface import BadMessage, Round

app = ClientApp()


def setup(context: Context) -> SiteSetup:
    """Return what the site decides by itself, from its SuperNode's configuration alone."""
    own = context.node_config
    return SiteSetup(
        client=int(own["partition-id"]),
        folder=Path(str(own["data"])),
        shard=int(own["shard"]),
        state=Path(str(own["state"])),
        device=torch.device(str(own["device"])),
    )


def site(context: Context, own: SiteSetup) -> Site:
    """Return the site of this run. Raises UserError."""
    config = read_settings(str(context.run_config["settings"]))
    (choice,) = choose(config)
    data = LocalData(own)
    about = data.announcement()
    task = make_task(config, about.shape, len(about.classes))
    settings = training(config, config.seed)
    return Site(own, choice.server, task, choice.params, settings, data, int(context.run_config["clients"]))


@app.query()
def announce(message: Message, context: Context) -> Message:
    """Announce this site; print the reason where the message says that the server refuses it."""
    reason = unpack(message.content).decode(errors="replace")
    if reason:
        _say(setup(context), f"refused by the server: {printable(reason)}")
    return Message(pack(LocalData(setup(context)).announcement().to_message().to_bytes()), reply_to=message)


@app.train()
def work(message: Message, context: Context) -> Message:
    """Measure, train, or do both, as the message asks."""
    own, request = setup(context), None
    try:
        request = Request.from_message(interface.Message.from_bytes(unpack(message.content)))
        if request.run != context.run_config["run"]:
            raise UserError(f"a request of run {request.run!r} in run {context.run_config['run']!r}")
        answer = site(context, own).handle(request)
        _say(own, _summary(request, answer))
    except (UserError, BadMessage) as error:
        _say(own, f"refused: {error}")
        round = request.round if request else Round(0, 0)
        answer = Answer(own.client, round.index, dropped=f"client {own.client}: {error}")
    return Message(pack(answer.to_message().to_bytes()), reply_to=message)


def _summary(request: Request, answer: Answer) -> str:
    """Return what an operator of the site sees of a round."""
    did = []
    if answer.metrics:
        samples, accuracy = answer.metrics[SERVED].row[:2].tolist()
        did.append(f"measured on {samples:.0f} windows, accuracy {100 * accuracy:.1f} %")
    if answer.reply is not None:
        did.append(f"trained, loss {answer.loss:.4f}")
    if answer.dropped:
        did.append(f"sent no update: {answer.dropped}")
    return f"{request.run} round {request.round.index}/{request.round.total}: {'; '.join(did)}"


def _say(own: SiteSetup, text: str) -> None:
    print(f"fedkdx site {own.client}: {text}", file=sys.stderr, flush=True)
