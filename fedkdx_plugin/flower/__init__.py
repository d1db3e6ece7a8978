"""The engine between real sites: each holds its own shards and private state, and messages cross the network.

- What crosses the wire: `protocol`; over Flower: `packing`, `link`.
- The server's side: `coordinator` (the rounds, and the backend whose clients are sites), `roster` (which sites are
  there), `server_app`.
- A site's side: `site` (its data, its work, its state on disk), `worker` (the process that does it), `node` (the
  connection).
- Programs: `superlink` (`fedkdx serve`, `--engine flower`), `supernode` (`fedkdx join`), `gate`, `certificates`,
  `processes`, and what they are given: `options`.
- The algorithms in somebody's own Flower app: `apps`, of which `Strategy` and `client_app` are offered here, too.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from registry.errors import UserError

if TYPE_CHECKING:
    from fedkdx_plugin.flower.apps.client import client_app
    from fedkdx_plugin.flower.apps.strategy import Strategy

__all__ = ["Strategy", "client_app", "require_flower"]

_HOMES = {"Strategy": "fedkdx_plugin.flower.apps.strategy", "client_app": "fedkdx_plugin.flower.apps.client"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_flower()
    return getattr(importlib.import_module(_HOMES[name]), name)


def require_flower() -> None:
    """Raise UserError where Flower, an extra, is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise UserError("Flower is not installed: pip install 'fedkdx[flower]' (Python 3.11 or newer)")
