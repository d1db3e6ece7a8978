"""Export of a trained model to a file that runs without this project, with a description of its preprocessing."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset_utils import shards
from dataset_utils.files import is_file, replacing, unreadable
from dataset_utils.preprocessing import ORDER
from dataset_utils.recording import Preprocessing
from dataset_utils.scaling import Scaling
from dataset_utils.time_axis import step_of
from fedkdx_plugin.engine.randomness import generator
from fedkdx_plugin.experiments.experiment import experiment_folder
from fedkdx_plugin.experiments.runner import where_it_began
from fedkdx_plugin.prediction.loading import load_model
from fedkdx_plugin.prediction.predictor import Predictor, Served
from fedkdx_plugin.results.runs import Run
from registry import __version__
from registry.errors import UserError
from registry.text import shown

FORMATS = {"onnx": "model.onnx", "torchscript": "model.pt"}
DESCRIPTION = "preprocessing.json"
INPUT, OUTPUT = "windows", "probabilities"
OPSET = 17
LARGEST = 1e-4
"""Largest accepted difference of a probability from PyTorch's."""
RANDOM = 64
"""Number of random windows that an export is checked on."""

Ask = Callable[[np.ndarray], np.ndarray]


class Export(NamedTuple):
    """Result of an export.

    Attributes:
        model, description: the files written.
        difference: largest difference of a probability from PyTorch's.
        windows: number of windows that it was checked on: 'random', and 'test' for those of the run.
        notes: lines about the model.
    """

    model: Path
    description: Path
    difference: float
    windows: dict[str, int]
    notes: tuple[str, ...] = ()


class Deployed(nn.Module):
    """Model to be exported: windows (n, channels, time) in physical units to probabilities (n, classes), float32.

    The offset is subtracted in two float32 parts whose sum is the float64 value: with one part, a channel whose mean is
    large against its deviation, such as air pressure, would be rounded coarsely.
    """

    high: Tensor
    low: Tensor
    scale: Tensor

    def __init__(self, network: Served, scaling: Scaling | None, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        offset, scale = scaling or Scaling(np.zeros(shape[0]), np.ones(shape[0]))
        high = offset.astype(np.float32)
        for name, values in (("high", high), ("low", offset - high), ("scale", scale)):
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32))[:, None, None])
        self.network = network

    def forward(self, windows: Tensor) -> Tensor:
        """Return the probability of each class."""
        x = (windows.unsqueeze(2) - self.high - self.low) / self.scale
        probabilities: Tensor = self.network(x).softmax(1)
        return probabilities


