"""Cost of secure aggregation in a round: seconds and bytes for 10 and 100 clients, beside the plain mean.

    python benchmarks/secure_aggregation.py

The clients' replies are the paper's model on SPAR's windows, with random values; there is no training. All clients work
one after the other in this process, on one thread, so a client's share of the time is a part of what is printed. The
best of several rounds counts (others may share the cores).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedkdx_plugin.models.cnn import CNN
from fedkdx_plugin.privacy.secure_aggregation.messages import MASK
from fedkdx_plugin.privacy.secure_aggregation.party import Party
from fedkdx_plugin.privacy.secure_aggregation.summing import Summing
from registry.aggregation import sample_weights, weighted_sum
from registry.interface import Message, float_state

SPAR = ((9, 1, 128), 7)


def make_replies(clients: int) -> dict[int, Message]:
    state = float_state({"model": CNN(*SPAR)})
    return {
        id: Message({name: torch.randn_like(own) for name, own in state.items()}, {"samples": 100 + id})
        for id in range(clients)
    }


class Room:
    """Carries messages between parties and server, by their bytes, and takes the time of both sides apart."""

    def __init__(self, replies: Mapping[int, Message], gone: int) -> None:
        began = time.perf_counter()
        self.parties = {id: Party(id, reply, "benchmark") for id, reply in replies.items()}
        self.offers = {id: party.offer() for id, party in self.parties.items()}
        self.seconds = time.perf_counter() - began  # of all clients
        self.gone, self.down, self.up = gone, 0, sum(offer.size() for offer in self.offers.values())

    def ask(self, step: str, requests: Mapping[int, Message]) -> dict[int, Message]:
        began, answers = time.perf_counter(), {}
        for id, request in requests.items():
            self.down += request.size()
            if step == MASK and id < self.gone:
                continue
            answers[id] = self.parties[id].answer(step, request)
            self.up += answers[id].size()
        self.seconds += time.perf_counter() - began
        return answers


def measure(replies: Mapping[int, Message], gone: int) -> tuple[float, float, Room]:
    """Return the seconds of all clients and of the server, and what carried their messages."""
    began = time.perf_counter()
    room = Room(replies, gone)
    outcome = Summing("benchmark", room.ask, lambda id, reply: None).run(room.offers)
    assert outcome.mean is not None, outcome.undone
    return room.seconds, time.perf_counter() - began - room.seconds, room


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| clients | drop out | s plain | s of a client | s of the server | MB up plain | MB up | MB down more |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for clients in given.clients:
        replies = make_replies(clients)
        began = time.perf_counter()
        weighted_sum([reply.tensors for reply in replies.values()], sample_weights(replies))
        plain = time.perf_counter() - began
        up = sum(reply.size() for reply in replies.values())
        for gone in (0, clients // 10):
            runs = [measure(replies, gone) for _ in range(given.repeats)]
            own, server, room = min(own for own, _, _ in runs), min(server for _, server, _ in runs), runs[0][2]
            megabytes = " | ".join(f"{size / 1e6:.2f}" for size in (up, room.up, room.down))
            print(f"| {clients} | {gone} | {plain:.3f} | {own / clients:.3f} | {server:.2f} | {megabytes} |")


if __name__ == "__main__":
    main()
