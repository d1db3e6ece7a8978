"""What stands beside the code: versions, licence, citation, the image's command, the bounds of dependencies."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import yaml

from registry import __version__

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"([\w-]+)==([\w.+]+)")


def setup_cfg() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read(ROOT / "setup.cfg")
    return parsed


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "tests" / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), lines
    return {match[1].lower(): match[2] for match in found}


def lower_bounds() -> dict[str, str]:
    """Package -> lower bound, of what is always installed and of the extra `test`."""
    extras = setup_cfg()["options.extras_require"]
    lines = setup_cfg()["options"]["install_requires"].split("\n")
    wanted = ["test"]
    for name in wanted:
        for line in extras[name].split("\n"):
            if reference := re.fullmatch(r"%\((\w+)\)s", line.strip()):
                wanted.append(reference[1])
            else:
                lines.append(line)
    bounds = [re.match(r"([\w-]+) *>= *([\w.]+)", line) for line in lines if line.strip()]
    assert all(bounds), lines
    return {match[1].lower(): match[2] for match in bounds}


def same_version(bound: str, pin: str) -> bool:
    """Tell if 4.60 and 4.60.0 are the same version."""
    ours, theirs = ([int(part) for part in text.split(".")] for text in (bound, pin))
    width = max(len(ours), len(theirs))
    return ours + [0] * (width - len(ours)) == theirs + [0] * (width - len(theirs))


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_allowed():
    bounds, oldest = lower_bounds(), pins("constraints-oldest.txt")
    assert bounds.keys() == oldest.keys()
    different = {name: (bounds[name], oldest[name]) for name in bounds if not same_version(bounds[name], oldest[name])}
    assert not different


def test_the_newest_versions_are_of_the_same_packages():
    assert pins("constraints-newest.txt").keys() == pins("constraints-oldest.txt").keys()


def test_changelog_and_citation_are_of_this_version():
    (latest, *_) = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert latest == citation["version"] == __version__


def test_licence_citation_and_metadata_agree():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "the fedkdx contributors" in text
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == setup_cfg()["metadata"]["license"] == "Apache-2.0"
    assert setup_cfg()["metadata"]["license_files"] == "LICENSE"


def test_the_image_runs_the_readmes_first_command():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    first, command = (
        json.loads(next(line for line in lines if line.startswith(word)).removeprefix(word))
        for word in ("ENTRYPOINT", "CMD")
    )
    (readme,) = re.findall(r"python run\.py (-data SPAR .*)\n```", (ROOT / "README.md").read_text())
    assert first == ["python", "run.py"]
    assert command == shlex.split(readme)
