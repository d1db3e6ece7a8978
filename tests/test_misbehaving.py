"""Plug-ins that fail or return what their interface does not allow: one line names file, class, method and error."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedkdx_plugin as fedkdx
from fedkdx_plugin.cli.main import main

HEAD = """
import torch
from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Message, Model, Output
from registry.parameters import Params, option


class Own(FedAvg):
    class Client(FedAvgClient):
        pass
"""
UPDATE = "update(self, weights, gradients, rate, step, context)"
# where a line is put -> the method's lines -> what the message says
CLIENT = [
    ("build(cls, task)", "1 / 0", "Own.Client.build: ZeroDivisionError"),
    ("build(cls, task)", "return [task.model()]", "Own.Client.build must return a dict of networks by name"),
    ("build(cls, task)", "return {}", "Own.Client.build must return a dict of networks by name, at least one"),
    ("build(cls, task)", "return {'model': 3}", "Own.Client.build must return a dict of networks"),
    ("build(cls, task)", "return {'a': torch.nn.Linear(2, 2)}", "Own.Client.build must return at least one Model"),
    ("losses(self, nets, batch, context)", "raise KeyError('x')", "Own.Client.losses: client"),
    ("losses(self, nets, batch, context)", "raise FileNotFoundError(2, 'x')", "Own.Client.losses: client"),
    ("losses(self, nets, batch, context)", "raise SystemExit(0)", "Own.Client.losses: SystemExit: 0"),
    ("losses(self, nets, batch, context)", "return None", "Own.Client.losses must return scalar tensors by name"),
    ("losses(self, nets, batch, context)", "return {}", "Own.Client.losses must return scalar tensors by name"),
    ("losses(self, nets, batch, context)", "return torch.zeros(())", "Own.Client.losses must return scalar tensors"),
    ("losses(self, nets, batch, context)", "return {'a': 1.0}", "Own.Client.losses must return scalar tensors"),
    ("losses(self, nets, batch, context)", "return {'a': nets['model'](batch.x).logits}", "must return scalar tensors"),
    ("losses(self, nets, batch, context)", "return {'a': torch.zeros(())}", "must return a loss that depends on"),
    ("holdout(self)", "return 1.5", "Own.Client.holdout must return a number from 0 to below 1, not float 1.5"),
    ("holdout(self)", "return 1", "Own.Client.holdout must return a number from 0 to below 1, not int 1"),
    ("holdout(self)", "return -0.1", "Own.Client.holdout must return a number from 0 to below 1, not float -0.1"),
    (
        "holdout(self)",
        "return float('nan')",
        "must return a number from 0 to below 1, not float nan",
    ),
    ("holdout(self)", "return 'some'", "Own.Client.holdout must return a number from 0 to below 1, not str 'some'"),
    ("receive(self, message)", "self.gone", "Own.Client.receive: client"),
    ("receive(self, message)", "return message", "Own.Client.receive must return nothing, and install what was sent"),
    ("context(self)", "return 1 / 0", "Own.Client.context: client"),
    ("context(self)", "return [1]", "Own.Client.context must return tensors by name, not list [1]"),
    ("context(self)", "return {'a': 'x'}", "Own.Client.context must return tensors by name"),
    ("reply(self)", "return self.gone", "Own.Client.reply: client"),
    ("reply(self)", "return {}", "Own.Client.reply must return a Message, not dict {}"),
    ("reply(self)", "return Message([1])", "Own.Client.reply must return a Message whose tensors are tensors by name"),
    ("reply(self)", "return Message({'a': 1})", "Own.Client.reply must return a Message whose tensors are tensors"),
    ("reply(self)", "return Message({}, {'a': {1}})", "Own.Client.reply must return a Message whose metadata are"),
    ("reply(self)", "return Message({}, {'a': float('inf')})", "Own.Client.reply must return a Message whose metadata"),
    (
        "trains(self, epoch, epochs)",
        "return None",
        "Own.Client.trains must return a list of patterns of names, not NoneType",
    ),
    ("trains(self, epoch, epochs)", "return 'model.*'", "must return a list of patterns of names, not str 'model.*'"),
    (
        "trains(self, epoch, epochs)",
        "return [1]",
        "Own.Client.trains must return a list of patterns of names, not list",
    ),
    (
        "private_in(cls, task, nets)",
        "return None",
        "Own.Client.private_in must return a tuple of patterns of names, not No",
    ),
    ("private_in(cls, task, nets)", "return 'model.*'", "must return a tuple of patterns of names, not str 'model.*'"),
    ("repeats(self)", "return None", "Own.Client.repeats must return a whole number of at least 1, not NoneType None"),
    ("repeats(self)", "return 1.5", "Own.Client.repeats must return a whole number of at least 1, not float 1.5"),
    ("repeats(self)", "return 0", "Own.Client.repeats must return a whole number of at least 1, not int 0"),
    (
        UPDATE,
        "return None",
        "Own.Client.update must return a tensor of the shape of its weights for each of model, not No",
    ),
    (
        UPDATE,
        "return {}",
        "Own.Client.update must return a tensor of the shape of its weights for each of model, not dic",
    ),
    (
        UPDATE,
        "return {'model': rate}",
        "Own.Client.update must return a tensor of the shape of its weights for each of",
    ),
    (UPDATE, "weights.gone", "Own.Client.update: client"),
    ("state(self)", "return None", "Own.Client.state must return tensors by name, not NoneType None"),
    ("state(self)", "return {'a': 1}", "Own.Client.state must return tensors by name, not dict {'a': 1}"),
    ("shared(self)", "return None", "Own.Client.shared must return tensors by name, not NoneType None"),
    ("shared(self)", "return [1]", "Own.Client.shared must return tensors by name, not list [1]"),
    ("shared(self)", "return self.gone", "Own.Client.shared: client"),
    ("serves(self)", "return 'nothing'", "Own.Client.serves must return one of the models that are trained (model)"),
    ("serves(self)", "return None", "Own.Client.serves must return one of the models that are trained (model)"),
    ("serves(self)", "return {'model': 0.5}", "or their weights, which add up to 1, not dict {'model': 0.5}"),
    ("serves(self)", "return {'model': 'x'}", "or their weights, which add up to 1, not dict {'model': 'x'}"),
    ("serves(self)", "raise RuntimeError('two\\nlines')", "Own.Client.serves: RuntimeError: two lines"),
]
SERVER = [
    ("__init__(self, task, params, initial)", "raise TypeError('a' * 9999)", "Own.__init__: TypeError: aaa"),
    ("check(cls, task, params)", "1 / 0", "Own.check: ZeroDivisionError"),
    ("message(self, client, round)", "return None", "Own.message must return a Message, not NoneType None"),
    ("message(self, client, round)", "raise OSError(28, 'No space')", "Own.message: OSError"),
    ("messages(self, clients, round)", "return {}", "Own.messages must return a message for each of the clients"),
    ("messages(self, clients, round)", "return [1]", "Own.messages must return a message for each of the clients"),
    ("aggregate(self, replies, round)", "replies[99]", "Own.aggregate: KeyError: 99"),
    ("check_reply(self, client, reply)", "reply.nothing", "Own.check_reply: AttributeError"),
    ("contribution(self, client, reply)", "1 / 0", "Own.contribution: ZeroDivisionError"),
    ("contribution(self, client, reply)", "return None", "Own.contribution must return tensors by name, not NoneType"),
    ("aggregate(self, replies, round)", "return self.weights", "Own.aggregate must return nothing, and assign the new"),
    ("networks(self)", "return None", "Own.networks must return tensors by name, not NoneType None"),
    ("networks(self)", "return {'a': 1}", "Own.networks must return tensors by name"),
    ("figures(self)", "return [1]", "Own.figures must return numbers by name"),
    ("figures(self)", "return {'a': 'x'}", "Own.figures must return numbers by name"),
    ("figures(self)", "return {'a/b': 1.0}", "Own.figures must return numbers by name, which consists of letters"),
    ("save(self)", "return {}", "Own.save must return a Message, not dict {}"),
    ("save(self)", "return 1 / 0", "Own.save: ZeroDivisionError"),
]
MODEL = [
    ("__init__(self, shape, classes)", "1 / 0", "Net.__init__: ZeroDivisionError"),
    ("__init__(self, shape, classes)", "super().__init__(shape, classes)", "Net.__init__ must set feature_size"),
    ("forward(self, x)", "return x", "Net.forward must return an Output of features (2, 4) and logits (2, 4)"),
    ("forward(self, x)", "return Output(x, x)", "Net.forward must return an Output of features (2, 4)"),
    ("features(self, x)", "return x.nothing", "Net.features: AttributeError"),
]
NET = """
class Net(Model):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.feature_size, self.head = 4, torch.nn.Linear(4, classes)
        self.body = torch.nn.LazyLinear(4)
    def features(self, x):
        return x.flatten(1)[:, :4]
