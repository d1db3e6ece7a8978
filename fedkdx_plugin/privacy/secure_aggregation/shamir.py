"""Shares of a secret: Shamir, How to Share a Secret, Communications of the ACM 22, 1979, over a prime field.

A secret of 32 bytes is f(0) of a polynomial of degree t − 1 whose other coefficients are random; the share at point x
is f(x). Any t shares give f; t − 1 of them are consistent with every secret, each with one polynomial.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

PRIME = 2**256 + 297  # the smallest above all numbers of 32 bytes
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, points: Collection[int]) -> dict[int, bytes]:
    """Return point -> share of a secret, `threshold` of which give it back.

    Args:
        secret: 32 bytes.
        threshold: t, at least 1 and at most the number of points.
        points: different numbers from 1 to PRIME − 1.

    Raises:
        ValueError: the arguments are not as stated.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(points):
        raise ValueError(f"{len(secret)} bytes to be shared among {len(points)}, {threshold} of which give them back")
    if len(set(points)) < len(points) or not all(0 < point < PRIME for point in points):
        raise ValueError("points of shares must be different, and not 0")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _value(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points}


def _value(coefficients: list[int], point: int) -> int:
    """Return f(point), by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def weights(points: Collection[int]) -> dict[int, int]:
    """Return point -> Lagrange's coefficient λ with Σ λ f(point) = f(0), the same for all secrets shared there."""
    found = {}
    for own in points:
        above, below = 1, 1
        for other in points:
            if other != own:
                above, below = above * other % PRIME, below * (other - own) % PRIME
        found[own] = above * pow(below, -1, PRIME) % PRIME
    return found


def combine(shares: Mapping[int, bytes], weight: Mapping[int, int]) -> bytes:
    """Return the secret of shares at as many points as its threshold asks for.

    Args:
        shares: point -> share.
        weight: `weights` of these points.

    Raises:
        ValueError: they are not shares of one secret, as far as this can be seen.
    """
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    secret = sum(values[point] * own for point, own in weight.items()) % PRIME
    if secret >= 1 << 8 * SECRET_BYTES:
        raise ValueError("these are not shares of one secret")
    return secret.to_bytes(SECRET_BYTES, "big")
