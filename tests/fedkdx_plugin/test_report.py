"""The report: every number from the files, what may be compared, and what is wrong said in one line."""

from __future__ import annotations

import csv
import re
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import yaml

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.experiments.results import Results
from fedkdx_plugin.reports import comparison_table, content, report, statistics, tables
from fedkdx_plugin.reports.looks import Looks
from fedkdx_plugin.reports.tables import Cell, Table
from fedkdx_plugin.results import runs
from fedkdx_plugin.results.runs import Missing, read
from fedkdx_plugin.tracking import tensorboard
from fedkdx_plugin.tracking.callbacks import RunInfo
from fedkdx_plugin.tracking.trackers import trackers
from registry import catalog
from tests.fedkdx_plugin import made_runs
from tests.fedkdx_plugin.made_runs import CLASSES, client_accuracy, column, last_accuracy, make_run, sections_of

# all figures of each of the paper's tables 1 to 4 together, added up from the paper itself
SUMS = {1: 7319.36, 2: 3459.48, 3: 7762.64, 4: 7784.29}
DATA = ("UCI-HAR", "SLEEP", "PAMAP2")


# ---- tables


def test_results_are_those_of_the_files(tmp_path):
    folders = {
        (name, seed): make_run(tmp_path / f"{name}-{seed}", name, seed, skill)
        for name, skill in (("Local", 0.3), ("FedAvg", 0.6), ("FedKDX", 1.2))
        for seed in (0, 1, 2)
    }
    (section,) = sections_of(*folders.values())
    table = content.results(section)
    for name in ("Local", "FedAvg", "FedKDX"):
        values = [last_accuracy(folders[name, seed]) for seed in (0, 1, 2)]
        cell = column(table, "accuracy %", "last round")[name]
        assert cell.value == pytest.approx(np.mean(values), rel=1e-12)
        assert cell.std == pytest.approx(np.std(values, ddof=1), rel=1e-9)
        assert cell.text == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        assert column(table, "seeds")[name].text == "3"
        assert column(table, "MB down", "whole run")[name].value == pytest.approx(6)
    assert [column(table, "accuracy %", "last round")[n].rank for n in ("Local", "FedAvg", "FedKDX")] == [0, 2, 1]


def test_flags_keep_their_hyphens_in_latex():
    table = Table("t", "Given by --split.", [("", "a"), ("", "b")], [[Cell("--train-fraction"), Cell("1 – 2 --- x")]])
    text = tables.latex(table)
    assert r"\caption{Given by -{}-split.}" in text
    assert (
        r"-{}-train-fraction & 1 -- 2 -{}-{}- x \\" in text
    )  # LaTeX sets -- as an en dash, as is meant between 1 and 2


def test_best_round_is_the_best_of_each_seed(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed, skill=0.0, global_rounds=6) for seed in (0, 1)]
    best = []
    for folder in folders:
        with h5py.File(folder / "results.h5") as file:
            best.append(file["views/served/accuracy"][:])
    assert any(rounds.argmax() < 5 for rounds in best)
    (section,) = sections_of(*folders)
    table = content.results(section)
    assert column(table, "accuracy %", "best round")["FedAvg"].value == pytest.approx(
        100 * np.mean([b.max() for b in best])
    )
    assert column(table, "number", "best round")["FedAvg"].value == pytest.approx(
        np.mean([b.argmax() + 1 for b in best])
    )


def test_a_network_that_once_equals_the_method_counts_in_every_seed(tmp_path):
    same = make_run(tmp_path / "0", "FedKDX", 0, views=("served", "teacher"))
    with h5py.File(same / "results.h5", "a") as file:
        del file["views/teacher"]
        file.copy("views/served", "views/teacher")
    other = make_run(tmp_path / "1", "FedKDX", 1, views=("served", "teacher"))
    (section,) = sections_of(same, other)
    table = content.results(section)
    cell = column(table, "accuracy %", "last round")["FedKDX (teacher)"]
    assert cell.value == pytest.approx((last_accuracy(same) + last_accuracy(other, "teacher")) / 2)
    assert cell.rank == 0


