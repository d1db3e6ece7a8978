"""Every check of `fedkdx_plugin.testing` can fail, and says what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.fedprox import FedProx
from fedkdx_plugin.testing import (
    AlgorithmCase,
    ModelCase,
    SourceCase,
    algorithm_checks,
    check_algorithm,
    check_model,
    check_source,
    model_checks,
    source_checks,
)
from fedkdx_plugin.testing.made import TinyNet
from fedkdx_plugin.testing.running import run_all
from registry.errors import UserError
from tests.dataset_utils.synthetic import Synthetic
from tests.fedkdx_plugin import broken

FAULTS = (AssertionError, UserError, ZeroDivisionError, TypeError, RuntimeError)  # what is broken may fail by itself
SHAPES = [(3, 1, 16), (1, 1, 40)]
TABLES = {
    "algorithm": (broken.ALGORITHMS, broken.MORE_ALGORITHMS, algorithm_checks()),
    "model": (broken.MODELS, [], model_checks()),
    "source": (broken.SOURCES, broken.MORE_SOURCES, source_checks()),
}
ALL = [(kind, check, one.what) for kind, (table, _, _) in TABLES.items() for check, one in table.items()]
ALL += [(kind, check, what) for kind, (_, more, _) in TABLES.items() for check, what in more]


def case(kind, what, folder):
    if kind == "algorithm":
        return AlgorithmCase(what)
    return ModelCase(what, SHAPES) if kind == "model" else SourceCase(what, folder)


def failures(kind, what, folder) -> dict[str, str]:
    """Name of each check that fails -> what it says."""
    try:
        run_all("it", TABLES[kind][2], case(kind, what, folder))
    except AssertionError as error:
        lines = str(error).splitlines()
        assert lines[0] == f"it fails {len(lines) - 1} of {len(TABLES[kind][2])} checks:"
        return dict(line.strip().split(": ", 1) for line in lines[1:])
    return {}


@pytest.mark.parametrize("kind", TABLES)
def test_there_is_something_broken_for_every_check(kind):
    table, _, checks = TABLES[kind]
    assert list(table) == [check.__name__ for check in checks]
    assert all(check.__doc__.startswith("Require ") for check in checks)


@pytest.mark.parametrize(("kind", "name", "what"), ALL)
def test_a_check_finds_what_it_is_for(kind, name, what, tmp_path):
    (check,) = (check for check in TABLES[kind][2] if check.__name__ == name)
    with pytest.raises(FAULTS) as error:
        check(case(kind, what, tmp_path))
    assert str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (table, _, _) in TABLES.items() for name in table])
def test_no_other_check_fails_without_a_reason(kind, name, tmp_path):
    what, also = TABLES[kind][0][name]
    assert set(failures(kind, what, tmp_path)) == {name, *also}


def test_all_failures_are_named_with_the_class():
    def other_each_time(self, replies, round):
        broken.draws(self, replies, round)

    server = type("Careless", (FedAvg,), {"aggregate": other_each_time, "Params": broken.Idle})
    with pytest.raises(AssertionError) as error:
        check_algorithm(server, skip={"check_beats_chance": "it does"})
    first, *lines = str(error.value).splitlines()
    failed = dict(line.strip().split(": ", 1) for line in lines)
    assert first == f"Careless fails {len(failed)} of {len(algorithm_checks())} checks:"
    assert "draw all that is random from" in failed["check_same_seed"]
    assert "check_beats_chance" not in failed


def test_a_hyper_parameter_without_effect_is_excused_by_name_and_reason():
    server = type("Proximal", (FedProx,), {"Params": broken.Idle})
    (check,) = (check for check in algorithm_checks() if check.__name__ == "check_parameters_matter")
    check(AlgorithmCase(server, without_effect={"zeta": "counts rounds beyond a short run"}))
    with pytest.raises(ValueError, match="hyper-parameter 'zeta' is left out without a reason"):
        check(AlgorithmCase(server, without_effect={"zeta": " "}))
    with pytest.raises(ValueError, match="there is no hyper-parameter 'eta'; known: mu, zeta"):
        check(AlgorithmCase(server, without_effect={"eta": "no"}))


def test_a_check_that_does_not_exist_cannot_be_skipped():
    with pytest.raises(ValueError, match="there is no check 'check_all'"):
        check_model(TinyNet, skip={"check_all": "no time"})


def test_an_error_of_what_is_checked_is_named_with_its_place(tmp_path):
    class Absent(Synthetic):
        def load(self, path):
            raise KeyError("acc_x")

    with pytest.raises(AssertionError) as error:
        check_source(Absent, raw=tmp_path)
    assert "check_contents: KeyError: 'acc_x' (test_testing.py, line " in str(error.value)


def test_checks_leave_threads_type_and_generator_as_they_were():
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    check_model(TinyNet, shapes=SHAPES)
    assert torch.get_num_threads() == 2 and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_time_without_pytest():
    code = "import sys; import fedkdx_plugin.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
