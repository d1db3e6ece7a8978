"""FedKDX+ and FedKD+: the additions are on by default, each can be switched off, all off is the paper's method.

What each addition does is tested in test_serving (who predicts, where teachers start), test_downlink (differences) and
test_compression (8 bits, error feedback).
"""

from __future__ import annotations

from dataclasses import fields

import pytest

from baselines.fedkd import FedKD
from baselines.fedkd_plus import FedKDPlus
from fedkdx_plugin.algorithm.additions import OFF, AdditionsParams
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.algorithm.fedkdx_plus import FedKDXPlus
from registry.errors import UserError
from tests.conftest import Recorder, make_federation, same_state

PAIRS = [(FedKDXPlus, FedKDX), (FedKDPlus, FedKD)]
PLUS = [plus for plus, _ in PAIRS]


def ran(algorithm, **options):
    federation, recorder = make_federation(algorithm, rounds=6, **options), Recorder()
    federation.run([recorder])
    return federation, recorder.records


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
@pytest.mark.parametrize(("plus", "paper"), PAIRS)
def test_with_all_off_it_is_the_papers_method_bit_for_bit(plus, paper, backend):
    one, records = ran(plus, params=OFF, backend=backend, join_ratio=0.5)
    other, others = ran(paper, backend=backend, join_ratio=0.5)
    assert same_state(one.save().tensors, other.save().tensors)
    assert one.save().meta == other.save().meta
    for a, b in zip(records, others, strict=True):
        assert (a.bytes_up, a.bytes_down, a.server, a.train_loss) == (b.bytes_up, b.bytes_down, b.server, b.train_loss)
        assert a.metrics.keys() == b.metrics.keys()
        assert a.metrics["served"].accuracy == b.metrics["served"].accuracy
        assert (a.metrics["served"].client_loss == b.metrics["served"].client_loss).all()


def test_every_addition_is_on_by_default_and_has_a_value_that_is_off():
    defaults = AdditionsParams()
    # a pull that ends at 0 is the default, too: where it starts says whether there is one
    assert [name for name in OFF if getattr(defaults, name) == OFF[name]] == ["pull_end"]
    assert list(OFF) == [field.name for field in fields(AdditionsParams)]
    assert (defaults.serve, defaults.teacher_init, defaults.downlink) == ("both", "student", "differences")
    assert (defaults.pull_start, defaults.pull_end, defaults.error_feedback, defaults.quantise) == (1, 0, True, True)


@pytest.mark.parametrize(("plus", "paper"), PAIRS)
def test_all_else_is_as_in_the_paper(plus, paper):
    """FedKD's own schedule of thresholds among it, which is not FedKDX's."""
    ours, papers = plus.Params(), paper.Params()
    assert {f.name for f in fields(ours)} == {f.name for f in fields(papers)} | OFF.keys()
    for field in fields(papers):
        if field.name != "serve":
            assert getattr(ours, field.name) == getattr(papers, field.name), field.name


CHANGES = {**OFF, "pull_start": 0.5, "pull_end": 0.5}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("plus", PLUS)
def test_every_addition_changes_the_outcome(plus, name):
    (default, _), (changed, _) = ran(plus), ran(plus, params={name: CHANGES[name]})
    assert not same_state(default.save().tensors, changed.save().tensors)


@pytest.mark.parametrize("name", OFF)
@pytest.mark.parametrize("paper", [FedKDX, FedKD])
def test_the_papers_methods_have_no_additions(paper, name):
    if name == "serve":
        with pytest.raises(UserError, match="'both' is unknown"):
            paper.Params(serve="both")
    else:
        with pytest.raises(TypeError, match=name):
            paper.Params(**{name: OFF[name]})


def test_each_reply_is_decompressed_once(monkeypatch):
    from fedkdx_plugin.algorithm import student

    asked = []
    usual = student.decompress
    monkeypatch.setattr(student, "decompress", lambda *args: asked.append(args) or usual(*args))
    _, records = ran(FedKDX)
    assert len(asked) == sum(len(record.selected) for record in records) > 6
