"""Models at the sites of a federation: they predict what the run in one process predicts, bit for bit."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedkdx_plugin as fedkdx
from dataset_utils import shards
from fedkdx_plugin.cli import main as cli
from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.engine.record import Observer
from fedkdx_plugin.experiments.setting import make_task, schedule, training
from fedkdx_plugin.flower.coordinator import Coordinator
from fedkdx_plugin.flower.options import read_settings, shared_settings
from fedkdx_plugin.flower.roster import Roster
from fedkdx_plugin.flower.site import SiteSetup
from fedkdx_plugin.flower.worker import Worker
from fedkdx_plugin.prediction import load_model, loading
from fedkdx_plugin.results import runs
from fedkdx_plugin.results.site_model import MODEL, SiteModel
from registry.errors import UserError
from registry.interface import Message
from tests.conftest import Recorder, same_state
from tests.fedkdx_plugin import watch_runs
from tests.flower.fakes import FakeLink, Story
from tests.sealing import reseal

# name -> options of the runs in one process; each has 3 rounds, of 2 of the 3 clients, unless it says so
COMPARISONS = {
    "federated": ["-algo", "FedAvg,Local,FedPer,kNN-Per,CFL,FedKDX"],
    "none": ["-algo", "FedKDX+,APFL", "--scale", "none"],
    "client": ["-algo", "FedAvg", "--scale", "client"],
    "local batch norm": ["-algo", "FedAvg", "--bn", "local"],
    "secure": ["-algo", "FedAvg", "--secure-aggregation", "-jr", "1"],
    "one round": ["-algo", "FedPer,FedKDX", "-gr", "1"],
    "two rounds": ["-algo", "FedPer", "-gr", "2"],
}
RUNS = [
    *(("federated", name) for name in ("FedAvg", "Local", "FedPer", "kNN-Per", "CFL", "FedKDX")),
    *(("none", "FedKDX+"), ("none", "APFL"), ("client", "FedAvg"), ("local batch norm", "FedAvg")),
    *(("secure", "FedAvg"), ("one round", "FedPer"), ("one round", "FedKDX")),
]
CLIENTS = range(3)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Make the runs in one process."""
    return watch_runs.make(tmp_path_factory.mktemp("here"), COMPARISONS)


class Cut(Exception):
    """Ends a federation."""


class WorkerLink(FakeLink):
    """Sites with the workers of `fedkdx join`.

    Attributes:
        cut: whether the server ends before its last request, which asks for metrics alone.
    """

    def __init__(self, settings: Mapping[str, Any], state: Path, setups: Mapping[int, SiteSetup], run: str) -> None:
        super().__init__(setups, None)
        self.state, self.settings, self.run, self.cut = state, settings, run, False
        self.workers = {id: Worker(setup) for id, setup in setups.items()}

    def exchange(self, requests, seconds):
        if self.cut and all(Message.from_bytes(data).meta.get("train", 0) is None for data in requests.values()):
            raise Cut
        about = {"run": self.run, "settings": shared_settings(self.settings), "clients": len(self.setups)}
        return {id: self.workers[id].work(data, about) for id, data in requests.items()}


def make_link(run: runs.Run, state: Path, name: str = "mine", **settings: Any) -> WorkerLink:
    """Return the sites of the clients of a run in one process, each with a disk of its own, for the same run."""
    folder = Path(run.data["folder"])
    setups = {id: SiteSetup(id, folder, id, state / f"site-{id}", torch.device("cpu")) for id in CLIENTS}
    return WorkerLink(dict(run.config) | settings, state, setups, name)


def coordinator(link: WorkerLink) -> Coordinator:
    """Return the server of these sites, made as `flower.server_app` makes it."""
    config = read_settings(shared_settings(link.settings))
    (choice,) = choose(config)
    roster = Roster(link, len(link.setups), len(link.setups), 0.0, Story())
    task = make_task(config, roster.about.shape, len(roster.about.classes))
    about = choice.server, task, choice.params, training(config, choice), schedule(config)
    return Coordinator(*about, link, roster, link.run, 60.0)


