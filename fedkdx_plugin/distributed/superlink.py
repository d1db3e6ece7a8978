"""The server's machine: a SuperLink, and runs that are handed to it one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedkdx_plugin.distributed.plan import FOLDER, ServerOptions, read_outcome, shared_settings, write_outcome
from fedkdx_plugin.distributed.processes import Processes, run_program, wait_for_port
from registry import __version__
from registry.errors import UserError

CONNECTION = "fedkdx"
START_SECONDS = 120.0  # for a run that was handed over to begin
CERTIFICATE, KEY, AUTHORITY = "server.pem", "server.key", "ca.pem"  # as `certificates` names them
APP = {
    "serverapp": "fedkdx_plugin.distributed.flower_server:app",
    "clientapp": "fedkdx_plugin.distributed.flower_client:app",
}


@dataclass(frozen=True)
class Address:
    """Where the SuperLink listens.

    Attributes:
        host, port: its address.
        certificates: folder with its certificate and key, and the authority's certificate; None: neither TLS nor
            authentication.
    """

    host: str
    port: int
    certificates: Path | None


class SuperLink:
    """Flower's server.

    Args:
        processes: what it is started among.
        folder: of the comparison; it gets a folder `flower` for what Flower says and knows.
        address: where it listens.
    """

    def __init__(self, processes: Processes, folder: Path, address: Address) -> None:
        self.processes, self.folder, self.address = processes, folder, address
        self.own = folder / "flower"
        self.home = self.own / "server"
        self.log = self.own / "superlink.log"
        self.home.mkdir(parents=True, exist_ok=True)
        self._connection()
        processes.start("flower-superlink", self._arguments(), self.home, self.log, {FOLDER: str(folder.absolute())})
        wait_for_port(self._reachable(), address.port, processes)

    def register(self, keys: Mapping[str, Path]) -> None:
        """Let in the holders of these keys, and nobody else: name -> file of the public key."""
        for name, path in keys.items():
            run_program("flwr", ["supernode", "register", str(path), CONNECTION, "--name", name], self.home)

    def run(self, place: Path, options: ServerOptions, say: Callable[[str], None]) -> None:
        """One run, from where its folder is, until it has ended; `say` hears the lines of its log.

        Raises:
            UserError: it failed; with its reason.
        """
        place.mkdir(parents=True, exist_ok=True)
        options.write(place)
        write_outcome(place, "")
        log = place / "log.txt"
        seen = log.stat().st_size if log.exists() else 0
        run_program("flwr", ["run", str(self._app(place, options)), CONNECTION], self.home)
        until = time.monotonic() + START_SECONDS
        while True:
            outcome = read_outcome(place)
            seen = _tell(log, seen, say)
            if outcome["status"] == "finished":
                return
            if outcome["status"] == "failed":
                raise UserError(outcome["reason"])
            self.processes.check()
            if not outcome["status"] and time.monotonic() > until:
                raise UserError(f"the run did not begin within {START_SECONDS:.0f} s; see {self.log}")
            if outcome["status"] and outcome["pid"] not in {process.pid for process in self.processes.running()}:
                outcome = read_outcome(place)
                if outcome["status"] == "running":
                    raise UserError(f"the server's process ended without a word; see {self.log}")
            time.sleep(0.2)

    def _arguments(self) -> list[str]:
        address, given = self.address, self.address.certificates
        common = ["--host", address.host, "--port", str(address.port), "--disable-runtime-dependency-installation"]
        if given is None:
            return [*common, "--insecure"]
        files = {
            "--ssl-certfile": given / CERTIFICATE,
            "--ssl-keyfile": given / KEY,
            "--ssl-ca-certfile": given / AUTHORITY,
        }
        for path in files.values():
            if not path.is_file():
                raise UserError(f"{path}: missing; 'fedkdx certificates' makes one for a test, or use --insecure")
        tls = [text for flag, path in files.items() for text in (flag, str(path.absolute()))]
        return [*common, *tls, "--enable-supernode-auth"]

    def _connection(self) -> None:
        """Tell Flower's own command line where the SuperLink is."""
        where: dict[str, Any] = {"address": f"{self._reachable()}:{self.address.port}"}
        if self.address.certificates is None:
            where["insecure"] = True
        else:
            where["root-certificates"] = str((self.address.certificates / AUTHORITY).absolute())
        self._toml(self.home / "config.toml", {"superlink": {"default": CONNECTION, CONNECTION: where}})

    def _reachable(self) -> str:
        """The address by which this machine reaches it."""
        return "127.0.0.1" if self.address.host == "0.0.0.0" else self.address.host

    def _app(self, place: Path, options: ServerOptions) -> Path:
        """The app that Flower carries to the sites: settings and two names, and no code."""
        app = self.own / "fedkdx-app"
        config = {
            "run": place.parent.name + "." + place.name,
            "folder": place.name,
            "clients": options.clients,
            "settings": shared_settings(options.settings),
        }
        self._toml(
            app / "pyproject.toml",
            {
                "project": {"name": app.name, "version": __version__, "license": "Apache-2.0"},
                "tool": {"flwr": {"app": {"publisher": "fedkdx", "components": APP, "config": config}}},
            },
        )
        return app

    @staticmethod
    def _toml(path: Path, values: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(values), encoding="utf-8")


def _tell(log: Path, seen: int, say: Callable[[str], None]) -> int:
    """Say the whole lines of a log behind its first `seen` bytes. Returns how far it has been said."""
    if not log.exists():
        return seen
    with log.open("rb") as file:
        file.seek(seen)
        whole, newline, _ = file.read().rpartition(b"\n")
    for line in whole.decode(errors="replace").splitlines():
        say(line)
    return seen + len(whole) + len(newline)


def to_stderr(line: str) -> None:
    """Say a line to whoever watches."""
    print(line, file=sys.stderr, flush=True)

