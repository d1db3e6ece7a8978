"""Keys, boxes and masks, all of them by `cryptography`: X25519, HKDF-SHA256, ChaCha20-Poly1305, AES-256-CTR."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES = 32  # of public keys, private keys, seeds and digests
TAG_BYTES = 16  # by which a box is longer than what is in it
Values = NDArray[np.uint64]


@dataclass(frozen=True)
class KeyPair:
    """A key pair for one purpose in one round, of 32 bytes each."""

    private: bytes = field(repr=False)
    public: bytes

    @staticmethod
    def new() -> KeyPair:
        """Draw a pair from the operating system's randomness."""
        return KeyPair.of(secrets.token_bytes(KEY_BYTES))

    @staticmethod
    def of(private: bytes) -> KeyPair:
        """Return the pair of a private key."""
        return KeyPair(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())

    def agree(self, public: bytes, purpose: bytes) -> bytes:
        """Return the key, 32 bytes, that the holders of two pairs have in common for a purpose.

        Raises:
            ValueError: the other's public key is none (of low order, so that the common key would be known).
        """
        common = X25519PrivateKey.from_private_bytes(self.private).exchange(X25519PublicKey.from_public_bytes(public))
        return _derived(common, purpose)


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return bytes(HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(secret))


def check_public(public: bytes) -> None:
    """Raise ValueError for bytes with which no key can be agreed on."""
    KeyPair.new().agree(public, b"check")


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """Return content in a box that the holders of a key alone can open or make. A key is used for one box alone."""
    return bytes(ChaCha20Poly1305(key).encrypt(bytes(12), content, about))


def unseal(key: bytes, box: bytes, about: bytes) -> bytes:
    """Return what is in a box. Raises ValueError: it was made by somebody else, or about something else."""
    try:
        return bytes(ChaCha20Poly1305(key).decrypt(bytes(12), box, about))
    except InvalidTag:
        raise ValueError("a box that cannot be opened") from None


def digest(secret: bytes) -> bytes:
    """Return the SHA-256 of a secret, by which it is recognised later."""
    return hashlib.sha256(secret).digest()


class Mask:
    """Adds masks to values modulo 2^64, or takes them away; keeps the memory that this needs.

    Args:
        values: the values (n,), which it changes in place.
    """

    def __init__(self, values: Values) -> None:
        self.values = values
        self._zeros = bytes(values.nbytes)
        self._stream = np.empty(values.nbytes + 15, dtype=np.uint8)  # the library wants room for another block

    def add(self, key: bytes) -> None:
        """Add the mask of a key."""
        self.values += self._expanded(key)

    def subtract(self, key: bytes) -> None:
        """Subtract the mask of a key."""
        self.values -= self._expanded(key)

    def _expanded(self, key: bytes) -> Values:
        """Return the key stream of AES-256-CTR as whole numbers, least significant byte first."""
        encryptor: Any = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        encryptor.update_into(self._zeros, self._stream)
        stream = self._stream[: len(self._zeros)].view("<u8")
        return stream.astype(np.uint64, copy=False)


def mask_key(seed: bytes) -> bytes:
    """Return the key of the mask that only its maker's seed b_u gives."""
    return _derived(seed, b"fedkdx secure aggregation, own mask")
