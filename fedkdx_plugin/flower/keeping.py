"""What a site keeps of a run beside its private state, so that its model can be used: nothing of it leaves the site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dataset_utils.files import private_files
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.flower.protocol import Request
from fedkdx_plugin.flower.site import LocalData, SiteSetup, StateFolder
from fedkdx_plugin.results.run_folder import code_of_models, environment
from fedkdx_plugin.results.site_model import KEPT, MEMORY, SHARED, SiteModel
from registry.catalog import Entry
from registry.interface import Client, Task


@dataclass(frozen=True)
class Keeper:
    """Keeps the model that a site has measured, in place of the one before.

    Attributes:
        setup: what the site decides by itself.
        config: the run's configuration, as the server announced it.
        entry: the algorithm.
        task: the learning task.
        data: the site's windows.
        clients: number of clients of the federation.
    """

    setup: SiteSetup
    config: Config
    entry: Entry
    task: Task
    data: LocalData
    clients: int

    def __call__(self, request: Request, kept: dict[str, Tensor], client: Client) -> None:
        """Write what was measured into the folder of the client's private state. Raises UserError.

        A copy of the private state is part of it: the state that was measured is removed once the server is beyond it.

        Args:
            request: the request to measure.
            kept: what the client kept of its networks.
            client: the client, with its memory.
        """
        own = {SHARED: request.shared or {}, KEPT: kept, MEMORY: client.memory}
        about = environment(self.entry, [], self.data, self.setup.device) | code_of_models(self.task)
        if request.scaling:
            about["scaling"] = request.scaling.to_dict()
        model = SiteModel(
            client=client.id,
            clients=self.clients,
            shard=self.setup.shard,
            round=request.after,
            rounds=request.round.total,
            trained=client.trained,
            config=self.config.to_dict(),
            environment=about,
            manifest=self.data.manifest,
            tensors={f"{part}{name}": tensor for part, tensors in own.items() for name, tensor in tensors.items()},
        )
        with private_files():
            model.write(StateFolder(self.setup.state, request.run, client.id).folder)
