"""Keys go where Kafka's own clients send them."""

from __future__ import annotations

import numpy as np
import pytest
from aiokafka.partitioner import DefaultPartitioner, murmur2
from hypothesis import given
from hypothesis import strategies as st

from models.partitions import partition_of, partitions_of

KEYS = st.lists(st.none() | st.binary(max_size=40), max_size=20)


def kafka_s(key: bytes, count: int) -> int:
    everywhere = list(range(count))
    return int(DefaultPartitioner()(key, everywhere, everywhere))


@given(KEYS, st.integers(1, 200))
def test_partitions_are_kafka_s(keys: list[bytes | None], count: int) -> None:
    """A batch at once: no key's bytes spill into the next one's."""
    ids = np.arange(len(keys)) * 7 - 20
    expected = [
        i % count if k is None else kafka_s(k, count) for k, i in zip(keys, ids.tolist(), strict=True)
    ]
    partitions = partitions_of(keys, ids, count)
    assert partitions.tolist() == expected
    assert [partition_of(k, count) for k in keys if k is not None] == [
        p for k, p in zip(keys, expected, strict=True) if k is not None
    ]


@pytest.mark.parametrize(
    ("key", "hashed"),
    [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536),
     (b"a-little-bit-longer-string", -1486304829), (b"abc", 479470107),
     (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971)],
)  # fmt: skip
def test_the_vectors_of_kafka_s_own_test(key: bytes, hashed: int) -> None:
    """From UtilsTest.testMurmur2 of Apache Kafka, so that we do not lean on one client alone."""
    assert murmur2(key) == hashed % 2**32
    assert partition_of(key, 2**31 - 1) == (hashed & 0x7FFFFFFF) % (2**31 - 1)


def test_events_without_a_key_are_spread_whatever_their_ids() -> None:
    ids = np.array([-1, -(2**63), 2**63 - 1, 0, 5])
    assert partitions_of([None] * 5, ids, 4).tolist() == [3, 0, 3, 0, 1]
