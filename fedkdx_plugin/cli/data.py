"""`fedkdx data` drafts the description of recordings, describes a data set, makes its shards, or imports PFLlib's."""

from __future__ import annotations

from collections.abc import Sequence

from registry.errors import UserError

COMMANDS = {
    "init": "draft the description of your own recordings",
    "describe": "describe a data set, and list what is wrong with it",
    "make": "make the shards of each client",
    "import-pfllib": "turn data of PFLlib into shards",
}
HELP = "usage: fedkdx data COMMAND ...\n\ncommands (fedkdx data COMMAND --help):\n" + "\n".join(
    f"  {name:<15}{use}" for name, use in COMMANDS.items()
)


def main(words: Sequence[str]) -> int:
    """Run one of the commands. Returns the exit code. Raises UserError: wrong input."""
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if name not in COMMANDS:
        raise UserError(f"fedkdx data: needs one of {', '.join(COMMANDS)}; see fedkdx data --help")
    if name == "init":
        from dataset_utils.draft import command

        return command.main(words[1:], "fedkdx data init")
    if name == "describe":
        from dataset_utils import describe

        return describe.main(words[1:], "fedkdx data describe")
    from dataset_utils import generate

    return generate.main(list(words[1:] if name == "make" else words), f"fedkdx data {name}")
