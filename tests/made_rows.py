"""Rows of results as the CSV files of `docs/results/data` hold them, made by hand; and the scripts that read them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent


def load_make():
    spec = importlib.util.spec_from_file_location("results_make", ROOT / "docs" / "results" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()
csv_figure, csv_rows, csv_tables = make.csv_figure, make.csv_rows, make.csv_tables


def row(algorithm: str, accuracy: float, seed: int = 0, clients: list[float] | None = None, **given: object) -> dict:
    """Return a row of a CSV file; the clients have the accuracy of all, unless they are given."""
    clients = clients or [accuracy] * 6
    values = dict.fromkeys(csv_rows.COLUMNS, "") | {
        "data": "UCI-HAR",
        "setting": "tenth",
        "model": "cnn",
        "algorithm": algorithm,
        "learning_rate": "0.01",
        "seed": seed,
        "data_seed": seed,
        "rounds": 100,
        "evaluated_on": "test",
        "accuracy": accuracy,
        "pooled": accuracy,
        "client_accuracy": ";".join(map(str, clients)),
        "names": f"1..{len(clients)}",
    }
    return {key: str(value) for key, value in (values | given).items()}


def write(path: Path, rows: list[dict]) -> None:
    pd.DataFrame(rows, columns=csv_rows.COLUMNS).to_csv(path, index=False)


def cells(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without the rule below the heads."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return [lines[0], *lines[2:]]
