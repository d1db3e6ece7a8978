"""The documentation: links and anchors resolve, command lines parse, code compiles, made pages are up to date."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fedkdx_plugin.cli import main as cli
from fedkdx_plugin.cli.options import Making, given_values
from fedkdx_plugin.configuration.config import from_dict
from registry import catalog
from registry.flags import given
from registry.parameters import parse

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"))
    if ".venv" not in path.parts
)
OF_THE_EXAMPLES = {"FedMedian", "mlp", "Wards"}  # names that a reader's own package brings
PROMPT = re.compile(r"(?:python run\.py|fedkdx|python -m dataset_utils\.(?:generate|describe)) ")


def load_make():
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "reference" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the code blocks of a page: language ('' for indented ones) and text."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + [("", match[0]) for match in re.finditer(r"(?:^(?: {4}).*\n)+", rest, re.MULTILINE)]


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    broken = []
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        path = (page.parent / place).resolve() if place else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def commands_of(page: Path) -> list[str]:
    """Return the command lines of a page, in blocks and in the text, that give an argument."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for language, block in blocks(text):
        if language in ("", "sh", "console"):
            lines += block.replace("\\\n", " ").splitlines()
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [code for code in re.findall(r"`([^`\n]+)`", plain) if PROMPT.match(code)]
    parts = [part.strip().removeprefix(".venv/bin/") for line in lines for part in line.split("#")[0].split("&&")]
    return [part for part in parts if PROMPT.match(part) and "..." not in part.split()]


def words_of(line: str) -> list[str] | None:
    """Return the words behind the program; None where the text only names a command."""
    words = shlex.split(line)
    if words[0] == "fedkdx":
        words = words[1:]
    elif words[1] == "run.py":
        words = words[2:]
    else:
        words = ["data", "make" if words[2].endswith("generate") else "describe", *words[3:]]
    bare = {("data",), ("run",), *make.commands(), *((f"--{flag}",) for flag in cli.AS_FLAGS)}
    return None if not words or (tuple(words) in bare and words != ["list"]) else words


def known(kind: str, name: str) -> bool:
    if name in OF_THE_EXAMPLES or ":" in name or name.endswith(".yaml") or "/" in name or name.isupper():
        return True
    return name in {entry.name for entry in catalog.entries(kind)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_command_lines_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in commands_of(page):
        words = words_of(line)
        if words is None:
            continue
        name, rest = cli._command(words)
        command = (name, rest[0]) if name == "data" else (name,)
        try:
            arguments = make.parser_of(command).parse_args(rest[len(command) - 1 :])
        except (SystemExit, Exception) as error:
            raise AssertionError(f"{line}: {error}") from error
        if name in ("run", "experiment"):
            check_values(line, arguments)


def check_values(line: str, arguments: argparse.Namespace) -> None:
    """Check what a command line gives as the command itself does, short of reading files."""
    parse(Making, given(arguments, Making))
    values = given_values(arguments)
    values.pop("config", None)
    for of_experiments in ("only", "write_preset"):
        values.pop(of_experiments, None)
    experiment = values.pop("name", None)
    if experiment and not experiment.isupper() and not experiment.endswith(".yaml"):
        assert (ROOT / "experiments" / f"{experiment}.yaml").is_file(), line
    config = from_dict({"data": "SPAR"} | values, "")
    assert all(name == "all" or known("algorithms", name) for name in config.algorithm), line
    assert known("models", config.model), line
    assert known("datasets", config.shards.data), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page):
    for language, block in blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(block)


@pytest.mark.parametrize("name", make.PAGES)
def test_made_pages_are_up_to_date(name):
    page = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert page == make.PAGES[name](), "run `python docs/reference/make.py`"


def test_every_page_can_be_found_from_the_start():
    """Every page is linked from the README or a page that is."""
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", without_code(page.read_text(encoding="utf-8")))
        ahead += [(page.parent / target).resolve() for target in targets if not re.match(r"[a-z]+:", target)]
    tracked = subprocess.run(["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True)
    pages = {ROOT / line for line in tracked.stdout.splitlines() if line.endswith(".md")}
    assert pages <= reached