"""
SOURCE = """
from pathlib import Path
from dataset_utils.preprocessing import Preprocessing
from dataset_utils.recording import Source


class Own(Source):
    name, classes, channels = "Own", ("a", "b"), ("x",)
    preprocessing = Preprocessing(50.0, 50, 0.5)
    def find(self, raw, data_root, download):
        return self.gone
    def files(self, path):
        return []
    def load(self, path):
        return []
"""
FLAGS = "-m cnn_small -gr 2 -ls 1 -jr 1 -dev cpu -o runs --backend sequential".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def method(signature: str, body: str, depth: int) -> str:
    space = "    " * depth
    lines = ["@classmethod"] if "(cls" in signature else []
    return "\n".join(space + line for line in [*lines, f"def {signature}:", f"    {body}"]) + "\n"


def said(capsys, argv) -> str:
    """Run the command line, which must end with code 2 and without a traceback; return the line with the reason."""
    assert main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "own.py" in line]
    assert lines, err
    return lines[-1]


@pytest.mark.parametrize(("signature", "body", "says"), CLIENT)
def test_clients(shard_folder, capsys, signature, body, says):
    Path("own.py").write_text(HEAD + method(signature, body, 2))
    line = said(capsys, ["-data", shard_folder, "-algo", "own.py:Own", *FLAGS])
    assert "file own.py: Own.Client." in line and says in line


@pytest.mark.parametrize(("signature", "body", "says"), SERVER)
def test_servers(shard_folder, capsys, signature, body, says):
    Path("own.py").write_text(HEAD + method(signature, body, 1))
    line = said(capsys, ["-data", shard_folder, "-algo", "own.py:Own", *FLAGS, "--outliers", "1000"])
    assert "file own.py: Own." in line and says in line
    assert len(line) < 600


@pytest.mark.parametrize("again", [[], ["--dry-run"]])
def test_a_misspelt_pattern_of_what_is_private(shard_folder, capsys, again):
    Path("own.py").write_text(HEAD + "        private = ('model.head.*', '!model.haed.bias')\n")
    line = said(capsys, ["-data", shard_folder, "-algo", "own.py:Own", *FLAGS, *again])
    assert (
        "file own.py: Own.Client.private: '!model.haed.bias' matches no state of its networks, such as model." in line
    )


def test_inherited_patterns_may_match_nothing(shard_folder):
    """Local's own memory, for one, is there with `memory` alone."""
    Path("own.py").write_text(HEAD.replace("FedAvg", "Local").replace("fedavg", "local"))
    assert main(["-data", str(shard_folder), "-algo", "own.py:Own", *FLAGS]) == 0


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
@pytest.mark.parametrize("signature", ["trains(self, epoch, epochs)", "repeats(self)", UPDATE])
def test_clients_of_every_backend(shard_folder, capsys, signature, backend):
    """A hook without a `return` is named, with what it must return, whoever calls it."""
    Path("own.py").write_text(HEAD + method(signature, "return None", 2))
    line = said(capsys, ["-data", shard_folder, "-algo", "own.py:Own", *FLAGS, "--backend", backend])
    assert f"file own.py: Own.Client.{signature.partition('(')[0]} must return " in line
    assert ", not NoneType None" in line