def test_the_ceiling_is_not_ranked(tmp_path):
    folders = [make_run(tmp_path / n, n, skill=s) for n, s in (("Centralised", 3), ("FedAvg", 0.5), ("Local", 0.1))]
    (section,) = sections_of(*folders)
    ranks = {name: cell.rank for name, cell in column(content.results(section), "accuracy %", "last round").items()}
    assert ranks == {"Centralised": 0, "FedAvg": 1, "Local": 2}


def test_rejected_replies_have_a_column_where_there_are_any(tmp_path):
    (section,) = sections_of(make_run(tmp_path / "0", damaged=True), make_run(tmp_path / "1", seed=1))
    assert column(content.results(section), "rejected", "whole run")["FedAvg"].value == 0.5
    (section,) = sections_of(make_run(tmp_path / "2"))
    assert ("whole run", "rejected") not in content.results(section).columns


def test_targets_are_met_in_the_first_round_that_reaches_them(tmp_path):
    folder = make_run(tmp_path / "0", skill=1.5, global_rounds=4)
    with h5py.File(folder / "results.h5") as file:
        accuracy = file["views/served/accuracy"][:]
    (section,) = sections_of(folder, make_run(tmp_path / "1", "Local", skill=0.0, global_rounds=4))
    first = int(np.flatnonzero(accuracy >= 0.95)[0]) + 1
    table = content.reaching(section)
    assert column(table, "rounds", "95 %")["FedAvg"].value == first
    assert column(table, "MB", "95 %")["FedAvg"].value == pytest.approx(3 * first)
    assert column(table, "rounds", "95 %")["Local"].text == "–"
    run = section.methods[0].runs[0]
    assert statistics.reached(run, accuracy.max() + 1e-9) is None
    assert statistics.reached(run, accuracy[1]) == (2, 6.0)


@pytest.mark.parametrize(
    ("bests", "expected"),
    [
        ({"FedAvg": [0.42, 0.36], "Local": [0.3]}, {"20 %": 0.2, "30 %": 0.3, "40 %": 0.4, "": 0.99 * 0.39}),
        ({"FedKDX": [0.951]}, {"80 %": 0.8, "90 %": 0.9, "95 %": 0.95}),
        ({"Local": [1.0]}, {"95 %": 0.95, "98 %": 0.98, "99 %": 0.99}),
        ({"FedAvg": [0.15, 0.15], "Local": [0.16]}, {"": 0.99 * 0.15}),
        ({"FedAvg": [0.2], "Local": [0.1]}, {"20 %": 0.2, "": 0.99 * 0.2}),  # and no 10 %, which is chance
        ({"FedAvg": [0.1], "Local": [0.1]}, {}),
    ],
)
def test_targets_fit_what_was_reached_and_are_above_chance(monkeypatch, bests, expected):
    methods = [SimpleNamespace(name=name, runs=[(1, best) for best in values]) for name, values in bests.items()]
    monkeypatch.setattr(statistics, "best_round", lambda run: run)
    monkeypatch.setattr(statistics, "chance", lambda run: 0.1)
    found = statistics.targets(SimpleNamespace(methods=methods))
    assert {name.partition("99 % of FedAvg")[0]: value for name, value in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([[3, 1], [0, 4]], 5 / 8),  # by client and class: 3 of the first, 5 of the second
        ([[2, 2], [2, 2]], 1 / 2),
        ([[0, 0], [0, 0]], 1 / 2),
    ],
)
def test_chance_is_the_share_of_the_largest_class(windows, expected):
    always_the_first = np.zeros((2, 2, 2), dtype=int)  # (clients, true, predicted)
    always_the_first[:, :, 0] = windows
    assert statistics.chance(SimpleNamespace(confusion={"served": always_the_first})) == expected


def test_a_method_looks_the_same_in_every_report():
    algorithms = list(catalog.BUILT_IN["algorithms"])
    everything = Looks(algorithms)
    seen = {(everything.colour(name), everything.line(name)["linestyle"]) for name in algorithms}
    assert len(seen) == len(algorithms)
    few = Looks(["FedKDX tau 2", "FedRoD", "FedAvg", "somebody's"])
    assert few.line("FedRoD") == everything.line("FedRoD") and few.line("FedAvg") == everything.line("FedAvg")
    assert few.line("FedKDX tau 2") == Looks(["FedKDX tau 2"]).line("FedKDX tau 2")
    crowd = Looks([f"variant {number}" for number in range(100)])
    assert len({(crowd.colour(f"variant {n}"), crowd.line(f"variant {n}")["linestyle"]) for n in range(48)}) == 48


