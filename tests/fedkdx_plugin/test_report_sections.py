"""Sections of the report: what names them, and what is remarked on their runs."""

from __future__ import annotations

import pytest

from dataset_utils.generate import prepare
from dataset_utils.shards import read_manifest
from dataset_utils.spec import ShardSpec
from fedkdx_plugin.reports import classes, content, data
from fedkdx_plugin.reports.report import remarks
from tests.dataset_utils.synthetic import Cut, Synthetic
from tests.fedkdx_plugin.made_runs import make_run, sections_of


def test_chosen_subjects_name_a_section_and_none_say_nothing(tmp_path):
    folders = [
        make_run(tmp_path / "a", subjects=[], exclude_subjects=[]),
        make_run(tmp_path / "b", subjects=["1", "2"], exclude_subjects=[]),
        make_run(tmp_path / "c", subjects=[], exclude_subjects=["3"]),
    ]
    titles = ["made", "made, subjects 1+2", "made, exclude subjects 3"]
    assert [section.title for section in sections_of(*folders)] == titles


def test_a_variant_without_a_model_of_its_own_for_the_student_says_that_it_is_as_the_teachers(tmp_path):
    folders = [make_run(tmp_path / str(model), "FedKDX", student_model=model) for model in ("tcn", None)]
    (section,) = sections_of(*folders)
    names = [method.name for method in section.methods]
    assert names == ["FedKDX student_model=tcn", "FedKDX student_model as -m"]


def test_no_caption_ends_in_a_space(tmp_path):
    (section,) = sections_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", "FedKDX"))
    tables = (content.results, content.reaching, content.clients, content.seconds, classes.together, classes.by_class)
    for table in tables:
        assert (caption := table(section).caption) == caption.strip() and "  " not in caption


def test_a_run_that_accepted_no_reply_is_named_with_the_reason(tmp_path):
    folders = [
        make_run(tmp_path / "a", "FedAvg"),
        make_run(tmp_path / "b", "FedProx", damaged=True),  # one reply of six was rejected
        make_run(tmp_path / "c", "FedKD", seed=3, rejected={0: "not finite", 1: "not finite"}),
    ]
    (section,) = sections_of(*folders)
    (note,) = section.notes
    assert note.startswith("FedKD seed 3 accepted no reply in any round (not finite): its figures, and its rank, are")
    assert note in remarks(section)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (Synthetic, {"exclude_subjects": "s10,s2"}, "2 subjects (--exclude-subjects): s2, s10"),
        (Synthetic, {"clients": 1}, "2 subjects (-nc 1): s2, s10"),
        (Synthetic, {"subjects": "s10,s1"}, "all subjects but 2 (--subjects): s1, s10"),
        (Cut, {"exclude_subjects": "s0"}, "1 subject (--exclude-subjects): s0"),  # windows as the data set has them
        (Cut, {}, "nothing"),
    ],
)
def test_the_data_card_names_the_subjects_left_out(tmp_path, source, options, says):
    """Else it says "left out: nothing", in a run on the folder of shards, too, whose options name nobody."""
    folder = prepare(ShardSpec(source.name, **options), tmp_path, None, False, print, source())
    manifest = read_manifest(folder)
    said = data._made(manifest)["left out"].split("; ")
    assert says in said and (says == "nothing" or "nothing" not in said)
    del manifest["counts"]  # as of shards that were not made here
    assert data._made(manifest).get("left out") == (None if says == "nothing" else says)
