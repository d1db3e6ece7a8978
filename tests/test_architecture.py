"""Imports point one way: registry <- dataset_utils, native <- algorithm, models <- baselines.

The engine knows no algorithm.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("registry", "dataset_utils", "fedkdx_plugin", "baselines")
# folder -> what of ours its modules may import, wherever the import stands
MAY_IMPORT = {
    "registry": ("registry",),
    "dataset_utils": ("registry", "dataset_utils"),
    "fedkdx_plugin/native": ("registry", "fedkdx_plugin.native"),
    "fedkdx_plugin/algorithm": ("registry", "fedkdx_plugin.algorithm", "fedkdx_plugin.native"),
    "fedkdx_plugin/models": ("registry", "fedkdx_plugin.models"),
    "fedkdx_plugin/privacy": ("registry", "fedkdx_plugin.privacy", "fedkdx_plugin.engine.randomness"),
    "fedkdx_plugin/engine": (
        "registry",
        "dataset_utils",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.native",
        "fedkdx_plugin.privacy",
    ),
    "fedkdx_plugin/configuration": ("registry", "dataset_utils", "fedkdx_plugin.configuration"),
    "fedkdx_plugin/results": (
        "registry",
        "dataset_utils",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.native",
        "fedkdx_plugin.privacy",
        "fedkdx_plugin.results",
    ),
    "fedkdx_plugin/prediction": (
        "registry",
        "dataset_utils",
        "fedkdx_plugin.configuration",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.experiments",
        "fedkdx_plugin.prediction",
        "fedkdx_plugin.results",
    ),
    "fedkdx_plugin/privacy/audit": (
        "registry",
        "dataset_utils",
        "fedkdx_plugin.configuration",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.experiments",
        "fedkdx_plugin.privacy",
        "fedkdx_plugin.privacy.audit",
        "fedkdx_plugin.reports",
        "fedkdx_plugin.results",
    ),
    "fedkdx_plugin/testing": (
        "registry",
        "dataset_utils",
        "baselines.fedavg",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.models",
        "fedkdx_plugin.privacy",
        "fedkdx_plugin.testing",
    ),
    "fedkdx_plugin/tracking": (
        "registry",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.privacy",
        "fedkdx_plugin.results",
        "fedkdx_plugin.tracking",
    ),
    "fedkdx_plugin/reports": (
        "registry",
        "dataset_utils",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.privacy",
        "fedkdx_plugin.results",
        "fedkdx_plugin.reports",
    ),
    "fedkdx_plugin/flower": (
        "registry",
        "dataset_utils",
        "fedkdx_plugin.cli",
        "fedkdx_plugin.configuration",
        "fedkdx_plugin.engine",
        "fedkdx_plugin.experiments",
        "fedkdx_plugin.flower",
        "fedkdx_plugin.privacy",
        "fedkdx_plugin.reports",
        "fedkdx_plugin.results",
    ),
    "baselines": ("registry", "baselines", "fedkdx_plugin.algorithm", "fedkdx_plugin.models"),
}
# the catalog checks that a loaded data set is a Source, which it must know for that
EXCEPTIONS = {("registry/catalog.py", "dataset_utils.recording")}


# built on nearly all others, and imported by the command line and the Python interface alone
AUDIT = "fedkdx_plugin.privacy.audit"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    inner = [ROOT / other for other in MAY_IMPORT if other.startswith(f"{folder}/")]  # with a line of their own
    paths = sorted(p for p in (ROOT / folder).rglob("*.py") if not any(p.is_relative_to(other) for other in inner))
    assert paths
    for path in paths:
        for name in imported(path):
            allowed = any(name == own or name.startswith(own + ".") for own in MAY_IMPORT[folder])
            allowed &= AUDIT in MAY_IMPORT[folder] or not name.startswith(AUDIT)
            assert allowed or (path.relative_to(ROOT).as_posix(), name) in EXCEPTIONS, f"{path} imports {name}"


def test_only_fedkd_and_pullavg_are_made_of_fedkdxs_parts():
    """What all baselines use is in the contract."""
    users = {
        path.name for path in (ROOT / "baselines").glob("*.py") if any("fedkdx_plugin" in n for n in imported(path))
    }
    assert users == {"fedkd.py", "fedkd_plus.py", "pullavg.py"}


def test_the_papers_fedkdx_knows_nothing_of_the_additions():
    folder, added = (
        ROOT / "fedkdx_plugin" / "algorithm",
        ("additions.py", "fedkdx_plus.py", "differences.py", "pull.py"),
    )
    papers = [path for path in folder.rglob("*.py") if path.name not in added]
    assert {"fedkdx.py", "student.py", "updates.py", "broadcast.py", "compression.py"} <= {path.name for path in papers}
    for path in papers:
        assert not any(name.rpartition(".")[2] + ".py" in added for name in imported(path)), path


def test_every_package_is_in_the_wheel():
    import configparser

    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in OURS
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == there
