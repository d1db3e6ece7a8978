"""Options of differential privacy, parsed; what goes together with what is checked in `experiments.private`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from registry.errors import UserError

NONE, CLIENT, EXAMPLE = "none", "client", "example"
LEVELS = (NONE, CLIENT, EXAMPLE)
CENTRAL, DISTRIBUTED = "central", "distributed"
NOISES = (CENTRAL, DISTRIBUTED)
AUTO = "auto"
# Relative spacing of float32. Beside weights of about 1, updates below it are rounded away; and where noise is above
# its inverse, as its deviation is about the bound or more, so are the weights.
LEAST_CLIP = 2.0**-23
MOST_CLIP = 1 / LEAST_CLIP


@dataclass(frozen=True)
class Privacy:
    """Options of differential privacy.

    Attributes:
        level: one of `LEVELS`: whose data are protected (`--dp`).
        epsilon, delta: the budget, spent by the last planned round.
        clip: bound C on the norm of what is clipped (`--clip`), from `LEAST_CLIP` to `MOST_CLIP`; None: it follows the
            median (`privacy.clipping`).
        noise: one of `NOISES`: who adds the noise of level 'client' (`--dp-noise`).
    """

    level: str = NONE
    epsilon: float = math.inf
    delta: float = 0.0
    clip: float | None = None
    noise: str = CENTRAL

    @staticmethod
    def parse(level: str, epsilon: float | None, delta: float | None, clip: str | None, noise: str) -> Privacy:
        """Return the options that the flags say. Raises UserError: one is missing, wrong or without --dp."""
        if level == NONE:
            given = {"--epsilon": epsilon, "--delta": delta, "--clip": clip}
            alone = [flag for flag, value in given.items() if value is not None]
            if alone or noise != CENTRAL:
                flag = alone[0] if alone else f"--dp-noise {noise}"
                raise UserError(f"{flag}: without --dp there is no noise; add --dp client, or leave it out")
            return Privacy()
        for flag, value, example in (("--epsilon", epsilon, "8"), ("--delta", delta, "1e-5")):
            if value is None:
                raise UserError(f"--dp {level}: {flag} is missing, such as {flag} {example}")
        assert epsilon is not None and delta is not None
        return Privacy(level, epsilon, delta, _clip(clip), noise)


def _clip(text: str | None) -> float | None:
    if text is None or text == AUTO:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--clip {text}: write auto, or a number above 0")
    if not LEAST_CLIP <= value <= MOST_CLIP:
        lost = "updates that small are" if value < LEAST_CLIP else "beside noise that large, weights are"
        raise UserError(
            f"--clip {text}: out of range, {lost} rounded away in float32; it must be from {LEAST_CLIP:.2g} to "
            f"{MOST_CLIP:.2g}"
        )
    return value
