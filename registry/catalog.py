"""Algorithms, models and data sets by name: the built-in ones and those of installed packages.

Third-party packages add names through the entry-point groups `fedkdx.algorithms`, `fedkdx.models` and
`fedkdx.datasets`. Names are found first, described without being imported, and loaded only when chosen, so that a
broken plug-in harms nobody else and listing needs no torch.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import warnings
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import entrypoints

from registry.errors import UserError
from registry.parameters import suggest

IGNORE_PLUGINS = "FEDKDX_IGNORE_PLUGINS"
OURS = "built-in"

BUILT_IN = {
    "algorithms": {
        "Local": "baselines.local:Local",
        "Centralised": "baselines.centralised:Centralised",
        "FedAvg": "baselines.fedavg:FedAvg",
        "FedProx": "baselines.fedprox:FedProx",
        "MOON": "baselines.moon:MOON",
        "FedFomo": "baselines.fedfomo:FedFomo",
        "FedMTL": "baselines.fedmtl:FedMTL",
        "FedMAT": "baselines.fedmat:FedMAT",
        "FedFTL": "baselines.fedftl:FedFTL",
        "FedDistill": "baselines.feddistill:FedDistill",
        "FedKD": "baselines.fedkd:FedKD",
        "FedKD+": "baselines.fedkd_plus:FedKDPlus",
        "FedKDX": "fedkdx_plugin.algorithm.fedkdx:FedKDX",
        "FedKDX+": "fedkdx_plugin.algorithm.fedkdx_plus:FedKDXPlus",
    },
    "models": {
        "cnn": "fedkdx_plugin.models.cnn:CNN",
        "cnn_small": "fedkdx_plugin.models.cnn:CNNSmall",
        "cnn_lstm": "fedkdx_plugin.models.cnn_lstm:CNNLSTM",
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
        target: `module:Class`.
        origin: 'built-in', or the package and version that brings it.
    """

    kind: str
    name: str
    target: str
    origin: str


@dataclass(frozen=True)
class Description:
    """What a listing shows of an entry, read from its source text.

    Attributes:
        summary: first line of the class's docstring.
        paper: its citation, or ''.
        sends: of an algorithm, what travels and who predicts, or ''.
        broken: why it cannot be loaded, or ''.
    """

    summary: str = ""
    paper: str = ""
    sends: str = ""
    broken: str = ""


def entries(kind: str) -> list[Entry]:
    """All entries of a kind, sorted by name; built-in ones first."""
    found = [Entry(kind, name, target, OURS) for name, target in BUILT_IN[kind].items()]
    return found if os.environ.get(IGNORE_PLUGINS, "0") not in ("", "0") else found + _plugins(kind)


def _plugins(kind: str) -> list[Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of entry points that cannot be read: they name nothing
        points = entrypoints.get_group_all(f"fedkdx.{kind}")
    plugins = []
    for point in points:
        # a distribution's folder spells its name with '_'
        origin = f"{point.distro.name.replace('_', '-')} {point.distro.version}" if point.distro else "unknown package"
        plugins.append(Entry(kind, point.name, f"{point.module_name}:{point.object_name}", origin))
    return sorted(set(plugins), key=lambda entry: (entry.name.lower(), entry.origin))


def find(kind: str, name: str) -> Entry:
    """The entry called `name`, whatever its case.

    Raises:
        UserError: nobody has that name, or two packages have it.
    """
    known = entries(kind)
    hits = [entry for entry in known if entry.name.lower() == name.lower()]
    noun = {"algorithms": "algorithm", "models": "model", "datasets": "data set"}[kind]
    if not hits:
        names = ", ".join(entry.name for entry in known)
        raise UserError(f"unknown {noun} '{name}'{suggest(name, [e.name for e in known])}; known: {names}")
    if len(hits) > 1:
        owners = " and ".join(hit.origin for hit in hits)
        raise UserError(
            f"{noun} '{name}' is claimed by {owners}; uninstall one, or set {IGNORE_PLUGINS}=1 to use built-ins only"
        )
    return hits[0]


def load(kind: str, name: str) -> type:
    """The class called `name`.

    Raises:
        UserError: unknown or ambiguous name, or a plug-in that cannot be loaded (naming its package and the reason).
    """
    entry = find(kind, name)
    module, _, attribute = entry.target.partition(":")
    try:
        loaded = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:  # whatever a stranger's module raises, its user needs the package's name
        if entry.origin == OURS:
            raise
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"'{entry.name}' from {entry.origin} cannot be loaded ({entry.target}): {reason}") from error
    problem = _misfit(kind, loaded)
    if problem:
        raise UserError(f"'{entry.name}' from {entry.origin} ({entry.target}) {problem}")
    return loaded


def _misfit(kind: str, loaded: object) -> str:
    """Why a loaded object is not what its group promises, or ''."""
    if kind == "datasets":
        from dataset_utils.recording import Source as base
    else:
        from registry import interface

        base = interface.Server if kind == "algorithms" else interface.Model
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        return f"is no subclass of {base.__module__}.{base.__name__}"
    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        return f"does not implement {', '.join(missing)}"
    if kind == "algorithms" and not hasattr(loaded, "Client"):
        return "names no Client class"
    return ""


def describe(entry: Entry) -> Description:
    """What can be said of an entry without importing anything of its package."""
    module, _, attribute = entry.target.partition(":")
    try:
        path = _source_file(module)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return Description(broken=f"{type(error).__name__}: {error}")
    missing = _missing_imports(tree)
    if missing:
        return Description(broken=f"needs the package '{missing}', which is not installed")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return Description(_first_line(node), _class_text(node, "paper"), _class_text(node, "sends"))
    if attribute in _bound_names(tree):  # made by a call or imported from elsewhere: exists, but tells nothing here
        return Description()
    return Description(broken=f"{module} has no '{attribute}'")


def _source_file(module: str) -> Path:
    """Where a module's source lies. Unlike `importlib.util.find_spec`, imports no parent package."""
    top, *rest = module.split(".")
    spec: ModuleSpec | None = importlib.util.find_spec(top)
    name = top
    for part in rest:
        if spec is None:
            break
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, spec.submodule_search_locations or [])
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{name}'")
    if not spec.origin or not spec.origin.endswith(".py"):
        raise ImportError(f"no source text for '{name}'")
    return Path(spec.origin)


def _missing_imports(tree: ast.Module) -> str:
    """The first top-level import whose package is not there, or ''."""
    for node in tree.body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if importlib.util.find_spec(top) is None:
                return top
    return ""


def _first_line(node: ast.ClassDef) -> str:
    text = ast.get_docstring(node) or ""
    return text.partition("\n")[0]


def _class_text(node: ast.ClassDef, name: str) -> str:
    """The text that a class body assigns to `name`, or ''."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""
    return ""


def _bound_names(tree: ast.Module) -> set[str]:
    """Names that a module's top level binds."""
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
