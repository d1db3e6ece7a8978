"""Models taken out of run folders say what the run says they say; what is wrong with a folder is one line."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml
from torch import nn

import fedkdx_plugin as fedkdx
from dataset_utils.sealed import Sealed
from fedkdx_plugin.native.chain import Chain
from fedkdx_plugin.prediction import load_model, loading
from fedkdx_plugin.results import runs
from fedkdx_plugin.results.run_folder import identity
from fedkdx_plugin.testing.made import make_federation
from registry import catalog
from registry.errors import UserError
from registry.interface import Message
from tests.fedkdx_plugin.watch_runs import CLASSES, shards_of
from tests.sealing import reseal

RUNS = [
    *(("federated", name) for name in ("FedAvg", "Local", "FedKDX", "FedFomo", "FedFTL", "Centralised")),
    *(("both", "FedKDX+"), ("client", "FedAvg"), ("client", "FedKDX")),
    *(("minmax", "FedAvg"), ("local batch norm", "FedAvg")),
]


def confusion(predicted, y) -> np.ndarray:
    counts = np.zeros((len(predicted.classes),) * 2, dtype=np.int64)
    np.add.at(counts, (y, [predicted.classes.index(label) for label in predicted.labels]), 1)
    return counts


@pytest.mark.parametrize(("comparison", "algorithm"), RUNS)
def test_a_client_predicts_what_the_run_recorded(watch, comparison, algorithm):
    folder = watch.run(comparison, algorithm)
    recorded = runs.read(folder)
    data, scaled = shards_of(recorded), comparison in ("client", "minmax")
    for client in range(3):
        predictor = load_model(folder, client)
        found = predictor.predict_windows(data.test[client].x, scaled=scaled)
        counts = confusion(found, data.test[client].y)
        np.testing.assert_array_equal(counts, recorded.confusion["served"][client])
        accuracy = recorded.records[-1].metrics["served"].client_accuracy[client]
        assert accuracy == counts.trace() / counts.sum()
        assert found.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-6)
    whole = recorded.confusion["served"].sum(axis=0)
    assert np.count_nonzero(whole.sum(axis=0)) > 1  # not one class for all


def test_the_guide_names_the_algorithms_that_have_no_model_for_a_newcomer():
    without = []
    for entry in catalog.entries("algorithms"):
        if entry.origin != catalog.OURS:
            continue
        algorithm = catalog.load_entry(entry)
        federation = make_federation(algorithm, rounds=1)
        workspace, known = federation.workspace, federation.workspace.clients[0]
        newcomer = algorithm.Client(len(workspace.clients), known.task, known.params, 0)
        if not loading.serves_newcomer(newcomer, workspace, federation.server.networks()):
            without.append(entry.name)
    guide = " ".join((Path(__file__).parents[2] / "docs/guide/predict.md").read_text().split())
    assert f"`--bn local`, and {', '.join(without)}." in guide


def test_clients_of_personal_algorithms_have_models_of_their_own(watch):
    x = shards_of(runs.read(watch.run("federated", "Local"))).test[0].x
    for comparison, algorithm in (("federated", "Local"), ("federated", "FedKDX"), ("local batch norm", "FedAvg")):
        one, other = (load_model(watch.run(comparison, algorithm), k).predict_windows(x) for k in (0, 1))
        assert np.abs(one.probabilities - other.probabilities).max() > 1e-3
    one, other = (load_model(watch.run("federated", "FedAvg"), k).predict_windows(x) for k in (0, 1))
    np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_what_notebooks_show_of_a_model_and_of_predictions_is_a_line(watch):
    place = watch.run("federated", "FedAvg")
    own, shared = load_model(place, 1), load_model(place)
    channels, _, time = own.shape
    assert repr(own) == (
        f"<Predictor: FedAvg, model of client 1 after round 3; windows of {channels} channels and {time} samples, "
        f"{len(own.classes)} classes; {place}>"
    )
    assert repr(shared).startswith("<Predictor: FedAvg, shared model after round 3; ")
    assert repr(own.run) == f"<Run: FedAvg, seed 0, 3 rounds; {place}>"
    found = own.predict_windows(np.zeros((2, *own.shape), np.float32))
    assert repr(found) == f"<Predicted: 2 windows, {len(own.classes)} classes; see .table>"


def test_both_networks_share_a_prediction(watch):
    predictor = load_model(watch.run("both", "FedKDX+"), 0)
    shares = predictor.network.serves
    assert sorted(shares) == ["student", "teacher"] and sum(shares.values()) == pytest.approx(1)
    x = shards_of(predictor.run).test[0].x
    windows = torch.from_numpy(predictor.scaled(x))
    alone = {name: net(windows).logits.double().softmax(1) for name, net in predictor.network.nets.items()}
    mixed = sum(share * alone[name] for name, share in shares.items())
    np.testing.assert_allclose(predictor.predict_windows(x).probabilities, mixed, atol=1e-6)


def test_the_table_of_clients_names_their_subjects(watch):
    clients = fedkdx.load_runs(watch.comparison("both")).clients
    assert clients.groupby("client")["subject"].unique().map(list).to_dict() == {0: ["anna"], 1: ["ben"], 2: ["carl"]}


def test_a_newcomer_is_served_what_all_share(watch):
    x = shards_of(runs.read(watch.run("federated", "FedAvg"))).test[2].x
    shared, own = (load_model(watch.run("federated", "FedAvg"), who).predict_windows(x) for who in (None, 2))
    np.testing.assert_array_equal(shared.probabilities, own.probabilities)
    assert load_model(watch.run("federated", "FedKDX")).network.serves == "student"
    assert load_model(watch.run("federated", "FedFTL")).network.serves == "model"
    for comparison, algorithm in (
        *(("federated", "Local"), ("federated", "FedFomo")),
        ("local batch norm", "FedAvg"),
    ):
        with pytest.raises(UserError, match="no model that all clients share; name one of its clients, 0 to 2"):
            load_model(watch.run(comparison, algorithm))


def test_federated_windows_are_scaled_by_all_training_windows(watch):
    predictor = load_model(watch.run("federated", "FedAvg"), 1)
    data = shards_of(predictor.run)
    train = np.concatenate([shard.x for shard in data.train]).astype(np.float64)
    mean, deviation = train.mean(axis=(0, 2, 3)), train.std(axis=(0, 2, 3))
    x = data.test[1].x
    right = (x - mean[:, None, None]) / deviation[:, None, None]
    np.testing.assert_allclose(predictor.scaled(x), right, rtol=1e-5, atol=1e-6)
    given = predictor.predict_windows(x[:, :, 0])  # without the axis of length 1, scaled within
    by_hand = predictor.predict_windows(right.astype(np.float32), scaled=True)
    np.testing.assert_allclose(given.probabilities, by_hand.probabilities, atol=1e-5)


def test_the_shared_model_cannot_scale_where_every_client_has_its_own_way(watch):
    predictor = load_model(watch.run("client", "FedAvg"))
    x = shards_of(predictor.run).test[0].x
    scaled = predictor.predict_windows(x, scaled=True)
    own = load_model(watch.run("client", "FedAvg"), 0).predict_windows(x, scaled=True)
    np.testing.assert_array_equal(scaled.probabilities, own.probabilities)
    with pytest.raises(UserError, match="every client scaled by its own training windows"):
        predictor.predict_windows(x)


def test_networks_are_pytorchs_plain_ones(watch):
    for part in load_model(watch.run("both", "FedKDX+"), 0).network.modules():
        assert not any(isinstance(value, Chain) for value in vars(part).values())
        assert not part.training


def test_a_table_has_a_row_for_each_window(watch):
    predictor = load_model(watch.run("federated", "FedAvg"), 0)
    found = predictor.predict(watch.csv(0))
    table = found.table
    assert list(table) == ["start", "end", "class", "probability", *(f"p({name})" for name in CLASSES)]
    assert table["class"].tolist() == found.labels
    assert table["probability"].tolist() == found.probabilities.max(axis=1).tolist()
    assert (table["end"] - table["start"]).tolist() == [1.0] * len(table)
    assert "start" not in predictor.predict_windows(np.zeros((2, *predictor.shape))).table


class Odd(nn.Module):
    """Gives logits (0, ln 3, 0); for a window that begins with 1, the last of them is `bad`."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def forward(self, x):
        logits = torch.tensor([0.0, math.log(3), 0.0]).repeat(len(x), 1)
        logits[x[:, 0, 0, 0] == 1, 2] = self.bad
        return logits


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_window_for_which_the_model_gives_no_number_has_no_class(watch, bad):
    predictor = dataclasses.replace(load_model(watch.run("federated", "FedAvg"), 0), network=Odd(bad))
    x = np.zeros((3, *predictor.shape), np.float32)
    x[1] = 1
    found = predictor.predict_windows(x, scaled=True)
    assert found.labels == ["sit", None, "sit"]
    right = [0.2, 0.6, 0.2]  # e⁰, e^ln 3 and e⁰ of their sum, 5
    np.testing.assert_allclose(found.probabilities, [right, [math.nan] * 3, right], atol=1e-6)
    assert found.notes == (
        "windows without a class: 1 of 3; the model of client 0 gives NaN or infinite values for them",
    )
    lines = found.table.round(6).to_csv(index=False, lineterminator="\n").splitlines()
    assert lines == ["class,probability,p(lie),p(sit),p(walk)", "sit,0.6,0.2,0.6,0.2", ",,,,", "sit,0.6,0.2,0.6,0.2"]
    with pytest.raises(UserError, match="the model of client 0 gives NaN or infinite values for all 3 windows"):
        predictor.predict_windows(np.ones_like(x), scaled=True)


