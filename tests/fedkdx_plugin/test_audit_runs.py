"""Audits of run folders: what is written, what the report shows, and what is refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import fedkdx_plugin as fedkdx
from dataset_utils.sealed import Sealed
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.privacy.audit import run as one_run
from fedkdx_plugin.privacy.audit.options import AuditOptions
from fedkdx_plugin.privacy.audit.rebuilt import Rebuilt
from fedkdx_plugin.privacy.audit.run import audit
from fedkdx_plugin.privacy.audit.several import Audits
from fedkdx_plugin.privacy.audit.view import Update
from fedkdx_plugin.privacy.audit.windows import choose
from fedkdx_plugin.reports.audits import described
from fedkdx_plugin.reports.plots import Looks
from fedkdx_plugin.reports.sections import arrange
from fedkdx_plugin.results import audits, runs
from fedkdx_plugin.results.audits import Audit
from registry.errors import UserError
from tests.fedkdx_plugin.watch_runs import FAST
from tests.sealing import reseal

QUICK = ["--shadows", "4", "--inverted", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def audited(watch, tmp_path_factory):
    """Copy three runs of one comparison, and audit them by the command line."""
    folder = tmp_path_factory.mktemp("audited") / "runs"
    for name in ("FedAvg", "FedKDX", "Local"):
        shutil.copytree(watch.run("federated", name), folder / f"{name}-seed0")
    assert main(["audit", str(folder), *QUICK]) == 0
    return folder


def test_every_attack_on_every_target_has_figures_in_range(audited):
    targets = {
        "FedAvg": {"shared model", "single update"},
        "FedKDX": {"shared model", "single update", "own model"},
        "Local": {"own model"},
    }
    for name, wanted in targets.items():
        result = audits.read(audited / f"{name}-seed0")
        membership = [one for one in result.figures if one.attack == "membership"]
        assert {one.target for one in membership} == wanted
        assert len({one.method for one in membership}) == 5
        for one in result.figures:
            assert math.isnan(one.value) or -1 <= one.value <= 1
            assert not one.low > one.high
        assert {(curve.target, curve.method) for curve in result.curves} == {(f.target, f.method) for f in membership}
        others = {one.attack for one in result.figures} - {"membership"}
        assert others == (set() if name == "Local" else {"inversion", "identity"})
    assert not audits.read(audited / "FedAvg-seed0").notes
    assert any("send no shared state" in note for note in audits.read(audited / "Local-seed0").notes)
    (guessed,) = [one for one in audits.read(audited / "FedKDX-seed0").figures if one.attack == "identity"]
    assert (guessed.name, guessed.chance) == ("accuracy", 1 / 3)


def test_all_files_are_there_and_the_windows_for_the_owner_alone(audited):
    own = audited / "FedAvg-seed0" / "audit"
    wanted = ["audit.csv", "audit.json", "inversion.pdf", "inversion.png", "membership.pdf", "membership.png"]
    assert sorted(path.name for path in own.iterdir()) == wanted
    assert own.stat().st_mode & 0o077 == 0
    rows = (own / "audit.csv").read_text().splitlines()
    assert len(rows) == 1 + len(audits.read(own.parent).figures)
    assert (audited / "audit.md").read_text().count("\n") >= 9
    assert len((audited / "audit.csv").read_text().splitlines()) > 60


def test_the_report_has_a_part_on_it(audited, tmp_path):
    assert main(["report", str(audited), "-o", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    part = text.partition("### Audit")[2].partition("\n### ")[0]
    for words in ("membership shared model", "identity single update", "FedKDX", "Local", "by chance"):
        assert words in part, words
    (table,) = (tmp_path / "tables").glob("*-audit.csv")
    assert len(table.read_text().splitlines()) == 4
    assert list((tmp_path / "figures").glob("*-audit.png"))
    assert not list((tmp_path / "figures").glob("*inversion*"))  # true windows stay in the run folder


def test_the_same_audit_is_not_repeated_and_another_one_replaces_it(audited, capsys, tmp_path):
    run = tmp_path / "FedAvg-seed0"
    shutil.copytree(audited / run.name, run)
    before = (run / "audit" / "audit.json").read_bytes()
    assert main(["audit", str(run), *QUICK]) == 0
    assert "audited before" in capsys.readouterr().err
    assert (run / "audit" / "audit.json").read_bytes() == before
    found = fedkdx.audit(run, attacks="identity", progress=False)
    assert {one.attack for one in audits.read(run).figures} == {"identity"}
    assert found.table.attack.unique().tolist() == ["identity"]
    again = fedkdx.audit(
        audited / run.name, attacks=["membership", "inversion", "identity"], inverted=2, steps=2, progress=False
    )
    assert again.found[audited / run.name].figures  # options from Python are those of the command line: it was read


def test_an_audit_gives_the_same_figures_again(audited):
    attacks = ("membership", "identity")
    again, _ = audit(audited / "FedKDX-seed0", AuditOptions(attacks, shadows=4), lambda text: None)
    before = audits.read(audited / "FedKDX-seed0")
    assert repr(list(again.figures)) == repr([one for one in before.figures if one.attack in attacks])
    assert repr(list(again.curves)) == repr(list(before.curves))


@pytest.mark.parametrize("name", ["FedAvg", "FedKDX"])
def test_a_shadow_run_on_the_runs_own_windows_is_the_run(watch, name):
    """So it differs from the run in its windows alone: same initial weights, same clients selected."""
    rebuilt = Rebuilt.of(watch.run("federated", name))
    with rebuilt.federation() as federation:
        for index in range(1, rebuilt.done + 1):
            federation.round(rebuilt.at(index))
        made = federation.save()
    assert made.tensors.keys() == rebuilt.saved.tensors.keys()
    for tensor, value in made.tensors.items():
        torch.testing.assert_close(value, rebuilt.saved.tensors[tensor], rtol=1e-4, atol=1e-5)
    other = choose(rebuilt.data, rebuilt.clients, 0)
    with rebuilt.federation(other.trained_on(rebuilt.data, ~other.member)) as federation:
        federation.round(rebuilt.at(1))
        changed = federation.save()
    assert not all(torch.equal(t, made.tensors[n]) for n, t in changed.tensors.items() if n.startswith("server/"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shadows", "3"], "--shadows 3: shadow runs come in pairs"),
        (["--shadows", "2"], "--shadows 2: shadow runs come in pairs"),
        (["--shadows", "-4"], "--shadows: -4 is out of range"),
        (["--attacks", "membership,guessing"], "--attacks: 'guessing' is unknown"),
        (["--attacks", ","], "--attacks: names none"),
        (["--steps", "0"], "--steps: 0 is out of range"),
        (["--inverted", "many"], "--inverted: 'many' is not a whole number"),
    ],
)
def test_wrong_options_are_one_line(watch, capsys, words, said):
    assert main(["audit", str(watch.run("federated", "FedAvg")), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def refused(run: Path, capsys) -> str:
    assert main(["audit", str(run), "--attacks", "identity"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_runs_that_cannot_be_audited_are_one_line(watch, capsys, tmp_path):
    assert "sends all windows to one place" in refused(watch.run("federated", "Centralised"), capsys)
    assert "no such folder" in refused(tmp_path / "nothing", capsys)
    assert "holds no run" in refused(tmp_path, capsys)
    run = tmp_path / "run"
    shutil.copytree(watch.run("federated", "FedAvg"), run)
    (run / "state.safetensors").write_bytes(b"damaged")
    assert "damaged or exchanged" in refused(run, capsys)
    (run / "state.safetensors").unlink()
    assert "state.safetensors: missing, it was removed" in refused(run, capsys)
    Sealed(run, "").remove("state.safetensors")  # as an experiment does
    assert "runs of a grid keep none" in refused(run, capsys)


@pytest.mark.parametrize("name", ["state.safetensors", "results.h5", "manifest.json", "description.yaml"])
def test_a_run_that_was_damaged_or_failed_is_refused_also_where_it_was_audited_before(audited, name, capsys, tmp_path):
    run = tmp_path / "FedAvg-seed0"
    shutil.copytree(audited / run.name, run)
    content = (run / name).read_bytes()
    (run / name).write_bytes(content + b" ")
    assert main(["audit", str(run), *QUICK]) == 2
    assert f"{name}: damaged or exchanged" in capsys.readouterr().err
    shutil.rmtree(run / "audit")
    assert f"{name}: damaged or exchanged" in refused(run, capsys)
    shutil.copytree(audited / run.name / "audit", run / "audit")
    (run / name).write_bytes(content)
    assert main(["audit", str(run), *QUICK]) == 0
    capsys.readouterr()
    (run / "failed.txt").write_text("too hot")
    assert main(["audit", str(run), *QUICK]) == 2
    assert "a run that failed; make it again" in capsys.readouterr().err


def test_of_an_unfinished_run_the_audit_says_so(watch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(watch.run("federated", "FedAvg"), run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    done = settings["global_rounds"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"global_rounds": done + 2}))
    reseal(run)
    found, _ = audit(run, AuditOptions(("identity",)), lambda text: None)
    assert f"The run is unfinished: it has made {done} of {done + 2} rounds." in found.notes


def test_without_its_windows_a_run_is_refused(watch, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(watch.run("federated", "FedAvg"), run)
    away = Path(json.loads((run / "environment.json").read_text())["data"]["folder"])
    hidden = away.with_name(away.name + "-hidden")
    away.rename(hidden)
    try:
        assert "its windows are gone" in refused(run, capsys)
    finally:
        hidden.rename(away)


def test_some_runs_that_cannot_be_audited_keep_no_other_from_it(watch, audited, capsys, tmp_path):
    shutil.copytree(watch.run("federated", "Centralised"), tmp_path / "Centralised-seed0")
    shutil.copytree(audited / "Local-seed0", tmp_path / "Local-seed0")
    assert main(["audit", str(tmp_path), *QUICK]) == 1
    told = capsys.readouterr()
    assert "not audited:" in told.err
    assert "membership, own model" in told.out


def test_a_damaged_audit_is_refused_and_named_in_the_report(audited, capsys, tmp_path):
    run = tmp_path / "FedAvg-seed0"
    shutil.copytree(audited / run.name, run)
    for content in ("{", "[]", '{"format": 9}', '{"format": 1}'):
        (run / "audit" / "audit.json").write_text(content)
        with pytest.raises(UserError, match="audit the run again"):
            audits.read(run)
    (section,) = arrange([runs.read(run)])
    (said,) = described(section, tmp_path / "figures", Looks(["FedAvg"]))
    assert said.startswith("Not in this part:")
    assert "audit the run again" in refused(run, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedFomo", "FedFTL"])
def test_algorithms_that_share_otherwise_are_audited_as_far_as_it_goes(watch, name, tmp_path):
    shutil.copytree(watch.run("federated", name), tmp_path / "run")
    assert main(["audit", str(tmp_path / "run"), *QUICK]) == 0
    assert audits.read(tmp_path / "run").figures


def test_where_an_attack_that_was_asked_for_has_no_figures_the_terminal_and_the_table_say_why(watch, capsys, tmp_path):
    """Of secure sums the server sees the mean of a round's clients, here all three: no single client sent it."""
    words = ["-data", str(watch.root / "watch.yaml"), "-algo", "FedAvg", *FAST, "-gr", "1", "-jr", "1"]
    assert main([*words, "--secure-aggregation", "-o", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    said = (
        "The server sees means of 3 clients' updates: every attack on an update is on such a mean, and none can be "
        "attributed to a client (identity)."
    )
    for attacks in ("identity,inversion", "inversion"):  # the latter sees updates by itself
        capsys.readouterr()
        assert main(["audit", str(folder), "--attacks", attacks, "--inverted", "1", "--steps", "1"]) == 0
        assert f"\nFedAvg: {said}\n" in capsys.readouterr().out
        page = (folder / "audit.md").read_text()
        assert page.startswith("| attack") and page.endswith(f"|\n\n- FedAvg: {said}\n")
        assert {one.attack for one in audits.read(folder / "FedAvg-seed0").figures} == {"inversion"}


def test_a_single_client_gives_no_identity_and_the_notes_say_so():
    found = one_run.Found()
    update = Update((4,), {}, {"head.bias": torch.ones(2)})
    one_run._identity(None, [[update], [update]], found)
    assert found.figures == []
    assert found.notes == ["A single client sends updates, so that there is no question who did (identity)."]


def test_notes_and_refusals_are_lines_of_their_own():
    made = Audit("Local", 0, 1, {}, {}, ["Nothing is sent."], 0.1, [], [])
    both = Audits({Path("a"): made, Path("b"): replace(made, seed=1)}, {Path("c"): "damaged"})
    assert repr(both).splitlines()[-2:] == ["Local: Nothing is sent.", "not audited: c: damaged"]
    assert repr(both).endswith("\n")
