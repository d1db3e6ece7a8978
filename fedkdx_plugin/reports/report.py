"""Report of finished runs: one HTML page, a Markdown file, and separate files for each table and plot.

report.html             everything, self-contained
report.md               the tables, with links to the plots
tables/*.tex, *.csv     each table
figures/*.pdf, *.png    each plot
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dataset_utils import figure as data_figure
from dataset_utils.files import replacing
from fedkdx_plugin.reports import against, audits, classes, content, data, overview, people, plots, tables
from fedkdx_plugin.reports.comparison_table import TUNING, VARIED
from fedkdx_plugin.reports.looks import Looks
from fedkdx_plugin.reports.plots import Plot
from fedkdx_plugin.reports.sections import Section, arrange
from fedkdx_plugin.reports.tables import Table
from fedkdx_plugin.results.runs import Missing, Run, read_all
from registry import __version__
from registry.errors import UserError

PAGE, TEXT, TABLES, PLOTS = "report.html", "report.md", "tables", "figures"
SHUFFLED = (
    "Split 'shuffled': windows of the training part overlap windows of the test part, so all metrics are too "
    "optimistic; with '--split blocked' they do not overlap."
)


@dataclass(frozen=True)
class Chapter:
    """Contents of a section of the report.

    Attributes:
        section: the section.
        parts: headings, in the order of the page, each with its paragraphs, tables and plots.
    """

    section: Section
    parts: list[tuple[str, list[str | Table | Plot]]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Name by which the page links to this chapter."""
        return self.section.slug

    @property
    def items(self) -> list[str | Table | Plot]:
        """Paragraphs, tables and plots of all parts."""
        return [item for _, items in self.parts for item in items]


def write(folders: Sequence[Path], out: Path, title: str, about: str = "", references: Sequence[str] = ()) -> Path:
    """Write the report of finished runs into the folder `out`, and return the path of its HTML page.

    Args:
        folders: run folders; the report names those that are missing or not finished, and uses only the others.
        out: folder of the report.
        title: title of the report.
        about: introductory paragraph.
        references: methods that the others are compared with (see `sections.arrange`).

    Raises:
        UserError: no run is left and one is damaged, a reference is in no run, a package is missing, or `out` cannot
            be written.
    """
    return compose(*read_all(folders), out, title, about, references)


def compose(
    runs: Sequence[Run],
    missing: Sequence[Missing],
    out: Path,
    title: str,
    about: str = "",
    references: Sequence[str] = (),
) -> Path:
    """Write the report of runs that were read; see `write`."""
    _check_packages()
    sections = arrange(runs, references)
    looks = Looks(method.name for section in sections for method in plots.shown(section))
    chapters = [_chapter(section, out, looks) for section in sections]
    summary = overview.overview(sections)
    for table in [*summary, *(item for chapter in chapters for item in chapter.items if isinstance(item, Table))]:
        _write(out / TABLES / f"{table.name}.tex", tables.latex(table))
        _write(out / TABLES / f"{table.name}.csv", tables.to_csv(table))
    values = {
        "title": title,
        "about": about,
        "warning": TUNING if any(section.on != "test" for section in sections) else "",
        "count": len(runs),
        "missing": missing,
        "overview": summary,
        "chapters": chapters,
        "version": __version__,
    }
    _write(out / TEXT, _render("report.md.j2", values, out))
    _write(out / PAGE, _render("report.html.j2", values, out))
    return out / PAGE