def test_clients_table_names_the_worst(tmp_path):
    folders = [make_run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    mean = np.mean([client_accuracy(folder) for folder in folders], axis=0)
    (section,) = sections_of(*folders)
    table = content.clients(section)
    assert column(table, "lowest")["FedAvg"].value == pytest.approx(100 * mean.min())
    assert column(table, "lowest is client")["FedAvg"].value == mean.argmin()


# ---- sections


def test_settings_make_sections_and_name_them(tmp_path):
    folders = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", "Local", 1),
        make_run(tmp_path / "c", split="shuffled"),
        make_run(tmp_path / "d", partition="dirichlet"),
        make_run(tmp_path / "e", late="0.3@2"),
        make_run(tmp_path / "f", out="elsewhere", device="cpu", preset="tuned"),
    ]
    sections = sections_of(*folders)
    titles = ["made", "made, shuffled split", "made, dirichlet, α 0.1", "made, late 0.3@2"]
    assert [section.title for section in sections] == titles
    assert [method.name for method in sections[0].methods] == ["FedAvg", "Local"]
    # f is a again: nothing that changes its result differs
    twice = f"FedAvg seed 0 exists twice; {tmp_path / 'a'} is used, {tmp_path / 'f'} left out."
    assert sections[0].notes == (twice,)


def test_other_data_of_the_same_name_are_not_mixed(tmp_path):
    folders = [make_run(tmp_path / c, data={"manifest_sha256": c * 64}) for c in "ab"]
    sections = sections_of(*folders)
    assert [section.title for section in sections] == ["made, data aaaaaaaa", "made, data bbbbbbbb"]
    assert "not mixed" in sections[0].notes[0]


def test_labels_and_hyper_parameters_tell_methods_apart(tmp_path):
    folders = [
        make_run(tmp_path / "a", "FedKDX", hyper={"gamma": 0.5, "tau": 1}),
        make_run(tmp_path / "b", "FedKDX", hyper={"gamma": 0.9, "tau": 1}),
        make_run(tmp_path / "c", "FedKDX", label="+NKD"),
    ]
    (section,) = sections_of(*folders)
    assert [m.name for m in section.methods] == ["FedKDX gamma=0.5", "FedKDX gamma=0.9", "FedKDX +NKD"]


# ---- the paper


def test_the_papers_figures_stand_beside(tmp_path):
    folder = make_run(tmp_path / "a", "FedKDX", data={"name": "UCI-HAR"}, split="shuffled", global_rounds=2)
    (section,) = sections_of(folder)
    table = content.paper(section)
    assert [row[1].text for row in table.rows] == ["1", "3"]
    assert column(table, "paper", "F1 %")["FedKDX"].value == 89.83  # of the last row, table 3
    assert table.rows[0][3].text == "94.54"
    assert table.rows[0][4].value == pytest.approx(last_accuracy(folder) - 94.54)
    assert table.rows[1][-1].text == "630" and "500 rounds, these after 2" in table.caption


@pytest.mark.parametrize("other", [{"partition": "iid"}, {"split": "blocked"}, {"late": "0.3@2"}, {"model": "mine"}])
def test_no_figures_of_the_paper_for_another_setting(tmp_path, other):
    config = {"split": "shuffled"} | other
    (section,) = sections_of(make_run(tmp_path / "a", "FedKDX", data={"name": "UCI-HAR"}, **config))
    assert content.paper(section) is None


def test_the_papers_numbers_are_whole():
    entries = yaml.safe_load(content.PAPER.read_text(encoding="utf-8"))
    numbers = [entry[data] for entry in entries for data in DATA]
    assert len(numbers) == 3 * (7 + 3 + 7 + 7) and all(len(n) == 4 and 50 < min(n) < max(n) < 100 for n in numbers)
    for table, total in SUMS.items():
        own = [sum(entry[data]) for entry in entries for data in DATA if entry["table"] == table]
        assert sum(own) == pytest.approx(total, abs=1e-6)