def test_the_notes_on_a_recording_name_windows_without_a_class(watch):
    """The model gives NaN for the windows that begin as the first one does, which no other does."""
    predictor = load_model(watch.run("federated", "FedAvg"))
    first = predictor.scaled(predictor.windows(watch.csv(0)).x)[0, 0, 0, 0]
    odd = Odd(math.nan)
    odd.register_forward_pre_hook(lambda module, given: (torch.where(given[0] == float(first), 1.0, 0.0),))
    found = dataclasses.replace(predictor, network=odd).predict(watch.csv(0))
    assert found.labels == [None] + ["sit"] * (len(found.labels) - 1)
    assert any("too long to interpolate" in note for note in found.notes)
    assert found.notes[-1].startswith(f"windows without a class: 1 of {len(found.labels)}; the shared model gives NaN")


def test_a_run_that_was_read_and_the_folder_of_a_single_one_will_do(watch):
    folder = watch.run("both", "FedKDX+")
    by_run = load_model(runs.read(folder), 1)
    by_comparison = load_model(str(watch.comparison("both")), 1)
    assert by_comparison.run.folder == folder and by_run.round == by_comparison.round == 3


def test_a_client_is_found_by_its_subject(watch):
    folder = watch.run("federated", "FedFomo")
    assert [load_model(folder, subject=name).client for name in ("anna", "ben", "carl")] == [0, 1, 2]
    for subject, client, text in (
        ("bin", None, r"no client of subject 'bin' \(did you mean ben\?\); there are anna, ben, carl"),
        ("ben", 1, "client 1 and subject 'ben': give one of them"),
    ):
        with pytest.raises(UserError, match=text):
            load_model(folder, client, subject)


