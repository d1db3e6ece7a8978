"""Keep results of runs as small CSV files, and make the tables of this folder's pages from them.

    python docs/results/make.py collect FOLDER... --into NAME [--commit HASH]   # runs -> data/NAME.csv
    python docs/results/make.py                                                 # data/*.csv -> tables in *.md
    python docs/results/make.py --check                                         # exit code 1 where a page differs

A page has its tables between `<!-- table: KIND from=NAME ... -->` and `<!-- end -->`; `csv_tables.py` says what the
kinds are, `csv_figure.py` what a figure shows, of the kind `figure`, and `csv_rows.py` what the columns of the CSV
files mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))  # where a test loads this file

import csv_figure
import csv_rows
import csv_tables

from dataset_utils.files import is_file, replacing
from dataset_utils.spec import ShardSpec
from fedkdx_plugin import load_runs
from fedkdx_plugin.cli.main import guarded
from fedkdx_plugin.configuration.choice import RATE, Common
from fedkdx_plugin.configuration.config import Options
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.participation import UNSEEN, measured
from fedkdx_plugin.experiments.experiment import FILE, read_experiment
from fedkdx_plugin.results.run_folder import MANIFEST
from fedkdx_plugin.results.runs import Run, content, nothing_accepted
from registry import catalog
from registry.errors import UserError
from registry.parameters import key_of
from registry.text import shown

FOLDER = Path(__file__).parent
ALSO = (FOLDER.parent / "privacy.md",)  # a page elsewhere that has tables of results
START, END = "<!-- table:", "<!-- end -->"
BLOCK = re.compile(rf"({START} (?P<order>[^\n]*?) -->\n)(?:(?!{START}).)*?({END})", re.DOTALL)
COMMENT = re.compile(r"<\s*!\s*-+.*?(?:-->|\Z)", re.DOTALL)
MEANT = re.compile(r"\W*(?:(?:tables?|end)\b|.*\bfrom\s*=)", re.DOTALL | re.IGNORECASE)  # for the mark of a block
MARK = re.compile(rf"{START} [^\n]*? -->|{END}")
NUMERIC = re.compile(r"^\|(?=.*-:).*-+:? *\|$", re.MULTILINE)  # the rule below the heads, with a right-aligned column
MADE_BY = re.compile(r"\bcommit `?[0-9a-f]{7,40}\b.*`[^`]*(fedkdx|run\.py) [^`]+`")
HASH = re.compile(r"[0-9a-f]{7,40}")

# Options that have a column of their own, or that do not change the results of the last round.
APART = (
    *("data", "model", "student_model", "algorithm", "label", "set", RATE, "seed", "global_rounds"),
    *("evaluate_on", "data_seed", "vary", "times", "preset", "goal", "eval_gap", "num_classes"),
    *("out", "raw", "download", "data_root", "backend", "device", "device_id", "client_memory"),
)
DEFAULTS = {key_of(own): own.default for part in (ShardSpec, Options) for own in dataclasses.fields(part)}
TENTH = {"train_fraction": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {  # protocol.md: name -> options that are not defaults
    "all": {},
    "tenth": TENTH,
    "quarter": {"train_fraction": 0.25},
    "blocked": {"train_fraction": 0.25, "split": "blocked"},
    "blocked eighth": {"train_fraction": 0.125, "split": "blocked"},  # of the search
    "Dirichlet 0.1": TENTH | {"partition": "dirichlet"},
    "Dirichlet 0.5": TENTH | {"partition": "dirichlet", "alpha": 0.5},
    "late": TENTH | {"late": "0.3@HALF"},
    "rare": TENTH | {"rare": "0.3@0.1"},
    "unseen": TENTH | {"unseen": 0.2},
}
OF_SETTING = {key for options in SETTINGS.values() for key in options}


def collect(folders: Iterable[Path], path: Path, commit: str = "") -> str:
    """Add the finished runs in folders to a CSV file, sorted, and return a line that says how many.

    A run in which no reply was ever accepted is left out: its networks are those that it began with.

    Args:
        folders: run folders, or folders of runs at any depth.
        path: the CSV file, which need not exist.
        commit: of the code that made the runs; where it is not given, rows have the package's version.

    Raises:
        UserError: a folder holds no run, a run is damaged or cannot be kept, or one that is in the file already has
            other numbers. The file is then as before.
    """
    if commit and not HASH.fullmatch(commit):
        raise UserError(f"--commit {commit}: write 7 to 40 hexadecimal digits")
    before = csv_rows.read(path) if is_file(path) else pd.DataFrame(columns=csv_rows.COLUMNS, dtype=str)
    rows, missing, idle = [], 0, 0
    for folder in folders:
        results = load_runs(folder)
        missing += len(results.missing)
        learned = [run for run in results.runs if not nothing_accepted(run)]
        idle += len(results.runs) - len(learned)
        rows += [_named_row(run, commit) for run in learned]
    found = pd.DataFrame(rows, columns=csv_rows.COLUMNS, dtype=str)
    after = csv_rows.merged([before, found], str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(after.to_csv(index=False, lineterminator="\n"), encoding="utf-8")
    new = len(after) - len(before)
    there = f"{len(found) - new} there already, {missing} unfinished or failed left out"
    there += f", {idle} in which no reply was accepted left out" if idle else ""
    return f"{path.name}: {new} runs added ({there}), {len(after)} in all"


def _named_row(run: Run, commit: str) -> dict[str, str]:
    """Return the row of a run. Raises UserError that names its folder: it cannot be kept."""
    try:
        return row_of(run, commit)
    except UserError as error:
        raise UserError(f"{run.folder}: {error}") from error


def row_of(run: Run, commit: str = "") -> dict[str, str]:
    """Return the row of a finished run: the metrics of its last round (see `csv_rows.COLUMNS`)."""
    last = run.evaluated[-1].metrics
    served, first, config = last[SERVED], run.records[0], run.config
    options = changed_options(config)
    f1, balanced = of_pairs(run, served)
    numbers = {
        "accuracy": (np.nanmean(served.client_accuracy), 5),
        "pooled": (served.accuracy, 5),
        "f1": (served.f1, 5),
        "f1_pooled": (f1, 5),
        "worst": (served.accuracy_worst, 5),
        "balanced": (balanced, 5),
        "auc": (served.auc, 5),
        "recall": (served.recall, 5),
        "mb_up": (sum(record.bytes_up for record in run.records) / 1e6, 2),
        "mb_down": (sum(record.bytes_down for record in run.records) / 1e6, 2),
        "mb_first": (first.bytes_down / 1e6 / max(1, len(first.selected)), 3),
        "seconds": (sum(sum(record.seconds.values()) for record in run.records), 0),
    }
    return {
        "experiment": experiment_of(run.folder),
        "data": str(run.data["name"]),
        "setting": setting_of(options, int(config["global_rounds"])),
        "options": as_text(options),
        "model": str(config["model"]),
        "student_model": "" if (student := config.get("student_model")) in (None, config["model"]) else str(student),
        "algorithm": run.algorithm,
        "label": str(config.get("label") or ""),
        "hyper": as_text(changed_hyper_parameters(run)),
        "learning_rate": f"{config.get(RATE, Common().local_learning_rate):g}",
        "seed": str(run.seed),
        "data_seed": str(config.get("data_seed", 0)),
        "rounds": str(config["global_rounds"]),
        "evaluated_on": run.evaluated_on,
        "clients": str(len(served.client_accuracy)),
        **{name: short(float(value), digits) for name, (value, digits) in numbers.items()},
        "networks": ";".join(f"{name}={pair(last[name])}" for name in other_networks(last)),
        "groups": ";".join(f"{name}={text}" for name, text in groups_of(run).items()),
        "client_accuracy": ";".join(short(float(value), 5) for value in served.client_accuracy),
        "names": csv_rows.packed(names_of(run)),
        "commit": commit or str(run.environment["versions"].get("fedkdx", "")),
        "processor": str(run.environment.get("device", "")),
    }


def experiment_of(folder: Path) -> str:
    """Return the name of the experiment that a run folder is of; without one, the name of the folder above."""
    for place in folder.resolve().parents:
        if is_file(place / FILE):
            return str(read_experiment(place).get("name") or place.name)
    return folder.resolve().parent.name


def changed_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a run that are not the defaults, without those that have columns of their own."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in DEFAULTS.items()}
    return {key: value for key, value in config.items() if key not in APART and value != plain.get(key)}


def setting_of(options: Mapping[str, Any], rounds: int) -> str:
    """Return the name that `SETTINGS` has for these options, with those that it says nothing of; else them, as text.

    Options of local training and those that choose subjects are of no setting.
    """
    own = {key: value for key, value in options.items() if key not in csv_rows.TRAINING | csv_rows.SUBJECTS}
    named = {key: value for key, value in own.items() if key in OF_SETTING}
    plain = named | ({"late": re.sub(rf"@{rounds // 2}$", "@HALF", named["late"])} if "late" in named else {})
    name = next((name for name, wanted in SETTINGS.items() if plain == wanted), as_text(named))
    return f"{name} {as_text({key: value for key, value in own.items() if key not in named})}".strip()


def changed_hyper_parameters(run: Run) -> dict[str, Any]:
    """Return the hyper-parameters of a run that are not the algorithm's defaults. Raises UserError: it is unknown."""
    server: Any = catalog.load("algorithms", str(run.config["algorithm"][0]))
    fields = {key_of(own): own.default for own in dataclasses.fields(server.Params)}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    given = {key.removeprefix(f"{run.algorithm}."): value for key, value in (run.config.get("set") or {}).items()}
    return {key: value for key, value in given.items() if key not in plain or value != plain[key]}


