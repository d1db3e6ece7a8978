"""Subjects chosen by name: the others are read by nobody, counted, and named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dataset_utils import describe, shards
from dataset_utils.generate import prepare
from dataset_utils.spec import ShardSpec
from dataset_utils.subjects import Subjects
from registry.errors import UserError
from registry.parameters import parse
from tests.dataset_utils.synthetic import Cut, Synthetic, windows


def made(tmp_path, source=Synthetic, **options):
    """Return the shards of a source, and the lines that were said."""
    said: list[str] = []
    folder = prepare(ShardSpec(source.name, **options), tmp_path, None, False, said.append, source())
    return shards.load(folder), said


def described(source, root, **options):
    """Return the lines of `fedkdx data describe`, and the errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describe, "find_source", lambda data: source())
        return describe.described(ShardSpec(source.name, **options), root, None, False)


def names(found):
    return [list(client["subjects"]) for client in found.manifest["clients"]]


def values(found, k):
    """Return all values of a client's windows, on both sides of the split, in ascending order."""
    return np.sort(np.concatenate([found.train[k].x, found.test[k].x]).reshape(-1))


def test_names_are_compared_however_their_letters_are_written():
    composed, apart = "J\u00f6rg", "Jo\u0308rg"  # ö as one letter, and as an o with two dots
    for one, other in ((composed, apart), (apart, composed)):
        chosen, rest = Subjects(only=(one,)), Subjects(without=(one,))
        assert [chosen.used(name) for name in (other, "Jorg")] == [True, False]
        assert [rest.used(name) for name in (other, "Jorg")] == [False, True]
        chosen.check()
        rest.check()


@pytest.mark.parametrize(
    ("source", "of_all", "options", "left"),
    [  # in the natural order of their names
        (Synthetic, ["s1", "s2", "s10"], {"subjects": ("s10", "s1")}, "s2"),
        (Synthetic, ["s1", "s2", "s10"], {"exclude_subjects": ("s2",)}, "s2"),
        (Cut, ["s0", "s1", "s2", "s3"], {"subjects": ("s1", "s3")}, "s0, s2"),
        (Cut, ["s0", "s1", "s2", "s3"], {"exclude_subjects": ("s0", "s2")}, "s0, s2"),
    ],
)
def test_the_chosen_subjects_have_the_windows_that_they_have_among_all(tmp_path, source, of_all, options, left):
    """A fifth of a class is tested on, whoever else is there; windows themselves are the same."""
    everybody, _ = made(tmp_path, source, scale="none")
    assert names(everybody) == [[name] for name in of_all]
    some, said = made(tmp_path, source, scale="none", **options)
    kept = [name for name in of_all if name not in left.split(", ")]
    assert names(some) == [[name] for name in kept]
    for k, name in enumerate(kept):
        np.testing.assert_array_equal(values(some, k), values(everybody, of_all.index(name)))
    (line,) = [line for line in said if "left out" in line]
    assert line.startswith(f"{len(of_all) - len(kept)} of {len(of_all)} subjects are left out")
    assert line.endswith(f": {left}")


@pytest.mark.parametrize(
    ("options", "clients", "line"),
    [
        ({"clients": 1}, ["s1"], "2 of 3 subjects are left out (-nc 1): s2, s10"),
        ({"clients": 2}, ["s1", "s2"], "1 of 3 subjects are left out (-nc 2): s10"),
        # of s2 and s10, who are not tested on, one remains; both predict windows of s1, who is not left out
        ({"clients": 1, "split": "loso", "seed": 0}, ["s2"], "1 of 3 subjects are left out (-nc 1): s10"),
        ({"clients": 3}, ["s1", "s2", "s10"], None),
        ({"clients": 2, "partition": "iid"}, None, None),  # in which everybody's windows are
    ],
)
def test_fewer_clients_than_subjects_leave_the_last_ones_out_and_say_so(tmp_path, options, clients, line):
    """The lines, the manifest and the description of the data agree."""
    found, said = made(tmp_path, **options)
    assert [text for text in said if "left out (-nc" in text] == ([line] if line else [])
    assert found.manifest.get("left_out", []) == (line.partition("): ")[2].split(", ") if line else [])
    if clients:
        assert [
            next(name for name, own in client["subjects"].items() if own["train"])
            for client in found.manifest["clients"]
        ] == clients
    lines, errors = described(Synthetic, tmp_path, **options)
    assert [text for text in lines if "left out (-nc" in text] == ([line] if line else []) and not errors