def _check_packages() -> None:
    """Raise UserError if a package is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install jinja2 matplotlib") from error


def _write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _chapter(section: Section, out: Path, looks: Looks) -> Chapter:
    """Make the tables and plots of a section, and write the plots."""
    made = {plot.name.rpartition("-")[2]: plot for plot in plots.draw(section, out / PLOTS, looks)}
    paper = content.paper(section)
    parts: list[tuple[str, list[str | Table | Plot]]] = [
        ("Results", [content.results(section)]),
        ("Comparison with the paper", [paper] if paper else []),
        ("Significance", [*against.significance(section)]),
        ("Convergence", [made["convergence"], content.reaching(section), *([made["loss"]] if "loss" in made else [])]),
        ("Classes", [classes.together(section), classes.by_class(section), made["confusion"]]),
        ("Clients", [made["clients"], content.clients(section)]),
        ("Data card", [*data.described(section)]),
        ("Classes of each client", [_classes(section, out / PLOTS)]),
        ("Compression", [made["compression"]] if "compression" in made else []),
        ("Audit", audits.described(section, out / PLOTS, looks)),
        ("Time", [made["seconds"], content.seconds(section)]),
    ]
    return Chapter(section, [(heading, items) for heading, items in parts if items])


def _classes(section: Section, folder: Path) -> str | Plot:
    """Write the plot of windows by client and class, from the data's manifest; return it, or why there is none."""
    shards, name = people.manifest_folder(section.first), f"{section.slug}-classes"
    if shards is None:
        return (
            f"No manifest of these runs' data is left in {section.first.folder} or {section.first.data['folder']}, so "
            "there is no plot of the classes of each client."
        )
    for ending in data_figure.FORMATS:
        folder.mkdir(parents=True, exist_ok=True)
        data_figure.draw(shards, folder / f"{name}{ending}")
    caption = f"{section.data}: windows of each client (left), and how many of each class (right){data.whose(section)}."
    return Plot(name, caption, 9.5)


def main_options(section: Section) -> str:
    """Return the main options of a section in one line."""
    config = section.config
    trained = {
        "model": config.get("model"),
        "rounds": config.get("global_rounds"),
        "join_ratio": config.get("join_ratio"),
        "local epochs": config.get("local_epochs"),
        "batch": config.get("batch_size"),
        "learning rate": _rates(section),
        "partition": config.get("partition"),
        "split": config.get("split"),
        "training windows kept": config.get("train_fraction"),
    }
    clients = len(section.first.evaluated[-1].metrics["served"].client_samples)
    words = [f"{clients} clients", f"{len(section.first.classes)} classes"]
    return ", ".join([*words, *(f"{name} {value}" for name, value in trained.items() if value is not None)])


def _rates(section: Section) -> str:
    """Return the learning rates of a section's methods: one, or the lowest and the highest."""
    rates = sorted({float(method.runs[0].config.get("local_learning_rate", 0.0)) for method in section.methods})
    return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g} (of each method its own)"


def remarks(section: Section) -> list[str]:
    """Return remarks without which the metrics would be misunderstood."""
    runs = section.runs
    found = [*section.notes]
    if section.config.get("split") == "shuffled":
        found.append(SHUFFLED)
    if max(len(method.runs) for method in section.methods) > 1:
        found.append(f"± over seeds: {VARIED[section.config.get('vary', 'training')]}")
    if min(len(method.runs) for method in section.methods) < 2:
        found.append("Some methods have only one seed, which does not show how much results change with the seed.")
    if len({len(method.runs) for method in section.methods}) > 1:
        found.append("Not all methods have the same number of seeds.")
    if len({run.environment.get("device") for run in runs}) > 1:
        found.append("Runs were made on different devices, so their seconds cannot be compared.")
    if len({str(run.environment["versions"]) for run in runs}) > 1:
        found.append(
            "Runs were made with different versions of packages, listed for each run at the end of the section."
        )
    return found


def origin(run: Run, section: Section) -> dict[str, str]:
    """Return the origin of a run: its command, and all that its metrics depend on besides the section's options."""
    own = {key: value for key, value in run.config.items() if key not in section.config}
    versions = ", ".join(f"{name} {version}" for name, version in run.environment["versions"].items() if version)
    return {
        "folder": str(run.folder),
        "command": shlex.join(run.environment["command"]),
        "versions": versions,
        "machine": ", ".join(
            str(run.environment[key]) for key in ("device", "platform", "backend") if key in run.environment
        ),
        "data": f"{run.data['name']}, manifest {run.data['manifest_sha256']}",
        "options": as_yaml(own),
    }


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return values as YAML, in their order."""
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _render(template: str, values: Mapping[str, Any], out: Path) -> str:
    """Return a filled-in template; plots are read from the report's folder `out`."""
    import jinja2

    def embedded(plot: Plot) -> str:
        content = (out / PLOTS / f"{plot.name}.png").read_bytes()
        return f"data:image/png;base64,{base64.b64encode(content).decode()}"

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"markdown": tables.markdown, "plain": tables.escaped, "embedded": embedded, "yaml": as_yaml}
    environment.tests["table"] = lambda item: isinstance(item, Table)
    environment.tests["plot"] = lambda item: isinstance(item, Plot)
    environment.globals |= {"main_options": main_options, "remarks": remarks, "origin": origin}
    return environment.get_template(template).render(values)