def export(
    run: str | Path | Run, client: int | None, format: str, out: str | Path, subject: str | None = None
) -> Export:
    """Write a client's model, and `preprocessing.json` beside it, and check it against PyTorch.

    The model takes windows (n, channels, time), float32, in physical units, filtered but not scaled (scaling is part of
    it), and gives probabilities (n, classes). It is checked on random windows and, if the run's shards still exist, on
    the client's test windows.

    Args:
        run, client, subject: as in `load_model`.
        format: 'onnx' (needs the extra 'export') or 'torchscript'.
        out: folder to write to; an earlier export of the same model in the same format is replaced.

    Raises:
        UserError: as in `load_model`; or an unknown format, a missing package, a folder with another model, a model
            that gives NaN or infinite values or cannot be exported, or one whose probabilities differ from PyTorch's by
            more than 1e-4. No file is then left, and none of an earlier export changed.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose from {', '.join(FORMATS)}")
    if format == "onnx":
        _require("onnx", "onnxruntime")
    predictor = load_model(run, client, subject)
    module, own_description = _plain(predictor), described(predictor)
    _check_folder(Path(out), own_description)
    random, own = _random_windows(predictor), _test_windows(predictor)
    right = [(windows, _right(predictor, windows)) for windows in (random, own) if len(windows)]
    model, description = Path(out) / FORMATS[format], Path(out) / DESCRIPTION
    with replacing(description) as description_part, replacing(model) as part:
        try:
            ask = _write_onnx(module, part) if format == "onnx" else _write_torchscript(module, part)
            found = [_difference(ask, windows, probabilities) for windows, probabilities in right]
        except OSError:  # such as a full disk
            raise
        except Exception as error:  # exporters, runtimes and models of others may raise anything
            reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
            name = f"{predictor.run.algorithm} with {predictor.run.config['model']}"
            raise UserError(f"the model of {name} cannot be written as {format} ({reason})") from error
        difference = float(np.max(found))  # NaN where one is
        if not difference <= LARGEST:
            raise UserError(
                f"{model}: not written: a probability differs from PyTorch's by {difference:.3g}, more than {LARGEST}"
            )
        checked = {"random": len(random), "test": len(own)}
        about = own_description | {
            "model": model.name,
            "check": {"windows": checked, "largest_difference": difference, "accepted_difference": LARGEST},
        }
        text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
        description_part.write_text(text + "\n", encoding="utf-8")
    return Export(model, description, difference, checked, predictor.notes)


def described(predictor: Predictor) -> dict[str, Any]:
    """Return the content of `preprocessing.json`: preprocessing, input and output of the model, and its run."""
    run, manifest = predictor.run, predictor.manifest
    channels, _, time = predictor.shape
    scaling = predictor.scaling or Scaling(np.zeros(channels), np.ones(channels))
    settings = Preprocessing(**manifest["preprocessing"]) if manifest.get("preprocessing") else None
    serves = predictor.network.serves
    return {
        "format": "fedkdx-model",
        "version": 1,
        "input": {"name": INPUT, "type": "float32", "shape": ["n", channels, time]},
        "output": {"name": OUTPUT, "type": "float32", "shape": ["n", len(predictor.classes)]},
        "classes": list(predictor.classes),
        "channels": [
            {"name": name, "offset": float(offset), "scale": float(scale)}
            for name, offset, scale in zip(predictor.channels, *scaling, strict=True)
        ],
        "scaling": {
            "kind": shards.scale_of(dict(manifest)),
            "in_model": True,
            "formula": "(x - offset) / scale; of federated and client scaling these are mean and standard deviation",
        },
        "recorded": manifest.get("recorded"),
        "rate_hz": settings and settings.rate,
        "window": {"samples": time, "seconds": settings and time / settings.rate},
        "overlap": settings and settings.overlap,
        "step_samples": settings and step_of(settings.window, settings.overlap),
        "filters": settings
        and {
            "median_samples": settings.median,
            "lowpass_hz": settings.lowpass,
            "gravity_hz": settings.gravity,
            "kind": f"median, then Butterworth of order {ORDER}, forwards and backwards; 0 leaves a filter out",
        },
        "preprocessing": settings and asdict(settings),
        "run": {
            "algorithm": run.algorithm,
            "label": run.config.get("label") or "",
            "client": predictor.client,
            "serves": serves if isinstance(serves, str) else dict(serves),
            "network": run.config["model"],
            "student": run.config.get("student_model") or run.config["model"],
            "seed": run.seed,
            "round": predictor.round,
            "weights_sha256": _weights(predictor.network),
            "data": {"name": run.data["name"], "manifest_sha256": run.data["manifest_sha256"]},
            "versions": dict(run.environment["versions"]),
        },
        "exported_with": {"fedkdx": __version__, "torch": torch.__version__},
    }


def _weights(network: nn.Module) -> str:
    """Return the SHA-256 of names and values of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_folder(out: Path, own: Mapping[str, Any]) -> None:
    """Raise UserError where a folder holds an export of another model, beside which this one would be taken for it.

    Args:
        out: folder to write to.
        own: description of the model to be written.
    """
    path, advice = out / DESCRIPTION, "give another folder (-o), or remove this one"
    if not is_file(path):
        if there := [name for name in FORMATS.values() if is_file(out / name)]:
            raise UserError(f"{out}: holds {there[0]} without its {DESCRIPTION}; {advice}")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        run = found["run"]
        whose = "shared model" if run["client"] is None else f"client {run['client']}"
        other = shown(f"{run['algorithm']} seed {run['seed']}, {whose}")
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is no description of an exported model; {advice}") from error
    plain = json.loads(json.dumps(own))
    if {key: found.get(key) for key in plain} != plain | {"exported_with": found.get("exported_with")}:
        raise UserError(f"{out}: holds an export of another model ({other}); {advice}")


