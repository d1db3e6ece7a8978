"""The model of a site of a federation: all that predicting with it needs, beside the site's private state.

In the folder of that state, STATE/<run>/client-<number>, are

- `model.safetensors`: the model that the site measured last, and how it was made;
- `manifest.json`: manifest of the site's shards;
- `description.yaml`: description of the data that they were made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset_utils import shards
from dataset_utils.files import is_file, yaml_text
from dataset_utils.scaling import Statistics
from dataset_utils.sealed import Sealed
from fedkdx_plugin.results.run_folder import DESCRIPTION, MANIFEST
from registry.errors import UserError
from registry.interface import BadMessage, Message
from registry.text import shown

MODEL = "model.safetensors"
FORMAT = 1  # of that file
SHARED, KEPT, MEMORY = "shared/", "kept/", "memory/"  # how names of its tensors begin
ADVICE = "use a copy of this folder, or go on with the federation, which writes the file anew"


@dataclass(frozen=True)
class SiteModel:
    """What a site's client predicts with, as the site measured it last.

    Attributes:
        client: number of the client.
        clients: number of clients of the federation.
        shard: number of the client's windows in the manifest.
        round, rounds: the round after which this is the model, and how many rounds were planned.
        trained: how often the client had trained.
        config: the run's configuration, as the server announced it.
        environment: as `run_folder.environment` returns it at the site; `scaling`, the pooled statistics, if there are.
        manifest: manifest of the site's shards.
        tensors: what the server gave ('shared/...'), what the client kept of its networks ('kept/...'), and its memory
            ('memory/...').
    """

    client: int
    clients: int
    shard: int
    round: int
    rounds: int
    trained: int
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    manifest: dict[str, Any]
    tensors: Mapping[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write it into a folder, in place of the one before. Raises UserError: it cannot be written."""
        meta = {name: value for name, value in vars(self).items() if name not in ("manifest", "tensors")}
        files = {
            MODEL: Message(self.tensors, meta | {"format": FORMAT}).to_bytes(),
            MANIFEST: shards.manifest_text(self.manifest).encode(),
            DESCRIPTION: yaml_text(self.manifest.get("description") or {}).encode(),
        }
        Sealed(folder, ADVICE, list(files)).write(files)

    @staticmethod
    def read(folder: Path) -> SiteModel:
        """Read what `write` wrote. Raises UserError: a file is missing, damaged, of another one, or too new."""
        path, sealed = folder / MODEL, Sealed(folder, ADVICE)
        try:
            saved = Message.from_bytes(sealed.read(MODEL))
            meta = dict(saved.meta)
            if (found := meta.pop("format")) != FORMAT:
                raise UserError(f"{path}: of format {shown(found)}, and this version reads {FORMAT}; update fedkdx")
            digest = hashlib.sha256(sealed.read(MANIFEST)).hexdigest()
            if digest != meta["environment"]["data"]["manifest_sha256"]:
                raise UserError(f"{folder / MANIFEST}: of other data than {MODEL}'s; {ADVICE}")
            sealed.read(DESCRIPTION)
            model = SiteModel(**meta, manifest=shards.read_manifest(folder), tensors=saved.tensors)
            if "statistics" in model.manifest["clients"][model.shard]:
                Statistics.from_dict(model.environment["scaling"], model.manifest["shape"][0])
        except (BadMessage, KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); {ADVICE}") from error
        return model

    def part(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of one part, such as 'kept/', by their names in it."""
        return {n.removeprefix(part): tensor for n, tensor in self.tensors.items() if n.startswith(part)}


def is_site(folder: Path) -> bool:
    """Return whether a folder holds a site's model. Raises UserError where this cannot be told."""
    return is_file(folder / MODEL)
