"""Catalog of algorithms, models and data sets: the built-in ones and those of installed packages.

Third-party packages add names through the entry-point groups `fedkdx.algorithms`, `fedkdx.models` and
`fedkdx.datasets`. Names are found first, described without importing the package, and loaded only when chosen, so
that a broken plug-in does not affect others and listing needs no torch.
"""

from __future__ import annotations

import configparser
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import entrypoints

from registry.errors import UserError
from registry.parameters import suggest
from registry.text import is_shown_as_it_is, shown

IGNORE_PLUGINS = "FEDKDX_IGNORE_PLUGINS"
POINTS = "entry_points.txt"
OURS, SESSION = "built-in", "this session"
NOUNS = {"algorithms": "algorithm", "models": "model", "datasets": "data set"}

BUILT_IN = {
    "algorithms": {
        "Local": "baselines.local:Local",
        "Centralised": "baselines.centralised:Centralised",
        "FedAvg": "baselines.fedavg:FedAvg",
        "FedAvgFT": "baselines.fedavgft:FedAvgFT",
        "PullAvg": "baselines.pullavg:PullAvg",
        "FedProx": "baselines.fedprox:FedProx",
        "MOON": "baselines.moon:MOON",
        "FedAvgM": "baselines.fedavgm:FedAvgM",
        "FedAdam": "baselines.fedadam:FedAdam",
        "FedYogi": "baselines.fedyogi:FedYogi",
        "SCAFFOLD": "baselines.scaffold:SCAFFOLD",
        "FedNova": "baselines.fednova:FedNova",
        "FedDyn": "baselines.feddyn:FedDyn",
        "FedNTD": "baselines.fedntd:FedNTD",
        "FedLC": "baselines.fedlc:FedLC",
        "IFCA": "baselines.ifca:IFCA",
        "CFL": "baselines.cfl:CFL",
        "pFedMe": "baselines.pfedme:PFedMe",
        "Per-FedAvg": "baselines.per_fedavg:PerFedAvg",
        "APFL": "baselines.apfl:APFL",
        "FedAMP": "baselines.fedamp:FedAMP",
        "FedALA": "baselines.fedala:FedALA",
        "FedAS": "baselines.fedas:FedAS",
        "FedFomo": "baselines.fedfomo:FedFomo",
        "FedMTL": "baselines.fedmtl:FedMTL",
        "FedMAT": "baselines.fedmat:FedMAT",
        "FedFTL": "baselines.fedftl:FedFTL",
        "FedDistill": "baselines.feddistill:FedDistill",
        "FedBN": "baselines.fedbn:FedBN",
        "FedPer": "baselines.fedper:FedPer",
        "LG-FedAvg": "baselines.lg_fedavg:LGFedAvg",
        "FedRep": "baselines.fedrep:FedRep",
        "FedBABU": "baselines.fedbabu:FedBABU",
        "FedRoD": "baselines.fedrod:FedRoD",
        "Ditto": "baselines.ditto:Ditto",
        "FML": "baselines.fml:FML",
        "FedProto": "baselines.fedproto:FedProto",
        "FedPAC": "baselines.fedpac:FedPAC",
        "FedGH": "baselines.fedgh:FedGH",
        "FedDBE": "baselines.feddbe:FedDBE",
        "GPFL": "baselines.gpfl:GPFL",
        "kNN-Per": "baselines.knnper:KNNPer",
        "FedKD": "baselines.fedkd:FedKD",
        "FedKD+": "baselines.fedkd_plus:FedKDPlus",
        "FedKDX": "fedkdx_plugin.algorithm.fedkdx:FedKDX",
        "FedKDX+": "fedkdx_plugin.algorithm.fedkdx_plus:FedKDXPlus",
    },
    "models": {
        "cnn": "fedkdx_plugin.models.cnn:CNN",
        "cnn_small": "fedkdx_plugin.models.cnn:CNNSmall",
        "cnn_lstm": "fedkdx_plugin.models.cnn_lstm:CNNLSTM",
        "deep_conv_lstm": "fedkdx_plugin.models.deep_conv_lstm:DeepConvLSTM",
        "resnet": "fedkdx_plugin.models.resnet:ResNet1d",
        "inception_time": "fedkdx_plugin.models.inception:InceptionTime",
        "tcn": "fedkdx_plugin.models.tcn:TCN",
        "transformer": "fedkdx_plugin.models.transformer:PatchTransformer",
        "tiny_har": "fedkdx_plugin.models.tiny_har:TinyHAR",
        "feature_mlp": "fedkdx_plugin.models.feature_mlp:FeatureMLP",
    },
    "datasets": {
        "SPAR": "dataset_utils.sources.spar:SPAR",
        "UCI-HAR": "dataset_utils.sources.uci_har:UCIHAR",
        "PAMAP2": "dataset_utils.sources.pamap2:PAMAP2",
        "SLEEP": "dataset_utils.sources.sleep:SLEEP",
        "WISDM": "dataset_utils.sources.wisdm:WISDM",
        "MotionSense": "dataset_utils.sources.motionsense:MotionSense",
        "MHEALTH": "dataset_utils.sources.mhealth:MHEALTH",
        "WESAD": "dataset_utils.sources.wesad:WESAD",
        "MIT-BIH": "dataset_utils.sources.mit_bih:MITBIH",
        "Sleep-EDF": "dataset_utils.sources.sleep_edf:SleepEDF",
    },
}


