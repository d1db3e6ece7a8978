"""`fedkdx data`: describe a data set, make its shards, take over those of PFLlib."""

from __future__ import annotations

from collections.abc import Sequence

from registry.errors import UserError

WORDS = ("describe", "make", "import-pfllib")


def main(words: Sequence[str]) -> int:
    """Run one of the three. Returns the exit code; raises UserError."""
    name = words[0] if words else ""
    if name not in WORDS:
        raise UserError(f"fedkdx data: which of {', '.join(WORDS)}? fedkdx data describe --help says more")
    if name == "describe":
        from dataset_utils import describe

        return describe.main(words[1:], "fedkdx data describe")
    from dataset_utils import generate

    return generate.main(list(words[1:] if name == "make" else words), f"fedkdx data {name}")
