"""The order of a flush, with real stores: nothing is written before its outputs have arrived."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from agents.flush import Flush
from agents.stage import Stage
from models.events import EventDecoder
from models.pipeline import Pipeline, find
from tables.profiles import Profiles
from tables.store import Store
from tests.conftest import PIPELINES
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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pipeline: Pipeline = find("card-fraud", PIPELINES)
        decoder = EventDecoder(self.pipeline)
        self.profiles = Profiles(
            self.pipeline.entities[0], lambda values, keys, sent: decoder.decode(values, sent),
            lambda partition: Store(path / str(partition), self.pipeline.definition), 1,
            [f.name for f in self.pipeline.stream.numeric],
        )  # fmt: skip
        self.producer = Producer()
        self.outbox = outbox(self.producer)
        self.stage = Stage(self.pipeline, 0, self.profiles, self.outbox, lambda log, applied: None, 1)
        self.committed: list[int] = []
        self.flush = Flush(
            [self.profiles],
            None,
            self.outbox,
            lambda topic, partition, position: self.committed.append(position),
            None,
            2**30,
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
        return store.position, rows


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