@dataclass(frozen=True)
class Entry:
    """One name of the catalog.

    Attributes:
        kind: 'algorithms', 'models' or 'datasets'.
        name: as its author spells it.
        target: `module:Class`, or `path/to/file.py:Class`.
        origin: 'built-in', the package and version that brings it, the file, or 'this session'.
        word: by which it is found again; '' where that is its name.
    """

    kind: str
    name: str
    target: str
    origin: str
    word: str = ""

    @property
    def spec(self) -> str:
        """What a configuration holds to name it."""
        return self.word or self.name

    @property
    def package(self) -> bool:
        """True if an installed package other than this one brings it."""
        return self.origin not in (OURS, SESSION) and not self.word


_registered: dict[tuple[str, str], type] = {}  # kind and name -> class, of this process
_origins: dict[str, str] = {}  # module, or package at the top -> whose it is, of what is not built in


def register(kind: str, loaded: type, name: str = "") -> Entry:
    """Make a class known by name to this process, beside the built-in ones: for a notebook or a script.

    Registering a class of the same name again replaces the earlier one, as running a notebook's cell again does.

    Args:
        kind: 'algorithms', 'models' or 'datasets'.
        name: what to call it; the class's own name by default.

    Raises:
        UserError: the class is not of that kind, or a built-in or installed one has the name.
    """
    entry = Entry(kind, name or loaded.__name__, f"{loaded.__module__}:{loaded.__qualname__}", SESSION)
    if problem := _misfit(kind, loaded):
        raise UserError(f"{NOUNS[kind]} '{entry.name}' ({entry.target}) {problem}")
    for other in _permanent(kind):
        if other.name.lower() == entry.name.lower():
            raise UserError(f"{NOUNS[kind]} '{entry.name}': {other.origin} has one of this name; rename the class")
    _registered[kind, entry.name] = loaded
    _origins[loaded.__module__] = f"{SESSION}, {loaded.__module__}"
    return entry


def entries(kind: str) -> list[Entry]:
    """Return all entries of a kind: the built-in ones, then those of packages by name, then those of this session."""
    own = [
        Entry(kind, name, f"{loaded.__module__}:{loaded.__qualname__}", SESSION)
        for (its_kind, name), loaded in _registered.items()
        if its_kind == kind
    ]
    return _permanent(kind) + own


def _permanent(kind: str) -> list[Entry]:
    found = [Entry(kind, name, target, OURS) for name, target in BUILT_IN[kind].items()]
    return found if os.environ.get(IGNORE_PLUGINS, "0") not in ("", "0") else found + _plugins(kind)


def _plugins(kind: str) -> list[Entry]:
    """Return the entries of installed packages, sorted by name; of a package that is found twice, the first one's.

    They are read again once a folder of packages has changed, as an experiment of many runs asks for them very often.
    """
    return list(_scanned(kind, tuple((folder, _changed(folder)) for folder in sys.path)))


def _changed(folder: str) -> int:
    """Return when a folder of packages, '' being the working directory, last changed (ns); 0 where there is none."""
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=8)
def _scanned(kind: str, state: tuple[tuple[str, int], ...]) -> tuple[Entry, ...]:
    """Return what `_plugins` does, by reading the files of every package on the path.

    Only files that name a group of ours are parsed, so that what another package's file holds matters to nobody.

    Args:
        state: the folders of packages and their last changes, by which the result is kept.
    """
    group, found, seen = f"fedkdx.{kind}", set(), set()
    for package in importlib.metadata.distributions():
        try:
            text = package.read_text(POINTS) or ""
            if group not in text:
                continue
            name, version = package.metadata["Name"].replace("_", "-"), package.version
            if name in seen:
                continue
            seen.add(name)
            parser = entrypoints.CaseSensitiveConfigParser(delimiters=("=",), interpolation=None)
            parser.read_string(text)
            lines = dict(parser[group]) if parser.has_section(group) else {}
            for own, target in lines.items():
                point = entrypoints.EntryPoint.from_string(target, own)
                if not is_shown_as_it_is(own) or not point.object_name:
                    raise entrypoints.BadEntryPoint(f"{own} = {target}")
                found.add(Entry(kind, own, f"{point.module_name}:{point.object_name}", f"{name} {version}"))
        except (configparser.Error, entrypoints.BadEntryPoint, UnicodeDecodeError, OSError, KeyError) as error:
            _warn(f"entry points of {_whose(package)} are skipped: {type(error).__name__}: {error}")
    return tuple(sorted(found, key=lambda entry: (entry.name.lower(), entry.origin)))


def _whose(package: importlib.metadata.Distribution) -> str:
    """Return a name for a package, even for one whose metadata cannot be read."""
    try:
        return str(package.metadata["Name"] or getattr(package, "_path", "a package"))
    except (OSError, UnicodeDecodeError):
        return str(getattr(package, "_path", "a package"))


