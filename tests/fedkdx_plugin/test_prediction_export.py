"""Exported models say what PyTorch says, without this project; the command lines that predict and export."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset_utils.scaling import Scaling
from fedkdx_plugin.cli import export as export_command
from fedkdx_plugin.cli import predict as predict_command
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from fedkdx_plugin.prediction import export, exporting, load_model
from fedkdx_plugin.prediction.exporting import Deployed
from fedkdx_plugin.prediction.predictor import Served
from registry.errors import UserError
from registry.interface import Model, Output
from tests.fedkdx_plugin.watch_runs import CLASSES, recording, shards_of
from tests.sealing import reseal

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the newest PyTorch
RUNS = [
    *(("federated", "FedAvg", None), ("federated", "FedFTL", 1), ("both", "FedKDX+", 1)),
    *(("client", "FedKDX", 2), ("minmax", "FedAvg", 0), ("local batch norm", "FedAvg", 1)),
]


def ask_torchscript(path, windows):
    return torch.jit.load(str(path))(torch.from_numpy(windows)).numpy()


def ask_onnx(path, windows):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    (entry,), (result,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, entry.shape[1:], result.name) == ("windows", [7, 50], "probabilities")
    return session.run(None, {"windows": windows})[0]


ASK = {"torchscript": ask_torchscript, "onnx": ask_onnx}


@pytest.fixture(params=ASK)
def format(request):
    if request.param == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    return request.param


@pytest.mark.parametrize(("comparison", "algorithm", "client"), RUNS)
def test_an_exported_model_takes_raw_windows_and_gives_the_same_probabilities(
    watch, tmp_path, format, comparison, algorithm, client
):
    folder = watch.run(comparison, algorithm)
    made = export(folder, client, format, tmp_path / "out")
    assert made.windows["random"] == 64 and made.windows["test"] == 21 and made.difference < 1e-5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [made.model.name, "preprocessing.json"]
    predictor = load_model(folder, client)
    cut = predictor.windows(watch.csv(client or 0))
    right = predictor.predict(watch.csv(client or 0)).probabilities
    for count in (1, 5, len(cut.x)):
        found = ASK[format](made.model, np.ascontiguousarray(cut.x[:count, :, 0]))
        np.testing.assert_allclose(found, right[:count], atol=1e-5)
    assert np.ptp(right, axis=0).max() > 1e-3  # a hundred times what may differ


@pytest.mark.parametrize(("comparison", "cutoff"), [("low-pass", 20.0), ("no filter", 0.0)])
def test_the_documented_device_code_finds_the_same_classes(watch, tmp_path, monkeypatch, comparison, cutoff):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    folder = watch.run(comparison, "FedAvg")
    export(folder, 1, "onnx", "watch-model")
    *_, code = (ROOT / "docs" / "guide" / "predict.md").read_text().split("```python")
    names = {}
    exec(code.partition("```")[0], names)
    assert names["cutoff"] == cutoff
    signals = recording(1).loc[2000:, ["ax", "ay", "az", "hr"]].interpolate().to_numpy().T[:, ::2]
    found = load_model(folder, 1).predict(signals, rate=50)
    assert names["classify"](signals) == found.labels
    assert len(set(found.labels)) > 1


def test_the_description_says_how_windows_are_made(watch, tmp_path):
    folder = watch.run("federated", "FedKDX")
    export(folder, 1, "torchscript", tmp_path)
    about = json.loads((tmp_path / "preprocessing.json").read_text())
    assert about["model"] == "model.pt"
    assert about["input"] == {"name": "windows", "type": "float32", "shape": ["n", 7, 50]}
    assert about["output"] == {"name": "probabilities", "type": "float32", "shape": ["n", 3]}
    assert about["classes"] == list(CLASSES)
    assert (about["rate_hz"], about["window"], about["overlap"]) == (50.0, {"samples": 50, "seconds": 1.0}, 0.5)
    assert about["step_samples"] == 25
    filters = about["filters"]
    assert (filters["median_samples"], filters["lowpass_hz"], filters["gravity_hz"]) == (3, 20.0, 0.3)
    assert about["recorded"] == {"channels": ["ax", "ay", "az", "hr"], "acceleration": ["ax", "ay", "az"]}
    names = [channel["name"] for channel in about["channels"]]
    assert names == ["body_ax", "body_ay", "body_az", "hr", "gravity_ax", "gravity_ay", "gravity_az"]
    data = shards_of(load_model(folder, 1).run)
    train = np.concatenate([shard.x for shard in data.train]).astype(np.float64)
    heart = about["channels"][3]
    assert heart["offset"] == pytest.approx(train[:, 3].mean()) and heart["scale"] == pytest.approx(train[:, 3].std())
    assert about["scaling"]["kind"] == "federated" and about["scaling"]["in_model"]
    run = about["run"]
    assert (run["algorithm"], run["client"], run["serves"], run["seed"], run["round"]) == ("FedKDX", 1, "teacher", 0, 3)
    environment = json.loads((folder / "environment.json").read_text())
    assert run["data"] == {"name": "watch", "manifest_sha256": environment["data"]["manifest_sha256"]}
    assert run["versions"]["torch"] == torch.__version__
    assert about["check"]["windows"] == {"random": 64, "test": 21}


def test_without_the_shards_random_windows_remain(watch, tmp_path):
    folder = shutil.copytree(watch.run("federated", "FedAvg"), tmp_path / "run")
    environment = json.loads((folder / "environment.json").read_text())
    environment["data"]["folder"] = str(tmp_path / "gone")
    (folder / "environment.json").write_text(json.dumps(environment))
    reseal(folder)
    assert export(folder, 0, "torchscript", tmp_path / "out").windows == {"random": 64, "test": 0}


def test_a_model_that_differs_leaves_nothing(watch, tmp_path, format, monkeypatch):
    def forward(self, windows):
        return self.network((windows.unsqueeze(2) - self.high) / (1.01 * self.scale)).softmax(1)

    monkeypatch.setattr(Deployed, "forward", forward)
    with pytest.raises(UserError, match="not written: a probability differs from PyTorch's by"):
        export(watch.run("federated", "FedAvg"), 0, format, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_difference_that_is_no_number_counts(watch, tmp_path, monkeypatch):
    differences = iter([0.0, float("nan")])  # on random windows, on test windows
    monkeypatch.setattr(exporting, "_difference", lambda *arguments: next(differences))
    with pytest.raises(UserError, match="differs from PyTorch's by nan"):
        export(watch.run("federated", "FedAvg"), 0, "torchscript", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_one_folder_holds_one_model(watch, tmp_path):
    """Another client's, a model without its description and what is no description; then the same model again."""
    pytest.importorskip("onnxruntime")
    run, out = watch.run("federated", "FedKDX"), tmp_path / "out"
    made = export(run, 1, "torchscript", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for other, client in ((run, 2), (run, None), (watch.run("federated", "Local"), 1)):
        with pytest.raises(UserError, match=r"out: holds an export of another model \(FedKDX seed 0, client 1\); give"):
            export(other, client, "onnx", out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    about = json.loads(made.description.read_text())
    made.description.write_text(json.dumps(about | {"exported_with": {"fedkdx": "another", "torch": "another"}}))
    export(run, 1, "torchscript", out)
    assert json.loads(made.description.read_text()) == about
    export(run, 1, "onnx", out)
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model.pt", "preprocessing.json"]
    for text in ("[]", "{", '{"run": {}}'):
        made.description.write_text(text)
        with pytest.raises(
            UserError, match=r"preprocessing.json: is no description of an exported model; give another"
        ):
            export(run, 1, "onnx", out)
    made.description.unlink()
    with pytest.raises(UserError, match=r"out: holds model\.onnx without its preprocessing\.json; give another"):
        export(run, 1, "onnx", out)


def test_a_model_that_was_trained_on_is_another(watch):
    """By one value of one parameter, in a run of which all else is the same."""
    predictors = [load_model(watch.run("federated", "FedAvg")) for _ in range(3)]
    with torch.no_grad():
        list(predictors[2].network.parameters())[-1][0] += 1
    first, same, other = (exporting.described(predictor)["run"] for predictor in predictors)
    assert first == same
    assert {key for key in first if first[key] != other[key]} == {"weights_sha256"}


def test_a_model_that_gives_nan_is_not_written(watch, tmp_path, monkeypatch):
    """All the random windows, or some of them: of 64, the three that are larger than the others."""
    for share, text in ((64, "gives NaN or infinite values for all 64 windows"), (3, "not written: .*class: 3 of 64")):
        predictor = load_model(watch.run("federated", "FedAvg"), 0)
        worth = torch.from_numpy(predictor.scaled(exporting._random_windows(predictor))).amax((1, 2, 3))
        least = worth.sort(descending=True).values[share - 1]

        def spoil(module, given, logits, least=least):
            return torch.where(given[0].amax((1, 2, 3))[:, None] >= least, torch.nan, logits)

        predictor.network.register_forward_hook(spoil)
        monkeypatch.setattr(exporting, "load_model", lambda *arguments, found=predictor: found)
        with pytest.raises(UserError, match=text):
            export(predictor.run, 0, "torchscript", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["a mapping", "a fixed number of windows"])
def test_a_model_that_cannot_be_written_leaves_nothing(watch, tmp_path, format, monkeypatch, wrong):
    def forward(self, windows):
        x = self.network({"x": windows}) if wrong == "a mapping" else self.network(windows.unsqueeze(2)).softmax(1)
        return x.reshape(len(windows), 3)  # a number of Python's, which tracing keeps as it is

    monkeypatch.setattr(Deployed, "forward", forward)
    with pytest.raises(UserError, match=f"the model of FedAvg with cnn_small cannot be written as {format}") as error:
        export(watch.run("federated", "FedAvg"), 0, format, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


class Sums(Model):
    """Gives each window's mean as one logit, and 0 as the other."""

    def __init__(self):
        super().__init__((1, 1, 8), 2)

    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return Output(mean[:, None], torch.stack([mean, torch.zeros_like(mean)], 1))


def test_a_large_offset_costs_no_digits():
    """Air pressure: 101325.1234 Pa with a deviation of 0.5 Pa, of which float32 holds steps of 0.0078 Pa."""
    scaling = Scaling(np.array([101325.1234]), np.array([0.5]))
    x = (101325.1234 + np.random.default_rng(0).normal(size=(5, 1, 1, 8))).astype(np.float32)
    mean = ((x.astype(np.float64) - 101325.1234) / 0.5).mean(axis=(1, 2, 3))
    deployed = Deployed(Served({"model": Sums()}, "model"), scaling, (1, 1, 8))
    np.testing.assert_allclose(deployed(torch.from_numpy(x[:, :, 0]))[:, 0], 1 / (1 + np.exp(-mean)), atol=1e-6)


def test_a_model_with_a_recurrent_layer_takes_any_number_of_windows(tmp_path, format):
    torch.manual_seed(0)
    module = Deployed(Served({"model": CNNLSTM((7, 1, 50), 3).eval()}, "model"), None, (7, 1, 50)).eval()
    write = exporting._write_onnx if format == "onnx" else exporting._write_torchscript
    ask = write(module, tmp_path / "model")
    for count in (1, 2, 9):
        x = torch.randn(count, 7, 50)
        np.testing.assert_allclose(ask(x.numpy()), module(x).detach(), atol=1e-6)


def test_wrong_wishes(watch, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--format tflite: choose from onnx, torchscript"):
        export(watch.run("federated", "FedAvg"), 0, "tflite", tmp_path)
    with pytest.raises(UserError, match="every client scaled by its own training windows"):
        export(watch.run("client", "FedAvg"), None, "torchscript", tmp_path)
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxruntime: pip install 'fedkdx\[export\]'"):
        export(watch.run("federated", "FedAvg"), 0, "onnx", tmp_path)
    assert not list(tmp_path.iterdir())


def test_predict_prints_a_table(watch, capsys):
    run = watch.run("federated", "FedKDX")
    assert predict_command.main([str(run), str(watch.csv(2)), "--client", "2"]) == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    found = load_model(run, 2).predict(watch.csv(2))
    assert [row["class"] for row in rows] == found.labels
    assert [float(row["start"]) for row in rows] == found.time[:, 0].tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(found.probabilities.max(axis=1), rel=1e-6)
    assert "1 gap was too long to interpolate" in printed.err


def test_the_commands_find_a_client_by_its_subject(watch, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, recording = str(watch.run("federated", "FedFomo")), str(watch.csv(2))
    tables = []
    for who in (["--client", "2"], ["--subject", "carl"], ["--subject", "anna"]):
        assert predict_command.main([run, recording, *who]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
    assert export_command.main([run, "--subject", "carl", "--format", "torchscript"]) == 0
    assert (tmp_path / "FedFomo-seed0-carl" / "preprocessing.json").exists()


def test_predict_writes_a_file_or_nothing(watch, tmp_path, capsys):
    run, out = str(watch.comparison("both")), tmp_path / "out" / "anna.csv"
    assert predict_command.main([run, str(watch.csv(0)), "-o", str(out)]) == 0
    assert out.read_text().startswith("start,end,class,probability,p(lie),p(sit),p(walk)\n0.0,1.0,")
    assert capsys.readouterr().out == f"{len(out.read_text().splitlines()) - 1} windows: {out}\n"
    for words, text in (
        ([run, "missing.csv", "-o", str(tmp_path / "no.csv")], "there is no such file"),
        ([str(tmp_path), str(watch.csv(0))], "is no run"),
        ([run], "the following arguments are required: recording; see --help"),
    ):
        with pytest.raises(UserError, match=text):
            predict_command.main(words)
    assert not (tmp_path / "no.csv").exists()


def test_predict_writes_over_nothing_but_predictions(watch, tmp_path):
    run, recording, earlier = str(watch.comparison("both")), tmp_path / "anna.csv", tmp_path / "earlier.csv"
    recording.write_bytes(watch.csv(0).read_bytes())
    (tmp_path / "link.csv").hardlink_to(recording)
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"\x10\x00 a model")
    (tmp_path / "pointer.csv").symlink_to(state)
    for out, what in (
        ("anna.csv", "holds the recording"),
        ("link.csv", "holds the recording"),
        ("state.safetensors", "holds no table of predictions"),
        ("pointer.csv", "holds no table of predictions"),
    ):
        with pytest.raises(UserError, match=f"-o .*{out}: {what}, which would be lost; name another file"):
            predict_command.main([run, str(recording), "-o", str(tmp_path / out)])
    with pytest.raises(UserError, match="-o /dev/null: is no regular file"):
        predict_command.main([run, str(recording), "-o", "/dev/null"])
    assert recording.read_bytes() == watch.csv(0).read_bytes() and state.read_bytes() == b"\x10\x00 a model"
    for content in ("", "recording,start,end,class,probability,p(lie)\n", "start,end,class,probability,p(lie)\n"):
        earlier.write_text(content)
        assert predict_command.main([run, str(recording), "-o", str(earlier)]) == 0
        assert len(earlier.read_text().splitlines()) > 2


def test_export_says_what_it_wrote(watch, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = watch.run("federated", "FedAvg")
    assert export_command.main([str(run), "--client", "1", "--format", "torchscript"]) == 0
    folder = tmp_path / "FedAvg-seed0-client1"
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "preprocessing.json"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrote FedAvg-seed0-client1/model.pt and FedAvg-seed0-client1/preprocessing.json"
    assert lines[1].startswith(
        "checked on 64 random and 21 test windows: probabilities differ from PyTorch's by at most"
    )
    with pytest.raises(UserError, match="invalid choice: 'tflite'"):
        export_command.main([str(run), "--format", "tflite"])


def test_the_commands_know_the_formats():
    assert set(export_command.FORMATS) == set(exporting.FORMATS)
