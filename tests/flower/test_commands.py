"""Command lines of the federation that cannot be: one clear line each, exit code 2. Needs no Flower."""

from __future__ import annotations

import pytest

from fedkdx_plugin import flower
from fedkdx_plugin.cli import main as cli

SERVE = "serve --sites 2 --insecure -algo FedAvg"
JOIN = "join --server here:9092 --client 0 --state state --insecure"
WRONG = {
    "serve --sites 2": "--certificates --insecure",
    "serve --insecure": "--sites",
    "serve --sites 2 --insecure --certificates keys": "not allowed with",
    f"{SERVE} --min-clients 3": "at most 2 sites",
    f"{SERVE} --deadline 0": "--deadline: 0 is out of range; it must be above 0",
    f"{SERVE} --port 99999": "it must be at least 1 and at most 65535",
    f"{SERVE} -data SPAR": "the sites' own",
    f"{SERVE} --dry-run": "unrecognized arguments: --dry-run",
    f"{SERVE} -gr 0": "-gr: 0 is out of range",
    f"{SERVE} --resume nowhere": "uses the options in the folder; leave",
    "serve --sites 2 --insecure --resume nowhere": "no experiment there",
    "certificates keys --sites 2": "--host",
    "certificates keys --sites 0 --host localhost": "--sites: 0 is out of range",
    JOIN: "-data",
    f"{JOIN} -data x --client -1": "--client",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(line, capsys):
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert WRONG[line] in error


@pytest.mark.parametrize("line", [SERVE, f"{JOIN} -data x", "certificates keys --sites 2 --host localhost"])
def test_without_flower_the_line_says_what_to_install(line, capsys, monkeypatch):
    monkeypatch.setattr(flower.importlib.util, "find_spec", lambda name: None)
    assert cli.main(line.split()) == 2
    assert "pip install 'fedkdx[flower]'" in capsys.readouterr().err
