"""The results' pages: tables from rows, and pages that hold what the tables give."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from registry.errors import UserError
from tests.made_rows import cells, csv_figure, csv_rows, csv_tables, make, row, write

# Pages whose tables were made before there were CSV files. A page is taken off when its tables are made from them.
OLDER = {"audit.md", "earlier.md", "privacy.md", "robustness.md", "settings.md", "tuning.md"}


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


def test_clients_set_apart_have_a_column_of_their_own(table):
    rows = [
        row("Local", 0.8, setting="late", groups="late=0.5/0.6"),
        row("FedAvg", 0.7, setting="late", groups="late=0.9/0.8"),
    ]
    assert table("settings metric=pooled", rows) == [
        ["method", "late", "late: late clients", "seeds"],
        ["FedAvg", "*70.00*", "**80.00**", "1"],
        ["Local", "**80.00**", "*60.00*", "1"],
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


def test_the_accuracy_of_tables_and_claims_is_that_of_all_windows_together(table):
    """Here it is above that of the mean over clients for one method, below for the other."""
    rows = [row("FedAvg", 0.6, clients=[0.5, 0.7] * 3, pooled=0.65), row("FedKDX", 0.7, clients=[0.7] * 6, pooled=0.62)]
    assert [line[1] for line in table("settings", rows)[1:]] == ["**65.00**", "*62.00*"]
    assert [line[1] for line in table("settings metric=accuracy", rows)[1:]] == ["*60.00*", "**70.00**"]
    assert table("claims reference=FedKDX", rows)[1][3] == "\N{MINUS SIGN}3.00"


def test_methods_are_in_the_order_of_their_mean_ranks_or_as_asked_for(table):
    values = {"FedAvg": (0.6, 0.7), "FedKDX": (0.8, 0.9), "MOON": (0.7, 0.6), "Centralised": (0.9, 0.95)}
    rows = [row(name, own[k], setting=s) for name, own in values.items() for k, s in enumerate(("tenth", "blocked"))]
    lines = table("settings", rows)[1:]
    # ranks 3 and 2, 1 and 1, 2 and 3
    assert [(line[0], line[3]) for line in lines] == [
        ("FedKDX", "1.00"), ("FedAvg", "2.50"), ("MOON", "2.50"), ("Centralised", "\N{EN DASH}"),
    ]  # fmt: skip
    asked = table("settings method=MOON,FedAvg,FedKDX", rows)[1:]
    assert [line[0] for line in asked] == ["MOON", "FedAvg", "FedKDX"]


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


def test_differences_of_many_methods_are_corrected_in_each_column(table):
    rows = [*compared("FedAvg", [UP, UP]), *compared("FedProx", [[-v for v in UP]] * 2), row("MOON", 0.5, seed=5)]
    own = [own for own in rows if own["algorithm"] != "FedKDX"] + compared("FedAvg", [UP, UP])[::2]
    sleep = compared("MOON", [[2 * v for v in UP]] * 2, data="SLEEP")  # alone in its column: 2 / 2^6
    assert table("against reference=FedKDX data=UCI-HAR,SLEEP method=MOON,FedProx,FedAvg,FedKDX", own + sleep) == [
        ["FedKDX against", "UCI-HAR tenth", "SLEEP tenth"],
        ["MOON", "–", "+7.00 better"],  # of UCI-HAR no seed that both have
        ["FedProx", "\N{MINUS SIGN}3.50", "–"],  # 2 / 2^6, times 2
        ["FedAvg", "+3.50", "–"],
    ]
    alone = compared("FedProx", [[-v for v in UP]] * 2)
    assert table("against reference=FedKDX", alone)[1] == ["FedProx", "\N{MINUS SIGN}3.50 worse"]


def test_clients_that_differ_between_seeds_are_no_pairs(table):
    given = {"names": "", "setting": "Dirichlet 0.1"}
    (line,) = table("claims reference=FedKDX", compared("FedAvg", [UP, UP], **given))[1:]
    assert line[-3:] == ["2", "–", "not told apart"]
    (line,) = table("claims reference=FedKDX", compared("FedAvg", [UP, UP], data_seed=0, **given))[1:]
    assert line[-3:] == ["6", "0.031", "better"]  # one partition for both seeds


def test_clients_of_several_subjects_are_no_pairs(table):
    """With `--split loso` the client tested on another subject is not the same with every seed: two seeds, no test."""
    (line,) = table("claims reference=FedKDX", compared("FedAvg", [UP, UP], names="1+2;3;4;5;6;7"))[1:]
    assert line[-3:] == ["2", "–", "not told apart"]
    six = [[value] * 6 for value in UP]  # six seeds, all better: p = 2 / 2^6
    (line,) = table("claims reference=FedKDX", compared("FedAvg", six, names="1+2;3;4;5;6;7"))[1:]
    assert line[-3:] == ["6", "0.031", "better"]


def test_only_seeds_that_both_have_are_compared(table):
    rows = [*compared("FedAvg", [UP, UP]), row("FedAvg", 0.99, seed=2)]
    assert table("claims reference=FedKDX", rows)[1][3:6] == ["+3.50", "+3.50 to +3.50", "2 of 2"]


def test_search_takes_the_best_mean_over_data_sets(table):
    def both(label: str, one: float, other: float) -> list[dict]:
        given = {"label": label, "evaluated_on": "validation"}
        return [row("FedProx", one, **given), row("FedProx", other, data="SLEEP", **given)]

    rows = [*both("defaults", 0.7, 0.8), *both("mu=0.1", 0.9, 0.5), *both("mu=0.3", 0.8, 0.78)]  # 75, 70 and 79
    assert table("search", rows) == [
        ["method", "candidates", "best", "accuracy %", "first candidate %"],
        ["FedProx", "3", "mu=0.3", "79.00", "75.00"],
    ]
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
    with pytest.raises(UserError, match="FedKDX, 100 rounds: several hyper: '' and 'tau=2'"):
        table("paper setting=all", [*rows, row("FedKDX", 0.95, seed=1, hyper="tau=2", **given)])
    rows = [row("FedKDX", 0.8, options="join_ratio=0.2", **given)]
    assert table("paper", rows)[1][:7] == ["FedKDX", "3", "0.2", "100", "80.00", "78.23", "+1.77"]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("plot", "no kind 'plot'"),
        ("settings data='UCI-HAR", "with quotes in pairs"),
        ("settings UCI-HAR", "'UCI-HAR' is not KEY=VALUE"),
        ("settings sets=1", "no column 'sets'"),
        ("settings reference=Local", "no column 'reference', and 'settings' has no word of this name"),
        ("claims metric=f1", "no column 'metric', and 'claims' has no word of this name"),
        ("settings data=SLEEP data=UCI-HAR", "'data' is given twice"),
        ("settings model=mlp", "no run with model=mlp"),
        ("settings metric=speed", "metric=speed: there are accuracy,"),
        ("detail", "several data: pick one, such as data='SLEEP'"),
        ("claims reference=Mine", "reference='Mine': no such method"),
        ("search", "no run with evaluated_on=validation"),
    ],
)
def test_an_order_that_cannot_be_met_is_told(table, order, message):
    with pytest.raises(UserError, match=message):
        table(order, [row("Local", 0.8), row("Local", 0.8, data="SLEEP")])


def test_runs_that_do_not_go_together_are_not_mixed(table):
    for given, message in (
        ({"rounds": 50}, "tenth: several rounds: '100' and '50'"),
        ({"options": "subjects=1+2"}, "tenth: several options: '' and 'subjects=1\\+2'"),
        ({"hyper": "mu=1"}, "tenth, FedProx: several hyper: '' and 'mu=1'"),
        ({"seed": 0, "data_seed": 7}, "tenth, seed 0: several data_seed: '0' and '7'"),
        ({"data_seed": 0, "seed": 2}, "tenth: some seeds have data of their own"),
    ):
        rows = [row("FedProx", 0.8), row("FedProx", 0.8, seed=1), row("FedProx", 0.8, **({"seed": 2} | given))]
        with pytest.raises(UserError, match=message):
            table("settings", rows)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["9", "10", "11"], "9..11"),
        (["01", "02", "03"], "01..03"),
        (["1", "02"], "1;02"),
        (["1", "3"], "1;3"),
        (["S1", "S2"], "S1;S2"),
        (["7"], "7"),
    ],
)
def test_names_of_clients_are_packed_and_found_again(names, text):
    assert csv_rows.packed(names) == text
    assert csv_rows.unpacked(text) == names


def test_options_of_training_make_a_method_unless_a_label_names_them(table):
    rows = [
        row("FedAvg", 0.8, options="subjects=1+2"),
        row("FedAvg", 0.9, options="bn=local subjects=1+2"),
        row("FedAvg", 0.7, options="optimizer=momentum subjects=1+2", label="fast"),
    ]
    assert [line[:2] for line in table("settings", rows)[1:]] == [
        ["FedAvg", "*80.00*"],
        ["FedAvg bn=local", "**90.00**"],
        ["FedAvg fast", "70.00"],
    ]


def test_rows_are_written_once_in_an_order_of_their_own(tmp_path):
    rows = [row("Local", 0.8, seed) for seed in (10, 9)] + [row("FedAvg", 0.7)]
    frame = pd.DataFrame(rows, columns=csv_rows.COLUMNS)
    once = csv_rows.merged([frame, frame.iloc[::-1]], "x.csv")
    assert list(zip(once["algorithm"], once["seed"], strict=True)) == [("FedAvg", "0"), ("Local", "9"), ("Local", "10")]


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


def test_a_figure_is_drawn_where_its_picture_is_not_of_these_results(tmp_path, capsys):
    (tmp_path / "page.md").write_text(PAGE.replace("settings", "figure"))
    for value in (0.9, 0.8):
        rows = [row("Local", 0.8), row("FedAvg", value), row("FedAvg", 0.7, seed=1)]
        write(tmp_path / "made.csv", [own | {"mb_up": "3", "mb_down": "1.5"} for own in rows])
        assert make.fill([tmp_path / "page.md"], tmp_path, check=True) == 1
        assert make.fill([tmp_path / "page.md"], tmp_path, check=False) == 0
        assert make.fill([tmp_path / "page.md"], tmp_path, check=True) == 0
    pictures = sorted((tmp_path / "figures").iterdir())
    assert len(pictures) == 2 and all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    (shown,) = re.findall(r"\]\((figures/.*)\)", (tmp_path / "page.md").read_text())
    (tmp_path / shown).unlink()
    capsys.readouterr()
    assert make.fill([tmp_path / "page.md"], tmp_path, check=True) == 1
    assert capsys.readouterr().out == f"{Path(shown).name}: is not there; run make.py\n"


def test_a_figure_shows_means_and_deviations_over_seeds_and_all_bytes(tmp_path):
    sent = {"mb_up": "3", "mb_down": "1.5"}
    rows = [row("FedAvg", 0.9, **sent), row("FedAvg", 0.7, seed=1, **sent), row("Local", 0.5, data="SLEEP")]
    write(tmp_path / "made.csv", rows)
    first, second = csv_figure.points("figure from=made data=UCI-HAR,SLEEP", tmp_path)
    assert first[:5] == ("UCI-HAR", "tenth", "FedAvg", 4.5, 80.0)
    assert first.deviation == pytest.approx(200**0.5, abs=5e-4)  # of 90 and 70
    assert second[:3] == ("SLEEP", "tenth", "Local") and second.accuracy == 50 and math.isnan(second.deviation)


def test_a_wrong_block_is_told_with_its_page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(UserError, match=r"page.md: table 'settings from=made': .*made.csv: cannot be read"):
        make.fill([tmp_path / "page.md"], tmp_path, check=True)


def test_a_block_without_an_end_does_not_swallow_the_page(tmp_path):
    write(tmp_path / "made.csv", [row("Local", 0.8)])
    with pytest.raises(UserError, match="has no '<!-- end -->' below it"):
        make.filled(PAGE.replace("<!-- end -->", "") + PAGE, tmp_path)


@pytest.mark.parametrize(
    "mark",
    [
        "<!--table: settings from=made -->",
        "<!-- table: settings from=made-->",
        "<!-- Table: settings from=made -->",
        "<!-- table settings from=made -->",
        "<!-- tables: settings from=made -->",
        "<!-- tabel: settings from=made -->",
        "<! -- table: settings from=made -->",
        "<!-- table: settings from=made",
    ],
)
def test_a_mark_that_is_nearly_right_is_told(tmp_path, mark):
    """Else there is silently no block, and its table is never made again."""
    write(tmp_path / "made.csv", [row("Local", 0.8)])
    with pytest.raises(UserError, match="a block begins with '<!-- table: KIND from=NAME -->'"):
        make.filled(PAGE.replace("<!-- table: settings from=made -->", mark), tmp_path)
    with pytest.raises(UserError, match="and ends with '<!-- end -->'"):
        make.filled(PAGE.replace("<!-- end -->", "<!--end-->"), tmp_path)
    assert make.filled("# Page\n\n<!-- a remark on tables -->\n", tmp_path) == "# Page\n\n<!-- a remark on tables -->\n"


def test_an_end_without_a_beginning_is_told(tmp_path):
    write(tmp_path / "made.csv", [row("Local", 0.8)])
    with pytest.raises(UserError, match="or the other way round"):
        make.filled(f"{PAGE}<!-- end -->\n", tmp_path)


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