def federate(run: runs.Run, state: Path, name: str = "mine", **settings: Any) -> Recorder:
    """Make a run between sites."""
    recorder = Recorder()
    coordinator(make_link(run, state, name, **settings)).run([recorder])
    return recorder


def site_folder(state: Path, client: int, name: str = "mine") -> Path:
    return state / f"site-{client}" / name / f"client-{client}"


def confusion(predicted, y) -> np.ndarray:
    counts = np.zeros((len(predicted.classes),) * 2, dtype=np.int64)
    np.add.at(counts, (y, [predicted.classes.index(label) for label in predicted.labels]), 1)
    return counts


def assert_same_model(there, here, csv: Path) -> None:
    """Compare two predictors bit for bit: weights, which networks predict, scaling, and predictions on a recording."""
    assert there.network.serves == here.network.serves
    assert same_state(there.network.state_dict(), here.network.state_dict())
    assert (there.scaling is None) == (here.scaling is None)
    if here.scaling is not None:
        assert all(np.array_equal(one, other) for one, other in zip(there.scaling, here.scaling, strict=True))
    pd.testing.assert_frame_equal(there.predict(csv).table, here.predict(csv).table, check_exact=True)


@pytest.fixture(scope="module")
def made(here, tmp_path_factory) -> Path:
    """Make the run of FedPer between sites."""
    state = tmp_path_factory.mktemp("made") / "state"
    federate(runs.read(here.run("federated", "FedPer")), state)
    return state


@pytest.fixture
def fedper(made, tmp_path) -> Path:
    """Copy the state of FedPer's sites, for a test to change it."""
    return shutil.copytree(made, tmp_path / "state")


@pytest.mark.parametrize(("comparison", "algorithm"), RUNS)
def test_a_site_predicts_what_the_run_in_one_process_predicts(here, tmp_path, comparison, algorithm):
    run = runs.read(here.run(comparison, algorithm))
    last = federate(run, tmp_path).records[-1].metrics["served"]
    data = watch_runs.shards_of(run)
    for client in CLIENTS:
        there = load_model(site_folder(tmp_path, client))
        assert (there.client, there.round, there.notes) == (client, len(run.records), ())
        assert_same_model(there, load_model(run, client), here.csv(client))
        found = there.predict_windows(data.test[client].x, scaled=comparison == "client")
        np.testing.assert_array_equal(confusion(found, data.test[client].y), last.confusion[client])
    trained = [SiteModel.read(site_folder(tmp_path, client)).trained for client in CLIENTS]
    assert sum(trained) == sum(len(record.selected) for record in run.records)
    assert comparison != "one round" or 0 in trained  # that of a client that never trained was compared, too


def test_noise_of_differential_privacy_is_in_the_model(here, tmp_path):
    run = runs.read(here.run("client", "FedAvg"))
    private = {"dp": "client", "epsilon": 50.0, "delta": 0.1, "join_ratio": 1.0}
    last = federate(run, tmp_path, **private).records[-1].metrics["served"]
    data = watch_runs.shards_of(run)
    for client in CLIENTS:
        found = load_model(site_folder(tmp_path, client)).predict_windows(data.test[client].x, scaled=True)
        np.testing.assert_array_equal(confusion(found, data.test[client].y), last.confusion[client])


def test_a_run_that_was_cut_leaves_the_model_of_the_round_before(here, tmp_path, capsys):
    """The last round trained FedPer's heads once more, but nothing was measured with them."""
    run = runs.read(here.run("two rounds", "FedPer"))
    link = make_link(run, tmp_path, global_rounds=3)
    link.cut = True
    with pytest.raises(Cut):
        coordinator(link).run([Recorder()])
    for client in CLIENTS:
        there = load_model(site_folder(tmp_path, client))
        assert there.round == 2
        assert_same_model(there, load_model(run, client), here.csv(client))
    capsys.readouterr()
    note = "the model is of round 2 of 3, the last that this site measured\n"
    assert cli.main(["predict", str(tmp_path / "site-0"), str(here.csv(0))]) == 0
    assert capsys.readouterr().err.startswith(note)
    out = tmp_path / "exported"
    assert cli.main(["export", str(tmp_path / "site-0"), "--format", "torchscript", "-o", str(out)]) == 0
    assert capsys.readouterr().err == note
    assert json.loads((out / "preprocessing.json").read_text())["run"]["round"] == 2


