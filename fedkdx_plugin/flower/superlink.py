"""The server's machine: a SuperLink, the runs it makes one after the other, and the two ways to start a federation."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedkdx_plugin.experiments import runner
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.results import Results
from fedkdx_plugin.experiments.setting import prepare_shards, run_device
from fedkdx_plugin.flower import certificates, gate, supernode
from fedkdx_plugin.flower.coordinator import check_sites
from fedkdx_plugin.flower.options import (
    FOLDER,
    Address,
    ServerOptions,
    Terms,
    read_outcome,
    run_name,
    shared_settings,
    write_outcome,
)
from fedkdx_plugin.flower.processes import (
    Processes,
    Tail,
    check_free,
    flower,
    free_port,
    run_flower,
    wait_for_port,
)
from fedkdx_plugin.flower.site import SiteSetup
from fedkdx_plugin.results.runs import rounds_done
from registry import __version__
from registry.errors import UserError

CONNECTION = "fedkdx"
START_SECONDS = 120.0  # for a run that was handed over to begin
WAIT_SECONDS = 120.0  # for the sites, where all are on this machine
DEADLINE_SECONDS = 3600.0  # for a round, where all sites are on this machine: a slow one is not lost
HOST = "127.0.0.1"
# sites run nothing that they are sent, but Flower wants a clientapp's name
APP = dict.fromkeys(("serverapp", "clientapp"), "fedkdx_plugin.flower.server_app:app")


def serve(experiment: Experiment, command: list[str], terms: Terms, address: Address, given: Path | None) -> int:
    """Make an experiment's runs between the sites that join (`fedkdx serve`). Returns the exit code.

    Args:
        given: the server's folder of certificates and keys; None: neither TLS nor authentication.

    Raises:
        UserError: wrong input, or a run that failed.
    """
    keys = certificates.public_keys(given) if given else []
    check_sites(experiment)
    runner.check_rounds(experiment)
    check_free(address.host, address.port)
    folder = experiment.make_folder(private=True)
    how = f"TLS, keys of {len(keys)} sites" if given else "INSECURE: no encryption, anybody may join"
    print(f"sites join at port {address.port} ({how}); results in {folder}", flush=True)
    try:
        with experiment.begun(command), Processes() as processes:
            link = SuperLink(processes, folder, secure=given is not None)
            link.register(keys)
            link.open_gate(address, given, keys)
            link.run_all(experiment, command, terms)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: the same command with --resume {folder} and no -algo, -m, ...", file=sys.stderr)
        return 130
    return runner.finish(Results.of(experiment))


def on_this_machine(experiment: Experiment, command: list[str]) -> int:
    """Make an experiment's runs with a process for each site (`--engine flower`). Returns the exit code.

    Raises:
        UserError: wrong input, or a run that failed.
    """
    check_sites(experiment)
    runner.check_rounds(experiment)
    runner.prepare(experiment)  # finds wrong input, and makes shards, before anything is started
    config = experiment.runs[0].config
    shards, device = prepare_shards(config), run_device(config)
    clients = shards.num_clients
    folder = experiment.make_folder(private=True)
    print(f"{shards.name}: {clients} sites on this machine, Flower; results in {folder}", flush=True)
    terms = Terms(clients, clients, WAIT_SECONDS, DEADLINE_SECONDS, min_updates=1)
    threads = 0 if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // clients)
    try:
        with experiment.begun(command), Processes() as processes:
            link = SuperLink(processes, folder, secure=False)
            for id in range(clients):
                setup = SiteSetup(id, shards.folder, id, folder / "sites" / str(id), device)
                supernode.start(processes, setup, supernode.Connection(link.address), threads)
            link.run_all(experiment, command, terms)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: fedkdx resume {folder}", file=sys.stderr)
        return 130
    return runner.finish(Results.of(experiment))


class SuperLink:
    """Starts Flower's server, which can be reached from this machine alone, and hands runs to it.

    Args:
        processes: starts it, and ends it.
        folder: the experiment's folder; Flower's own files and logs go into its folder `flower`.
        secure: encrypt, and accept registered keys alone.

    Attributes:
        address, url: where it listens.
        authority: the certificate that has signed its own; None where it is not secure.
    """

    def __init__(self, processes: Processes, folder: Path, secure: bool) -> None:
        self.processes, self.folder = processes, folder
        self.own = folder / "flower"
        self.home = self.own / "server"
        self.log = self.own / "superlink.log"
        self.own.mkdir(exist_ok=True, mode=0o700)
        self.home.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.address = f"{HOST}:{port}"
        self.url = f"{'https' if secure else 'http'}://{self.address}"
        self.authority = self.own / "internal" / certificates.AUTHORITY if secure else None
        arguments = ["--host", HOST, "--port", str(port), "--disable-runtime-dependency-installation"]
        arguments += self._certificates() if secure else ["--insecure"]
        trust = {"root-certificates": str(self.authority.absolute())} if self.authority else {"insecure": True}
        where = {"default": CONNECTION, CONNECTION: trust | {"address": self.address}}
        self._toml(self.home / "config.toml", {"superlink": where})
        env = {FOLDER: str(folder.absolute())}
        processes.start([flower("flower-superlink"), *arguments], self.home, self.log, env)
        wait_for_port(HOST, port, processes)

    def register(self, keys: Sequence[Path]) -> None:
        """Accept the holders of these public keys, and nobody else; a file's name is the name of its holder."""
        for path in keys:
            arguments = ["supernode", "register", str(path.absolute()), CONNECTION, "--name", path.stem]
            run_flower("flwr", arguments, self.home)

    def open_gate(self, address: Address, given: Path | None, keys: Sequence[Path]) -> None:
        """Let sites in from outside, through a gate that passes on no other calls than theirs.

        Args:
            address: where it listens.
            given: folder of the certificate that sites are shown, and its key; None: no TLS.
            keys: files of the sites' public keys; none: anybody may come in.
        """
        host, port = address.host, address.port
        command = [sys.executable, "-m", gate.__name__, "--host", host, "--port", str(port), "--upstream", self.url]
        if self.authority:
            command += ["--authority", str(self.authority)]
        if given:
            command += ["--certificate", str(given / certificates.CERTIFICATE), "--key", str(given / certificates.KEY)]
        if keys:
            command += ["--allow", *map(str, keys)]
        self.processes.start(command, self.home, self.own / "gate.log")
        wait_for_port(HOST if host == "0.0.0.0" else host, port, self.processes)

    def run_all(self, experiment: Experiment, command: list[str], terms: Terms) -> None:
        """Make all runs that are not done. Raises UserError where one failed."""
        for planned in experiment.runs:
            place = experiment.place(planned)
            if rounds_done(place) < planned.rounds:
                self.run(place, ServerOptions(planned.settings, command, terms), to_stderr)

    def run(self, place: Path, options: ServerOptions, say: Callable[[str], None]) -> None:
        """Make one run from where its folder is, until it has ended; `say` is called with the lines of its log.

        Raises:
            UserError: it failed, for the reason that the error states.
        """
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
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
                    raise UserError(f"the server's process ended without a reason; see {self.log}")
            time.sleep(0.2)

    def _certificates(self) -> list[str]:
        """Make a certificate for this machine alone, without which Flower authenticates no sites; return its flags."""
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
        """Write the app that Flower carries to the sites: settings and the names of two modules, and no code."""
        app = self.own / "fedkdx-app"
        config = {
            "run": run_name(place),
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


def to_stderr(line: str) -> None:
    """Print a line for whoever watches."""
    print(line, file=sys.stderr, flush=True)
