"""Hyper-parameters from text."""

import dataclasses
from dataclasses import dataclass

import pytest

from registry import parameters
from registry.errors import UserError
from registry.parameters import option, parse, suggest


@dataclass(frozen=True)
class Params:
    gamma: float = option(0.9, "a share", 0.0, 1.0)
    count: int = option(5, "a number", 1)
    flag: bool = option(False, "a switch")
    use: tuple[str, ...] = option(("kd",), "terms", choices=("kd", "nkd"))
    maybe: int | None = option(None, "optional", 0)
    mode: str = option("a", "a mode", choices=("a", "b"))


def test_text_and_typed_values_give_the_same():
    text = {"gamma": "0.5", "count": "3", "flag": "True", "use": "kd, nkd", "maybe": "4", "mode": "b"}
    typed = {"gamma": 0.5, "count": 3, "flag": True, "use": ["kd", "nkd"], "maybe": 4, "mode": "b"}
    assert parse(Params, text, "x") == parse(Params, typed, "x") == Params(0.5, 3, True, ("kd", "nkd"), 4, "b")


def test_false_is_false():
    assert parse(Params, {"flag": "False"}, "x").flag is False
    assert parse(Params, {"use": ""}, "x").use == ()
    assert parse(Params, {"maybe": None}, "x").maybe is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("gamma", "1.5", r"gamma: 1.5 is out of range; it must be at least 0 and at most 1"),
        ("gamma", "nan", "not a number"),
        ("gamma", "much", "not a number"),
        ("gamma", True, "not a number"),
        ("gamma", None, "not a number"),
        ("count", "2.5", "not a whole number"),
        ("count", "0", "at least 1"),
        ("flag", "perhaps", "neither true nor false"),
        ("use", "kd,nkt", r"did you mean nkd\?"),
        ("use", 3, "not a list"),
        ("mode", "c", "choose from a, b"),
        ("mode", ["a"], "not a text"),
        ("gama", "0.5", r"did you mean gamma\?"),
    ],
)
def test_wrong_values_are_named(name, value, says):
    with pytest.raises(UserError, match=says) as error:
        parse(Params, {name: value}, "Algo")
    assert str(error.value).startswith("Algo")
    assert "\n" not in str(error.value)


def test_suggestions_ignore_case():
    assert suggest("fedkdX", ["FedAvg", "FedKDX"]) == " (did you mean FedKDX?)"
    assert suggest("zzz", ["FedAvg"]) == ""


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("0", ["03", "00", "05"], "00"),  # the same number; all share one letter of three
        ("1", ["10", "0001", "11"], "0001"),
        ("7", ["S7", "P7", "T7"], "S7"),  # the first
        ("abcde", ["abc", "abcd", "abcdf"], "abcd"),  # 2 · 4 of 9 letters, before 2 · 3 of 8 and 2 · 4 of 10
        ("²", ["2", "02"], ""),  # a digit that is no number
    ],
)
def test_the_nearest_name_is_suggested(word, known, near):
    assert suggest(word, known) == (f" (did you mean {near}?)" if near else "")


@dataclass(frozen=True)
class Checked(parameters.Params):
    gamma: float = option(0.9, "a share", 0.0, 1.0)
    use: tuple[str, ...] = option(("kd",), "terms", choices=("kd", "nkd"))


def test_an_instance_checks_itself_wherever_it_is_made():
    with pytest.raises(UserError, match=r"Checked: gamma: 7 is out of range; it must be at least 0 and at most 1"):
        Checked(gamma=7)
    with pytest.raises(UserError, match=r"Checked: gamma: 1.5 is out of range"):
        dataclasses.replace(Checked(), gamma=1.5)
    with pytest.raises(UserError, match=r"Checked: use: 'nkt' is unknown .did you mean nkd"):
        Checked(use=["nkt"])
    assert Checked(gamma="0.5", use="kd,nkd") == Checked(0.5, ("kd", "nkd"))
