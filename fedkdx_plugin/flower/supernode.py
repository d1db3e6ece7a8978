"""A site's machine: a SuperNode with its own shards and its own folder for private state."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fedkdx_plugin.flower.processes import Processes, flower, free_port
from fedkdx_plugin.flower.site import Place


@dataclass(frozen=True)
class Server:
    """The server as a site sees it.

    Attributes:
        address: 'host:port'.
        authority: the certificate that its own must be signed by; None: no TLS.
        key: the site's private key; None where the server asks for none.
    """

    address: str
    authority: Path | None = None
    key: Path | None = None


def start(processes: Processes, place: Place, server: Server, threads: int = 0) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a site's SuperNode. Returns the process and its log.

    Args:
        threads: for PyTorch at this site; 0: as many as it likes.
    """
    place.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    own = {
        "partition-id": place.client,
        "data": str(place.folder.absolute()),
        "shard": place.shard,
        "state": str(place.state.absolute()),
        "device": str(place.device),
    }
    config, log = place.state / "site.toml", place.state / "supernode.log"
    config.write_text(tomli_w.dumps(own), encoding="utf-8")
    arguments = ["--superlink", server.address, "--port", str(free_port()), "--node-config", str(config)]
    if server.authority is None:
        arguments.append("--insecure")
    else:
        arguments += ["--root-certificates", str(server.authority.absolute())]
    if server.key is not None:
        arguments += ["--auth-supernode-private-key", str(server.key.absolute())]
    env = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return processes.start([flower("flower-supernode"), *arguments], place.state / "flower", log, env), log
