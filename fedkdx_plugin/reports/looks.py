"""Colours and line styles of methods, which are the same in every plot of every report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from registry import catalog

# Paul Tol's muted scheme, which colour-blind readers can distinguish (https://personal.sron.nl/~pault/), with black,
# dark grey and orange instead of its pale grey
COLOURS = (
    *("#cc6677", "#332288", "#117733", "#88ccee", "#ddcc77", "#882255", "#44aa99", "#999933", "#aa4499"),
    *("#000000", "#777777", "#ee7733"),
)
MARKERS = {"-": "o", "--": "s", ":": "^", "-.": "D"}  # line style -> what stands for it where a line is one point
DASHES = tuple(MARKERS)
KINDS = [(colour, dashes) for dashes in DASHES for colour in COLOURS]
# those that are most often compared, which have solid lines
OFTEN = (
    *("FedKDX", "FedAvg", "FedKDX+", "Local", "FedKD", "FedProx", "MOON", "FedMTL", "FedFTL", "FedFomo", "PullAvg"),
    "FedMAT",
)


class Looks:
    """Colours and line styles of the methods of a report.

    Every built-in algorithm has its own. Any other name, such as that of a variant, has one that follows from the name,
    or the next that is free in this report.

    Args:
        names: names of the methods.
    """

    def __init__(self, names: Iterable[str]) -> None:
        known = list(dict.fromkeys((*OFTEN, *catalog.BUILT_IN["algorithms"])))
        wanted = sorted(dict.fromkeys(names), key=lambda name: name not in known)
        taken: set[int] = set()
        self._of: dict[str, tuple[str, str]] = {}
        for name in wanted:
            place = known.index(name) if name in known else int(hashlib.sha256(name.encode()).hexdigest(), 16)
            free = [(place + step) % len(KINDS) for step in range(len(KINDS))]
            chosen = next((kind for kind in free if kind not in taken), free[0])
            taken.add(chosen)
            self._of[name] = KINDS[chosen]

    def colour(self, name: str) -> str:
        """Return the colour of a method."""
        return self._of[name][0]

    def line(self, name: str, points: int = 2) -> dict[str, Any]:
        """Return matplotlib's options for the line of a method; one of a single point is a marker."""
        colour, dashes = self._of[name]
        marker = MARKERS[dashes] if points == 1 else ""
        return {"color": colour, "linestyle": dashes, "linewidth": 1.6, "label": name, "marker": marker}
