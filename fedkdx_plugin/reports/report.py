"""The report of finished runs: one HTML page, a Markdown file, and every table and figure as a file of its own.

report.html             everything, self-contained
report.md               the tables, with links to the figures
tables/*.tex, *.csv     each table
figures/*.pdf, *.png    each figure
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
from fedkdx_plugin.reports import content, data, figures, overview, tables
from fedkdx_plugin.reports.comparison_table import TUNING, VARIED
from fedkdx_plugin.reports.sections import Section, arrange
from fedkdx_plugin.reports.tables import Table
from fedkdx_plugin.results.runs import Run, read_all
from registry import __version__
from registry.errors import UserError

PAGE, TEXT, TABLES, FIGURES = "report.html", "report.md", "tables", "figures"
SHUFFLED = (
    "Split 'shuffled': overlapping windows fall into training and test part alike, which flatters every method; "
    "'--split blocked' does not."
)


@dataclass(frozen=True)
class Chapter:
    """What the report holds of a section, in the page's order: a heading, and paragraphs, tables and figures below."""

    section: Section
    parts: list[tuple[str, list[str | Table | figures.Drawn]]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return self.section.slug

    @property
    def items(self) -> list[str | Table | figures.Drawn]:
        return [item for _, items in self.parts for item in items]


def write(folders: Sequence[Path], out: Path, title: str, about: str = "") -> Path:
    """Write the report of these runs into the folder `out`; returns its page.

    Args:
        folders: of runs; those that are not there, or not finished, are said to be so and count in nothing.
        about: a paragraph.

    Raises:
        UserError: a damaged run, jinja2 or matplotlib missing, or `out` cannot be written.
    """
    _check_packages()
    runs, missing = read_all(folders)
    sections = arrange(runs)
    looks = figures.Looks([method.name for section in sections for method in figures.shown(section)])
    chapters = [_chapter(section, out, looks) for section in sections]
    glance = overview.overview(sections)
    for table in [*glance, *(item for chapter in chapters for item in chapter.items if isinstance(item, Table))]:
        _write(out / TABLES / f"{table.name}.tex", tables.latex(table))
        _write(out / TABLES / f"{table.name}.csv", tables.to_csv(table))
    values = {
        "title": title,
        "about": about,
        "warning": TUNING if any(section.on != "test" for section in sections) else "",
        "count": len(runs),
        "missing": missing,
        "overview": glance,
        "chapters": chapters,
        "version": __version__,
    }
    _write(out / TEXT, _render("report.md.j2", values, out))
    _write(out / PAGE, _render("report.html.j2", values, out))
    return out / PAGE


def _check_packages() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"a report needs {error.name}: pip install jinja2 matplotlib") from error


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _chapter(section: Section, out: Path, looks: figures.Looks) -> Chapter:
    """All tables of a section, and its figures, which are written now."""
    drawn = {figure.name.rpartition("-")[2]: figure for figure in figures.draw(section, out / FIGURES, looks)}
    tested, meaning = content.significance(section)
    beside = content.paper(section)
    parts: list[tuple[str, list[Any]]] = [
        ("Results", [content.results(section)]),
        ("Beside the paper", [beside] if beside else []),
        ("More than chance?", [item for item in (tested, meaning) if item]),
        ("Convergence", [drawn["convergence"], content.reaching(section)]),
        ("Clients", [drawn["clients"], content.clients(section), drawn["confusion"]]),
        ("Data", data.described(section)),
        ("Who holds which classes", [_classes(section, out / FIGURES)]),
        ("Compression", [drawn["compression"]] if "compression" in drawn else []),
        ("Time", [drawn["seconds"], content.seconds(section)]),
    ]
    return Chapter(section, [(heading, items) for heading, items in parts if items])


def _classes(section: Section, folder: Path) -> str | figures.Drawn:
    """The figure of the data's own manifest, or why it cannot be had."""
    shards, name = data.manifest_folder(section), f"{section.slug}-classes"
    if shards is None:
        return (
            f"No manifest of these runs' data is left in {section.first.folder} or {section.first.data['folder']}, so "
            "their classes cannot be shown."
        )
    for ending in data_figure.FORMATS:
        folder.mkdir(parents=True, exist_ok=True)
        data_figure.draw(shards, folder / f"{name}{ending}")
    return figures.Drawn(
        name, f"{section.data}: windows of each client (left), and how many of each class (right).", 9.5
    )


def setting(section: Section) -> str:
    """The section's setting in a line, for people."""
    config = section.config
    trained = {
        "model": config.get("model"),
        "rounds": config.get("global_rounds"),
        "join ratio": config.get("join_ratio"),
        "local epochs": config.get("local_epochs"),
        "batch": config.get("batch_size"),
        "learning rate": config.get("local_learning_rate"),
        "partition": config.get("partition"),
        "split": config.get("split"),
        "training windows kept": config.get("train_fraction"),
    }
    clients = len(section.first.evaluated[-1].metrics["served"].client_samples)
    words = [f"{clients} clients", f"{len(section.first.classes)} classes"]
    return ", ".join([*words, *(f"{name} {value}" for name, value in trained.items() if value is not None)])


def remarks(section: Section) -> list[str]:
    """What a reader must know before the figures."""
    runs = [run for method in section.methods for run in method.runs]
    found = [*section.notes]
    if section.config.get("split") == "shuffled":
        found.append(SHUFFLED)
    if max(len(method.runs) for method in section.methods) > 1:
        found.append(f"± over seeds: {VARIED[section.config.get('vary', 'training')]}")
    if min(len(method.runs) for method in section.methods) < 2:
        found.append("Some methods have one seed only: nothing is known of how much another seed would change.")
    if len({len(method.runs) for method in section.methods}) > 1:
        found.append("Not all methods have the same number of seeds.")
    if len({run.environment.get("device") for run in runs}) > 1:
        found.append("Runs were made on different devices: their seconds do not compare.")
    if len({str(run.environment["versions"]) for run in runs}) > 1:
        found.append(
            "Runs were made with different versions of packages; each run's own are listed at the section's end."
        )
    return found


def origin(run: Run, section: Section) -> dict[str, str]:
    """Where a run comes from: what to type, and what its figures depend on besides the section's setting."""
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
        "settings": as_yaml(own),
    }


def as_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _render(template: str, values: Mapping[str, Any], out: Path) -> str:
    import jinja2

    def embedded(figure: figures.Drawn) -> str:
        content = (out / FIGURES / f"{figure.name}.png").read_bytes()
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
    environment.tests["figure"] = lambda item: isinstance(item, figures.Drawn)
    environment.globals |= {"setting": setting, "remarks": remarks, "origin": origin}
    return environment.get_template(template).render(values)
