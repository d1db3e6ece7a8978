"""Results of finished runs as tables, plots and a report, from Python and for the command line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from dataset_utils.counts import some
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.experiments.experiment import Experiment, algorithms_of, title_and_about
from fedkdx_plugin.reports import comparison_table, curves, people
from fedkdx_plugin.reports.sections import arrange
from fedkdx_plugin.results.records import PER_CLIENT, SCALARS
from fedkdx_plugin.results.runs import Missing, Run, find, read_all
from registry.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Results:
    """Finished runs, and the tables, plots and report of them.

    Attributes:
        folder: the experiment folder, or the folder that was read.
        runs: the finished runs (see `fedkdx_plugin.results.runs.Run`).
        missing: the runs that failed or are not finished, with the reason.
        title, about: title and introduction of the report.
        is_grid: whether the runs belong to an experiment with sections.
    """

    folder: Path
    runs: Sequence[Run]
    missing: Sequence[Missing] = ()
    title: str = ""
    about: str = ""
    is_grid: bool = False

    @staticmethod
    def of(experiment: Experiment) -> Results:
        """Read the run folders of an experiment. Raises UserError: a damaged run folder."""
        if experiment.folder is None:
            raise RuntimeError("the experiment has no folder yet; call make_folder first")
        runs, missing = read_all([experiment.place(planned) for planned in experiment.runs])
        title, about = experiment.title, experiment.about
        return Results(experiment.folder, runs, missing, title, about, experiment.is_grid)

    @staticmethod
    def load(folder: str | Path) -> Results:
        """Read all run folders in a folder, at any depth. Raises UserError: there is none, or a damaged one."""
        whole = Path(folder)
        runs, missing = read_all(find(whole))
        runs = _as_planned(runs)
        title, about = title_and_about(whole)
        grid = any(run.folder.parent != whole for run in runs)
        return Results(whole, runs, missing, title or whole.resolve().name, about, grid)

    @property
    def count(self) -> int:
        """Number of runs, finished or missing."""
        return len(self.runs) + len(self.missing)

    def sections(self) -> list[Results]:
        """Return the results of each section, in order of their runs."""
        folders = dict.fromkeys(run.folder.parent for run in self.runs)
        return [
            Results(folder, [run for run in self.runs if run.folder.parent == folder], title=self.title)
            for folder in folders
        ]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each setting and method: metrics of the last round in [0, 1], mean and std over seeds.

        A method with several networks that predict has a row for each of them, too, such as 'FedKDX (student)'.
        """
        lines = []
        for section in arrange(self.runs):
            for name, same in _by_name(_rows([run for method in section.methods for run in method.runs])).items():
                values: dict[str, Any] = {"setting": section.title, "method": name, "seeds": len(same)}
                for key in same[0].values:
                    own = np.array([row.values[key] for row in same])
                    column = comparison_table.COLUMNS.get(key, key.replace(" ", "_"))
                    values |= {column: own.mean(), f"{column}_std": own.std(ddof=1) if len(own) > 1 else np.nan}
                lines.append(values)
        return pd.DataFrame(lines).set_index(["setting", "method"])

    @property
    def rounds(self) -> pd.DataFrame:
        """A row for each setting, method, seed, round and view: metrics, loss, bytes, seconds and clients."""
        lines = []
        for key, run in self._keyed():
            for record in run.records:
                common = key | {
                    "round": record.round,
                    "train_loss": record.train_loss,
                    "bytes_up": record.bytes_up,
                    "bytes_down": record.bytes_down,
                    "seconds": sum(record.seconds.values()),
                    "selected": len(record.selected),
                    "rejected": len(record.rejected),
                    "lost": len(record.lost),
                }
                views: Mapping[str, Metrics | None] = record.metrics or {"": None}
                for view, metrics in views.items():
                    own = {name: getattr(metrics, name) for name in SCALARS} if metrics else {}
                    lines.append(common | {"view": view} | own)
        return pd.DataFrame(lines)

    @property
    def clients(self) -> pd.DataFrame:
        """A row for each setting, method, seed, client and view: the client's subjects, metrics of the last round."""
        lines = []
        for key, run in self._keyed():
            subjects = people.whose(run, len(run.evaluated[-1].metrics[SERVED].client_samples))
            for view, metrics in run.evaluated[-1].metrics.items():
                columns = {name.removeprefix("client_"): getattr(metrics, name) for name in PER_CLIENT}
                for client, samples in enumerate(metrics.client_samples):
                    own = {name: float(values[client]) for name, values in columns.items()}
                    who = {"client": client, "subject": subjects[client], "view": view, "windows": int(samples)}
                    lines.append(key | who | own)
        return pd.DataFrame(lines)

    def _keyed(self) -> Iterable[tuple[dict[str, Any], Run]]:
        for section in arrange(self.runs):
            for method in section.methods:
                for run in method.runs:
                    yield {"setting": section.title, "method": method.name, "seed": run.seed}, run

    def plot(self, metric: str = "accuracy") -> Figure:
        """Plot a metric over rounds and over megabytes, mean ± std over seeds.

        Args:
            metric: a column of `rounds`: accuracy, auc, f1, recall, auc_macro, loss, accuracy_std or accuracy_worst.

        Raises:
            UserError: several settings, or no such metric.
        """
        self._require_one()
        return curves.plotted(self.runs, self.title, metric)

    def report(self, out: str | Path | None = None, reference: str | Sequence[str] = ()) -> Path:
        """Write the report of all runs and return the path of its page.

        Args:
            out: folder of the report; by default `report` in the results' folder.
            reference: name of the method that all others are compared with, or several names; by default FedKDX+ and
                FedKDX, else the best method.

        Raises:
            UserError: no run is of a reference, jinja2 or matplotlib is missing, or the folder cannot be written.
        """
        from fedkdx_plugin.reports import report

        folders = [*(run.folder for run in self.runs), *(missing.folder for missing in self.missing)]
        place = Path(out) if out else self.folder / "report"
        references = [reference] if isinstance(reference, str) else reference
        return report.write(folders, place, self.title, self.about, references)

    def write(self) -> str:
        """Write `comparison.md`, `.csv` and, with matplotlib, `.png` of one section. Returns the table as Markdown."""
        self._require_one()
        text = comparison_table.write(self.folder, self.runs, self.runs[0].config.get("vary", "training"))
        if importlib.util.find_spec("matplotlib"):
            curves.draw(self.folder / "comparison.png", self.runs, self.title)
        return text

    def _require_one(self) -> None:
        if not self.runs:
            reasons = some(with_reasons([(missing.name, missing.reason) for missing in self.missing]), "; ")
            raise UserError(f"{self.folder}: no run is finished ({reasons})")
        if len(found := dict.fromkeys(run.folder.parent for run in self.runs)) > 1:
            names = some(folder.name for folder in found)
            raise UserError(
                f"{self.folder}: runs of several settings ({names}); use one of `sections()`, or `report()`"
            )

    def __repr__(self) -> str:
        parts = [comparison_table.markdown(_rows(section.runs)) for section in self.sections()]
        parts += [f"missing: {missing.name}: {missing.reason}" for missing in self.missing]
        return "\n".join(parts) or f"no finished run in {self.folder}"

    def _repr_html_(self) -> str:
        return self.table.to_html() if self.runs else repr(self)


def with_reasons(runs: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each reason, with the name of the first run that has it, and the number of others."""
    alike: dict[str, list[str]] = {}
    for name, reason in runs:
        alike.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in alike.items()
    ]


def _as_planned(runs: Sequence[Run]) -> list[Run]:
    """Return runs with those of a comparison in the order in which it names its algorithms, by seed."""
    planned = {folder: algorithms_of(folder) for folder in dict.fromkeys(run.folder.parent for run in runs)}
    order = []
    for folder, specs in planned.items():
        own = [run for run in runs if run.folder.parent == folder]
        if all(run.config["algorithm"][0] in specs for run in own):
            own.sort(key=lambda run: (run.seed, specs.index(run.config["algorithm"][0])))
        order += own
    return order


def _rows(runs: Sequence[Run]) -> list[comparison_table.Row]:
    return comparison_table.of_seeds(runs)


def _by_name(rows: Iterable[comparison_table.Row]) -> dict[str, list[comparison_table.Row]]:
    found: dict[str, list[comparison_table.Row]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found
