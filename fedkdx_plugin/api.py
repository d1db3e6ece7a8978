"""Functions of `fedkdx`: the command line's `run` and results, from Python."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataset_utils.spec import check_used
from fedkdx_plugin.configuration.config import from_dict, option_names, with_names
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.results import Results
from fedkdx_plugin.tracking.callbacks import Callback
from registry import catalog
from registry.blame import is_expected
from registry.errors import UserError
from registry.interface import Model, Server
from registry.parameters import parse, suggest

if TYPE_CHECKING:
    from dataset_utils.recording import Source
    from fedkdx_plugin.privacy.audit.several import Audits

OWN_NAMES = {
    "global_rounds": "rounds",
    "times": "seeds",
    "algorithm": "algorithms",
}  # options that `compare` names itself


def compare(
    data: str | Path | type[Source],
    algorithms: str | type[Server] | Sequence[str | type[Server]],
    *,
    model: str | type[Model] = "cnn",
    rounds: int = 500,
    seeds: int = 1,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    jobs: int = 1,
    **options: Any,
) -> Results:
    """Compare algorithms on identical splits, client samples and seeds, as `fedkdx run` does, in a folder of runs.

    Args:
        data: name of a data set, YAML file that describes your own, folder of shards, or a `Source` class.
        algorithms: names (see `fedkdx list`), `path/to/file.py:Class`, or `Server` classes; a list, or one text with
            commas.
        model: model of every client: a name, `path/to/file.py:Class`, or a `Model` class.
        rounds: number of communication rounds.
        seeds: number of seeds, the first of which is the option `seed`.
        callbacks: receive the events of all runs (see `fedkdx.Callback`).
        progress: show the progress on stderr.
        jobs: number of runs in parallel, in a process each; 1 is needed for classes that a notebook defines.
        **options: any option of the command line by its long name in snake case, such as `join_ratio=0.4`,
            `train_fraction=0.25`, `preset="tuned"`, `out="runs"`, `set={"FedKDX.gamma": 0.5}`.

    Returns:
        The finished runs: `.table`, `.rounds` and `.clients` (data frames), `.plot()`, `.report()`, `.folder`.

    Raises:
        UserError: wrong input, found before the first round. Exceptions of an algorithm are raised as they are.
    """
    for name, own in OWN_NAMES.items():
        if name in options:
            raise UserError(f"compare: {name}: write {own}=")
    named = (option_names() - OWN_NAMES.keys()) | (inspect.signature(compare).parameters.keys() - {"options"})
    for name in options:
        if name not in named:
            raise UserError(f"compare: unknown key '{name}'{suggest(name, sorted(named))}")
    if isinstance(algorithms, str):
        algorithms = algorithms.split(",")
    several = algorithms if isinstance(algorithms, (list, tuple)) else [algorithms]
    values = options | {
        "data": _name("datasets", data),
        "algorithm": [_name("algorithms", algorithm) for algorithm in several],
        "model": _name("models", model),
        "global_rounds": rounds,
        "times": seeds,
    }
    if "student_model" in values and values["student_model"] is not None:
        values["student_model"] = _name("models", values["student_model"])
    try:
        config = from_dict(values, "compare")
        check_used(values, config.shards)
        experiment = Experiment.comparison(config)
        return experiment.run(jobs=jobs, callbacks=callbacks, progress=progress)
    except UserError as error:
        if not is_expected(error):
            raise  # of a plug-in, as it is
        raise UserError(with_names(str(error), OWN_NAMES)) from error


def load_runs(folder: str | Path) -> Results:
    """Read all run folders in a folder, at any depth. Raises UserError: there is none, or a damaged one."""
    return Results.load(folder)


def audit(
    runs: str | Path | Results | Sequence[str | Path],
    *,
    attacks: str | Sequence[str] = ("membership", "inversion", "identity"),
    progress: bool = True,
    **options: Any,
) -> Audits:
    """Attack runs and measure what they leak, as `fedkdx audit` does; results are also in `audit/` of each run folder.

    Args:
        runs: run folders, folders of runs, or what `compare` and `load_runs` return.
        attacks: which attacks to make.
        progress: show the progress on stderr.
        **options: other options of `fedkdx audit`: `shadows`, `inverted`, `steps`.

    Returns:
        The audits: `.table` (a data frame), `.found` and `.refused` by run folder.

    Raises:
        UserError: wrong input, or no run in a folder.
    """
    from fedkdx_plugin.privacy.audit.options import AuditOptions
    from fedkdx_plugin.privacy.audit.several import audit_all

    chosen = parse(AuditOptions, {"attacks": attacks, **options}, "audit")
    if isinstance(runs, Results):
        folders = [run.folder for run in runs.runs]
    else:
        folders = [Path(runs)] if isinstance(runs, (str, Path)) else list(map(Path, runs))
    return audit_all(folders, chosen, progress)


def _name(kind: str, thing: object) -> str:
    """Return the name of a class or a name in a configuration. Raises UserError: it is neither, but an object."""
    if isinstance(thing, type):
        return catalog.register(kind, thing).name
    if not isinstance(thing, (str, os.PathLike)):
        raise UserError(
            f"compare: {catalog.NOUNS[kind]}: an object of the class {type(thing).__name__} is neither a name nor a "
            "class; give the class itself, not what it makes"
        )
    return str(thing)
