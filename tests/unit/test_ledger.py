"""The ledger's process on a Kafka and a PostgreSQL that are made up. Real ones: tests/integration/test_ledger.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from aiokafka import TopicPartition

from app import ledger as module
from app.ledger import Ledger
from models.predictions import Place
from tables.ledger.writing import Rows
from tests.fixtures.logs import log
from tests.fixtures.pipelines import shop
from tests.unit.test_record import made

PIPELINE = shop()
TP = TopicPartition(PIPELINE.predictions, 0)
NOW = 1_600_000_000


class Consumer:
    """Of one partition, all of which was fetched once; what a fetch says of its end is of now, as aiokafka has it."""

    def __init__(self) -> None:
        self.records = log([made(i, i) for i in range(4)])
        self.behind = 0  # records that came while the process stood still
        self.at = 0

    def assignment(self) -> set[TopicPartition]:
        return {TP}

    async def beginning_offsets(self, tps: Any) -> Any:
        return dict.fromkeys(tps, 0)

    async def end_offsets(self, tps: Any) -> Any:
        return dict.fromkeys(tps, len(self.records) + self.behind)

    async def position(self, tp: Any) -> int:
        return self.at

    def seek(self, tp: Any, offset: int) -> None:
        self.at = offset

    async def getmany(self, timeout_ms: float, max_records: int = 1) -> Any:
        await asyncio.sleep(0)
        found = self.records[self.at : self.at + 1]
        self.at += len(found)
        return {TP: found} if found else {}

    def last_stable_offset(self, tp: Any) -> int:
        return len(self.records)

    highwater = last_stable_offset

    def last_poll_timestamp(self, tp: Any) -> int:
        return NOW * 1000

    async def commit(self, offsets: Any) -> None: ...


class Writer:
    """Has one connection, as tables.ledger.writing's."""

    def __init__(self) -> None:
        self.busy = False
        self.at_once: list[str] = []
        self.place = Place(0)
        self.whole: list[int | None] = []

    @contextlib.asynccontextmanager
    async def _alone(self, what: str) -> AsyncIterator[None]:
        if self.busy:
            self.at_once.append(what)
        self.busy = True
        for _ in range(5):
            await asyncio.sleep(0)
        yield
        self.busy = False

    async def places(self, tps: Any, first: Any) -> Any:
        async with self._alone("places"):
            return {tuple(TP): self.place}

    async def write(self, rows: Rows) -> int:
        async with self._alone("write"):
            self.place = rows.moves[tuple(TP)].after
            self.whole.append(rows.moves[tuple(TP)].whole_at)
            return len(rows.predictions)

    async def keep(self, now: int, days: int) -> list[str]:
        async with self._alone("keep"):
            return []


async def lived(consumer: Consumer, writer: Writer, turns: int = 200) -> Ledger:
    ledger = Ledger(PIPELINE, "", "postgresql://nowhere", 90, clock=lambda: NOW)
    ledger._consumer, ledger._writer = consumer, writer  # type: ignore[assignment]
    stop = asyncio.Event()
    reading = asyncio.create_task(ledger._read(stop))
    for _ in range(turns):
        await asyncio.sleep(0)
    stop.set()
    await reading
    return ledger


async def test_one_at_a_time_uses_the_connection(monkeypatch: Any) -> None:
    """Two would end each other: under load no day would ever be dropped."""
    monkeypatch.setattr(module, "KEEP_S", 0)
    writer = Writer()
    ledger = await lived(Consumer(), writer)
    assert (ledger.rows, writer.at_once) == (4, [])


async def test_what_came_while_it_stood_still_is_none_of_what_it_is_whole_of() -> None:
    """Woken, it finds an answer of then in its socket: labels whose events are yet to be read would be given up."""
    consumer, writer = Consumer(), Writer()
    consumer.behind = 1
    await lived(consumer, writer)
    assert writer.place.next == 4
    assert set(writer.whole) == {None}
    consumer.behind = 0
    await lived(consumer, writer)
    assert writer.whole[-1] == NOW * 1000


async def test_an_older_owner_may_have_read_on(monkeypatch: Any) -> None:
    """What it wrote while the places were asked for is not beyond the topic's end."""
    consumer, writer = Consumer(), Writer()
    places = writer.places

    async def late(tps: Any, first: Any) -> Any:
        consumer.records = log([made(i, i) for i in range(6)])
        writer.place = Place(6, 5)
        return await places(tps, first)

    monkeypatch.setattr(writer, "places", late)
    assert (await lived(consumer, writer)).holds