@functools.cache
def _warn(text: str) -> None:
    """Print a line on standard error, once in this process."""
    print(shown(text), file=sys.stderr)


def find(kind: str, name: str) -> Entry:
    """Return the entry called `name`, in any case of letters; or of a file's class, `path/to/file.py:Class`.

    Raises:
        UserError: there is no such name or file, or two packages provide it.
    """
    path, _, attribute = name.rpartition(":")
    if name.endswith(".py"):
        raise UserError(f"{NOUNS[kind]} '{name}': which class of it? write {name}:Class")
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise UserError(f"{NOUNS[kind]} '{name}': no such file; write path/to/file.py:Class")
        return Entry(kind, attribute, name, f"file {path}", name)
    known = entries(kind)
    hits = [entry for entry in known if entry.name.lower() == name.lower()]
    noun = NOUNS[kind]
    if not hits:
        if "/" in name or os.sep in name:
            raise UserError(f"{NOUNS[kind]} '{name}': no such file or folder, and no name; see fedkdx list")
        names = ", ".join(entry.name for entry in known)
        raise UserError(f"unknown {noun} '{name}'{suggest(name, [e.name for e in known])}; known: {names}")
    if len(hits) > 1:
        owners = " and ".join(hit.origin for hit in hits)
        raise UserError(
            f"{noun} '{name}' is claimed by {owners}; uninstall one, or set {IGNORE_PLUGINS}=1 to use built-ins only"
        )
    return hits[0]


def load(kind: str, name: str) -> type:
    """Import and return the class called `name`.

    Raises:
        UserError: the name is unknown or ambiguous, or the plug-in cannot be loaded (the text names its package and
            the reason).
    """
    return load_entry(find(kind, name))


def load_entry(entry: Entry) -> type:
    """Return the class of an entry. Raises UserError: see `load`."""
    if entry.origin == SESSION:
        return _registered[entry.kind, entry.name]
    module, _, attribute = entry.target.rpartition(":")
    try:
        loaded: object = _from_file(Path(module)) if entry.word else importlib.import_module(module)
        for part in attribute.split("."):
            if entry.word and not hasattr(loaded, part):
                raise AttributeError(f"it has no class '{part}'; it has {_classes_of(loaded)}")
            loaded = getattr(loaded, part)
    except Exception as error:  # a third party's module may raise anything; the message names its package
        if entry.origin == OURS:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"'{entry.name}' from {entry.origin} cannot be loaded ({entry.target}): {reason}") from error
    problem = _misfit(entry.kind, loaded)
    if problem or not isinstance(loaded, type):
        raise UserError(f"'{entry.name}' from {entry.origin} ({entry.target}) {problem}")
    if entry.origin != OURS:
        _origins[loaded.__module__.partition(".")[0]] = entry.origin
    return loaded


def origin_of_module(name: str) -> str:
    """Return the package, file or session that a module of a loaded entry is from; '' for all others."""
    return _origins.get(name) or _origins.get(name.partition(".")[0], "")


def origin_of(owner: object) -> str:
    """Return where a class, or an object's class, is from; '' if it is built in, or unknown to the catalog."""
    return origin_of_module((owner if isinstance(owner, type) else type(owner)).__module__)


def _classes_of(module: object) -> str:
    """Return the names of the classes that are written in a module, for messages."""
    own = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == getattr(module, "__name__", "")
    ]
    return ", ".join(own) or "none"


def _from_file(path: Path) -> ModuleType:
    """Run the module in a file, once in this process as long as the file stays the same, and return it.

    It may not import its neighbours by name.
    """
    whole = path.resolve()
    name = f"fedkdx_file_{hashlib.sha256(str(whole).encode() + whole.read_bytes()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, whole)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _misfit(kind: str, loaded: object) -> str:
    """Return why a loaded object does not have the type that its group requires, or ''."""
    base: type
    if kind == "datasets":
        from dataset_utils.recording import Source

        base = Source
    else:
        from registry import interface

        base = interface.Server if kind == "algorithms" else interface.Model
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        module = base.__module__ if kind == "datasets" else "registry.interface"  # from where authors import it
        return f"is no subclass of {module}.{base.__name__}"
    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        return f"does not implement {', '.join(missing)}"
    return _unfinished(loaded) if kind == "algorithms" else ""


def _unfinished(algorithm: Any) -> str:
    """Return what is wrong with the two classes that a server names, its clients' and its hyper-parameters', or ''."""
    from registry.interface import Client
    from registry.parameters import Params

    if not hasattr(algorithm, "Client"):
        return "names no Client class"
    if not (isinstance(algorithm.Client, type) and issubclass(algorithm.Client, Client)):
        return "has a Client that is no subclass of registry.interface.Client"
    own = algorithm.Params
    if not (isinstance(own, type) and issubclass(own, Params)):
        return "has a Params that is no subclass of registry.parameters.Params"
    if inspect.get_annotations(own) and "__dataclass_fields__" not in vars(own):
        return "has a Params that is no dataclass; write @dataclass(frozen=True) above it"
    return ""
