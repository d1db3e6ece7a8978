"""What `test_fuzz` mutates besides files of data: messages, options, experiments and run folders."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import fedkdx_plugin as fedkdx
from dataset_utils import shards
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration import config
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.engine.rounds import Federation
from registry.errors import UserError
from registry.interface import Round
from registry.messages import BadMessage, Message
from tests.sealing import reseal
from tests.test_resume import interrupt_after

RUN = "FedAvg-seed0"
MOST_ROUNDS = 20
FLAGS = "-algo FedAvg -m cnn_small -gr 2 -jr 1 -ls 1 -dev cpu --backend sequential".split()


@contextlib.contextmanager
def silence() -> Iterator[io.StringIO]:
    """Within, nothing is printed; yields what stderr would show."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        yield said


def make_message(folder: Path) -> Path:
    tensors = {"w": torch.arange(12.0).reshape(3, 4), "w.S": torch.ones(2).half(), "n": torch.arange(5)}
    (folder / "message").write_bytes(Message(tensors, {"samples": 3, "more": [1.5, {"x": None}]}).to_bytes())
    return folder / "message"


def read_message(path: Path) -> None:
    """Read a message; what was read can be sent on."""
    try:
        message = Message.from_bytes(path.read_bytes())
    except BadMessage as error:
        raise UserError(str(error)) from error
    assert message.size() == len(message.to_bytes())


def make_options(folder: Path) -> Path:
    (folder / "mine.yaml").write_text(
        "data: SPAR\nalgorithm: [FedAvg, FedKDX]\nmodel: cnn\nglobal_rounds: 3\njoin_ratio: 0.5\nwindow: 128 samples\n"
        "set: {FedKDX.gamma: 0.5}\nlearning_rate_decay: true\nunseen: 2\n"
    )
    return folder / "mine.yaml"


def make_experiment(folder: Path) -> Path:
    (folder / "mine.yaml").write_text(
        "title: Mine\nabout: Two methods.\nbase: {model: cnn, global_rounds: 3}\n"
        "grid: {data: [SPAR, UCI-HAR], algorithm: [Local, FedKDX], seed: [0, 1]}\n"
    )
    return folder / "mine.yaml"


def _made(folder: Path) -> Path:
    """Run two rounds of two clients, the second one interrupted, and return the experiment folder."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3, 1, 32)).astype(np.float32), np.arange(8) % 4
    client = shards.ClientData(shards.Shard(x, y), shards.Shard(x, y), {})
    shards.write(folder / "made", {"name": "made", "classes": list("abcd"), "channels": list("xyz")}, [client, client])
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, silence():
        interrupt_after(patch, 3)
        assert main(["-data", str(folder / "made"), *FLAGS, "-o", str(folder / "runs")]) == 130
    (whole,) = (folder / "runs").iterdir()
    return whole


def make_finished(folder: Path, name: str) -> Path:
    whole = _made(folder)
    with silence():
        assert main(["resume", str(whole)]) == 0
    return whole / RUN / name


def read_results(path: Path) -> None:
    """Read a run folder one of whose files has changed, and its checksum with it."""
    reseal(path.parent)
    results = fedkdx.load_runs(path.parents[1])
    if results.missing:
        raise UserError(results.missing[0].reason)
    assert len(results.table) == 1


def make_stopped(folder: Path, name: str) -> Path:
    return _made(folder) / name


def resume(path: Path) -> None:
    """Resume a copy of an experiment one of whose files has changed, and its checksum with it."""
    whole = path.parent if path.name == "experiment.yaml" else path.parents[1]
    copy = whole.parents[1] / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    reseal(copy)
    reseal(copy / RUN)
    with silence() as said, mock.patch.object(Federation, "round", _a_few_rounds):
        code = main(["resume", str(copy)])
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if code == 2 and len(lines) == 1 and "Traceback" not in said.getvalue():
        raise UserError(lines[0])
    assert code == 0, said.getvalue()


ROUND = Federation.round


def _a_few_rounds(self: Federation, round: Round) -> RoundRecord:
    """Make a round of an experiment that, changed, may ask for very many."""
    if round.index > MOST_ROUNDS:
        raise UserError("more rounds than there is time for")
    return ROUND(self, round)


def read_options(path: Path) -> None:
    config.from_dict(config.read_yaml(path), str(path))


RUN_FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "message": (make_message, read_message),
    "options": (make_options, read_options),
    "experiment": (make_experiment, lambda path: fedkdx.Experiment.grid(str(path))),
    "run's config": (lambda folder: make_finished(folder, "config.yaml"), read_results),
    "run's environment": (lambda folder: make_finished(folder, "environment.json"), read_results),
    "run's results": (lambda folder: make_finished(folder, "results.h5"), read_results),
    "stopped state": (lambda folder: make_stopped(folder, f"{RUN}/state.safetensors"), resume),
    "stopped config": (lambda folder: make_stopped(folder, f"{RUN}/config.yaml"), resume),
    "stopped experiment": (lambda folder: make_stopped(folder, "experiment.yaml"), resume),
}
