"""The tutorial: every cell runs in a fresh kernel and shows what its text promises."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.ipynb"


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the plain text of every output, in order."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.get("text") or output["data"]["text/plain"] for output in outputs]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    patch.setenv("PYTHONPATH", os.pathsep.join(places))
    patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tutorial")))
    notebook = nbformat.read(TUTORIAL, as_version=4)
    try:
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    finally:
        patch.undo()
    return notebook


def test_every_cell_runs_and_shows_what_its_text_promises(executed):
    shown = "\n".join(texts(executed))
    assert "476 windows of 4 subjects and 3 classes" in shown and "error:" not in shown
    assert all(name in shown for name in ("Local", "FedAvg", "FedKDX+", "FedMedian", "p(walk)"))
    assert any("image/png" in output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", []))


def test_stored_outputs_are_those_of_its_cells_and_name_no_machine(executed):
    stored = nbformat.read(TUTORIAL, as_version=4)
    kinds = [
        [{output.output_type for output in cell.get("outputs", [])} for cell in notebook.cells]
        for notebook in (stored, executed)
    ]
    assert kinds[0] == kinds[1]
    text = TUTORIAL.read_text(encoding="utf-8")
    assert not any(place in text for place in ("/tmp/", "/root/", "/home/", "/work/", "/Users/"))