def _plain(predictor: Predictor) -> Deployed:
    """Return the module to export, with contiguous weights. Raises UserError: the scaling is unknown."""
    predictor.scaled(np.zeros((1, *predictor.shape), np.float32))
    module = Deployed(copy.deepcopy(predictor.network), predictor.scaling, predictor.shape)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return module.eval()


def _write_torchscript(module: Deployed, path: Path) -> Ask:
    """Trace a module into a file. Returns a function that runs the file."""
    with _quiet():
        traced = torch.jit.trace(module, (_example(module),))
        torch.jit.save(traced, str(path))
        loaded = torch.jit.load(str(path))

    def ask(windows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(loaded(torch.from_numpy(windows)))

    return ask


def _write_onnx(module: Deployed, path: Path) -> Ask:
    """Write a module as ONNX, in one file. Returns a function that runs the file."""
    import onnxruntime

    # of PyTorch's two exporters, the one in all versions from 2.3 on, which needs no package but onnx
    way: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with _quiet():
        torch.onnx.export(
            module,
            (_example(module),),
            str(path),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "n"}, OUTPUT: {0: "n"}},
            opset_version=OPSET,
            **way,
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # print nothing: errors are raised anyway
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda windows: session.run([OUTPUT], {INPUT: windows})[0]


def _example(module: Deployed) -> Tensor:
    """Return two windows for tracing: a batch of one might be taken for a constant size."""
    channels, _, time = module.shape
    return torch.zeros(2, channels, time)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of exporters, which users cannot act on; the result is checked anyway."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _right(predictor: Predictor, x: np.ndarray) -> np.ndarray:
    """Return PyTorch's probabilities (n, classes). Raises UserError: a window has none, as the model gives NaN."""
    found = predictor.predict_windows(x)
    if found.notes:
        raise UserError(f"{predictor.run.folder}: not written: {found.notes[0]}")
    return found.probabilities


def _difference(ask: Ask, x: np.ndarray, right: np.ndarray) -> float:
    """Return the largest difference of a probability from PyTorch's: the first window alone, then all others."""
    parts = [part for part in (x[:1, :, 0], x[1:, :, 0]) if len(part)]
    found = np.concatenate([ask(np.ascontiguousarray(part)) for part in parts])
    if found.shape != right.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - right).max())


def _random_windows(predictor: Predictor) -> np.ndarray:
    """Return random windows (n, channels, 1, time) in physical units, with mean and deviation of the run's."""
    drawn = torch.randn((RANDOM, *predictor.shape), generator=generator(0, "export")).numpy()
    return _unscaled(drawn, predictor.scaling)


def _test_windows(predictor: Predictor) -> np.ndarray:
    """Return the test windows of the client, or of client 0, in physical units; none if the shards are gone."""
    none = np.empty((0, *predictor.shape), np.float32)
    try:
        with where_it_began(experiment_folder(predictor.run.folder)):
            manifest, _, test = shards.load_client(Path(predictor.run.data["folder"]), predictor.shard or 0)
    except UserError:
        return none
    if manifest != predictor.manifest:
        return none
    raw = "statistics" in manifest["clients"][0]
    return test.x if raw else _unscaled(test.x, predictor.scaling)


def _unscaled(x: np.ndarray, scaling: Scaling | None) -> np.ndarray:
    if scaling is None:
        return x
    return np.asarray(x * scaling.scale[:, None, None] + scaling.offset[:, None, None], dtype=np.float32)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install 'fedkdx[export]'")