@pytest.mark.parametrize("base", ["FedKDX", "FedKDX+", "Ditto", "FedProx"])
@pytest.mark.parametrize("backend", ["sequential", "stacked"])
@pytest.mark.parametrize("hook", ["state", "shared"])
def test_a_state_that_other_methods_use_is_named(shard_folder, capsys, hook, backend, base):
    """The failure is not put on `receive`, `context` or `reply` of a built-in method, which call it."""
    head = (
        "from registry import catalog\n\n"
        f"Base = catalog.load('algorithms', '{base}')\n\n"
        "class Own(Base):\n    class Client(Base.Client):\n        pass\n"
    )
    Path("own.py").write_text(head + method(f"{hook}(self)", "return None", 2))
    line = said(capsys, ["-data", shard_folder, "-algo", "own.py:Own", *FLAGS, "--backend", backend])
    assert f"Own.Client.{hook} must return tensors by name, not NoneType None" in line


@pytest.mark.parametrize(
    ("signature", "says"),
    [
        ("idle(self, sent)", "Own.idle must return tensors by name, not NoneType None"),
        ("forged(self, reply, contribution)", "Own.forged must return a Message, not NoneType None"),
    ],
)
def test_servers_under_attack(shard_folder, capsys, signature, says):
    Path("own.py").write_text(HEAD + method(signature, "return None", 1))
    attack = ["--attackers", "0.4", "--attack", "sign-flip"]
    assert says in said(capsys, ["-data", shard_folder, "-algo", "own.py:Own", *FLAGS, *attack])