def test_a_federation_that_goes_on_leaves_its_newest_model(here, tmp_path):
    run = runs.read(here.run("federated", "FedPer"))
    first = coordinator(make_link(run, tmp_path, global_rounds=2))
    first.run([Recorder()])
    second = coordinator(make_link(run, tmp_path))
    second.restore(first.save())
    second.run([Recorder()], done=2)
    for client in CLIENTS:
        there = load_model(site_folder(tmp_path, client))
        assert there.round == 3
        assert_same_model(there, load_model(run, client), here.csv(client))


def test_a_request_says_after_which_round_the_measured_state_is(here, tmp_path):
    """With evaluations every other of 5 rounds, what is measured is of rounds 2, 4 and 5."""
    seen: list[int] = []

    class Listening(WorkerLink):
        def exchange(self, requests, seconds):
            seen.extend({Message.from_bytes(data).meta["after"] for data in requests.values()})
            return super().exchange(requests, seconds)

    made = make_link(runs.read(here.run("federated", "FedAvg")), tmp_path, global_rounds=5, eval_gap=2)
    link = Listening(made.settings, made.state, made.setups, made.run)
    coordinator(link).run([Observer()])
    assert seen == [0, 0, 2, 0, 4, 5]
    assert load_model(site_folder(tmp_path, 0)).round == 5


def test_a_site_with_shards_of_its_own(here, tmp_path):
    """Client 2 has one shard in its folder, number 0: its scaling, and its test windows for the check of an export."""
    run = runs.read(here.run("client", "FedAvg"))
    manifest, train, test = shards.load_client(Path(run.data["folder"]), 2)
    entry = {"scaling": manifest["clients"][2]["scaling"]}
    common = ("name", "classes", "channels", "spec", "recorded", "preprocessing", "counts", "description")
    about = {name: manifest[name] for name in common}
    shards.write(tmp_path / "own", about, [shards.ClientData(train, test, entry)])
    link = make_link(run, tmp_path)
    setups = dict(link.setups)
    setups[2] = dataclasses.replace(setups[2], folder=tmp_path / "own", shard=0)
    coordinator(WorkerLink(link.settings, tmp_path, setups, "mine")).run([Recorder()])
    assert_same_model(load_model(site_folder(tmp_path, 2)), load_model(run, 2), here.csv(2))
    made = fedkdx.export(site_folder(tmp_path, 2), None, "torchscript", tmp_path / "out")
    assert made.windows == {"random": 64, "test": len(test.y)}
    assert json.loads(made.description.read_text())["run"]["client"] == 2


def test_the_commands_find_the_only_model_of_a_folder(fedper, here, tmp_path, capsys, monkeypatch):
    state, run = fedper, runs.read(here.run("federated", "FedPer"))
    monkeypatch.chdir(tmp_path)
    right = load_model(run, 1).predict(here.csv(1)).table
    capsys.readouterr()
    for place in (state / "site-1", state / "site-1" / "mine", site_folder(state, 1)):
        assert cli.main(["predict", str(place), str(here.csv(1))]) == 0
        printed = pd.read_csv(io.StringIO(capsys.readouterr().out))
        assert printed["class"].tolist() == right["class"].tolist()
        assert cli.main(["export", str(place), "--format", "torchscript"]) == 0
        assert "wrote mine-client-1/model.pt" in capsys.readouterr().out
    federate(run, state, "other")
    with pytest.raises(UserError, match="site-1: holds 2 runs; name one: mine/client-1, other/client-1"):
        load_model(state / "site-1")
    assert load_model(state / "site-1" / "other").client == 1


