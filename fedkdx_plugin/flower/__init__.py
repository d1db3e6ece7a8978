"""The engine between real sites: each holds its own shards and private state, and messages cross the network.

- What crosses the wire: `protocol`; over Flower: `packing`, `link`.
- The server's side: `coordinator` (the rounds, and the backend whose clients are sites), `roster` (which sites are
  there), `server_app`.
- A site's side: `site` (its data, its work, its state on disk), `worker` (the process that does it), `node` (the
  connection).
- Programs: `superlink` (`fedkdx serve`, `--engine flower`), `supernode` (`fedkdx join`), `gate`, `certificates`,
  `processes`, and what they are given: `options`.
"""

import importlib.util

from registry.errors import UserError


def require_flower() -> None:
    """Raise UserError where Flower, an extra, is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise UserError("Flower is not installed: pip install 'fedkdx[flower]' (Python 3.11 or newer)")
