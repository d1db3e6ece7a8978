"""What a run on Flower is: the part that all parties know, and the part that is the server's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dataset_utils.files import replacing
from fedkdx_plugin.configuration.config import Config, from_dict
from registry.errors import UserError
from registry.parameters import Params, option

ELSEWHERE = "sites"  # stands for the data set's name where the data are the sites' own
OPTIONS = "flower.json"
OUTCOME = "outcome.json"
FOLDER = "FEDKDX_FLOWER_FOLDER"  # environment variable by which the ServerApp finds the run's folder
OWN = ("out", "data_root", "raw", "download", "device", "device_id", "engine")  # nobody else's business
RESOLVED = ("preset",)  # its values are in 'set'


def shared_settings(settings: Mapping[str, Any]) -> str:
    """A run's resolved configuration as every party gets it: without the server's own paths, as JSON."""
    common = {key: value for key, value in settings.items() if key not in OWN + RESOLVED}
    return json.dumps(common | {"data": "at-the-sites"}, sort_keys=True)


def read_settings(text: str) -> Config:
    """The configuration that `shared_settings` wrote. Raises UserError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"the server's settings are not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError("the server's settings are no mapping")
    return from_dict(values, "the server's settings")


@dataclass(frozen=True)
class Terms(Params):
    """Who may take part, and how long the server waits."""

    clients: int = option(0, "how many sites at most", 0, flags="--sites", key="sites")
    min_clients: int | None = option(None, "sites that a round needs (default: all)", 1, flags="--min-clients")
    wait: float = option(600.0, "seconds to wait for them", above=0, flags="--wait")
    deadline: float = option(600.0, "seconds for a round", above=0, flags="--deadline")

    def checked(self) -> Terms:
        """Return the terms with nothing left to default. Raises UserError: no sites, or fewer than a round needs."""
        if not self.clients:
            raise UserError("--sites N: how many sites take part at most?")
        least = self.min_clients or self.clients
        if least > self.clients:
            raise UserError(f"--min-clients {least}: there are at most {self.clients} sites (--sites)")
        return replace(self, min_clients=least)


@dataclass(frozen=True)
class Address(Params):
    """Where the server listens."""

    host: str = option("0.0.0.0", "address to listen on; 0.0.0.0: all of this machine's", flags="--host")
    port: int = option(9092, "port to listen on", 1, 65535, flags="--port")


@dataclass(frozen=True)
class ServerOptions:
    """What only the server needs.

    Attributes:
        settings: the run's resolved configuration, as it is saved with the results.
        command: the command line.
        terms: who may take part.
    """

    settings: Mapping[str, Any]
    command: list[str]
    terms: Terms

    def write(self, folder: Path) -> None:
        """Into a run's folder."""
        with replacing(folder / OPTIONS) as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> ServerOptions:
        """What `write` wrote."""
        values = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        return ServerOptions(**values | {"terms": Terms(**values["terms"])})


def write_outcome(folder: Path, status: str, reason: str = "") -> None:
    """Say how a run is doing: 'running', 'finished' or 'failed', and which process it is."""
    with replacing(folder / OUTCOME) as part:
        part.write_text(json.dumps({"status": status, "reason": reason, "pid": os.getpid()}) + "\n", encoding="utf-8")


def read_outcome(folder: Path) -> dict[str, Any]:
    """The last thing that `write_outcome` said; 'status' is '' before it said anything."""
    try:
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "", "reason": "", "pid": 0}
