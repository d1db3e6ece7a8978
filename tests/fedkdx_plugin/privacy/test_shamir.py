"""Shares of a secret: any t give it back, fewer tell nothing, by the definition over the field."""

from __future__ import annotations

import itertools
import secrets

import pytest
import sympy

from fedkdx_plugin.privacy.secure_aggregation import shamir
from fedkdx_plugin.privacy.secure_aggregation.shamir import PRIME, combine, split, weights

SECRET = bytes(range(32))


def back(shares: dict[int, bytes]) -> bytes:
    return combine(shares, weights(list(shares)))


def test_the_field_is_one_and_holds_every_secret():
    assert sympy.isprime(PRIME) and 2**256 < PRIME < 2**264


@pytest.mark.parametrize("secret", [SECRET, bytes(32), b"\xff" * 32])
def test_any_threshold_of_the_shares_give_the_secret_back(secret):
    shares = split(secret, 3, [1, 2, 5, 9, 10**9])
    for chosen in itertools.combinations(shares, 3):
        assert back({point: shares[point] for point in chosen}) == secret
    assert back(shares) == secret  # more are as good


def test_shares_of_a_known_polynomial(monkeypatch):
    """f(x) = s + 7x + 11x² by hand."""
    drawn = iter([7, 11])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda bound: next(drawn))
    shares = split((5).to_bytes(32, "big"), 3, [1, 2, 3])
    assert [int.from_bytes(share, "big") for share in shares.values()] == [23, 63, 125]
    assert weights([1, 2, 3]) == {1: 3, 2: PRIME - 3, 3: 1}  # Lagrange at 0: 3, −3, 1


def test_fewer_shares_fit_every_secret():
    """With t − 1 shares and any secret whatsoever there is one polynomial, so that they tell none from another."""
    points = [1, 2, 3, 4]
    shares = split(SECRET, 3, points)
    known = {point: int.from_bytes(shares[point], "big") for point in (2, 4)}
    for other in (0, 1, secrets.randbelow(2**256)):
        # the polynomial through (0, other) and the known shares, and its value at the points unknown
        through = {0: other, **known}
        for unknown in (1, 3):
            value = 0
            for own, y in through.items():
                term = y
                for place in through:
                    if place != own:
                        term = term * (unknown - place) * pow(own - place, -1, PRIME) % PRIME
                value = (value + term) % PRIME
            forged = {point: known[point].to_bytes(33, "big") for point in known} | {unknown: value.to_bytes(33, "big")}
            assert back(forged) == other.to_bytes(32, "big")


def test_single_shares_are_uniform():
    """A share of one secret, over many dealings, is as uniform as one of another: χ² of its highest four bits."""
    for secret in (bytes(32), b"\xff" * 32):
        counts = [0] * 16
        for _ in range(1600):
            value = int.from_bytes(split(secret, 2, [1, 2])[1], "big")
            counts[value * 16 // PRIME] += 1
        assert sum((count - 100) ** 2 / 100 for count in counts) < 50  # 15 degrees of freedom: p < 1e-5


def test_too_few_or_false_shares_do_not_give_it_back():
    shares = split(SECRET, 3, [1, 2, 3])
    for wrong in ({1: shares[1], 2: shares[2]}, shares | {3: shares[2]}):
        try:
            assert back(wrong) != SECRET
        except ValueError as error:
            assert "not shares of one secret" in str(error)


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [(b"short", 1, [1]), (SECRET, 0, [1]), (SECRET, 3, [1, 2]), (SECRET, 1, [0, 1]), (SECRET, 1, [2, 2])],
)
def test_wrong_arguments_are_refused(secret, threshold, points):
    with pytest.raises(ValueError):
        split(secret, threshold, points)
