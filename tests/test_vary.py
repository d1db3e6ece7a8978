"""`-t` varies what `--vary` says, and the table and the report say which."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from dataset_utils import shards
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.cli.run import parser
from fedkdx_plugin.reports import report
from fedkdx_plugin.reports.people import same_clients
from fedkdx_plugin.reports.sections import arrange
from fedkdx_plugin.results.runs import find, read_all
from registry import catalog
from tests.dataset_utils import synthetic

RUN = "-data synthetic -algo Local,FedAvg -m cnn_small -gr 2 -jr 1 -ls 1 -dev cpu --partition iid -nc 3".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder_that_knows_a_made_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = catalog.load
    ours = {"synthetic": synthetic.Synthetic}
    monkeypatch.setattr(catalog, "load", lambda kind, name: ours.get(name.lower()) or original(kind, name))


def runs(*more: str) -> Path:
    assert main([*RUN, *more]) == 0
    (folder,) = Path("runs").iterdir()
    return folder


def manifests(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.glob("*/manifest.json")}


def test_by_default_all_seeds_have_the_same_data(capsys):
    folder = runs("-t", "2")
    assert len(set(manifests(folder).values())) == 1
    assert (
        "± over 2 seeds: initial weights, batches, client sampling, and the clients set apart differ; the windows"
        in (folder / "comparison.md").read_text()
    )


def test_vary_data_divides_anew_for_every_seed_and_alike_for_every_algorithm():
    folder = runs("-t", "3", "--vary", "data", "--data-seed", "5", "--train-fraction", "0.5")
    found = manifests(folder)
    for seed in range(3):
        assert found[f"Local-seed{seed}"] == found[f"FedAvg-seed{seed}"]
        manifest = json.loads(found[f"FedAvg-seed{seed}"])
        assert manifest["spec"]["seed"] == 5 + seed
        config = yaml.safe_load((folder / f"FedAvg-seed{seed}" / "config.yaml").read_text())
        assert (config["data_seed"], config["seed"], config["vary"]) == (5 + seed, seed, "data")
    assert len(set(found.values())) == 3 and len({json.loads(text)["drawn_from"] for text in found.values()}) == 1
    drawn = [shards.load(place) for place in sorted(Path("data/Synthetic").iterdir()) if place.is_dir()]
    windows = [[{x.tobytes() for x in shard.x} for shard in part] for made in drawn for part in (made.train, made.test)]
    assert windows[0][0] != windows[2][0] and windows[1][0] != windows[3][0]  # kept and divided, and tested, otherwise
    assert "split, kept windows and partition differ" in (folder / "comparison.md").read_text()


def test_the_report_takes_seeds_with_data_of_their_own_for_one_method():
    folder = runs("-t", "2", "--vary", "data")
    (section,) = arrange(read_all(find(folder))[0])
    assert [method.seeds for method in section.methods] == [[0, 1], [0, 1]]
    page = report.write(find(folder), Path("out"), "title").read_text(encoding="utf-8")
    assert "± over seeds: split, kept windows and partition differ" in page
    assert "how they were made (seed 0)" in page


@pytest.mark.parametrize(("partition", "same"), [("subject", True), ("iid", False), ("dirichlet", False)])
def test_clients_are_the_same_with_every_seed_where_they_are_subjects(partition, same):
    folder = runs("-t", "2", "--vary", "data", "--partition", partition)
    found, _ = read_all(find(folder))
    assert len({run.data["manifest_sha256"] for run in found}) == 2 and same_clients(found) is same
    text = (report.write(find(folder), Path("out"), "title").parent / "report.md").read_text(encoding="utf-8")
    assert ("A point is a client of one seed" not in text) is same
    assert ("Each seed has data of its own" not in text) is same


def test_the_report_says_how_the_windows_were_made():
    folder = runs()
    page = report.write(find(folder), Path("out"), "title")
    text = re.sub(" +", " ", (page.parent / "report.md").read_text(encoding="utf-8"))
    for line in (
        "| rate | 50 Hz |",
        "| window | 50 samples (1 s), overlap 50% |",
        "| filters | median of 3 samples, low-pass at 20 Hz, gravity separated below 0.3 Hz |",
        "| scaling | federated: z-scores with mean and variance of all clients' training windows |",
        "| split | shuffled, 0 windows dropped between |",
        "| clients | 3 |",
    ):
        assert line in text, line
    # 3 subjects with 179 windows: 59 or 60 of a class each, a fifth of which is tested on
    assert "| all | 429 | 108 | 3 |" in text
    assert "Classes of each client" in text and "there is no plot of the classes" not in text


def test_a_run_folder_keeps_what_its_data_were_made_from():
    folder = runs()
    run = folder / "FedAvg-seed0"
    (place,) = (path for path in Path("data/Synthetic").iterdir() if path.is_dir())
    assert (run / "manifest.json").read_bytes() == (place / "manifest.json").read_bytes()
    assert yaml.safe_load((run / "description.yaml").read_text())["classes"] == ["lying", "sitting", "walking"]


def test_a_folder_of_shards_cannot_be_divided_again(shard_folder, capsys):
    argv = ["-data", str(shard_folder), "-algo", "Local", "-gr", "1", "-t", "2", "--vary", "data"]
    assert main(argv) == 2
    assert "which cannot be divided again" in capsys.readouterr().err


def test_help_says_what_t_varies(capsys):
    text = " ".join(parser().format_help().split())
    assert "--vary sets what differs between them" in text
    assert "training (initial weights, batches, client sampling) or data (also split, kept share and partition)" in text