def other_networks(last: Mapping[str, Metrics]) -> list[str]:
    """Return the networks whose predictions differ from those that clients are served."""
    losses = {name: metrics.client_loss for name, metrics in last.items() if name != UNSEEN}
    return [name for name, own in losses.items() if not np.array_equal(own, losses[SERVED], equal_nan=True)]


def groups_of(run: Run) -> dict[str, str]:
    """Return the accuracies of the clients set apart, over clients and pooled: late, rare, unseen."""
    last = run.evaluated[-1].metrics
    found = {}
    for group, ids in measured(run.groups).items():
        own = last[SERVED]
        found[group] = f"{short(float(np.nanmean(own.client_accuracy[ids])), 5)}/{short(own.accuracy_of(ids), 5)}"
    return found | ({UNSEEN: pair(last[UNSEEN])} if UNSEEN in last else {})


def of_pairs(run: Run, served: Metrics) -> tuple[float, float]:
    """Return macro F1 and balanced accuracy of all test windows together, from the confusion matrices.

    NaN where a prediction was not finite: the matrices leave such windows out.
    """
    if served.nonfinite:
        return float("nan"), float("nan")
    pairs = run.confusion[SERVED].sum(axis=0)
    hits, true, predicted = np.diag(pairs), pairs.sum(axis=1), pairs.sum(axis=0)
    f1 = (2 * hits / np.maximum(true + predicted, 1))[true + predicted > 0].mean()
    return float(f1), float((hits / np.maximum(true, 1))[true > 0].mean())


