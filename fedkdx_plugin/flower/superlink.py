"""The server's machine: a SuperLink, and runs that are handed to it one after the other."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.flower import certificates, gate
from fedkdx_plugin.flower.plan import FOLDER, ServerOptions, Terms, read_outcome, shared_settings, write_outcome
from fedkdx_plugin.flower.processes import Processes, flower, free_port, run_flower, wait_for_port
from fedkdx_plugin.flower.tail import Tail
from registry import __version__
from registry.errors import UserError

CONNECTION = "fedkdx"
START_SECONDS = 120.0  # for a run that was handed over to begin
HOST = "127.0.0.1"
APP = {
    "serverapp": "fedkdx_plugin.flower.flower_server:app",
    "clientapp": "fedkdx_plugin.flower.flower_client:app",
}


class SuperLink:
    """Flower's server, which this machine alone can reach.

    Args:
        processes: what it is started among.
        folder: of the comparison; it gets a folder `flower` for what Flower says and knows.
        secure: encrypt, and let in registered keys alone.

    Attributes:
        url: where it listens.
        authority: certificate that its own is signed by, where it is secure.
    """

    def __init__(self, processes: Processes, folder: Path, secure: bool) -> None:
        self.processes, self.folder = processes, folder
        self.own = folder / "flower"
        self.home = self.own / "server"
        self.log = self.own / "superlink.log"
        self.home.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.address = f"{HOST}:{port}"
        self.url = f"{'https' if secure else 'http'}://{self.address}"
        self.authority = self.own / "internal" / certificates.AUTHORITY if secure else None
        arguments = ["--host", HOST, "--port", str(port), "--disable-runtime-dependency-installation"]
        arguments += self._certificates() if secure else ["--insecure"]
        where = {"root-certificates": str(self.authority.absolute())} if secure else {"insecure": True}
        where["address"] = self.address
        self._toml(self.home / "config.toml", {"superlink": {"default": CONNECTION, CONNECTION: where}})
        env = {FOLDER: str(folder.absolute())}
        processes.start([flower("flower-superlink"), *arguments], self.home, self.log, env)
        wait_for_port(HOST, port, processes)

    def register(self, keys: Sequence[Path]) -> None:
        """Let in the holders of these keys, and nobody else. A file's name is the name of its holder."""
        for path in keys:
            arguments = ["supernode", "register", str(path.absolute()), CONNECTION, "--name", path.stem]
            run_flower("flwr", arguments, self.home)

    def open_gate(self, host: str, port: int, given: Path | None) -> None:
        """Let sites in from outside, by a gate that passes on no other calls than theirs.

        Args:
            host, port: where it listens.
            given: folder with the certificate that sites are shown, and its key; None: no TLS.
        """
        command = [sys.executable, "-m", gate.__name__, "--host", host, "--port", str(port), "--upstream", self.url]
        if self.authority:
            command += ["--authority", str(self.authority)]
        if given:
            command += ["--certificate", str(given / certificates.CERTIFICATE), "--key", str(given / certificates.KEY)]
        self.processes.start(command, self.home, self.own / "gate.log")
        wait_for_port(HOST if host == "0.0.0.0" else host, port, self.processes)

    def run_all(self, experiment: Experiment, command: list[str], terms: Terms) -> None:
        """Make every run that is not done. Raises UserError where one failed."""
        for planned in experiment.runs:
            place = experiment.place(planned)
            if not _is_finished(place, planned.rounds):
                self.run(place, ServerOptions(planned.settings, command, terms), to_stderr)

    def run(self, place: Path, options: ServerOptions, say: Callable[[str], None]) -> None:
        """One run, from where its folder is, until it has ended; `say` hears the lines of its log.

        Raises:
            UserError: it failed; with its reason.
        """
        place.mkdir(parents=True, exist_ok=True)
        options.write(place)
        write_outcome(place, "")
        log = Tail(place / "log.txt")
        run_flower("flwr", ["run", str(self._app(place, options)), CONNECTION], self.home)
        until = time.monotonic() + START_SECONDS
        while True:
            outcome = read_outcome(place)
            for line in log.lines():
                say(line)
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

    def _certificates(self) -> list[str]:
        """Flower authenticates sites only where it encrypts, so on this machine, too; nobody else sees this one."""
        made = self.own / "internal"
        certificates.make_server(made, [HOST])
        files = {
            "certfile": certificates.CERTIFICATE,
            "keyfile": certificates.KEY,
            "ca-certfile": certificates.AUTHORITY,
        }
        flags = [text for flag, name in files.items() for text in (f"--ssl-{flag}", str((made / name).absolute()))]
        return [*flags, "--enable-supernode-auth"]

    def _app(self, place: Path, options: ServerOptions) -> Path:
        """The app that Flower carries to the sites: settings and two names, and no code."""
        app = self.own / "fedkdx-app"
        config = {
            "run": place.parent.name + "." + place.name,
            "folder": place.name,
            "clients": options.terms.clients,
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


def _is_finished(place: Path, rounds: int) -> bool:
    """Whether a run has ended well, with as many rounds as are wanted now."""
    if read_outcome(place)["status"] != "finished":
        return False
    return ServerOptions.read(place).settings["global_rounds"] == rounds


def to_stderr(line: str) -> None:
    """Say a line to whoever watches."""
    print(line, file=sys.stderr, flush=True)
