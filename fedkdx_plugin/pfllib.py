"""`python -m fedkdx_plugin.pfllib CHECKOUT` runs algorithms on the data of a PFLlib checkout.

Data are read from `CHECKOUT/dataset/NAME`; results go to `CHECKOUT/results`, as PFLlib's own scripts read them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from dataset_utils.files import is_file, is_folder, replacing
from dataset_utils.pfllib import imported
from dataset_utils.spec import Files
from fedkdx_plugin.cli.main import guarded
from fedkdx_plugin.cli.making import make
from fedkdx_plugin.cli.options import Making, add_options, given_values
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.experiments.experiment import Experiment, file_name
from fedkdx_plugin.experiments.results import Results
from fedkdx_plugin.results.runs import Run
from registry import catalog
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse

PROGRAM = "python -m fedkdx_plugin.pfllib"
MADE_BY = "fedkdx"  # attribute of a result file that tells it from PFLlib's own


def main(words: Sequence[str]) -> int:
    """Run the command line. Returns the exit code, as of `fedkdx run`."""
    return guarded(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    parser = Parser(
        prog=PROGRAM,
        description="Run algorithms on a data set of a PFLlib checkout, and write its results there.",
        epilog=f"example: {PROGRAM} ~/PFLlib -data HAR -algo FedKDX -m cnn -gr 100 -t 3; the same command goes on",
    )
    parser.add_argument("checkout", metavar="CHECKOUT", help="folder of PFLlib, which holds dataset/ and results/")
    add_options(parser)
    add_flags(parser, Making)
    arguments = parser.parse_args(words)
    making = parse(Making, given(arguments, Making))
    checkout = Path(arguments.checkout)
    del arguments.checkout
    values = given_values(arguments)
    name = str(values.get("data", ""))
    if not name or not is_folder(checkout / "dataset" / name):
        raise UserError(f"{checkout / 'dataset'}: no data set '{name}' there; generate it with PFLlib, and give -data")
    folder = imported(checkout / "dataset" / name, name, Path(values.get("data_root", Files().data_root)))
    config = from_dict(values | {"data": str(folder.absolute())}, "")
    experiment = Experiment.comparison(config)
    model = catalog.find("models", config.model).name
    experiment.title = f"{name}, {model}"
    experiment.folder = Path(config.out) / file_name(f"pfllib-{name}-{model}-{config.goal}")  # so that runs go on
    for planned in experiment.runs:
        algorithm = catalog.find("algorithms", planned.config.algorithm[0]).name
        place = _result(checkout, name, f"{algorithm} {config.label}", config.goal, planned.config.seed - config.seed)
        _check_free(place)
    code = make(experiment, [*PROGRAM.split(), *words], making)
    for run in Results.of(experiment).runs if code in (0, 1) and not making.dry_run else ():
        _write(_result(checkout, name, run.name, config.goal, run.seed - config.seed), run)
    return code


def _result(checkout: Path, data: str, algorithm: str, goal: str, time: int) -> Path:
    """Return the path that PFLlib gives the results of a repetition; `time` counts from 0; a label ends the name."""
    return checkout / "results" / f"{data}_{file_name(algorithm)}_{goal}_{time}.h5"


def _check_free(path: Path) -> None:
    """Raise UserError if a file is there that this program did not write."""
    if not is_file(path):
        return
    try:
        with h5py.File(path) as file:
            own = file.attrs.get("made_by") == MADE_BY
    except OSError:
        own = False
    if not own:
        raise UserError(f"{path}: is not of {MADE_BY} and would be replaced; give another goal (-go), or move it away")


def _write(path: Path, run: Run) -> None:
    """Write a run's results as PFLlib does: a value for each evaluation, of the model that each client would use."""
    rows = [record.metrics[SERVED] for record in run.evaluated]
    with replacing(path) as part, h5py.File(part, "w") as file:
        file["rs_test_acc"] = np.array([row.accuracy for row in rows])
        file["rs_test_auc"] = np.array([row.auc for row in rows])
        file["rs_train_loss"] = np.array([record.train_loss for record in run.evaluated])
        file.attrs["made_by"] = MADE_BY
        file.attrs["run"] = str(run.folder.absolute())
    print(f"results for PFLlib: {path}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
