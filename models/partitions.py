"""Which partition of a topic a key belongs in: Kafka's default partitioner (murmur2), a batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.windows import Ints, jit


def partitions_of(keys: Sequence[bytes | None], ids: Ints, count: int) -> Ints:
    """Partitions (n,) of `count`. Records without a key are spread by their event ids (n,) int64.

    >>> partitions_of([b"21", None], np.array([5, 6]), 4).tolist()
    [0, 2]
    """
    lengths = np.array([-1 if k is None else len(k) for k in keys], np.int64)
    joined = np.frombuffer(b"".join([k or b"" for k in keys]), np.uint8)
    result = np.empty(len(keys), np.int64)
    _partition(joined, lengths, ids, count, result)
    return result


def partition_of(key: bytes, count: int) -> int:
    """The partition of one key."""
    return int(partitions_of([key], np.zeros(1, np.int64), count)[0])


@jit
def _partition(joined: npt.NDArray[np.uint8], lengths: Ints, ids: Ints, count: int, result: Ints) -> None:
    start = 0
    for i in range(len(lengths)):
        n = lengths[i]
        if n < 0:
            result[i] = ids[i] % count
            continue
        # murmur2 with the seed and constants of Kafka's clients, in 32-bit arithmetic
        h = np.uint32(0x9747B28C) ^ np.uint32(n)
        at = start
        for _ in range(n // 4):
            k = (
                np.uint32(joined[at]) | np.uint32(joined[at + 1]) << np.uint32(8)
                | np.uint32(joined[at + 2]) << np.uint32(16) | np.uint32(joined[at + 3]) << np.uint32(24)
            )  # fmt: skip
            k = np.uint32(k * np.uint32(0x5BD1E995))
            k ^= k >> np.uint32(24)
            k = np.uint32(k * np.uint32(0x5BD1E995))
            h = np.uint32(h * np.uint32(0x5BD1E995)) ^ k
            at += 4
        rest = n % 4
        if rest == 3:
            h ^= np.uint32(joined[at + 2]) << np.uint32(16)
        if rest >= 2:
            h ^= np.uint32(joined[at + 1]) << np.uint32(8)
        if rest >= 1:
            h ^= np.uint32(joined[at])
            h = np.uint32(h * np.uint32(0x5BD1E995))
        h ^= h >> np.uint32(13)
        h = np.uint32(h * np.uint32(0x5BD1E995))
        h ^= h >> np.uint32(15)
        result[i] = np.int64(h & np.uint32(0x7FFFFFFF)) % count
        start += n
