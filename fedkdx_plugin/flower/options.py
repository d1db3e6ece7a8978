"""Options of a federation: what each party's command takes, and what the server hands over to a run.

A run's configuration goes to all parties (`shared_settings`); the server's own options and the run's outcome are
files in the run's folder, by which `superlink.SuperLink` and the ServerApp's process tell each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset_utils.files import replacing
from fedkdx_plugin.configuration.config import Config, from_dict
from fedkdx_plugin.engine.randomness import count_selected
from registry.errors import UserError
from registry.parameters import Params, option
from registry.text import is_plain_name

ELSEWHERE = "sites"  # stands for the data set's name where the data are the sites' own
OPTIONS = "flower.json"
OUTCOME = "outcome.json"
FOLDER = "FEDKDX_FLOWER_FOLDER"  # environment variable by which the ServerApp finds the run's folder
OWN = ("out", "data_root", "raw", "download", "device", "device_id", "engine")  # of the server's machine alone
MOST_BYTES = 255  # of a file's name, in most file systems
RESOLVED = ("preset",)  # its values are in 'set'


@dataclass(frozen=True)
class Terms(Params):
    """Bounds on the number of sites and on the time that the server waits for them."""

    sites: int | None = option(None, "largest number of sites, numbered from 0", 1, flags="--sites")
    min_clients: int | None = option(
        None, "sites that must be connected before a round begins (default: all)", 1, flags="--min-clients"
    )
    wait: float = option(600.0, "seconds to wait for so many sites before giving up", above=0, flags="--wait")
    deadline: float = option(600.0, "seconds that a site has to answer in a round", above=0, flags="--deadline")
    min_updates: int = option(
        3,
        "fewest updates that a round may combine; from fewer, sites can work out each other's",
        1,
        flags="--min-updates",
    )
    max_refusals: int = option(5, "leave a site out after so many refusals in a row", 1, flags="--max-refusals")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.clients:
            raise UserError(f"--min-clients {self.least}: there are at most {self.clients} sites (--sites)")

    @property
    def clients(self) -> int:
        """Return how many sites there are at most. Raises UserError where it was not given."""
        if self.sites is None:
            raise UserError("--sites: missing; write --sites N, how many sites take part at most")
        return self.sites

    @property
    def least(self) -> int:
        """Return how many sites a round needs."""
        return self.min_clients or self.clients

    def check_updates(self, join_ratio: float) -> None:
        """Raise UserError where a round can come to select fewer sites than it is to put together updates of."""
        fewest = count_selected(self.least, join_ratio)
        if fewest < self.min_updates:
            raise UserError(
                f"a round of {self.least} sites selects {fewest} (-jr {join_ratio:g}), but at least {self.min_updates} "
                "updates are to be put together, as sites can work out each other's from fewer: raise --min-clients, "
                f"--sites or -jr, or write --min-updates {fewest} where all sites agree to that"
            )


@dataclass(frozen=True)
class Address(Params):
    """Address and port that the server listens on."""

    host: str = option("0.0.0.0", "address to listen on; 0.0.0.0: all of this machine's", flags="--host")
    port: int = option(9092, "port to listen on", 1, 65535, flags="--port")


@dataclass(frozen=True)
class Security(Params):
    """How server and sites know each other."""

    certificates: str = option("", "folder of this party's certificates and keys", flags="--certificates")
    insecure: bool = option(False, "no encryption, anybody may join: for tests alone", flags="--insecure", switch=True)

    @property
    def folder(self) -> Path | None:
        """Return the folder of certificates; None where insecure. Raises UserError unless one of the two is given."""
        if bool(self.certificates) == self.insecure:
            raise UserError(
                "--certificates FOLDER or --insecure: give one of the two (`fedkdx certificates` makes the folder)"
            )
        return Path(self.certificates).absolute() if self.certificates else None


@dataclass(frozen=True)
class SiteOptions(Params):
    """What a site joins with."""

    server: str = option("", "address of the server, HOST:PORT", flags="--server")
    client: int | None = option(None, "this site's number, from 0", 0, flags="--client")
    data: str = option("", "folder of shards (fedkdx data make)", flags="-data --data")
    shard: int | None = option(None, "number of the site's shard, where the folder has several", 0, flags="--shard")
    state: str = option("", "folder for what this site keeps to itself; keep it between runs", flags="--state")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"), flags="-dev --device")
    secure_aggregation: bool = option(
        False,
        "send masked updates only, and refuse a server that asks for others",
        flags="--secure-aggregation",
        switch=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("--server", self.server), ("--client", self.client), ("-data", self.data)):
            if value in ("", None):
                raise UserError(f"{flag}: missing; see fedkdx join --help")
        if not self.state:
            raise UserError("--state: missing; name a folder that is kept between runs")
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"--server {self.server}: write HOST:PORT")


def run_name(place: Path) -> str:
    """Return the name that a run has at the sites, which make a folder of it.

    It is that of the experiment folder and of the run folder; where sites would refuse that, as a long one, its digest.

    Args:
        place: the run folder, in the experiment folder.
    """
    name = f"{place.parent.name}.{place.name}"
    encoded = name.encode(errors="surrogateescape")
    return name if is_plain_name(name) and len(encoded) <= MOST_BYTES else hashlib.sha256(encoded).hexdigest()


def shared_settings(settings: Mapping[str, Any]) -> str:
    """Return a run's resolved configuration as every party gets it: JSON, without the server's own paths."""
    common = {key: value for key, value in settings.items() if key not in OWN + RESOLVED}
    return json.dumps(common | {"data": "at-the-sites"}, sort_keys=True)


def read_settings(text: str) -> Config:
    """Read the configuration that `shared_settings` wrote. Raises UserError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"the server's settings are not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError("the server's settings are not a mapping")
    return from_dict(values, "the server's settings")


@dataclass(frozen=True)
class ServerOptions:
    """Holds what only the server needs of a run.

    Attributes:
        settings: the run's resolved configuration, as it is saved with the results.
        command: the command line.
        terms: who may take part.
    """

    settings: Mapping[str, Any]
    command: list[str]
    terms: Terms

    def write(self, folder: Path) -> None:
        """Write it into a run's folder."""
        with replacing(folder / OPTIONS) as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> ServerOptions:
        """Read what `write` wrote."""
        values = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        return ServerOptions(**values | {"terms": Terms(**values["terms"])})


def write_outcome(folder: Path, status: str, reason: str = "") -> None:
    """Note a run's status, 'running', 'finished' or 'failed', and the process that makes it."""
    with replacing(folder / OUTCOME) as part:
        part.write_text(json.dumps({"status": status, "reason": reason, "pid": os.getpid()}) + "\n", encoding="utf-8")


def read_outcome(folder: Path) -> dict[str, Any]:
    """Return what `write_outcome` noted last; 'status' is '' before that."""
    try:
        noted: dict[str, Any] = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": "", "reason": "", "pid": 0}
    return noted
