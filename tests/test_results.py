"""The results' pages: rows from runs, tables from rows, and pages that hold what the tables give."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from registry.errors import UserError
from tests.fedkdx_plugin.made_runs import client_accuracy, last_accuracy, make_run

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "results"
# Pages whose tables were made before there were CSV files. A page is taken off when its tables are made from them.
OLDER = {"README.md", "audit.md", "privacy.md", "robustness.md", "settings.md", "tuning.md"}


def load_make():
    spec = importlib.util.spec_from_file_location("results_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()
csv_tables = make.csv_tables


def row(algorithm: str, accuracy: float, seed: int = 0, clients: list[float] | None = None, **given: object) -> dict:
    """Return a row of a CSV file; the clients have the accuracy of all, unless they are given."""
    clients = clients or [accuracy] * 6
    values = dict.fromkeys(csv_tables.COLUMNS, "") | {
        "data": "UCI-HAR",
        "setting": "tenth",
        "model": "cnn",
        "algorithm": algorithm,
        "learning_rate": "0.01",
        "seed": seed,
        "data_seed": seed,
        "rounds": 100,
        "evaluated_on": "test",
        "accuracy": accuracy,
        "pooled": accuracy,
        "client_accuracy": ";".join(map(str, clients)),
        "names": ";".join(map(str, range(1, len(clients) + 1))),
    }
    return {key: str(value) for key, value in (values | given).items()}


def write(path: Path, rows: list[dict]) -> None:
    csv_tables.pd.DataFrame(rows, columns=csv_tables.COLUMNS).to_csv(path, index=False)


def cells(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without the rule below the heads."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return [lines[0], *lines[2:]]


@pytest.fixture
def table(tmp_path):
    """Make a table of rows, by its order without `from`."""

    def made(order: str, rows: list[dict]) -> list[list[str]]:
        write(tmp_path / "made.csv", rows)
        kind, _, rest = order.partition(" ")
        return cells(csv_tables.make(f"{kind} from=made {rest}", tmp_path))

    return made


def test_methods_by_settings(table):
    rows = [
        *(row("Local", value, seed) for seed, value in enumerate((0.80, 0.82))),  # 81, deviation √2
        *(row("FedAvg", 0.9, seed) for seed in (0, 1)),
        row("MOON", 0.85),  # of one setting, so without a mean rank
        row("Centralised", 0.95),
        *(row(name, 0.7, setting="blocked") for name in ("Local", "FedAvg", "Centralised")),  # a tie: ranks of 1.5
    ]
    assert table("settings setting=tenth,blocked", rows) == [
        ["method", "tenth", "blocked", "mean rank", "seeds"],
        ["FedAvg", "**90.00 ± 0.00**", "**70.00**", "1.25", "1 to 2"],
        ["Local", "81.00 ± 1.41", "**70.00**", "1.75", "1 to 2"],
        ["MOON", "*85.00*", "–", "–", "1"],
        ["Centralised", "95.00", "70.00", "–", "1"],
    ]


def test_clients_set_apart_have_a_column_that_is_not_ranked_over(table):
    rows = [
        row("Local", 0.8, setting="late", groups="late=0.5/0.6"),
        row("FedAvg", 0.7, setting="late", groups="late=0.9/0.8"),
    ]
    assert table("settings metric=pooled", rows) == [
        ["method", "late", "late: late clients", "mean rank", "seeds"],
        ["FedAvg", "*70.00*", "**80.00**", "2.00", "1"],
        ["Local", "**80.00**", "*60.00*", "1.00", "1"],
    ]


def test_several_data_sets_are_columns(table):
    rows = [row("Local", 0.8), row("Local", 0.9, data="SLEEP")]
    assert table("settings data=UCI-HAR,SLEEP", rows)[0] == ["method", "UCI-HAR tenth", "SLEEP tenth", "seeds"]


def test_detail(table):
    more = {"pooled": 0.75, "f1": 0.7, "worst": 0.5, "mb_up": 12.34, "mb_down": 100, "networks": "student=0.9/0.88"}
    rows = [row("FedKD", 0.8, **more), row("Local", 0.6, f1=0.5, worst=0.4, mb_up=0, mb_down=0)]
    assert table("detail", rows) == [
        ["method", "accuracy %", "pooled %", "F1 %", "worst client %", "MB up", "MB down", "seeds"],
        ["FedKD", "**80.00**", "**75.00**", "**70.00**", "**50.00**", "12.3", "100.0", "1"],
        ["FedKD (student)", "90.00", "88.00", "–", "–", "–", "–", "–"],
        ["Local", "*60.00*", "*60.00*", "*50.00*", "*40.00*", "0.0", "0.0", "1"],
    ]


def compared(name: str, differences: list[list[float]], **given: object) -> list[dict]:
    """Return rows of FedKDX at 0.5 and of another method, so many points below it by seed and client."""
    rows = []
    for seed, points in enumerate(differences):
        below = [round(0.5 - 0.01 * value, 4) for value in points]
        rows += [row("FedKDX", 0.5, seed, [0.5] * len(points), **given)]
        rows += [row(name, round(float(np.mean(below)), 5), seed, below, **given)]
    return rows


UP = [1, 2, 3, 4, 5, 6]  # all of six pairs differ one way: p = 2 / 2^6


def test_better_in_the_mean_in_every_seed_and_by_the_test(table):
    assert table("claims reference=FedKDX", compared("FedAvg", [UP, [0.5 * v for v in UP]])) == [
        ["data", "setting", "FedKDX against", "difference", "of seeds", "better in", "pairs", "p", "verdict"],
        ["UCI-HAR", "tenth", "FedAvg", "+2.62", "+1.75 to +3.50", "2 of 2", "6", "0.031", "better"],
    ]


@pytest.mark.parametrize(
    ("differences", "p", "verdict"),
    [
        ([[-v for v in UP]] * 2, "0.031", "worse"),
        ([UP], "0.031", "one seed"),
        # ranks 6 against 15: of all 64 sums of ranks 1 to 6, 14 are at most 6, so p = 28 / 64
        ([[6, 5, 4, 3, 2, -10]] * 2, "0.438", "not told apart"),
        ([[3 * v for v in UP], [-v for v in UP]], "0.031", "not told apart"),  # the second seed is worse
        ([[0] * 6] * 2, "1.000", "not told apart"),
    ],
)
def test_no_claim_without_all_three(table, differences, p, verdict):
    (line,) = table("claims reference=FedKDX", compared("FedAvg", differences))[1:]
    assert line[-2:] == [p, verdict]


def test_p_is_corrected_for_all_of_a_table(table):
    eight = [1, 2, 3, 4, 5, 6, 7, 8]  # p = 2 / 2^8, times 2; then 2 / 2^6 of the six of UCI-HAR, times 1
    rows = [*compared("FedAvg", [UP, UP]), *compared("FedAvg", [eight, eight], data="SLEEP")]
    lines = table("claims reference=FedKDX", rows)[1:]
    assert [line[0] for line in lines] == ["SLEEP", "UCI-HAR"]
    assert [line[-2:] for line in lines] == [["0.016", "better"], ["0.031", "better"]]
    rows += compared("FedAvg", [UP, UP], setting="blocked")  # three: 2 / 2^6 times 2
    assert [line[-2] for line in table("claims reference=FedKDX", rows)[1:]] == ["0.023", "0.062", "0.062"]


def test_clients_that_differ_between_seeds_are_no_pairs(table):
    given = {"names": "", "setting": "Dirichlet 0.1"}
    (line,) = table("claims reference=FedKDX", compared("FedAvg", [UP, UP], **given))[1:]
    assert line[-3:] == ["2", "–", "not told apart"]
    (line,) = table("claims reference=FedKDX", compared("FedAvg", [UP, UP], data_seed=0, **given))[1:]
    assert line[-3:] == ["6", "0.031", "better"]  # one partition for both seeds


def test_only_seeds_that_both_have_are_compared(table):
    rows = [*compared("FedAvg", [UP, UP]), row("FedAvg", 0.99, seed=2)]
    assert table("claims reference=FedKDX", rows)[1][3:6] == ["+3.50", "+3.50 to +3.50", "2 of 2"]


def test_search_takes_the_best_mean_over_data_sets(table):
    def both(label: str, one: float, other: float) -> list[dict]:
        given = {"label": label, "evaluated_on": "validation"}
        return [row("FedProx", one, **given), row("FedProx", other, data="SLEEP", **given)]

    rows = [*both("defaults", 0.7, 0.8), *both("mu=0.1", 0.9, 0.5), *both("mu=0.3", 0.8, 0.78)]  # 75, 70 and 79
    assert table("search", rows)[1:] == [["FedProx", "3", "mu=0.3", "79.00", "75.00"]]
    rows += both("mu=0", 0.79, 0.79)[:1]
    with pytest.raises(UserError, match="FedProx: not all candidates have run in all settings"):
        table("search", rows)


def test_of_equal_candidates_the_defaults_are_taken(table):
    rows = [row("FedProx", 0.7, label=label, evaluated_on="validation") for label in ("a=1", "defaults", "z=1")]
    assert table("search", rows)[1][2] == "defaults"


def test_ours_beside_the_papers(table):
    given = {"setting": "all", "auc": 0.99, "f1": 0.94, "recall": 0.93}
    rows = [
        row("FedKDX", 0.95, **given),
        row("FedKDX", 0.6, label="mine", **given),
        row("FedKDX", 0.7, setting="tenth"),
    ]
    first, *lines = table("paper setting=all", rows)
    assert first[4:7] == ["accuracy here", "accuracy paper", "accuracy difference"]
    assert [line[:7] for line in lines] == [  # 94.54 and 90.80 in its tables, for the same options
        ["FedKDX", "1", "0.4", "100", "95.00", "94.54", "+0.46"],
        ["FedKDX", "3", "0.4", "100", "95.00", "90.80", "+4.20"],
    ]
    rows = [row("FedKDX", 0.8, options="join_ratio=0.2", **given)]
    assert table("paper", rows)[1][:7] == ["FedKDX", "3", "0.2", "100", "80.00", "78.23", "+1.77"]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("plot", "no kind 'plot'"),
        ("settings UCI-HAR", "'UCI-HAR' is not KEY=VALUE"),
        ("settings sets=1", "no column 'sets'"),
        ("settings model=mlp", "no run with model=mlp"),
        ("settings metric=speed", "metric=speed: there are accuracy,"),
        ("detail", "several data: pick one, such as data='SLEEP'"),
        ("claims reference=Mine", "reference='Mine': no such method"),
        ("search", "no run that it could be of"),
    ],
)
def test_an_order_that_cannot_be_met_is_told(table, order, message):
    with pytest.raises(UserError, match=message):
        table(order, [row("Local", 0.8), row("Local", 0.8, data="SLEEP")])


def test_runs_that_do_not_go_together_are_not_mixed(table):
    for given, message in (
        ({"rounds": 50}, "tenth: several rounds: '100' and '50'"),
        ({"options": "aggregate=median"}, "tenth: several options: '' and 'aggregate=median'"),
        ({"hyper": "mu=1"}, "tenth, FedProx: several hyper: '' and 'mu=1'"),
    ):
        with pytest.raises(UserError, match=message):
            table("settings", [row("FedProx", 0.8), row("FedProx", 0.8, seed=1, **given)])


def test_rows_are_written_once_in_an_order_of_their_own(tmp_path):
    rows = [row("Local", 0.8, seed) for seed in (10, 9)] + [row("FedAvg", 0.7)]
    frame = csv_tables.pd.DataFrame(rows, columns=csv_tables.COLUMNS)
    once = csv_tables.merged([frame, frame.iloc[::-1]], "x.csv")
    assert list(zip(once["algorithm"], once["seed"], strict=True)) == [("FedAvg", "0"), ("Local", "9"), ("Local", "10")]


def runs_in(folder: Path) -> Path:
    """Make two finished runs and an unfinished one."""
    make_run(folder / "one" / "FedKDX", "FedKDX", views=("served", "teacher", "student"), train_fraction=0.1)
    make_run(folder / "one" / "FedProx", "FedProx", hyper={"mu": 0.5}, groups={"late": [1, 3]}, late="0.3@1")
    make_run(folder / "one" / "Local", "Local", done=1)
    return folder


def test_collect_reads_what_the_run_folders_hold(tmp_path, capsys):
    folder, path = runs_in(tmp_path / "runs"), tmp_path / "data" / "survey.csv"
    said = make.collect([folder], path, "0123abc")
    assert said == "survey.csv: 2 runs added (0 there already, 1 unfinished or failed left out), 2 in all"
    rows = csv_tables.read(path).set_index("algorithm").to_dict("index")
    mine = rows["FedKDX"]
    own = client_accuracy(folder / "one" / "FedKDX")
    assert 100 * float(mine["pooled"]) == pytest.approx(last_accuracy(folder / "one" / "FedKDX"), abs=0.001)
    assert float(mine["accuracy"]) == pytest.approx(own.mean(), abs=0.00001)
    assert [float(text) for text in mine["client_accuracy"].split(";")] == pytest.approx(own, abs=0.0001)
    assert float(mine["worst"]) == pytest.approx(own.min(), abs=0.00001)
    assert [name.split("=")[0] for name in mine["networks"].split(";")] == ["teacher", "student"]
    assert (mine["experiment"], mine["data"], mine["clients"], mine["names"]) == ("one", "made", "8", "")
    assert (mine["mb_up"], mine["mb_down"], mine["mb_first"], mine["commit"]) == ("3", "6", "1", "0123abc")
    other = rows["FedProx"]
    late = client_accuracy(folder / "one" / "FedProx")[[1, 3]].mean()  # as many windows each, so pooled is the same
    assert other["groups"] == f"late={make.short(late, 5)}/{make.short(late, 5)}"
    assert (other["hyper"], other["options"]) == ("mu=0.5", "late=0.3@1 split=blocked")
    assert mine["seconds"] == "11"  # 0.75 and the number of the round and 1, of three rounds: 11.25


def test_collecting_again_changes_nothing_and_other_numbers_are_refused(tmp_path):
    folder, path = runs_in(tmp_path / "runs"), tmp_path / "survey.csv"
    make.collect([folder], path, "0123abc")
    before = path.read_text()
    assert make.collect([folder], path).startswith("survey.csv: 0 runs added (2 there already")
    assert path.read_text() == before
    make_run(
        tmp_path / "again" / "FedKDX", "FedKDX", skill=2.0, views=("served", "teacher", "student"), train_fraction=0.1
    )
    make_run(tmp_path / "again" / "FedAvg", "FedAvg")
    with pytest.raises(UserError, match=r"FedKDX, made, .*, seed 0: accuracy is [\d.]+ \(commit 0123abc\) and [\d.]+"):
        make.collect([tmp_path / "again"], path)
    assert path.read_text() == before
    with pytest.raises(UserError, match="--commit main: write 7 to 40 hexadecimal digits"):
        make.collect([folder], path, "main")


def test_pooled_f1_and_balanced_accuracy():
    pairs = np.array(
        [[[5, 1, 0], [1, 4, 0], [0, 0, 0]], [[3, 1, 0], [2, 3, 0], [0, 0, 0]]]
    )  # 8 2, 3 7; a class nobody has
    run = SimpleNamespace(confusion={"served": pairs})
    f1, balanced = make.of_pairs(run, SimpleNamespace(nonfinite=0))
    assert f1 == pytest.approx((16 / 21 + 14 / 19) / 2)
    assert balanced == pytest.approx((0.8 + 0.7) / 2)
    assert np.isnan(make.of_pairs(run, SimpleNamespace(nonfinite=1))).all()


def test_clients_are_named_by_their_subjects(tmp_path):
    folder = make_run(tmp_path / "run", "FedAvg")
    (folder / "manifest.json").write_text(
        json.dumps({"clients": [{"subjects": {"7": {}}}, {"subjects": {"a": {}, "b": {}}}]})
    )
    run = SimpleNamespace(folder=folder, config={"partition": "subject"})
    assert make.names_of(run) == ["7", "a+b"]
    assert make.names_of(SimpleNamespace(folder=folder, config={"partition": "iid"})) == []


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "all"),
        ({"train_fraction": 0.1}, "tenth"),
        ({"train_fraction": 0.25, "split": "blocked", "aggregate": "median"}, "blocked"),
        ({"train_fraction": 0.1, "late": "0.3@50"}, "late"),
        ({"train_fraction": 0.1, "late": "0.3@20"}, "late=0.3@20 train_fraction=0.1"),
        ({"train_fraction": 0.1, "partition": "dirichlet", "alpha": 0.5}, "Dirichlet 0.5"),
        ({"train_fraction": 0.1, "split": "blocked"}, "split=blocked train_fraction=0.1"),
    ],
)
def test_settings_have_the_protocols_names(options, name):
    assert make.setting_of(options, rounds=100) == name


PAGE = "# Page\n\n<!-- table: settings from=made -->\n<!-- end -->\n\nText.\n"


def test_a_page_is_filled_and_a_digit_that_is_edited_is_found(tmp_path, capsys):
    write(tmp_path / "made.csv", [row("Local", 0.8), row("FedAvg", 0.9)])
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert make.fill([page], tmp_path, check=True) == 1
    assert page.read_text() == PAGE
    assert make.fill([page], tmp_path, check=False) == 0
    made = page.read_text()
    assert (
        "| **90.00** |" in made
        and made.startswith("# Page\n\n<!-- table: ")
        and made.endswith("<!-- end -->\n\nText.\n")
    )
    capsys.readouterr()
    assert make.fill([page], tmp_path, check=True) == 0
    assert capsys.readouterr().out == ""
    page.write_text(made.replace("90.00", "90.01"))
    assert make.fill([page], tmp_path, check=True) == 1
    assert capsys.readouterr().out == "page.md: differs from what the CSV files give; run make.py\n"


def test_a_wrong_block_is_told_with_its_page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(UserError, match=r"page.md: table 'settings from=made': .*made.csv: cannot be read"):
        make.fill([tmp_path / "page.md"], tmp_path, check=True)


def test_pages_with_tables_from_elsewhere_are_named():
    numbers, words = "| a | b |\n| --- | ---: |\n| c | 1 |\n", "| a | b |\n| --- | --- |\n| c | d |\n"
    assert make.without_source(numbers)
    assert not make.without_source(words)
    assert not make.without_source(f"<!-- table: settings from=made -->\n{numbers}<!-- end -->\n")
    assert not make.without_source(f"Tables of commit `0123abc`, made by `fedkdx experiment table1`.\n\n{numbers}")
    assert make.without_source(f"Made by `fedkdx experiment table1`.\n\n{numbers}")


def test_the_pages_hold_what_the_csv_files_give(capsys):
    assert make.main(["--check"]) == 0, capsys.readouterr().out
    named = {line.split(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert named <= OLDER


def test_wrong_input_is_told_in_one_line(tmp_path, capsys):
    assert make.main(["collect", str(tmp_path / "nowhere"), "--into", "survey"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "nowhere" in said
    assert make.main(["collect", str(tmp_path), "--into", "../survey"]) == 2
    assert "name a file of data/ without its ending" in capsys.readouterr().err