def test_a_subject_is_found_however_its_name_is_spelt_in_unicode(tmp_path):
    composed, apart = "J\u00f6rg", "Jo\u0308rg"  # ö as one letter, and as an o with two dots, as of a Mac's file
    manifest = {"clients": [{"subjects": {"7": 20}}, {"subjects": {apart: 20}}, {"subjects": {"p1": 9, "p2": 11}}]}
    run = SimpleNamespace(folder=tmp_path)
    assert [loading._client_of(run, manifest, name, None) for name in (composed, apart, "7", 7)] == [1, 1, 0, 0]
    with pytest.raises(UserError, match="no client is subject 'p1' alone: see client 2"):
        loading._client_of(run, manifest, "p1", None)


@pytest.mark.parametrize("client", [3, -1, True, "0"])
def test_an_unknown_client(watch, client):
    with pytest.raises(UserError, match=r"no client .*; there are clients 0 to 2"):
        load_model(watch.run("federated", "FedAvg"), client)


@pytest.fixture
def copied(watch, tmp_path):
    return shutil.copytree(watch.run("federated", "FedKDX"), tmp_path / "FedKDX-seed0")


def wrong(folder, client=0) -> str:
    with pytest.raises(UserError) as error:
        load_model(folder, client)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_folders_that_hold_no_run_or_several(watch, tmp_path):
    text = wrong(watch.comparison("client"))
    assert "holds 2 runs; name one: " in text and "FedAvg-seed0" in text and "FedKDX-seed0" in text
    assert "is no run" in wrong(tmp_path)
    assert "no such folder" in wrong(tmp_path / "missing")


