"""Sections of the report: what names them, and what is remarked on their runs."""

from __future__ import annotations

from fedkdx_plugin.reports.report import remarks
from tests.fedkdx_plugin.made_runs import make_run, sections_of


def test_chosen_subjects_name_a_section_and_none_say_nothing(tmp_path):
    folders = [
        make_run(tmp_path / "a", subjects=[], exclude_subjects=[]),
        make_run(tmp_path / "b", subjects=["1", "2"], exclude_subjects=[]),
        make_run(tmp_path / "c", subjects=[], exclude_subjects=["3"]),
    ]
    titles = ["made", "made, subjects 1+2", "made, exclude subjects 3"]
    assert [section.title for section in sections_of(*folders)] == titles


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
