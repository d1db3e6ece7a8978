"""Checks that an algorithm's hyper-parameters are documented, and that each of them has an effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

from fedkdx_plugin.testing.case import AlgorithmCase, numbers, run
from fedkdx_plugin.testing.made import make_data
from fedkdx_plugin.testing.running import Checks, check_reasons, require
from registry.errors import UserError
from registry.parameters import Params

CHECKS = Checks()


@CHECKS
def check_parameters_documented(case: AlgorithmCase) -> None:
    """Require a frozen dataclass derived from `registry.parameters.Params`, and a line of help for each field."""
    params = case.algorithm.Params
    require(
        isinstance(params, type) and issubclass(params, Params) and dataclasses.is_dataclass(params),
        f"{params} does not declare hyper-parameters: derive a @dataclass(frozen=True) from registry.parameters.Params",
    )
    for field in dataclasses.fields(params):
        text = str(field.metadata.get("help", "")).strip()
        require(text, f"hyper-parameter '{field.name}' has no help: declare it by registry.parameters.option")


@CHECKS
def check_parameters_matter(case: AlgorithmCase) -> None:
    """Require that another value of each hyper-parameter, within its range, changes a run.

    It is varied with the others at their defaults and, if that changes nothing, together with each other one.
    """
    default = case.algorithm.Params(**case.params)
    names = [field.name for field in dataclasses.fields(default)]
    check_reasons(case.without_effect, names, "hyper-parameter")
    alternatives = {name: list(_alternatives(default, name)) for name in names}
    known: dict[str, Any] = {}

    def outcome(**params: Any) -> Any:
        key = repr(sorted(params.items()))
        if key not in known:
            known[key] = _outcome(case, params)
        return known[key]

    def matters(name: str) -> bool:
        others = ({other: value} for other in names if other != name for value in alternatives[other])
        for rest in ({}, *others):
            reference = outcome(**rest)
            values = (outcome(**rest, **{name: value}) for value in alternatives[name])
            if reference is not None and any(value not in (None, reference) for value in values):
                return True
        return False

    for name in names:
        if name not in case.without_effect:
            require(
                matters(name),
                f"hyper-parameter '{name}' changes nothing, whatever its value: use it, remove it, or give a reason in "
                "`without_effect`",
            )


def _outcome(case: AlgorithmCase, params: Mapping[str, Any]) -> Any:
    """Return state and records of a run, or None if the algorithm refuses these values together."""
    try:
        federation = case.federation(make_data((18, 7, 20, 9)), params=params, rounds=4, join_ratio=0.75)
    except UserError:
        return None
    records = [(numbers(record), sorted(record.server.items())) for record in run(federation)]
    return federation.save().to_bytes(), records


def _alternatives(default: Any, name: str) -> Iterator[Any]:
    """Yield other values of a hyper-parameter that its declaration allows."""
    field = next(own for own in dataclasses.fields(default) if own.name == name)
    value, kind = getattr(default, name), get_type_hints(type(default))[name]
    for candidate in _candidates(value, kind, field.metadata):
        if candidate == value:
            continue
        try:
            dataclasses.replace(default, **{name: candidate})
        except UserError:
            continue
        yield candidate


def _candidates(value: Any, kind: Any, metadata: Mapping[str, Any]) -> Iterator[Any]:
    """Yield values to try for a hyper-parameter of a type; some may be equal to its value or out of range."""
    low, high, choices = metadata.get("low"), metadata.get("high"), metadata.get("choices") or ()
    if isinstance(value, bool) or kind is bool:
        yield not value
    elif isinstance(value, tuple):
        yield from ((), *((choice,) for choice in choices), tuple(choices))
    elif choices:
        yield from choices
    elif isinstance(value, str) or kind is str:
        yield f"{value}x"
    else:
        number = value if value is not None else 1.0 if low is None else low
        whole = int in (kind, *get_args(kind))
        steps = (2 * number + 1, number + 1, number // 2) if whole else (number / 2, 2 * number or 0.5, number + 0.5)
        yield from steps
        yield from (bound for bound in (low, high) if bound is not None)
        if value is not None and type(None) in get_args(kind):
            yield None