def names_of(run: Run) -> list[str]:
    """Return the subjects of each client, '+' between several; [] where clients are no subjects, or are not known.

    Raises:
        UserError: a subject's name cannot be kept (see `csv_rows.joined`).
    """
    if run.config.get("partition") != "subject" or not is_file(run.folder / MANIFEST):
        return []
    clients = json.loads(content(run.folder, MANIFEST))["clients"]
    return [csv_rows.joined(client["subjects"]) for client in clients]


def pair(metrics: Metrics) -> str:
    """Return accuracy over clients and pooled, 'a/b'."""
    return f"{short(float(np.nanmean(metrics.client_accuracy)), 5)}/{short(metrics.accuracy, 5)}"


def short(value: float, digits: int) -> str:
    """Return a number with at most so many decimals; '' for NaN."""
    text = "" if np.isnan(value) else f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def as_text(values: Mapping[str, Any]) -> str:
    """Return 'a=1 b=2', sorted by name; '+' between the items of a list, and no spaces in a value."""
    texts = {key: "+".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in values.items()}
    return " ".join(f"{key}={texts[key].replace(' ', '')}" for key in sorted(texts))


def filled(text: str, data: Path) -> str:
    """Return a page with every table made anew from the CSV files in `data`. Raises UserError: a table cannot be."""
    for comment in COMMENT.findall(text):
        if MEANT.match(comment) and not MARK.fullmatch(comment):
            line = shown(comment.partition("\n")[0])
            raise UserError(f"'{line}': a block begins with '{START} KIND from=NAME -->' and ends with '{END}'")
    if not text.count(START) == text.count(END) == len(BLOCK.findall(text)):
        raise UserError(f"a '{START} KIND from=NAME -->' has no '{END}' below it, or the other way round")
    return BLOCK.sub(lambda block: f"{block[1]}\n{_made(block['order'], data)}\n{block[3]}", text)


