"""Wrong command lines of a federation: one clear line each, exit code 2. Needs no Flower."""

from __future__ import annotations

import pytest

from fedkdx_plugin import flower
from fedkdx_plugin.cli import main as cli
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.experiments.experiment import Experiment
from registry.errors import UserError

SERVE = "serve --sites 2 --min-updates 1 --insecure -algo FedAvg"
JOIN = "join --server here:9092 --client 0 --state state --insecure"
WRONG = {
    "serve --sites 2": "--certificates FOLDER or --insecure",
    "serve --insecure": "--sites",
    "serve --sites 2 --insecure --certificates keys": "give one of the two",
    f"{SERVE} --min-clients 3": "at most 2 sites",
    "serve --sites 2 --insecure -algo FedAvg -jr 1": "a round of 2 sites selects 2 (-jr 1), but at least 3 updates",
    "serve --sites 5 --insecure -algo FedAvg -jr 0.4": "or write --min-updates 2 where all sites agree to that",
    "serve --sites 5 --min-clients 2 --insecure -algo FedAvg -jr 1": "a round of 2 sites selects 2",
    f"{SERVE} --deadline 0": "--deadline: 0 is out of range; it must be above 0",
    f"{SERVE} --port 99999": "it must be at least 1 and at most 65535",
    f"{SERVE} -data SPAR": "the sites' own",
    f"{SERVE} --dry-run": "unrecognized arguments: --dry-run",
    f"{SERVE} -gr 0": "-gr: 0 is out of range",
    f"{SERVE} --resume nowhere": "uses the options in the folder; leave",
    "serve --sites 2 --insecure --resume nowhere": "nowhere: no such folder",
    "certificates keys --sites 2": "--host",
    "certificates keys --sites 0 --host localhost": "--sites: 0 is out of range",
    "certificates keys --host localhost": "--sites: missing",
    JOIN: "-data: missing",
    f"{JOIN} -data x --client -1": "--client: -1 is out of range",
    "join --server here --client 0 -data x --state state --insecure": "--server here: write HOST:PORT",
    "join --server here:9092 -data x --state state --insecure": "--client: missing",
    "join --server here:9092 --client 0 -data x --insecure": "--state: missing",
    "join --server here:9092 --client 0 -data x --state state": "--certificates FOLDER or --insecure",
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


def test_a_folder_goes_on_with_the_command_that_began_it(tmp_path, capsys):
    """Data at sites: `serve --resume`; on this machine: `resume`. The other is refused, and names the right one."""
    folders = {}
    for data in ("sites", "SPAR"):
        experiment = Experiment.comparison(from_dict({"data": data, "algorithm": ["FedAvg"], "out": str(tmp_path)}, ""))
        folders[data] = str(experiment.make_folder())
        with experiment.begun(["fedkdx"]):
            pass
    assert cli.main(["resume", folders["sites"]]) == 2
    assert f"`fedkdx serve --resume {folders['sites']}" in capsys.readouterr().err
    assert cli.main(["serve", "--sites", "2", "--insecure", "--resume", folders["SPAR"]]) == 2
    assert f"`fedkdx resume {folders['SPAR']}`" in capsys.readouterr().err


def test_python_does_not_start_processes_of_flower():
    experiment = Experiment.comparison(from_dict({"data": "SPAR", "algorithm": ["FedAvg"], "engine": "flower"}, ""))
    with pytest.raises(UserError, match="fedkdx run --engine flower"):
        experiment.run()
