"""The order of a flush, with real stores: nothing is written before its outputs have arrived."""

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agents.flush import Flush
from agents.stage import Stage
from models.events import EventDecoder
from models.pipeline import Pipeline, find
from tables import profiles as module
from tables.profiles import Profiles
from tables.store import Store
from tests.conftest import PIPELINES
from tests.fixtures.histories import bits
from tests.unit.test_outbox import Producer, outbox, settle


class Record(msgspec.Struct):
    offset: int
    value: bytes
    key: bytes | None = None
    timestamp: int = 1_600_000_000_000


def payment(offset: int, customer: int = 7) -> Record:
    body = {
        "TRANSACTION_ID": offset, "TX_DATETIME": 1_500_000_000_000 + offset, "CUSTOMER_ID": customer,
        "TERMINAL_ID": 1, "TX_AMOUNT": 2.5,
    }  # fmt: skip
    return Record(offset, msgspec.json.encode(body))


class Bench:
    """One stage over one partition, its store, and a producer that waits to be told."""

    def __init__(self, path: Path, most_bytes: int = 2**30) -> None:
        self.path = path
        self.pipeline: Pipeline = find("card-fraud", PIPELINES)
        decoder = EventDecoder(self.pipeline, self.pipeline.stream)
        self.profiles = Profiles(
            self.pipeline.entities[0], lambda values, keys, sent: decoder.decode(values, sent),
            lambda partition, at_most: Store(path / str(partition), self.pipeline.definition), 1,
            self.pipeline.columns, targets=1,
        )  # fmt: skip
        self.producer = Producer()
        self.outbox = outbox(self.producer)
        self.stage = Stage(self.pipeline, 0, self.profiles, self.outbox, lambda log, applied: None, 1)
        self.committed: list[int] = []
        self.flush = Flush(
            [self.profiles],
            [],
            self.outbox,
            lambda topic, partition, position: self.committed.append(position),
            most_bytes,
        )
        self.profiles.start_at(0, self.profiles.open(0) or 0)

    def stored(self) -> tuple[int | None, int]:
        """Position, and how many rows customer 7 has, as a new owner would find them."""
        self.profiles.flush()
        self.profiles.close(0)
        store = Store(self.path / "0", self.pipeline.definition)
        packed = store.get(b"7")
        store.close()
        rows = 0 if packed is None else int.from_bytes(packed[8:16], "little")
        return store.progress and store.progress.position, rows

    async def flushed(self, work: Coroutine[Any, Any, None]) -> None:
        """Let it happen, with all that it waits for acknowledged."""
        task = asyncio.create_task(work)
        while not task.done():
            await self.producer.acknowledge()
        await task


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_profiles_and_position_follow_the_acknowledgement(bench: Bench) -> None:
    bench.stage.handle([(0, [payment(0), payment(1)])])
    flushing = asyncio.create_task(bench.flush.once())
    await settle()
    assert not flushing.done()
    assert bench.committed == []
    await bench.producer.acknowledge()
    await flushing
    assert bench.committed == [2]
    assert bench.stored() == (2, 2)


async def test_without_acknowledgement_nothing_is_written(bench: Bench) -> None:
    bench.stage.handle([(0, [payment(0)])])
    flushing = asyncio.create_task(bench.flush.once())
    await settle()
    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    assert bench.stored() == (None, 0)


async def test_a_flush_is_the_state_at_its_beginning(bench: Bench) -> None:
    bench.stage.handle([(0, [payment(0)])])
    flushing = asyncio.create_task(bench.flush.once())
    await settle()
    bench.stage.handle([(0, [payment(1)])])  # goes on while the flush waits
    await bench.producer.acknowledge()
    await flushing
    assert bench.stored() == (1, 1)


async def test_what_a_cancelled_flush_took_is_written_by_the_next(bench: Bench) -> None:
    """Else a later position would stand in the store without these profiles: events lost."""
    bench.stage.handle([(0, [payment(0)])])
    flushing = asyncio.create_task(bench.flush.once())
    await settle()
    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    bench.stage.handle([(0, [payment(1, customer=8)])])  # customer 7 is not touched again
    flushing = asyncio.create_task(bench.flush.once())
    await settle()
    await bench.producer.acknowledge()
    await bench.producer.acknowledge()
    await flushing
    assert bench.stored() == (2, 1)


async def test_memory_stays_within_its_bound_and_no_feature_changes(tmp_path: Path) -> None:
    bound = 4_000_000
    small, large = Bench(tmp_path / "small", bound), Bench(tmp_path / "large")
    rng, offset = random.Random(3), 0
    for _ in range(60):
        polled = [(0, [payment(offset + i, rng.randrange(30_000)) for i in range(400)])]
        offset += 400
        await small.flushed(small.flush.room())
        assert small.profiles.used <= bound
        found, expected = small.profiles.apply(polled), large.profiles.apply(polled)
        assert bits(found.features) == bits(expected.features)
    assert small.profiles.evicted > small.profiles.loaded > 0
    assert (large.profiles.evicted, large.profiles.loaded) == (0, 0)
    assert small.profiles.unmirrored == large.profiles.unmirrored == large.profiles.size


async def test_nothing_is_evicted_before_it_is_written(tmp_path: Path) -> None:
    """A flush that was cancelled has taken profiles that are not stored yet."""
    bench = Bench(tmp_path, 1)
    bench.stage.handle([(0, [payment(0)])])
    flushing = asyncio.create_task(bench.flush.room())
    await settle()
    assert not flushing.done()
    assert bench.profiles.size == 1
    flushing.cancel()
    await asyncio.gather(flushing, return_exceptions=True)
    bench.stage.handle([(0, [payment(1)])])
    await bench.flushed(bench.flush.room())
    assert bench.profiles.size == 0
    assert bench.profiles.apply([(0, [payment(2)])]).features[0, 0] == 3


async def test_a_profile_above_the_bound_works_and_does_not_flush_at_every_poll(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 100_000)
    for n in range(100):
        await bench.flushed(bench.flush.room())
        applied = bench.profiles.apply([(0, [payment(n * 50 + i) for i in range(50)])])
        assert applied.features[:, 0].tolist() == list(range(n * 50 + 1, n * 50 + 51))
    assert bench.profiles.used > 100_000
    assert len(bench.committed) < 50


async def test_consumption_waits_while_more_has_changed_than_one_write_should_hold(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_CHANGED", 10)
    monkeypatch.setattr(module, "FEW", 10)
    bench.profiles.apply([(0, [payment(i, customer=i % 10) for i in range(30)])])
    await bench.flush.room()
    assert bench.committed == []  # thirty records, but ten profiles
    bench.profiles.apply([(0, [payment(30, customer=10)])])
    await bench.flush.room()
    assert bench.committed == [31]


async def test_where_nothing_can_be_let_go_it_waits_for_one_flush_and_goes_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 1)
    for n in range(3):
        bench.profiles.apply([(0, [payment(n)])])
        await asyncio.wait_for(asyncio.gather(bench.flush.room(), bench.flush.room()), 10)
    assert bench.committed[-1] == 3 or bench.profiles.size == 1