def test_a_site_has_the_model_of_its_own_client_alone(fedper, capsys):
    folder = site_folder(fedper, 1)
    assert load_model(folder, 1).client == 1
    for options in (["--client", "0"], ["--subject", "ben"]):
        assert cli.main(["predict", str(folder), "any.csv", *options]) == 2
        expected = f"error: {folder}: a site's folder, of client 1 alone; leave client and subject out\n"
        assert capsys.readouterr().err == expected


def test_what_is_kept_is_for_its_owner_alone_and_the_newest_only(fedper):
    folder = site_folder(fedper, 1)
    numbered = [path.name for path in folder.glob("*.safetensors") if path.stem.isdecimal()]
    assert len(numbered) == 1
    files = {MODEL, "manifest.json", "description.yaml"}
    assert {path.name for path in folder.iterdir()} == files | {*numbered, "SHA256SUMS"}
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in files} == {0o600}


def wrong(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", [MODEL, "manifest.json", "description.yaml"])
def test_a_damaged_or_exchanged_file_is_named(fedper, here, name):
    folder = site_folder(fedper, 1)
    path, content = folder / name, (folder / name).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"{path}: damaged or exchanged" in wrong(folder)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert f"{path}: damaged or exchanged" in wrong(folder)
    if name == MODEL:
        path.write_bytes((site_folder(fedper, 2) / name).read_bytes())
        assert f"{path}: damaged or exchanged" in wrong(folder)
    else:
        path.unlink()
        assert f"{path}: missing" in wrong(folder)


def rewrite(folder: Path, change) -> None:
    """Change a model: `change` is given its tensors and metadata."""
    saved = Message.from_bytes((folder / MODEL).read_bytes())
    tensors, meta = dict(saved.tensors), json.loads(json.dumps(dict(saved.meta)))
    change(tensors, meta)
    (folder / MODEL).write_bytes(Message(tensors, meta).to_bytes())
    reseal(folder)


def test_a_manifest_of_other_data_is_refused(fedper, here):
    folder = site_folder(fedper, 1)
    other = Path(runs.read(here.run("client", "FedAvg")).data["folder"])
    shutil.copy(other / "manifest.json", folder)
    reseal(folder)
    assert f"{folder / 'manifest.json'}: of other data than {MODEL}'s" in wrong(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, meta: meta.update(format=2), "of format 2, and this version reads 1; update fedkdx"),
        (lambda tensors, meta: meta.pop("shard"), "damaged"),
        (lambda tensors, meta: meta["environment"].pop("scaling"), "damaged ('scaling')"),
        (lambda tensors, meta: meta.update(clients="many"), "does not fit FedPer with model cnn_small"),
        (lambda tensors, meta: meta.update(client=7), "does not fit FedPer with model cnn_small"),
        (lambda tensors, meta: tensors.update({n: t[:1] for n, t in tensors.items()}), "does not fit FedPer"),
        (lambda tensors, meta: next(iter(tensors.values())).fill_(torch.nan), "NaN or infinite values"),
        (lambda tensors, meta: meta["config"].update(algorithm=["Nowhere"]), "Nowhere"),
        (lambda tensors, meta: meta["config"].update(model="nowhere"), "nowhere"),
    ],
)
def test_a_model_that_cannot_be_used_says_why(fedper, change, message):
    folder = site_folder(fedper, 1)
    rewrite(folder, change)
    assert message in wrong(folder)


def test_a_model_whose_code_changed_is_refused(fedper, monkeypatch):
    monkeypatch.setattr(loading, "code_of_models", lambda task: {"code_of_models": "other"})
    assert "the code of its model cnn_small has changed since" in wrong(site_folder(fedper, 1))


def test_a_site_that_never_measured_has_no_model(fedper):
    folder = site_folder(fedper, 1)
    for name in (MODEL, "manifest.json", "description.yaml"):
        (folder / name).unlink()
    assert f"nor that of a site which has measured (with {MODEL}), and holds none" in wrong(folder)
