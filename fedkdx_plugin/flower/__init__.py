"""The same rounds between real sites: each holds its own shards and private state, and messages cross the network."""

import importlib.util

from registry.errors import UserError


def require_flower() -> None:
    """Raises UserError where Flower, an extra, is not installed."""
    if importlib.util.find_spec("flwr") is None:
        raise UserError("Flower is not installed: pip install 'fedkdx[flower]' (Python 3.11 or newer)")
