"""What an example's algorithm computes, and that the examples' own tests pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkdx_plugin.testing import check_algorithm
from registry import catalog
from registry.interface import Message, Round
from tests.conftest import make_federation

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def median(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "fedkdx-median")
    from fedkdx_median.algorithm import FedMedian

    yield FedMedian
    for name in list(sys.modules):
        if name.startswith("fedkdx_median"):
            del sys.modules[name]


@pytest.mark.parametrize("clients", [1, 2, 3, 4])
def test_it_is_the_median_of_each_coordinate(median, clients):
    server = make_federation(median).server
    states = [torch.randn(3, 2) for _ in range(clients)]
    server.aggregate({k: Message({"model.w": state}) for k, state in enumerate(states)}, Round(1, 1))
    expected = np.median(np.stack([state.numpy() for state in states]).astype(np.float64), axis=0)
    np.testing.assert_allclose(server.weights["model.w"].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_one_wild_client_of_three_is_outvoted(median):
    server = make_federation(median).server
    states = [torch.zeros(4), torch.full((4,), 1e6), torch.ones(4)]
    server.aggregate({k: Message({"model.w": state}) for k, state in enumerate(states)}, Round(1, 1))
    assert torch.equal(server.weights["model.w"], torch.ones(4))


@pytest.mark.parametrize(("name", "count"), [("fedkdx-median", 2), ("fedkdx-centres", 12)])
def test_the_own_tests_of_an_example_pass(name, count):
    folder = EXAMPLES / name
    paths = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert f"{count} passed" in run.stdout


def guides_code(page: str, mark: str) -> str:
    """Return the first Python block of a page behind a mark."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(mark)[2]
    return text.partition("```python\n")[2].partition("```")[0]


@pytest.fixture
def near(tmp_path, monkeypatch):
    """Return the class of the guide's algorithm with a client of its own, taken from a file as a user does."""
    (tmp_path / "near.py").write_text(guides_code("extend/algorithm.md", "### With a client of its own"))
    return catalog.load("algorithms", f"{tmp_path / 'near.py'}:FedNear")


def test_the_guides_algorithm_with_a_client_of_its_own_passes_all_checks(near):
    assert near.Client is not near.__mro__[1].Client and near.Params().mu == 0.1
    check_algorithm(near)


def test_the_guides_client_stays_nearer_at_first_and_is_fedavgs_in_the_last_round(near):
    server = make_federation(near, params={"mu": 0.5}).server
    assert [server.message(0, Round(index, 3)).meta["mu"] for index in (1, 2, 3)] == [0.5, 0.25, 0]


@pytest.mark.parametrize("side", ["client", "server"])
def test_the_guides_flower_app_is_that_of_the_example(side):
    file = (EXAMPLES / "flower-app" / "wrist" / f"{side}_app.py").read_text(encoding="utf-8")
    code = guides_code("guide/flower-app.md", f"`{side}_app.py`")
    _, _, written = file.partition('"""\n\n')  # behind the module's own docstring
    assert "fedkdx.flower." in code and written.startswith(code)
