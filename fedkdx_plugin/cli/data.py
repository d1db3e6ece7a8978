"""`fedkdx data` describes a data set, makes its shards, or imports those of PFLlib."""

from __future__ import annotations

from collections.abc import Sequence

from registry.errors import UserError

WORDS = ("describe", "make", "import-pfllib")


def main(words: Sequence[str]) -> int:
    """Run one of the three commands. Returns the exit code. Raises UserError: wrong input."""
    name = words[0] if words else ""
    if name not in WORDS:
        raise UserError(f"fedkdx data: needs one of {', '.join(WORDS)}; see fedkdx data describe --help")
    if name == "describe":
        from dataset_utils import describe

        return describe.main(words[1:], "fedkdx data describe")
    from dataset_utils import generate

    return generate.main(list(words[1:] if name == "make" else words), f"fedkdx data {name}")