def test_figures_of_the_paper_stand_beside_its_own_method_alone(tmp_path):
    config = {"split": "shuffled", "global_rounds": 2, "data": {"name": "UCI-HAR"}}
    folders = [make_run(tmp_path / name, name, **config) for name in ("FedKDX", "FedKDX+", "FedKD+")]
    (section,) = sections_of(*folders)
    table = content.paper(section)
    assert {row[0].text for row in table.rows} == {"FedKDX"}


# ---- files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a report of two sections with an awkward label, an unfinished, a failed and a missing run."""
    root = tmp_path_factory.mktemp("report")
    place = root / "runs"
    for seed in (0, 1):
        make_run(place / "x" / f"FedKDX-{seed}", "FedKDX", seed, 1.2, server=True, views=("served", "student"))
        make_run(place / "x" / f"Local-{seed}", "Local", seed, 0.4)
    make_run(place / "x" / "odd", "FedKDX", 0, label="<i>a_b</i> & 50 % ~ε")
    make_run(place / "y" / "FedAvg-0", "FedAvg", 0, data={"evaluated_on": "validation"}, join_ratio=0.8)
    make_run(place / "x" / "late", "MOON", 0, done=2)
    (place / "x" / "broken").mkdir()
    (place / "x" / "broken" / "failed.txt").write_text("ValueError: <boom>\nTraceback\n")
    folders = [*runs.find(place), place / "x" / "never"]
    return report.write(folders, root / "out", "A <title> & more", "What it is for.").parent


def test_the_page_is_self_contained(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=\"(?!data:|#)", page)
    assert page.count('src="data:image/png;base64,') == 5 + 6
    assert page.count("<section") == page.count("</section>") == 3


