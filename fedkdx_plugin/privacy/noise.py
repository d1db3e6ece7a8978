"""Sources of Gaussian noise: one for simulations, which repeats, and one for use, which nobody can."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from fedkdx_plugin.engine.randomness import generator

BITS = 53  # of a random number in (0, 1)


class Noise(ABC):
    """Source of independent standard normal numbers."""

    @abstractmethod
    def normal(self, shape: torch.Size, *purpose: int | str) -> Tensor:
        """Return standard normal numbers, float64, on the CPU.

        Args:
            purpose: what they are for; never the same twice.
        """


class SeededNoise(Noise):
    """Noise that follows from the run's seed and the purpose: the same whenever a simulation is repeated.

    Whoever knows the seed knows the noise, so that nothing is protected from them.

    Args:
        seed: the run's seed.
        run: what else tells the run from others of this seed, whose noise must not be the same: their difference would
            have none.
    """

    def __init__(self, seed: int, *run: str) -> None:
        self.seed, self.run = seed, run

    def normal(self, shape: torch.Size, *purpose: int | str) -> Tensor:
        """Return the numbers of this purpose."""
        return torch.randn(shape, generator=generator(self.seed, "privacy", *self.run, *purpose), dtype=torch.float64)


class SecretNoise(Noise):
    """Noise from the operating system's random numbers, which nobody can know or repeat."""

    def normal(self, shape: torch.Size, *purpose: int | str) -> Tensor:
        """Return new numbers, by the inverse of the normal distribution function."""
        drawn = np.frombuffer(os.urandom(8 * shape.numel()), dtype=np.uint64) >> np.uint64(64 - BITS)
        return torch.from_numpy(ndtri((drawn + 0.5) / 2.0**BITS)).reshape(shape)