def test_runs_that_kept_no_model_or_did_not_finish(copied):
    (copied / "state.safetensors").unlink()
    assert "runs of a grid keep no state" in wrong(copied)
    (copied / "results.h5").unlink()
    assert "results.h5: missing, it was removed" in wrong(copied)
    Sealed(copied, "").remove("results.h5")
    assert "no finished run (unfinished: 3 of 3 rounds)" in wrong(copied)


@pytest.mark.parametrize(
    "name", ["state.safetensors", "manifest.json", "results.h5", "environment.json", "config.yaml"]
)
def test_damaged_files(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: len(content) // 2])
    assert str(copied) in wrong(copied)


def test_files_of_another_run(watch, copied):
    shutil.copy(watch.run("federated", "FedAvg") / "state.safetensors", copied)
    assert "damaged or exchanged" in wrong(copied)
    reseal(copied)
    assert "has another configuration, data or version" in wrong(copied)
    shutil.copy(watch.run("client", "FedAvg") / "manifest.json", copied)
    assert "of other data than the run's" in wrong(copied)
    (copied / "manifest.json").unlink()
    assert "manifest.json: missing; the models of a federation between sites are at the sites" in wrong(copied)


def state_names(folder) -> list[str]:
    return list(Message.from_bytes((folder / "state.safetensors").read_bytes()).tensors)


def rewrite(folder, change) -> None:
    """Change a saved state: `change` is given its tensors and metadata."""
    state = Message.from_bytes((folder / "state.safetensors").read_bytes())
    tensors, meta = dict(state.tensors), dict(state.meta)
    change(tensors, meta)
    (folder / "state.safetensors").write_bytes(Message(tensors, meta).to_bytes())
    reseal(folder)


def test_a_state_of_another_round_shape_or_without_numbers(copied):
    rewrite(copied, lambda tensors, meta: meta.update(round=2))
    assert "is of round 2, but the results of 3; run fedkdx resume" in wrong(copied)
    name = "client/0/kept/teacher.head.weight"
    rewrite(copied, lambda tensors, meta: (meta.update(round=3), tensors.update({name: tensors[name][:, :1]})))
    assert "does not fit FedKDX with model cnn_small" in wrong(copied)
    other = name.replace("client/0", "client/1")
    rewrite(copied, lambda tensors, meta: tensors.update({name: tensors[other] * float("nan")}))
    assert f"tensor '{name}' holds NaN or infinite values, as training diverged; take another run, another" in wrong(
        copied
    )
    assert load_model(copied, 1).client == 1  # whose state is whole
    name = next(name for name in state_names(copied) if name.startswith("server/"))
    rewrite(copied, lambda tensors, meta: tensors.update({name: tensors[name] * float("inf")}))
    with pytest.raises(UserError, match=f"tensor '{name}' holds NaN"):
        load_model(copied, 1)


def test_a_plug_in_that_is_not_installed(copied):
    config = yaml.safe_load((copied / "config.yaml").read_text())
    environment = json.loads((copied / "environment.json").read_text())
    config |= {"algorithm": ["TheirOwn"], "set": {}}
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    with h5py.File(copied / "results.h5", "r+") as file:
        file.attrs["config"] = yaml.safe_dump(config)
    rewrite(copied, lambda tensors, meta: meta.update(identity=identity(config, environment)))
    assert "unknown algorithm 'TheirOwn'" in wrong(copied)


def test_pooled_statistics_that_are_missing(copied):
    environment = json.loads((copied / "environment.json").read_text())
    del environment["scaling"]
    (copied / "environment.json").write_text(json.dumps(environment))
    reseal(copied)
    assert "'scaling', the clients' pooled statistics, is missing" in wrong(copied)


def test_windows_that_cannot_be_predicted_on(watch):
    predictor = load_model(watch.run("federated", "FedAvg"), 0)
    x = np.zeros((2, *predictor.shape), np.float32)
    for given, text in (
        (x[:, :3], r"windows must be numbers of shape \(n, 7, 50\) or \(n, 7, 1, 50\), not float32 of shape"),
        (x[0], "windows must be numbers"),
        (x[:0], "no window"),
        (x + np.nan, "700 of 700 values of the windows are NaN"),
        (np.full(x.shape, 1e300), "700 of 700 values"),
    ):
        with pytest.raises(UserError, match=text):
            predictor.predict_windows(given)