def test_the_page_says_who_has_no_results_and_counts_them_not(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    for line in ("x/broken</code>: failed: ValueError: &lt;boom&gt;", "x/late</code>: unfinished: 2 of 3 rounds"):
        assert line in page
    assert "x/never</code>: not begun" in page
    assert not any("MOON" in path.read_text(encoding="utf-8") for path in written.glob("tables/*"))


def test_names_are_escaped_everywhere(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert "<i>" not in page and "FedKDX &lt;i&gt;a_b&lt;/i&gt; &amp; 50 % ~ε" in page
    assert "<title>A &lt;title&gt; &amp; more</title>" in page
    assert "<fast>" not in page and "run &lt;fast&gt;" in page  # a class
    text = (written / "report.md").read_text(encoding="utf-8")
    assert r"FedKDX \<i\>a\_b\</i\> & 50 % \~ε" in text
    (latex,) = (path.read_text(encoding="utf-8") for path in written.glob("tables/made-join-ratio-0.4-results.tex"))
    assert r"FedKDX $<$i$>$a\_b$<$/i$>$ \& 50 \% \textasciitilde{}$\varepsilon$" in latex
    assert latex.count(r"\\") == 2 + 4 and r"\toprule" in latex and r"\multicolumn{5}{c}{last round}" in latex


def test_validation_is_said_loudly(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count('class="warning"') == 2 and "Measured on validation windows" in page


def test_every_table_and_figure_is_a_file(written):
    names = {path.stem for path in written.glob("tables/*.csv")}
    assert names == {path.stem for path in written.glob("tables/*.tex")} and "overview" in names
    pictures = {path.stem for path in written.glob("figures/*.png")}
    assert pictures == {path.stem for path in written.glob("figures/*.pdf")}
    own = ("convergence", "loss", "clients", "confusion", "compression", "seconds")
    assert {f"made-join-ratio-0.4-{kind}" for kind in own} <= pictures
    rows = list(csv.DictReader((written / "tables" / "made-join-ratio-0.4-results.csv").open(encoding="utf-8")))
    assert [row["method"] for row in rows][:2] == ["FedKDX", "FedKDX (student)"]
    assert float(rows[0]["last round accuracy % std"]) >= 0


def test_long_class_names_are_not_clipped(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from fedkdx_plugin.reports import plots

    names = ("W" * 30, "ascending the stairs with a heavy bag in the left hand, slowly", "costs $5 or $10")
    monkeypatch.setattr(made_runs, "CLASSES", names)
    (section,) = sections_of(make_run(tmp_path / "run"))
    with plots.style():
        figure, _ = plots.confusion(section, section.methods, None)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        axes = figure.axes[0]
        labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    assert [label.get_text() for label in labels[:3]] == [
        "W" * 30,
        "ascending the stairs…e left hand, slowly",
        r"costs \$5 or \$10",
    ]
    width, height = figure.get_size_inches() * figure.dpi
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height
    assert axes.get_window_extent().width > 1.2 * figure.dpi  # and the matrix keeps its size


def test_each_run_says_where_it_comes_from(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    assert page.count("<dt>command</dt>") == 6 and "fedkdx -algo Local" in page and "0" * 64 in page
    assert "No manifest of these runs&#39; data is left in" in page and "or /nowhere, so" in page


def test_classes_are_drawn_where_the_data_are_unchanged(shard_folder, tmp_path):
    import hashlib

    code = hashlib.sha256((shard_folder / "manifest.json").read_bytes()).hexdigest()
    right = {"folder": str(shard_folder), "manifest_sha256": code}
    (section,) = sections_of(make_run(tmp_path / "a", data=right))
    assert report._classes(section, tmp_path).name == "made-classes" and (tmp_path / "made-classes.pdf").exists()
    (section,) = sections_of(make_run(tmp_path / "b", data=right | {"manifest_sha256": "1" * 64}))
    assert "No manifest of these runs' data is left" in report._classes(section, tmp_path)


def test_a_comparison_leaves_the_field_of_a_missing_number_empty(tmp_path, monkeypatch):
    table = [comparison_table.Row("FedAvg", 0, {"accuracy": 0.5, "auc": float("nan")})]
    monkeypatch.setattr(comparison_table, "of_seeds", lambda runs: table)
    (section,) = sections_of(make_run(tmp_path / "0"))
    assert " – |" in comparison_table.write(tmp_path, section.methods[0].runs, "training")
    text = (tmp_path / "comparison.csv").read_text(encoding="utf-8")
    assert text == "algorithm,seed,evaluated on,accuracy,auc\nFedAvg,0,test,0.5,\n"


def test_markdown_and_csv_of_a_small_table():
    rows = [[Cell("a|b"), Cell("1.00 ± 0.50", 1.0, 0.5, rank=1)], [Cell("c"), Cell("–")]]
    table = Table("t", "T", [("", "name"), ("last", "x %")], rows)
    assert tables.markdown(table) == (
        "| name |        last x % |\n"
        "| ---- | --------------: |\n"
        "| a\\|b | **1.00 ± 0.50** |\n"
        "| c    |               – |\n"
    )
    assert tables.to_csv(table) == "name,last x %,last x % std\na|b,1.0,0.5\nc,,\n"


def test_what_reads_the_same_ranks_the_same():
    cells = [Cell(f"{v:.2f}", v) for v in (1.001, 1.004, 0.5, 2.0)]
    assert [cell.rank for cell in tables.ranked(cells, range(4))] == [2, 2, 0, 1]
    assert [cell.rank for cell in tables.ranked(cells, [3])] == [0, 0, 0, 0]


# ---- wrong input


def said(capsys, *arguments):
    assert main(["--report", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_report_of_other_references(tmp_path, capsys):
    for name in ("FedAvg", "FedKDX", "Local"):
        make_run(tmp_path / "runs" / name, name)
    line = said(capsys, tmp_path / "runs", "--reference", "FedAvg,Lcal")
    assert line.endswith(" --reference: no run is of 'Lcal' (did you mean Local?); there are FedAvg, FedKDX, Local")
    assert "--reference: no name given" in said(capsys, tmp_path / "runs", "--reference", ",")
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "runs"), "-o", str(out), "--reference", "FedAvg, local"]) == 0
    made = {path.stem for path in (out / "tables").glob("*.csv")}
    assert {name for name in made if "-differences-" in name} == {f"made-differences-{n}" for n in ("FedAvg", "Local")}


def test_a_report_of_other_references_in_python(tmp_path):
    for name in ("FedAvg", "FedKDX", "Local"):
        make_run(tmp_path / "runs" / name, name)
    results = Results.load(tmp_path / "runs")
    for place, reference, named in (("a", "Local", ["Local"]), ("b", ["Local", "FedAvg"], ["FedAvg", "Local"])):
        folder = results.report(tmp_path / place, reference=reference).parent / "tables"
        assert sorted(path.stem for path in folder.glob("*-differences-*.csv")) == [
            f"made-differences-{name}" for name in named
        ]


def test_runs_are_found_behind_links_and_count_once(tmp_path):
    make_run(tmp_path / "here" / "a")
    (tmp_path / "chosen").mkdir()
    (tmp_path / "chosen" / "one").symlink_to(tmp_path / "here" / "a", target_is_directory=True)
    (found,) = runs.find(tmp_path / "chosen")
    (run,), _ = runs.read_all([found, tmp_path / "here" / "a"])
    assert run.seed == 0


def test_no_folder_no_run_no_place(tmp_path, capsys):
    assert "no such folder" in said(capsys, tmp_path / "nowhere")
    assert "holds no run" in said(capsys, tmp_path)
    assert "-o DIR" in said(capsys, tmp_path, tmp_path)
    assert "unrecognized arguments: -data SPAR" in said(capsys, tmp_path, "-data", "SPAR")


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("results.h5", "nonsense", "damaged"),
        ("config.yaml", "algorithm: [FedAvg]\nseed: 0\nmodel: cnn", "'global_rounds' is missing"),
        ("config.yaml", "{", "not the configuration"),
        ("environment.json", "{}", "'data' is missing"),
        ("environment.json", "[", "not the environment"),
    ],
)
def test_damaged_files(tmp_path, capsys, file, text, expected):
    folder = make_run(tmp_path / "run")
    (folder / file).write_text(text)
    line = said(capsys, tmp_path)
    assert expected in line and str(folder / file) in line


def test_a_figure_that_older_runs_lack(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    with h5py.File(folder / "results.h5", "a") as file:
        del file["views/served/client_auc_macro"]
    line = said(capsys, tmp_path)
    assert "client_auc_macro" in line and "run it again" in line


def test_results_cut_short(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    content = (folder / "results.h5").read_bytes()
    (folder / "results.h5").write_bytes(content[: len(content) // 2])
    assert "damaged" in said(capsys, tmp_path)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_missing_packages_are_named(tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    make_run(tmp_path / "run")
    assert "pip install jinja2 matplotlib" in said(capsys, tmp_path)


def test_tensorboard_holds_the_figures_of_every_round(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = read(make_run(tmp_path / "run", "FedKDX", views=("served", "student"), server=True))
    (board,), info = trackers(["tensorboard"]), RunInfo("FedKDX", "FedKDX", tmp_path, run.config)
    board.on_run_start(info)
    for record in run.records:
        board.on_round_end(info, record)
    board.on_run_end(info, None)
    events = accumulator.EventAccumulator(str(tmp_path / tensorboard.FOLDER))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("student/accuracy")]
    assert scalars == [(r.round, pytest.approx(r.metrics["student"].accuracy)) for r in run.records]
    assert {"train_loss", "bytes/up", "seconds/train", "server/epsilon", "served/f1"} <= set(events.Tags()["scalars"])


def test_tensorboard_missing_is_said_before_anything_runs(shard_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    out = tmp_path / "runs"
    assert main(["-data", str(shard_folder), "-algo", "Local", "--tensorboard", "-o", str(out)]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not out.exists()


def test_without_results_yet(tmp_path):
    folder = make_run(tmp_path / "x" / "run")
    (folder / "results.h5").unlink()
    (folder / "metrics.csv").write_text("round,accuracy\n1,0.5\n")
    assert read(folder) == Missing("x/run", "unfinished: 1 of 3 rounds", folder)


def test_classes_of_the_made_runs_are_read(tmp_path):
    assert read(make_run(tmp_path / "run")).classes == CLASSES