def _made(order: str, data: Path) -> str:
    return csv_figure.line(order, data) if csv_figure.is_figure(order) else csv_tables.make(order, data)


def without_source(text: str) -> bool:
    """Tell if a page has a table with numbers outside of all blocks, and no line that says commit and command."""
    return bool(NUMERIC.search(BLOCK.sub("", text))) and not MADE_BY.search(text)


def fill(pages: Iterable[Path], data: Path, check: bool) -> int:
    """Fill all pages, or only say which differ. Returns the exit code: 1 if `check` and a page differs, else 0."""
    code = 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        try:
            new = filled(text, data)
        except UserError as error:
            raise UserError(f"{page.name}: {error}") from error
        if new != text and check:
            print(f"{page.name}: differs from what the CSV files give; run {Path(__file__).name}")
            code = 1
        elif new != text:
            with replacing(page) as part:
                part.write_text(new, encoding="utf-8")
            print(f"{page.name}: written")
        for order in filter(csv_figure.is_figure, (block["order"] for block in BLOCK.finditer(text))):
            if not is_file(picture := page.parent / csv_figure.path(order, data)):
                print(f"{picture.name}: {f'is not there; run {Path(__file__).name}' if check else 'drawn'}")
                code = code or int(check)
                if not check:
                    csv_figure.draw(order, data, picture)
        if without_source(text):
            print(f"{page.name}: has tables that are not from a CSV")
    return code


def main(words: Sequence[str]) -> int:
    """Collect runs, or fill or check the pages. Returns the exit code (see `fedkdx_plugin.cli.main.guarded`)."""
    parser = argparse.ArgumentParser(prog="make.py", description="Results as CSV files, and tables made from them.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page differs")
    collecting = parser.add_subparsers(dest="command").add_parser("collect", help="add finished runs to a CSV file")
    collecting.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="folders of runs, at any depth")
    collecting.add_argument("--into", required=True, metavar="NAME", help="of the file: data/NAME.csv")
    collecting.add_argument("--commit", default="", metavar="HASH", help="commit of the code that made the runs")
    given = parser.parse_args(words)

    def command() -> int:
        if given.command == "collect":
            print(collect(given.folders, csv_rows.path_of(given.into, FOLDER / "data"), given.commit))
            return 0
        return fill([*sorted(FOLDER.glob("*.md")), *ALSO], FOLDER / "data", given.check)

    return guarded(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
