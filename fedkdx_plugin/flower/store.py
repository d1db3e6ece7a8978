"""A site's private state on its own disk: one file for each round it trained in, as far back as may be needed."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from dataset_utils.files import replacing, unwritable
from registry.errors import UserError
from registry.interface import BadMessage, Message

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ENDING = ".safetensors"


class Store:
    """What one client keeps between the rounds of one run, by the round that made it.

    A round's state is written before the reply leaves the site, but counts only once the server says that the reply
    arrived. So a reply that was lost or late leaves no trace, and a server that went back to its checkpoint finds the
    state that belongs to it.

    Args:
        folder: the site's folder for state; readable by its owner alone.
        run: name of the run.
        client: the client's number.

    Raises:
        UserError: a name that is no plain file name, or a folder that cannot be made.
    """

    def __init__(self, folder: Path, run: str, client: int) -> None:
        if not isinstance(run, str) or not NAME.fullmatch(run):
            raise UserError(f"run {run!r}: a name of letters, digits, '.', '_' and '-' was expected")
        self.folder = folder / run / f"client-{client}"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def rounds(self) -> list[int]:
        """Rounds of which there is a state, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob(f"*{ENDING}") if path.stem.isdecimal())

    def load(self, round: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """What the client kept of its networks, its memory, and how often it had trained, after a round (0: nothing).

        Raises:
            UserError: that state is not there, or damaged.
        """
        if not round:
            return {}, {}, 0
        path = self._path(round)
        if not path.is_file():
            there = ", ".join(map(str, self.rounds())) or "none"
            raise UserError(
                f"{path}: missing; the server goes on from round {round}, this site has state of rounds: {there}"
            )
        try:
            saved = Message.from_bytes(path.read_bytes())
            parts = {
                part: {n.removeprefix(part): t for n, t in saved.tensors.items() if n.startswith(part)}
                for part in ("kept/", "memory/")
            }
            return parts["kept/"], parts["memory/"], int(saved.meta["trained"])
        except (BadMessage, KeyError, OSError) as error:
            raise UserError(f"{path}: damaged ({error})") from error

    def save(self, round: int, kept: dict[str, Tensor], memory: dict[str, Tensor], trained: int) -> None:
        """Write the state after a round. Raises UserError."""
        tensors = {f"kept/{name}": tensor for name, tensor in kept.items()}
        tensors |= {f"memory/{name}": tensor for name, tensor in memory.items()}
        with replacing(self._path(round)) as part:
            part.write_bytes(Message(tensors, {"trained": trained}).to_bytes())

    def settle(self, accepted: int, durable: int) -> None:
        """Forget what came after the last round whose reply arrived, and what no checkpoint can ask for.

        Args:
            accepted: round of the last reply that reached the server.
            durable: last round on the server's disk: of the states up to then, only the newest may be asked for.
        """
        rounds = self.rounds()
        base = max((round for round in rounds if round <= min(accepted, durable)), default=0)
        for round in rounds:
            if round > accepted or round < base:
                self._path(round).unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self.folder / f"{round}{ENDING}"
