"""Windows whose membership is attacked, and training data of shadow runs that hold a half of them each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.randomness import derive

PAIRINGS = ((0, 1), (0, 2), (0, 3))  # of four quarters, the two that are trained on together; the others are the rest


@dataclass(frozen=True, eq=False)
class Windows:
    """Audited windows: of each class of each client, as many that the run trained on as others.

    Attributes:
        client: (n,), client of each window; windows of one client are adjacent, clients ascending.
        member: (n,), bool, whether the run trained on it.
        place: (n,), index into the client's training windows of a member, into its test windows of another.
        quarter: (n,), 0 or 1 for the first and second half of a client's members of a class in their order, 2 or 3 for
            the halves of the others.
        group: (n,), number of the client and class.
    """

    client: np.ndarray
    member: np.ndarray
    place: np.ndarray
    quarter: np.ndarray
    group: np.ndarray

    def of(self, client: int) -> slice:
        """Return the position of a client's windows."""
        first, last = np.searchsorted(self.client, [client, client + 1])
        return slice(int(first), int(last))

    def x(self, data: DeviceData, client: int) -> Tensor:
        """Return the audited windows of a client, (own, channels, 1, time), on the device of the test windows."""
        return self._taken(client, data.train_x[client], data.test_x[data.test_slices[client]], data.test_x.device)

    def y(self, data: DeviceData, client: int) -> Tensor:
        """Return the labels of the audited windows of a client, (own,), on the device of the test windows."""
        return self._taken(client, data.train_y[client], data.test_y[data.test_slices[client]], data.test_y.device)

    def _taken(self, client: int, train: Tensor, test: Tensor, device: torch.device) -> Tensor:
        """Return the rows of a client's audited windows; training windows may lie elsewhere than test windows."""
        own = self.of(client)
        places = zip(self.member[own], self.place[own], strict=True)
        return torch.stack([(train if member else test)[place].to(device) for member, place in places])

    def drawn(self, shadows: int, seed: int) -> np.ndarray:
        """Draw which windows each shadow run trains on, (shadows, n), bool.

        Runs come in pairs that divide the windows between them, so that each window is in half of the runs. Quarters
        are drawn as a whole: consecutive windows overlap, and a window would not be unseen if its neighbours were seen.
        """
        rng = np.random.default_rng(derive(seed, "audit", "shadows"))
        groups = int(self.group.max()) + 1
        pairs = []
        for _ in range(shadows // 2):
            table = np.zeros((groups, 4), dtype=bool)
            chosen = np.array(PAIRINGS)[rng.integers(len(PAIRINGS), size=groups)]
            table[np.arange(groups)[:, None], chosen] = True
            table ^= rng.integers(2, size=(groups, 1)).astype(bool)
            trained = table[self.group, self.quarter]
            pairs += [trained, ~trained]
        return np.array(pairs)

    def trained_on(self, data: DeviceData, trained: np.ndarray) -> DeviceData:
        """Return the data of a shadow run: of the audited windows, clients train on those `trained`, (n,), bool.

        Training windows that are not audited stay. Windows must be scaled already.
        """
        train_x, train_y = list(data.train_x), list(data.train_y)
        for client in np.unique(self.client).tolist():
            own = self.of(client)
            rest = np.setdiff1d(np.arange(len(train_y[client])), self.place[own][self.member[own]])
            chosen, tests = np.flatnonzero(trained[own]), data.test_slices[client]
            for windows, test in ((train_x, data.test_x), (train_y, data.test_y)):
                audited = self._taken(client, windows[client], test[tests], windows[client].device)
                windows[client] = torch.cat([windows[client][rest], audited[chosen]])
        return replace(data, train_x=train_x, train_y=train_y, scaled={})


def choose(data: DeviceData, clients: Sequence[int], seed: int) -> Windows:
    """Choose the windows to audit: of each class of each client, a run of consecutive ones of either kind.

    Args:
        clients: the clients that have trained.
        seed: seed of the positions of these runs.
    """
    parts: list[tuple[int, bool, np.ndarray, np.ndarray, int]] = []
    group = 0
    for client in sorted(clients):
        kinds = {True: data.train_y[client].cpu().numpy(), False: data.test_y[data.test_slices[client]].cpu().numpy()}
        for label in np.intersect1d(kinds[True], kinds[False]).tolist():
            places = {member: np.flatnonzero(y == label) for member, y in kinds.items()}
            count = min(map(len, places.values()))
            for member, own in places.items():
                rng = np.random.default_rng(derive(seed, "audit", "windows", client, label, int(member)))
                first = rng.integers(len(own) - count + 1)
                half = (np.arange(count) >= (count + rng.integers(2)) // 2).astype(np.int64)
                parts.append((client, member, own[first : first + count], half + (0 if member else 2), group))
            group += 1
    sizes = [len(places) for _, _, places, _, _ in parts]
    return Windows(
        client=np.repeat([part[0] for part in parts], sizes).astype(np.int64),
        member=np.repeat([part[1] for part in parts], sizes).astype(bool),
        place=np.concatenate([part[2] for part in parts]) if parts else np.empty(0, np.int64),
        quarter=np.concatenate([part[3] for part in parts]) if parts else np.empty(0, np.int64),
        group=np.repeat([part[4] for part in parts], sizes).astype(np.int64),
    )
