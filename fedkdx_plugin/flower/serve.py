"""`fedkdx serve`: the server's machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.results import Results
from fedkdx_plugin.experiments.runner import finish
from fedkdx_plugin.flower import certificates
from fedkdx_plugin.flower.coordinator import check_sites
from fedkdx_plugin.flower.plan import Terms
from fedkdx_plugin.flower.processes import Processes, check_free
from fedkdx_plugin.flower.superlink import SuperLink
from registry.errors import UserError


@dataclass(frozen=True)
class Gate:
    """Where sites come in.

    Attributes:
        host, port: address to listen on.
        certificates: folder of the server (see `certificates.make`); None: neither TLS nor authentication.
    """

    host: str
    port: int
    certificates: Path | None

    def keys(self) -> list[Path]:
        """Files of the sites' public keys. Raises UserError where a file is missing."""
        if not self.certificates:
            return []
        for name in (certificates.CERTIFICATE, certificates.KEY, certificates.KEYS):
            if not (self.certificates / name).exists():
                raise UserError(
                    f"{self.certificates / name}: missing; `fedkdx certificates` makes them for a try-out, "
                    "and --insecure does without"
                )
        keys = sorted((self.certificates / certificates.KEYS).glob("*.pub"))
        if not keys:
            raise UserError(f"{self.certificates / certificates.KEYS}: holds no public key (client-0.pub, ...)")
        return keys


def run(experiment: Experiment, command: list[str], terms: Terms, gate: Gate) -> int:
    """Run every algorithm under every seed between the sites that join. Returns the exit code.

    Raises:
        UserError: wrong input, or a run that failed.
    """
    keys = gate.keys()
    check_sites(experiment)
    check_free(gate.host, gate.port)
    folder = experiment.begin(command)
    how = f"TLS, keys of {len(keys)} sites" if gate.certificates else "INSECURE: no encryption, anybody may join"
    print(f"sites join at port {gate.port} ({how}); results in {folder}", flush=True)
    try:
        with Processes() as processes:
            link = SuperLink(processes, folder, secure=gate.certificates is not None)
            link.register(keys)
            link.open_gate(gate.host, gate.port, gate.certificates)
            link.run_all(experiment, command, terms)
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: the same command with --resume {folder} and no -algo, -m, ...", file=sys.stderr)
        return 130
    return finish(Results.of(experiment))
