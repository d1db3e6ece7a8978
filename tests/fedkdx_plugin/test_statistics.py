"""Significance in the report: pairs, tests, corrections, differences by seed, and who is compared with whom."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import rankdata, wilcoxon

from fedkdx_plugin.reports import against, content, statistics, tables
from fedkdx_plugin.reports.people import same_clients, subjects
from fedkdx_plugin.reports.statistics import BySeed, holm, paired
from fedkdx_plugin.results.runs import read
from registry.errors import UserError
from tests.fedkdx_plugin.made_runs import column, make_run, sections_of, set_accuracy, set_subjects

PEOPLE = [f"S{number}" for number in range(8)]
BETTER = [
    0.9,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.2,
]  # accuracies of the eight clients; all above 0.1, by different amounts


def metrics(accuracy, *clients):
    return SimpleNamespace(accuracy=accuracy, client_accuracy=np.array(clients, dtype=float))


def two(place, accuracies, clients=None, people=None, **options):
    """Make runs of FedKDX and Local, and return their section.

    Args:
        accuracies: by seed, FedKDX's and Local's in the last round.
        clients: accuracies of FedKDX's and Local's clients in each seed; by default all have that of the run.
        people: seed -> the subjects that are its clients; then each seed has data of its own.
    """
    folders = []
    for seed, both in accuracies.items():
        for name, accuracy, own in zip(("FedKDX", "Local"), both, clients or (None, None), strict=True):
            folder = set_accuracy(make_run(place / f"{name}{seed}", name, seed, **options), accuracy, own)
            folders.append(set_subjects(folder, people(seed), seed) if people else folder)
    (section,) = sections_of(*folders)
    return section


def anew(place, accuracies, **options):
    """Make the same with data that are divided anew with each seed, and no manifest."""
    folders = []
    for seed, both in accuracies.items():
        data = {"manifest_sha256": f"{seed}" * 64, "drawn_from": "the same"}
        for name, accuracy in zip(("FedKDX", "Local"), both, strict=True):
            folder = make_run(place / f"{name}{seed}", name, seed, data=data, vary="data", **options)
            folders.append(set_accuracy(folder, accuracy))
    (section,) = sections_of(*folders)
    return section


def differences(section):
    """Return the table of differences by seed."""
    (table,) = (part for part in against.significance(section) if getattr(part, "name", "").count("-differences-"))
    return table


# ---- corrections and pairs


def test_holm_against_a_worked_example():
    # sorted: 0.005·4, 0.01·3, 0.03·2, 0.04·1, which may not fall below its predecessor
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_clients_that_are_the_same_are_averaged_over_seeds_first():
    """By hand: means over seeds 0.6 and 0.7 against 0.4 and 0.7; the third has no windows, the fourth in one seed."""
    own = [metrics(0.6, 0.5, 0.7, np.nan, 0.3), metrics(0.7, 0.7, 0.7, np.nan, np.nan)]
    other = [metrics(0.5, 0.4, 0.7, np.nan, 0.1), metrics(0.6, 0.4, 0.7, np.nan, np.nan)]
    over, differences = paired(own, other, same=True)
    assert over == "clients" and differences == pytest.approx([0.2, 0.0, 0.2])


def test_clients_that_are_others_with_each_seed_are_no_pairs():
    own, other = [metrics(0.6, 0.5), metrics(0.7, 0.7)], [metrics(0.5, 0.9), metrics(0.65, 0.9)]
    over, differences = paired(own, other, same=False)
    assert over == "seeds" and differences == pytest.approx([0.1, 0.05])


def test_pairs_are_seeds_from_six_on_whoever_the_clients_are():
    own, other = [metrics(0.6, 0.5)] * 6, [metrics(0.5, 0.1)] * 6
    for same in (True, False):
        over, differences = paired(own, other, same)
        assert over == "seeds" and differences == pytest.approx([0.1] * 6)
    assert paired(own[:5], other[:5], True).over == "clients"


def test_the_test_favours_the_larger_sum_of_ranks_not_the_mean():
    """By hand: |d| has ranks 1, 2, 3, 4, the positive ones add up to 6, the negative one to 4; the mean is negative."""
    assert statistics.favours(np.array([0.01, 0.02, 0.03, -0.1])) == 1
    assert statistics.favours(np.array([0.01, -0.01, 0.0])) == 0  # both have rank 1.5
    assert statistics.favours(np.array([-0.01, 0.0])) == -1


# ---- whose clients they are


def test_same_data_have_the_same_clients(tmp_path):
    assert same_clients(read(make_run(tmp_path / str(seed), seed=seed)) for seed in (0, 1))


def test_subjects_in_the_same_order_are_the_same_clients_in_data_of_other_seeds(tmp_path):
    def same(place, *people):
        runs = []
        for seed, names in enumerate(people):
            folder = make_run(tmp_path / place / str(seed), seed=seed, data={"manifest_sha256": str(seed) * 64})
            runs.append(read(set_subjects(folder, names, seed) if names else folder))
        assert [subjects(run) for run in runs] == [names or [] for names in people]
        return same_clients(runs)

    assert same("a", PEOPLE, PEOPLE)
    assert not same("b", PEOPLE, PEOPLE[::-1])
    assert not same("c", PEOPLE, PEOPLE[1:])
    assert not same("d", PEOPLE, None)  # no manifest is left: not known
    assert not same("e", None, None)


def test_a_client_with_windows_of_several_subjects_is_nobody(tmp_path):
    folder = set_subjects(make_run(tmp_path / "a"), PEOPLE, 0)
    assert subjects(read(folder)) == PEOPLE
    text = (folder / "manifest.json").read_text().replace('"subjects": {"S3": {}}', '"subjects": {"S3": {}, "S4": {}}')
    assert "S4" in text.partition("S3")[2][:12]
    (folder / "manifest.json").write_text(text)
    assert subjects(read(folder)) == []  # nor is a manifest believed that was changed


# ---- tests


def test_few_seeds_are_paired_by_client(tmp_path):
    section = two(tmp_path, {0: (0.9, 0.1), 1: (0.9, 0.1)}, (BETTER, [0.1] * 8))
    (reference,) = section.references
    (test,), untested = statistics.tests(section, reference)
    assert (test.name, test.over, test.pairs, test.better, test.worse, untested) == ("Local", "clients", 8, 8, 0, [])
    assert test.difference == pytest.approx(0.45)  # the mean of 0.8, 0.7, … 0.1
    # of the 2^8 sign patterns only two are as extreme
    assert test.p == pytest.approx(2 / 2**8) and test.favours == 1
    table, _, meaning = against.significance(section)
    assert column(table, "the test favours")["Local"].text == "FedKDX"
    assert column(table, "difference, points")["Local"].text == "+45.00"
    assert "by client, whose accuracies are averaged over the seeds" in meaning and "not independent" in meaning


def test_many_seeds_are_paired_by_seed(tmp_path):
    section = two(tmp_path, {seed: (0.5, 0.51 + 0.01 * seed) for seed in range(6)})
    (test,), _ = statistics.tests(section, *section.references)
    assert (test.over, test.pairs, test.worse, test.favours) == ("seeds", 6, 6, -1)
    assert test.p == pytest.approx(2 / 2**6)


@pytest.mark.parametrize("partition", ["dirichlet", "iid", "pathological"])
def test_few_seeds_that_divide_the_windows_anew_are_not_tested(tmp_path, partition):
    section = anew(tmp_path, dict.fromkeys((0, 1, 2), (0.9, 0.1)), partition=partition)
    table, untested, meaning = against.significance(section)
    assert untested == "Not tested against FedKDX, as there are fewer than 6 pairs: Local."
    assert meaning.startswith("Each seed has data of its own") and "Wilcoxon" not in meaning
    assert column(table, "better")["Local"].text == "no" and column(table, "p, Holm")["Local"].text == "–"
    assert column(table, "mean", "difference in points")["Local"].text == "+80.00 ± 0.00"


def test_many_seeds_that_divide_the_windows_anew_are_paired_by_seed(tmp_path):
    section = anew(tmp_path, {seed: (0.6 + 0.01 * seed, 0.5) for seed in range(6)}, partition="dirichlet")
    table, _, meaning = against.significance(section)
    assert column(table, "pairs")["Local"].text == "6 seeds"
    assert (
        meaning.startswith("Accuracies in the last round are paired by seed. ")
        and "Each seed has data of its own" in meaning
    )
    assert column(table, "p")["Local"].value == pytest.approx(2 / 2**6)


def test_subjects_are_followed_through_the_seeds(tmp_path):
    accuracies = dict.fromkeys((0, 1), (0.9, 0.1))
    data = {"drawn_from": "the same"}
    by_subject = two(tmp_path / "b", accuracies, (BETTER, [0.1] * 8), lambda seed: PEOPLE, vary="data", data=data)
    table = against.significance(by_subject)[0]
    assert column(table, "pairs")["Local"].text == "8 clients"
    others = two(tmp_path / "c", accuracies, None, lambda seed: PEOPLE[seed:] + PEOPLE[:seed], vary="data", data=data)
    assert against.significance(others)[-1].startswith("Each seed has data of its own")


def test_equal_seeds_with_other_data_are_no_pair(tmp_path):
    place = {"vary": "data"}
    folders = [
        make_run(tmp_path / name, name, 0, data={"manifest_sha256": code * 64, "drawn_from": "the same"}, **place)
        for name, code in (("FedKDX", "a"), ("Local", "b"))
    ]
    (section,) = sections_of(*folders)
    assert statistics.common(*section.methods) == ([], [])
    table, untested, _ = against.significance(section)
    assert "FedKDX, as there are fewer than 6 pairs: Local" in untested
    assert [cell.text for cell in table.rows[0]] == ["Local", "0", "–", "–", "–", "–"]


def test_no_significance_without_anything_to_compare(tmp_path):
    (section,) = sections_of(make_run(tmp_path / "0"))
    assert against.significance(section) == ["Significance cannot be tested: there is nothing to compare with."]
    (section,) = sections_of(make_run(tmp_path / "1", "FedKDX", 0), make_run(tmp_path / "2", "Local", 1))
    _, why, meaning = against.significance(section)
    assert why.endswith("fewer than 6 pairs: Local.") and meaning == "Fewer than 6 pairs cannot give a p below 0.05."


def test_that_no_difference_can_be_significant_is_said(tmp_path):
    """By hand: of six pairs the smallest p is 2/64 = 0.03125, and twice that is above 0.05."""
    folders = [make_run(tmp_path / f"{name}{seed}", name, seed) for name in ("FedKDX", "Local") for seed in range(6)]
    (section,) = sections_of(*folders)
    assert not any("no difference can be" in part for part in against.significance(section) if isinstance(part, str))
    (section,) = sections_of(*folders, *(make_run(tmp_path / f"c{seed}", "FedAvg", seed) for seed in range(6)))
    assert "With 6 pairs and 2 comparisons, no difference can be significant." in against.significance(section)


def test_equal_methods_do_not_differ(tmp_path):
    section = two(tmp_path, {0: (0.5, 0.5)})
    (test,), _ = statistics.tests(section, *section.references)
    assert test.p == 1 and not test.significant and test.favours == 0


# ---- differences by seed


@pytest.mark.parametrize(
    ("differences", "corrected", "favours", "verdict"),
    [
        ([0.1, 0.2], 0.04, 1, 1),
        ([-0.1, -0.2], 0.04, -1, -1),
        ([0.1, 0.2], 0.05, 1, 0),  # not significant
        ([0.1, -0.01], 0.01, 1, 0),  # not in every seed
        ([0.1, 0.0], 0.01, 1, 0),  # equal in one
        ([0.1, 0.2], 0.01, -1, 0),  # the test says the opposite: of clients, where large ones decide the accuracy
        ([0.1, 0.2], None, 0, 0),  # not tested
        ([0.1], 0.001, 1, None),  # one seed decides nothing
        ([], None, 0, None),
    ],
)
def test_better_is_what_seeds_and_test_agree_on(differences, corrected, favours, verdict):
    test = None if corrected is None else statistics.Test("x", "clients", 8, 8, 0, 0.1, favours, corrected, corrected)
    assert BySeed("x", dict(enumerate(differences)), test).verdict == verdict


def test_differences_of_seeds_by_hand(tmp_path):
    """By hand: +10, −5, +5 points: mean 10/3, deviation √((6.67² + 8.33² + 1.67²) / 2) = √58.33 = 7.64."""
    section = two(tmp_path, {0: (0.9, 0.8), 1: (0.8, 0.85), 2: (0.85, 0.8)}, (BETTER, [0.1] * 8))
    table = differences(section)
    assert [cell.text for cell in table.rows[0]] == [
        "Local",
        "3",
        "+3.33 ± 7.64",
        "+10.00",
        "−5.00",
        "+5.00",
        "2 of 3",
        "0.008",  # 2 / 2^8
        "no",
    ]


def test_a_seed_that_a_method_lacks_is_left_out_of_its_row(tmp_path):
    folders = [set_accuracy(make_run(tmp_path / f"a{seed}", "FedKDX", seed), 0.9) for seed in (0, 1)]
    folders += [set_accuracy(make_run(tmp_path / f"b{seed}", "Local", seed), 0.8) for seed in (0, 1)]
    folders += [set_accuracy(make_run(tmp_path / "c", "FedAvg", 1), 0.7)]
    (section,) = sections_of(*folders)
    rows = {row[0].text: [cell.text for cell in row[1:5]] for row in differences(section).rows}
    assert rows == {"Local": ["2", "+10.00 ± 0.00", "+10.00", "+10.00"], "FedAvg": ["1", "+20.00", "–", "+20.00"]}
    assert tables.to_csv(differences(section)).splitlines()[0] == (
        "against,seeds,difference in points mean,difference in points mean std,"
        'difference with seed 0,difference with seed 1,better in seeds,"p, Holm",better'
    )


def test_better_worse_and_one_seed_in_the_table(tmp_path):
    def verdict(place, accuracies, clients):
        section = two(tmp_path / place, accuracies, clients)
        return column(differences(section), "better")["Local"].text

    assert verdict("a", {0: (0.9, 0.8), 1: (0.9, 0.8)}, (BETTER, [0.1] * 8)) == "yes"
    assert verdict("b", {0: (0.8, 0.9), 1: (0.8, 0.9)}, ([0.1] * 8, BETTER)) == "worse"
    assert verdict("c", {0: (0.9, 0.8)}, (BETTER, [0.1] * 8)) == "one seed decides nothing"


def test_of_many_seeds_the_lowest_and_highest_difference_are_shown(tmp_path):
    section = two(tmp_path, {seed: (0.5 + 0.01 * (seed + 1), 0.5) for seed in range(6)})
    table = differences(section)
    assert [title for group, title in table.columns if group == "difference of a seed"] == ["lowest", "highest"]
    assert [cell.text for cell in table.rows[0][2:5]] == ["+3.50 ± 1.87", "+1.00", "+6.00"]  # ± √3.5
    assert column(table, "better in seeds")["Local"].text == "6 of 6"
    assert column(table, "better")["Local"].text == "yes"  # 2 / 2^6 = 0.031, the only comparison


# ---- references


def references(place, *methods, asked=()):
    """Return the references where these (name, label) take part, the last of them the best."""
    folders = [
        set_accuracy(make_run(place / f"{n}{label}", n, label=label), 0.1 * i) for i, (n, label) in enumerate(methods)
    ]
    (section,) = sections_of(*folders, references=asked)
    return [method.name for method in section.references]


def test_the_others_are_tested_against_fedkdx_plus_and_fedkdx_else_the_best(tmp_path):
    plain = ("FedAvg", ""), ("FedKDX", ""), ("FedKDX+", "")
    assert references(tmp_path / "a", *plain) == ["FedKDX+", "FedKDX"]
    assert references(tmp_path / "b", ("FedAvg", ""), ("FedKDX+", "tuned"), ("FedKDX", "")) == ["FedKDX"]
    assert references(tmp_path / "c", ("FedKDX", "base"), ("FedKDX+", "tuned")) == ["FedKDX+ tuned"]
    assert references(tmp_path / "d", ("FedAvg", ""), ("Local", "")) == ["Local"]
    assert references(tmp_path / "e", ("FedAvg", ""), ("Centralised", "")) == ["FedAvg"]  # the best is not federated
    assert references(tmp_path / "f", ("Centralised", "")) == ["Centralised"]


def test_references_can_be_asked_for(tmp_path):
    made = ("FedAvg", ""), ("FedKDX", ""), ("FedKDX", "base"), ("Local", "")
    assert references(tmp_path / "a", *made, asked=["local", "FedKDX base"]) == ["Local", "FedKDX base"]
    assert references(tmp_path / "b", *made, asked=["FedKDX", "FedKDX"]) == ["FedKDX"]
    variants = ("FedAvg", ""), ("FedKDX", "a"), ("FedKDX", "b")
    assert references(tmp_path / "c", *variants, asked=["FedKDX"]) == ["FedKDX a", "FedKDX b"]
    with pytest.raises(UserError, match=r"no run is of 'Lcal' \(did you mean Local\?\); there are FedAvg, FedKDX"):
        references(tmp_path / "d", *made, asked=["FedAvg", "Lcal"])


def test_each_reference_has_tables_of_its_own_corrected_for_its_own_comparisons(tmp_path):
    """By hand: three methods, so two comparisons for each reference; p = 2/2^8 twice, or 1 where equal."""
    folders = [
        set_accuracy(make_run(tmp_path / name, name), 0.5, clients)
        for name, clients in (("FedKDX+", BETTER), ("FedKDX", BETTER), ("Local", [0.1] * 8))
    ]
    (section,) = sections_of(*folders)
    first, first_seeds, second, second_seeds, meaning = against.significance(section)
    assert [table.name for table in (first, first_seeds, second, second_seeds)] == [
        "made-significance-FedKDX-plus",
        "made-differences-FedKDX-plus",
        "made-significance-FedKDX",
        "made-differences-FedKDX",
    ]
    assert {name: cell.value for name, cell in column(first, "p, Holm").items()} == {
        "FedKDX": 1,
        "Local": pytest.approx(2 * 2 / 2**8),
    }
    assert list(column(second, "p, Holm")) == ["FedKDX+", "Local"]
    assert "corrected for its own comparisons" in meaning


def test_a_section_without_the_reference_says_so(tmp_path):
    folders = [make_run(tmp_path / "a", "FedKDX"), make_run(tmp_path / "b", "Local")]
    folders += [make_run(tmp_path / "c", "FedAvg", join_ratio=1.0), make_run(tmp_path / "d", "Local", join_ratio=1.0)]
    one, other = sections_of(*folders, references=["FedKDX"])
    assert [method.name for method in one.references] == ["FedKDX"]
    (why,) = against.significance(other)
    assert why.startswith("None of the methods that were named as reference takes part here")


# ---- tables of clients


def test_other_clients_with_each_seed_are_not_averaged(tmp_path):
    """By hand: eight clients at 0.4 and eight at 0.8, of which the lowest is one of seed 0."""
    section = anew(tmp_path, {0: (0.4, 0.1), 1: (0.8, 0.1)}, partition="dirichlet")
    table = content.clients(section)
    own = table.rows[0]
    assert [cell.value for cell in own[1:4]] == pytest.approx([60, 20, 40])  # mean, deviation, lowest
    assert own[-1].text == "0 (seed 0)" and "of the clients of all seeds side by side" in table.caption


def test_the_same_clients_are_averaged(tmp_path):
    section = two(tmp_path, {0: (0.4, 0.1), 1: (0.8, 0.1)})
    table = content.clients(section)
    assert [cell.value for cell in table.rows[0][1:4]] == pytest.approx([60, 0, 60])
    assert table.rows[0][-1].text == "0" and "mean over seeds. Each" in table.caption


def test_that_seeds_set_other_clients_apart_is_said(tmp_path):
    folders = [
        make_run(tmp_path / str(seed), seed=seed, groups={"late": [seed], "unseen": [5]}, late="0.1@2", unseen=0.1)
        for seed in (0, 1)
    ]
    (section,) = sections_of(*folders)
    caption = content.clients(section).caption
    assert "each seed sets other clients apart (late, unseen)" in caption and "leaves out those in which" in caption
    (section,) = sections_of(folders[0])
    assert "apart" not in content.clients(section).caption


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5], 2 / 2**5),  # all of one sign: only this choice and its opposite
        ([0] * 15 + [1, 2, 3, 4, 5], 2 / 2**5),  # zeros say nothing
        ([0] * 14 + [1] * 6, 2 / 2**6),
        ([0] * 10 + [1] * 8 + [-1] * 2, 2 * (45 + 10 + 1) / 2**10),  # equal ranks: at most 2 of 10 of one sign
        ([1, -2, 3], 6 / 8),  # sums of 4 and 2; only all of one sign, and a 1 alone, are further apart
        ([1, -1], 1.0),
        ([0, 0], 1.0),
    ],
)
def test_signed_rank_by_hand(differences, p):
    assert statistics.signed_rank(np.array(differences, dtype=float)) == pytest.approx(p, abs=1e-15)


@pytest.mark.parametrize("seed", range(6))
def test_signed_rank_is_the_share_of_all_choices_of_signs(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-4, 6, 12 - seed).astype(float)
    some = values[values != 0]
    ranks = rankdata(abs(some))
    sums = [abs(np.dot(signs, ranks)) for signs in itertools.product((-1, 1), repeat=len(some))]
    wanted = np.mean([one >= abs(np.dot(np.sign(some), ranks)) - 1e-9 for one in sums])
    assert statistics.signed_rank(values) == pytest.approx(wanted, abs=1e-12)


def test_without_ties_it_is_scipys_exact_test_and_with_very_many_its_approximation():
    values = np.random.default_rng(0).normal(0.2, 1, 40)
    assert statistics.signed_rank(values) == pytest.approx(wilcoxon(values, method="exact").pvalue, rel=1e-9)
    many = np.random.default_rng(0).normal(0.1, 1, 300)
    assert statistics.signed_rank(many) == wilcoxon(many, method="approx").pvalue
