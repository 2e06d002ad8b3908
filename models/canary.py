"""A canary: a version that decides for a share of the entities, by a hash, so that every worker says the same of each.

An entity is of the canary when the first 8 bytes of BLAKE2b-512, little-endian, of `<version>/<key>` are below the
share of 2^64. The version is the salt: of two canaries each has entities of its own, and one whose share grows keeps
those that it had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from models.scoring import Model

Mask = npt.NDArray[np.bool_]


class Canary(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the registry says of a version that is, or was, the canary.

    share: percent of the entities. since: ms since the epoch. rail, reason: which guard rail took it back at `until`,
    and the sentence; None while nobody has.
    """

    share: float
    since: int
    rail: str | None = None
    reason: str | None = None
    until: int | None = None


@dataclass(frozen=True)
class Side:
    """Of n events, those that a canary has decided. mask: (n,)."""

    model: Model
    mask: Mask


def chosen(keys: Sequence[bytes | None], version: str, share: float) -> Mask:
    """Which entities are the canary's, (n,). keys: of the records; none without a key is. share: percent.

    >>> chosen([b"7", b"8", None], "0d5a4a3e77c1", 60).tolist()
    [True, True, False]
    """
    salted, below = hashlib.blake2b(f"{version}/".encode()), int(share / 100 * 2**64)

    def low(key: bytes) -> bool:
        hashed = salted.copy()
        hashed.update(key)
        return int.from_bytes(hashed.digest()[:8], "little") < below

    return np.array([key is not None and low(key) for key in keys], np.bool_)
