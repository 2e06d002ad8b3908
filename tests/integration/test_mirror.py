"""The mirror on a real server: what is written is read back to the bit, and no old owner overwrites."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import mirror as mirror_agent
from agents.mirror import MirrorAgent
from app.local.services import Addresses
from models.events import EventDecoder
from models.pipeline import Pipeline, find
from tables.mirror import Mirror, connect
from tables.profiles import Profiles, Touched
from tables.store import Store
from tests.conftest import PIPELINES
from tests.fixtures.logs import Fetched, order
from tests.fixtures.pipelines import shop

pytestmark = pytest.mark.integration


@pytest.fixture
async def mirror(addresses: Addresses) -> AsyncIterator[Mirror]:
    mirror = Mirror(connect(addresses.redis_url), pipeline())
    await mirror.clear()
    yield mirror
    await mirror.clear()
    await mirror.close()


def pipeline() -> Pipeline:
    return find("flight-delays", PIPELINES, "mirror-test")


def touched(keys: list[bytes], value: float, offset: int, time: int = 1000) -> Touched:
    """Profiles of the entity `tailnum`, which has two features."""
    n = len(keys)
    features = np.column_stack([np.full(n, value), np.full(n, math.nan)])
    return Touched(
        np.arange(n),
        keys,
        features,
        np.full(n, time),
        np.full(n, offset),
        np.zeros(n, np.bool_),
        np.zeros(n, np.int64),
    )


async def test_values_are_read_back_to_the_bit(mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    value = 0.1 + 0.2
    assert await mirror.store(entity, touched([b"N1", b"N 2/\xc3\xa9"], value, 7, 1_378_000_000_123)) == 2
    for key in ("N1", "N 2/é"):
        found = await mirror.fetch(entity, key)
        assert found is not None
        assert (found.time, found.offset, found.definition) == (1_378_000_000_123, 7, pipeline().definition)
        assert found.features == {"TAILNUM_NB_7D": value, "TAILNUM_AVG_DEP_DELAY_7D": None}
    assert await mirror.fetch(entity, "N3") is None


async def test_an_older_offset_changes_nothing(mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    await mirror.store(entity, touched([b"N1"], 5.0, 9))
    assert await mirror.store(entity, touched([b"N1", b"N2"], 4.0, 8)) == 1
    found = await mirror.fetch(entity, "N1")
    assert found is not None
    assert (found.offset, found.features["TAILNUM_NB_7D"]) == (9, 5.0)
    assert await mirror.store(entity, touched([b"N1"], 6.0, 9)) == 1  # a label at the same place may


async def test_entries_expire_when_no_window_reaches_them(addresses: Addresses, mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    await mirror.store(entity, touched([b"N1"], 5.0, 9))
    client = connect(addresses.redis_url)
    left = await client.pttl(mirror.key(entity, b"N1"))
    await client.aclose()
    assert entity.retention - 5000 < left <= entity.retention == (7 * 24 + 1) * 3_600_000


async def test_clear_leaves_other_pipelines_alone(addresses: Addresses, mirror: Mirror) -> None:
    entity = pipeline().entities[0]
    other = Mirror(connect(addresses.redis_url), find("flight-delays", PIPELINES, "mirror-other"))
    for each in (mirror, other):
        await each.store(entity, touched([b"N1"], 5.0, 9))
    await mirror.clear()
    assert await mirror.fetch(entity, "N1") is None
    assert await other.fetch(entity, "N1") is not None
    await other.clear()
    await other.close()
    await asyncio.sleep(0)


# --- written anew --------------------------------------------------------------------------------


class Bench:
    """The first stage of the small pipeline over a real store, mirrored to the real Redis."""

    def __init__(self, path: Path, client: Any) -> None:
        self.pipeline = shop()
        self.entity = self.pipeline.entities[0]
        decoder = EventDecoder(self.pipeline, self.pipeline.stream)
        self.mirror = Mirror(client, self.pipeline)
        self._path, self._decode = path, lambda values, keys, sent: decoder.decode(values, sent)
        self._offset = 0
        self.begin()

    def begin(self) -> None:
        """A new owner of the store."""
        self.profiles = Profiles(
            self.entity, self._decode, lambda p, at_most: Store(self._path, self.pipeline.definition), 1,
            self.pipeline.columns,
        )  # fmt: skip
        self.profiles.start_at(0, self.profiles.open(0) or 0)
        self.agent = MirrorAgent([self.profiles], self.mirror)

    def fold(self, *customers: int) -> None:
        values = [order(self._offset + i, CUSTOMER=c) for i, c in enumerate(customers)]
        records = [Fetched(self._offset + i, v, b"", 2**41) for i, v in enumerate(values)]
        self._offset += len(records)
        self.profiles.apply([(0, records)])

    def flush(self) -> None:
        for snapshot in self.profiles.snapshots():
            self.profiles.write(snapshot)

    async def counts(self, *customers: int) -> list[float | None]:
        name = self.entity.features[0]
        found = [await self.mirror.fetch(self.entity, str(c)) for c in customers]
        return [None if f is None else f.features[name] for f in found]

    async def settled(self) -> None:
        async with asyncio.timeout(20):
            await self.agent.once()
            while self.agent.rebuilding:
                await self.agent.once()


@pytest.fixture
async def bench(addresses: Addresses, tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "store", connect(addresses.redis_url))
    await bench.mirror.clear()
    yield bench
    await bench.mirror.clear()
    await bench.mirror.close()


async def test_what_redis_has_lost_is_written_anew_also_of_profiles_that_are_on_disk_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = range(100, 700)  # more than go in one call
    bench.fold(1, 1, 2, *many)
    bench.flush()
    await bench.settled()
    assert sum(bench.profiles.sweep(True)) > 0, "evicted"
    assert bench.profiles.size == 0
    bench.fold(2, 3)
    await bench.mirror.clear()
    bench.agent._looked = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(mirror_agent, "REBUILD_S", 0.0)
        await bench.agent.once()
    assert bench.agent.rebuilding == 1
    await bench.settled()
    assert await bench.counts(1, 2, 3, *many) == [2, 2, 1, *[1] * len(many)]


async def test_a_copy_of_some_time_ago_is_noticed(bench: Bench) -> None:
    """As when Redis was killed and came back with what it had saved."""
    bench.fold(1, 2)
    bench.flush()
    await bench.settled()
    bench.fold(1, 3)
    bench.flush()
    await bench.settled()
    await bench.mirror.clear()
    await bench.mirror.mark(bench.entity, {0: (0, 2)})
    bench.agent._looked = 0.0
    await bench.settled()
    assert await bench.counts(1, 2, 3) == [2, 1, 1]


async def test_who_does_not_finish_leaves_it_to_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis lost its data, the owner noticed, and went before all was written anew."""
    bench.fold(1, 2)
    bench.flush()
    await bench.settled()
    await bench.mirror.clear()
    bench.fold(3)
    bench.flush()
    with monkeypatch.context() as patch:
        patch.setattr(mirror_agent, "REBUILD_S", 0.0)
        await bench.agent.once()
    assert bench.agent.rebuilding == 1
    bench.profiles.close(0)
    bench.begin()
    await bench.settled()
    assert await bench.counts(1, 2, 3) == [1, 1, 1]


async def test_what_an_owner_flushed_and_had_not_mirrored_its_successor_writes(bench: Bench) -> None:
    bench.fold(1)
    bench.flush()
    await bench.settled()
    bench.fold(1, 2)
    bench.flush()
    bench.profiles.close(0)  # it died here
    bench.begin()
    await bench.settled()
    assert await bench.counts(1, 2) == [2, 1]


async def test_a_successor_of_an_owner_that_mirrored_all_writes_nothing(bench: Bench) -> None:
    bench.fold(1, 2)
    bench.flush()
    await bench.settled()
    bench.profiles.close(0)
    bench.begin()
    await bench.settled()
    assert bench.agent.written == 0
