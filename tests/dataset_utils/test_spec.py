"""Every wrong value is named by its flag, and different parameters never share a folder."""

import dataclasses
import subprocess
import sys

import pytest

from dataset_utils.spec import ShardSpec, is_own_data, window_samples
from fedkdx_plugin.configuration.config import from_dict
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def spec_of(*argv):
    parser = Parser()
    add_flags(parser, ShardSpec)
    parser.add_argument("-data")
    return parse(ShardSpec, given(parser.parse_args(argv), ShardSpec))


def test_flags_left_out_become_the_defaults():
    assert spec_of("-data", "X") == ShardSpec("X")


def test_every_flag_arrives():
    text = (
        "-data X -nc 7 --partition dirichlet --alpha 0.3 --classes-per-client 3 --split blocked --test-fraction 0.3 "
        "--scale minmax --min-samples 4 --data-seed 9 --window 64 --overlap 0.25 --median 5 --lowpass 10 --gravity 0 "
        "--train-fraction 0.2 --evaluate-on validation"
    )
    spec = spec_of(*text.split())
    drawn = ShardSpec("X", 7, "dirichlet", 0.3, 3, "blocked", 0.3, "minmax", 4, 9, 64, 0.25, 5, 10.0, 0.0)
    assert spec == dataclasses.replace(drawn, train_fraction=0.2, evaluate_on="validation")
    snake = text.replace("-per-", "_per_").replace("--min-samples", "--min_samples").replace("-nc 7", "--num_clients=7")
    assert spec_of(*snake.split()) == spec


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data", [None, ["X"]]),
        ("clients", [0, -1, 2.5, True, "three"]),
        ("partition", ["dir", None, ""]),
        ("alpha", [0, -0.1, float("nan"), float("inf"), "low", None]),
        ("classes_per_client", [0, 1.5, None]),
        ("split", ["random"]),
        ("test_fraction", [0, 1, 1.2, -0.2, float("nan")]),
        ("scale", ["std"]),
        ("min_samples", [0, None]),
        ("seed", [-1, 0.5, None]),
        ("window", [0, -1, True, "64 s s", "two", "nan"]),
        ("overlap", [1, -0.1, float("nan")]),
        ("median", [2, -1, 1.5]),
        ("lowpass", [-1, float("inf"), "low"]),
        ("gravity", [-0.3]),
        ("train_fraction", [0, -0.1, 1.1, float("nan"), True, "all", None]),
        ("evaluate_on", ["train", None]),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(name, values):
    for value in values:
        (field,) = (field for field in dataclasses.fields(ShardSpec) if field.name == name)
        flag = (field.metadata["flags"] or [f"ShardSpec: {name}"])[0]
        with pytest.raises(UserError, match=f"^{flag}: "):
            dataclasses.replace(ShardSpec("X"), **{name: value})


def test_folder_names_are_readable():
    assert ShardSpec("X").folder_name().startswith("subject-shuffled-seed0-")
    spec = ShardSpec("X", clients=30, partition="dirichlet", split="blocked", seed=4)
    assert spec.folder_name().startswith("dirichlet0.1-nc30-blocked-seed4-")
    spec = ShardSpec("X", train_fraction=0.1, evaluate_on="validation")
    assert spec.folder_name().startswith("subject-train0.1-validation-shuffled-seed0-")
    assert ShardSpec("X", partition="pathological").folder_name().startswith("pathological2-")


def test_different_parameters_have_different_folders():
    base = ShardSpec("X", partition="dirichlet", clients=5)
    changes = {
        "clients": 6, "partition": "iid", "alpha": 0.1000001, "split": "blocked", "test_fraction": 0.21,
        "scale": "none", "min_samples": 11, "seed": 1, "window": 64, "overlap": 0.5, "median": 0, "lowpass": 20.0,
        "gravity": 0.3, "train_fraction": 0.5, "evaluate_on": "validation",
        "subjects": ("1",), "exclude_subjects": ("1",),
    }  # fmt: skip
    specs = [base, *(dataclasses.replace(base, **{key: value}) for key, value in changes.items())]
    pathological = dataclasses.replace(base, partition="pathological")
    specs += [pathological, dataclasses.replace(pathological, classes_per_client=3)]
    assert len({spec.folder_name() for spec in specs}) == len(specs)


def test_equal_parameters_share_a_folder():
    base = ShardSpec("X", partition="dirichlet", clients=5, alpha=1.0, lowpass=20.0)
    for same in ({"data": "x"}, {"alpha": 1}, {"lowpass": 20}, {"classes_per_client": 5}):
        assert dataclasses.replace(base, **same).folder_name() == base.folder_name()
    some, same = ShardSpec("X", subjects=("1", "2")), ShardSpec("X", subjects=("2", "1", "2"))
    assert some.folder_name() == same.folder_name() and some.folder_name().startswith("subject-only2-")
    assert ShardSpec("X", subjects=("2", "10")).folder_name() == "subject-only2-shuffled-seed0-61e6f93f"
    assert some.folder_name() == "subject-only2-shuffled-seed0-78d3845c"  # as it has always been
    assert ShardSpec("X", alpha=0.5).folder_name() == ShardSpec("X").folder_name()  # no Dirichlet, no alpha


@pytest.mark.parametrize("name", ["subjects", "exclude_subjects"])
def test_a_choice_of_subjects_has_one_text_however_it_is_written(name):
    for written in ("10,2,1", "1,2,10,10", ["2", 10, "1"], ("1", "2", "10")):
        assert getattr(ShardSpec("X", **{name: written}), name) == ("1", "2", "10")
        assert from_dict({"data": "X", "algorithm": "FedAvg", name: written}, "").to_dict()[name] == ["1", "2", "10"]


def test_without_a_reduction_folders_keep_their_names():
    assert ShardSpec("X").folder_name() == "subject-shuffled-seed0-1b2da8c9"


@pytest.mark.parametrize("flag", ["--subjects", "--exclude-subjects"])
@pytest.mark.parametrize("given", [",", "", " , "])
def test_a_choice_of_nobody_is_not_one_of_all(flag, given):
    with pytest.raises(UserError, match=f"^{flag}: '{given}' names nothing; write a,b,c, or leave it out"):
        spec_of("-data", "X", flag, given)
    with pytest.raises(UserError, match=f"^{flag}: .* names nothing"):
        ShardSpec("X", **{flag[2:].replace("-", "_"): [" "]})
    assert ShardSpec("X", subjects=[]).subjects == ()


def test_own_data_is_a_yaml_file():
    assert is_own_data("my/data.yaml") and is_own_data("data.YML") and not is_own_data("UCI-HAR")


def test_importing_the_flags_costs_nothing():
    code = "import sys, dataset_utils.spec; print({'numpy', 'scipy', 'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("window", "samples"),
    [(2.56, 128), ("2.56", 128), ("2.56 s", 128), ("128 samples", 128), ("128samples", 128), (2, 100)],
)
def test_a_window_in_seconds_or_samples(window, samples):
    assert window_samples(window, 50.0) == samples


def test_a_window_below_two_samples_is_refused():
    for window in ("1 samples", 0.02, "1 sample", None):
        with pytest.raises(ValueError, match="is no window of two samples or more at 50 Hz"):
            window_samples(window, 50.0)


def test_a_window_has_one_name_however_it_is_written():
    names = {ShardSpec("d", window=window).folder_name() for window in (2, 2.0, "2", "2 s", "2.0s")}
    assert len(names) == 1 and ShardSpec("d", window="2 samples").folder_name() not in names
