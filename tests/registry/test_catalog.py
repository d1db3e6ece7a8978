"""Finding, describing and loading algorithms, models and data sets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from registry import catalog
from registry.description import Description, describe
from registry.errors import UserError

GOOD = '''
"""A module."""
from baselines.fedavg import FedAvg

class FedGood(FedAvg):
    """Says something good."""
    paper = "Good et al. 2030"

class Abstract:
    """Is no server."""
'''


def install(site: Path, package: str, points: str, source: str = GOOD, version: str = "1.0") -> None:
    """Write what pip installs for a package with entry points."""
    (site / f"{package}.py").write_text(source)
    info = site / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[fedkdx.algorithms]\n{points}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(catalog.IGNORE_PLUGINS, raising=False)
    yield tmp_path
    for module in list(sys.modules):
        if module.startswith("plug_"):
            del sys.modules[module]


def entry(name: str, kind: str = "algorithms") -> catalog.Entry:
    return next(e for e in catalog.entries(kind) if e.name == name)


@pytest.mark.parametrize("kind", catalog.BUILT_IN)
def test_every_built_in_name_loads_and_is_described(kind):
    for name in catalog.BUILT_IN[kind]:
        about = describe(entry(name, kind))
        assert not about.broken
        assert about.summary.endswith(".")
        assert about.paper
        loaded = catalog.load(kind, name.upper())
        assert loaded is catalog.load(kind, name.lower())
        assert about.summary == loaded.__doc__.partition("\n")[0]
        assert about.paper == loaded.paper
        assert kind != "algorithms" or about.sends == loaded.sends != ""


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UserError, match=r"unknown algorithm 'FedKDXX' \(did you mean FedKDX\?\); known: .*Local"):
        catalog.find("algorithms", "FedKDXX")
    with pytest.raises(UserError, match="unknown data set 'zzz'; known"):
        catalog.find("datasets", "zzz")


def test_a_package_adds_a_name(site):
    install(site, "plug_good", "FedGood = plug_good:FedGood")
    found = entry("FedGood")
    assert found.origin == "plug-good 1.0"
    assert describe(found) == Description("Says something good.", "Good et al. 2030")
    assert "plug_good" not in sys.modules
    assert catalog.load("algorithms", "fedgood").__name__ == "FedGood"


def test_two_packages_with_one_name_are_both_named(site):
    install(site, "plug_one", "FedGood = plug_one:FedGood")
    install(site, "plug_two", "fedgood = plug_two:FedGood", version="2.1")
    with pytest.raises(UserError, match=r"'FEDGOOD' is claimed by plug-one 1\.0 and plug-two 2\.1"):
        catalog.find("algorithms", "FEDGOOD")
    assert catalog.load("algorithms", "FedAvg")


def test_a_built_in_name_cannot_be_taken_over_in_silence(site):
    install(site, "plug_thief", "FedAvg = plug_thief:FedGood")
    with pytest.raises(UserError, match=r"claimed by built-in and plug-thief 1\.0"):
        catalog.find("algorithms", "FedAvg")


def test_the_environment_can_ignore_plug_ins(site, monkeypatch):
    install(site, "plug_thief", "FedAvg = plug_thief:FedGood")
    monkeypatch.setenv(catalog.IGNORE_PLUGINS, "1")
    assert catalog.load("algorithms", "FedAvg").__module__ == "baselines.fedavg"
    monkeypatch.setenv(catalog.IGNORE_PLUGINS, "0")
    with pytest.raises(UserError):
        catalog.find("algorithms", "FedAvg")


@pytest.mark.parametrize(
    ("target", "source", "why_listed", "why_loaded"),
    [
        ("plug_bad:FedGood", "import nowhere_at_all\n" + GOOD, "needs the package 'nowhere_at_all'", "No module named"),
        ("plug_bad:FedGood", "def broken(:\n", "SyntaxError", "SyntaxError"),
        ("plug_bad:Missing", GOOD, "plug_bad has no 'Missing'", "has no attribute 'Missing'"),
        ("plug_gone:FedGood", GOOD, "No module named 'plug_gone'", "No module named 'plug_gone'"),
        ("plug_bad:FedGood", GOOD + "\nraise RuntimeError('boom')", "", "RuntimeError: boom"),
        ("plug_bad:Abstract", GOOD, "", "is no subclass of registry.interface.Server"),
    ],
)
def test_a_broken_plug_in_is_listed_with_its_reason_and_breaks_nobody(site, target, source, why_listed, why_loaded):
    install(site, "plug_bad", f"Bad = {target}", source)
    assert why_listed in describe(entry("Bad")).broken
    with pytest.raises(UserError, match=r"'Bad' from plug-bad 1\.0") as error:
        catalog.load("algorithms", "Bad")
    assert why_loaded in str(error.value)
    assert catalog.load("algorithms", "FedAvg")


MALFORMED = {
    "no entry point": b"[fedkdx.algorithms]\nthis is = not; an entry point!\n",
    "an option twice": b"[fedkdx.algorithms]\nA = plug_odd:FedGood\nA = plug_odd:FedGood\n",
    "a section twice": b"[fedkdx.algorithms]\n[fedkdx.algorithms]\n",
    "garbage": b"fedkdx.algorithms\x00\x01\n= = =\n",
    "an indented line": b"[fedkdx.algorithms]\n  A = plug_odd:FedGood\n B\n",
    "Latin-1": "[fedkdx.algorithms]\nFedÄ = plug_odd:FedGood\n".encode("latin-1"),
    "no object": b"[fedkdx.algorithms]\nA = plug_odd\n",
    "a control character": b"[fedkdx.algorithms]\nA\x1b[31m = plug_odd:FedGood\n",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_entry_points_are_skipped_and_said_once(site, what, capsys):
    """Whatever one package holds, all others, installed before or after it, are there."""
    install(site, "plug_a", "FedFirst = plug_a:FedGood")
    install(site, "plug_odd", "")
    install(site, "plug_z", "FedLast = plug_z:FedGood")
    (site / "plug_odd-1.0.dist-info" / "entry_points.txt").write_bytes(MALFORMED[what])
    catalog._warn.cache_clear()
    for _ in range(2):
        names = {entry.name for entry in catalog.entries("algorithms")}
        assert {"FedFirst", "FedLast", "FedAvg"} <= names and not any("\x1b" in name for name in names)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("entry points of plug_odd are skipped: ") and line.isprintable()


@pytest.mark.parametrize("text", ["[a]\nx = 1\nx = 1\n", "\x00", "[a]\nx = %(a)s\n", " x\n"])
def test_what_is_not_ours_is_not_even_parsed(site, text, capsys):
    install(site, "plug_good", "FedGood = plug_good:FedGood")
    install(site, "plug_odd", "")
    (site / "plug_odd-1.0.dist-info" / "entry_points.txt").write_text(text)
    assert entry("FedGood") and not capsys.readouterr().err


def test_a_percent_sign_is_no_interpolation(site):
    install(site, "plug_good", "FedGood = plug_good:FedGood\n[other]\na = %(b)s")
    assert entry("FedGood")


def test_an_algorithm_that_leaves_methods_out_says_which(site):
    source = "from registry.interface import Server\nclass Half(Server):\n    '''Half done.'''\n"
    install(site, "plug_half", "Half = plug_half:Half", source)
    with pytest.raises(UserError, match="does not implement aggregate, message"):
        catalog.load("algorithms", "Half")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Client = 3", "has a Client that is no subclass of registry.interface.Client"),
        ("class Client: pass", "has a Client that is no subclass of registry.interface.Client"),
        ("Params = {'mu': 0.1}", "has a Params that is no subclass of registry.parameters.Params"),
        ("class Params: mu: float = 0.1", "has a Params that is no subclass of registry.parameters.Params"),
        ("class Params(Base): mu: float = 0.1", "has a Params that is no dataclass; write @dataclass(frozen=True)"),
    ],
)
def test_the_classes_that_an_algorithm_names_are_checked(site, body, reason):
    """Or a hyper-parameter that is no field would be unknown to --set, and a foreign class end in a traceback."""
    lines = "\n".join(("from registry.parameters import Params as Base", GOOD, f"class Half(FedAvg):\n    {body}\n"))
    install(site, "plug_half", "Half = plug_half:Half", lines)
    with pytest.raises(UserError, match=re.escape(reason)):
        catalog.load("algorithms", "Half")


def test_listing_imports_no_torch_and_no_plug_in(site):
    install(site, "plug_good", "FedGood = plug_good:FedGood")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from fedkdx_plugin.cli.main import main; code = main(['--list']);"
        "heavy = {'torch', 'pandas', 'scipy', 'matplotlib', 'numpy', 'plug_good'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=Path.cwd())
    assert run.returncode == 0, run.stderr
    assert "FedGood" in run.stdout
    assert "Says something good." in run.stdout
    assert "plug-good 1.0" in run.stdout