def test_more_clients_than_subjects_are_refused(tmp_path):
    refusal = "-nc 4: there are only 3 subjects; choose at most 3, or another --partition"
    with pytest.raises(UserError, match=refusal):
        made(tmp_path, clients=4)
    assert described(Synthetic, tmp_path, clients=4)[1] == [refusal]


def test_a_class_that_only_the_others_have_is_missing(tmp_path):
    class Uneven(Synthetic):
        def load(self, path):
            for recording in super().load(path):
                recording.labels[recording.labels == 2] = 0 if recording.subject != "s2" else 2
                yield recording

    says = "no window of the subjects that are used has 'walking', of the classes of Synthetic; use more subjects, or"
    with pytest.raises(UserError, match=says):
        made(tmp_path, Uneven, exclude_subjects=("s2",))


def test_the_nearest_subject_is_the_one_with_the_same_number():
    chosen = Subjects(only=("0",))
    for number in (4, 0, 5):
        chosen.used(f"0{number}")
    with pytest.raises(UserError, match=r"no subject '0' \(did you mean 00\?\); there are 04, 00, 05$"):
        chosen.check()


@pytest.mark.parametrize("source", [Synthetic, Cut])
@pytest.mark.parametrize("flag", ["subjects", "exclude_subjects"])
def test_a_name_that_nobody_has_is_an_error(tmp_path, source, flag):
    with pytest.raises(UserError, match=f"^--{flag.replace('_', '-')}: there is no subject 'S1' .did you mean s1.*s2"):
        made(tmp_path, source, **{flag: ("S1",)})
    assert not list(tmp_path.glob("*/subject-*"))


def test_a_name_with_a_comma_can_be_given_in_a_list_alone(tmp_path):
    class Comma(Synthetic):
        def load(self, path):
            for recording in super().load(path):
                yield dataclasses.replace(recording, subject=recording.subject.replace("s10", "Doe, J"))

    wrong = parse(ShardSpec, {"data": "Comma", "subjects": "Doe, J"})
    says = "^--subjects: there is no subject 'Doe'.*; write a name with a comma in a list in YAML"
    with pytest.raises(UserError, match=says):
        prepare(wrong, tmp_path, None, False, print, Comma())
    some, _ = made(tmp_path, Comma, subjects=["Doe, J", "s1"])
    assert names(some) == [["Doe, J"], ["s1"]]


def test_nobody_left_and_both_at_once_are_errors(tmp_path):
    with pytest.raises(UserError, match="leaves none of the subjects"):
        made(tmp_path, exclude_subjects=("s1", "s2", "s10"))
    with pytest.raises(UserError, match="give one of them"):
        ShardSpec("X", subjects=("1",), exclude_subjects=("2",))


def test_windows_are_renumbered_by_hand():
    """Of four subjects with 2 windows in each of 6 bouts, the second and the fourth become 0 and 1."""
    whole = windows(per_class=4)
    own = Subjects(only=("s1", "s3")).choose(whole)
    assert own.subjects == ("s1", "s3") and own.subject.tolist() == [0] * 12 + [1] * 12
    assert own.y.tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2] * 2
    np.testing.assert_array_equal(own.x, whole.x[[*range(12, 24), *range(36, 48)]])
    np.testing.assert_array_equal(own.stretch, whole.stretch[[*range(12, 24), *range(36, 48)]])
    assert Subjects().choose(whole) is whole