def test_whether_windows_meet_must_be_said(shard_folder, capsys):
    """None would pass for '', as if no windows met, and what the noise hides would be too little."""
    Path("own.py").write_text(HEAD + method("meeting(cls, params)", "return None", 2))
    private = "--dp example --epsilon 8 --delta 1e-3 --clip 1 --norm group --scale none".split()
    assert main(["-data", str(shard_folder), "-algo", "own.py:Own", *FLAGS, *private]) == 2
    says = "Own.Client.meeting must return text, '' where windows do not meet, not NoneType None"
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("signature", "body", "says"), MODEL)
def test_models(shard_folder, capsys, signature, body, says):
    Path("own.py").write_text(HEAD + NET + method(signature, body, 1))
    line = said(capsys, ["-data", shard_folder, "-algo", "FedAvg", *FLAGS, "-m", "own.py:Net"])
    assert "file own.py: Net." in line and says in line


def test_a_state_that_cannot_be_restored_names_the_method(shard_folder, capsys):
    Path("own.py").write_text(HEAD + method("restore(self, saved)", "saved.tensors['nothing']", 1))
    argv = ["-data", str(shard_folder), "-algo", "own.py:Own", *FLAGS]
    assert main(argv) == 0
    (folder,) = Path("runs").iterdir()
    capsys.readouterr()
    line = said(capsys, ["resume", folder, "-gr", "3"])
    assert "file own.py: Own.restore: KeyError: 'nothing'" in line


def test_the_traceback_is_in_the_run_folder_and_the_others_go_on(shard_folder, capsys):
    Path("own.py").write_text(HEAD + method("aggregate(self, replies, round)", "replies[99]", 1))
    assert main(["-data", str(shard_folder), "-algo", "own.py:Own,FedAvg", *FLAGS]) == 1
    out, err = capsys.readouterr()
    assert "| FedAvg " in out and "failed.txt" in err
    (failed,) = Path("runs").glob("*/Own-seed0/failed.txt")
    first, *rest = failed.read_text().splitlines()
    assert first.startswith("file own.py: Own.aggregate: KeyError: 99 (own.py, line ")
    assert "Traceback (most recent call last):" in rest


def test_a_failure_before_the_first_round_leaves_its_traceback_in_a_file(shard_folder, capsys):
    Path("own.py").write_text(SOURCE)
    line = said(capsys, ["data", "describe", "own.py:Own"])
    assert "file own.py: Own.find: AttributeError" in line
    trace = Path(line.rpartition(" is in ")[2])
    assert "Traceback" in trace.read_text()
    trace.unlink()


SOURCES = [
    ("find(self, raw, data_root, download)", "return self.gone", "Own.find: AttributeError"),
    ("find(self, raw, data_root, download)", "return 3", "Own: "),
    ("files(self, path)", "return 1 / 0", "Own.files: ZeroDivisionError"),
    ("load(self, path)", "return None", "Own: "),
    ("load(self, path)", "yield 3", "Own: "),
    ("load(self, path)", "yield self.gone", "Own.load: AttributeError"),
    ("description(self)", "return 1 / 0", "Own.description: ZeroDivisionError"),
]


@pytest.mark.parametrize(("signature", "body", "says"), SOURCES)
def test_sources(capsys, signature, body, says):
    works = method("find(self, raw, data_root, download)", "return Path('.')", 1)
    Path("own.py").write_text(SOURCE + works + method(signature, body, 1))
    line = said(capsys, ["-data", "own.py:Own", "-algo", "FedAvg", *FLAGS])
    assert "file own.py: Own" in line and says in line


def test_from_python_the_error_is_a_plug_in_error_with_its_cause(shard_folder):
    Path("own.py").write_text(HEAD + method("aggregate(self, replies, round)", "replies[99]", 1))
    with pytest.raises(fedkdx.UserError, match=r"own.py: Own.aggregate: KeyError: 99") as caught:
        fedkdx.compare(shard_folder, "own.py:Own", model="cnn_small", rounds=1, device="cpu", progress=False)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_ours_is_not_put_on_a_plug_in(shard_folder, monkeypatch):
    from fedkdx_plugin.experiments import runner

    def broken(*_):
        raise ZeroDivisionError

    Path("own.py").write_text(HEAD)
    monkeypatch.setattr(runner, "prepare_shards", broken)
    with pytest.raises(ZeroDivisionError):
        main(["-data", str(shard_folder), "-algo", "own.py:Own", *FLAGS])
