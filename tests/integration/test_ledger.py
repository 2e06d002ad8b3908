"""The ledger on a real PostgreSQL and Kafka: it holds what the topics say, each once, whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from agents.record import Recorder
from app import kafka, session
from app.ledger import group_of
from app.local import services
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import Pipeline, find
from models.predictions import Place, decode
from tables.ledger import AWAY, migrating
from tables.ledger.reading import Ledger, Outcome, WrongCursor
from tables.ledger.schema import PARTED, SCHEMA, Table
from tables.ledger.writing import DAY_MS, Move, Moved, Rows, Writer

pytestmark = pytest.mark.integration

BEGIN = 1_600_000_000_000


def prediction(number: int, partition: int, origin: int, **other: Any) -> bytes:
    made = {
        "id": number, "event_time": BEGIN + number * 1000, "score": (number * 7 % 1000) / 1000, "decision": "pass",
        "model": "card-fraud", "version": "5f0c", "definition": "7cb3", "late": number % 2 == 0, "degraded": False,
        "origin": {"partition": partition, "offset": origin},
        "keys": {"customer": str(number % 50), "terminal": None if number % 11 == 0 else str(number % 20)},
        "features": {"TX_AMOUNT": -0.0 if number % 3 == 0 else number / 7, "NB": None},
    }  # fmt: skip
    return json.dumps(made | other).encode()


def label(pipeline: Pipeline, number: int, value: int | None) -> bytes:
    assert pipeline.labels is not None
    stream = pipeline.stream
    unit = 1000 if stream.fields[stream.time].unit == "s" else 1
    return json.dumps({
        stream.id: number, stream.time: (BEGIN + number * 1000) // unit, "TERMINAL_ID": number % 20,
        pipeline.labels.field: value, pipeline.labels.known: (BEGIN + number * 1000 + DAY_MS) // unit,
    }).encode()  # fmt: skip


@dataclass
class Topics:
    """Writes the topics of an instance. `partitions` have, each, the next origin."""

    pipeline: Pipeline
    address: str
    producer: Any
    count: int = 4

    def __post_init__(self) -> None:
        self.origins = [0] * self.count
        self.made = 0

    async def predict(self, count: int, again: float = 0.0, seed: int = 0) -> None:
        """So many predictions. again: how often an owner begins at an earlier one, as a zombie's successor would."""
        rng = np.random.default_rng(seed)
        sent: dict[int, list[bytes]] = {p: [] for p in range(self.count)}
        for _ in range(count):
            number, p = self.made, self.made % self.count
            self.made += 1
            value = prediction(number, p, self.origins[p])
            self.origins[p] += int(rng.integers(1, 3))
            sent[p].append(value)
            await self._send(p, value)
            if rng.random() < again:
                for old in sent[p][-5:]:
                    await self._send(p, old)
        await self.producer.flush()

    async def _send(self, partition: int, value: bytes, topic: str | None = None) -> None:
        await self.producer.send(topic or self.pipeline.predictions, value, partition=partition)

    async def label(self, numbers: range, value: int | None) -> None:
        assert self.pipeline.labels is not None
        for number in numbers:
            await self._send(
                number % self.count, label(self.pipeline, number, value), self.pipeline.labels.topic
            )
        await self.producer.flush()

    async def told(self) -> dict[tuple[int, int], Any]:
        """The predictions of the topic by origin, each as it came first."""
        places: dict[int, Place] = {}
        found = {}
        async for record in kafka.read_between(self.address, self.pipeline.predictions):
            made = decode(record.value)
            if places.setdefault(record.partition, Place(0)).take(record.offset, made.origin.offset):
                found[record.partition, made.origin.offset] = (made, record.timestamp)
        return found


@contextlib.asynccontextmanager
async def topics_of(world: Settings, addresses: Addresses, instance: str) -> AsyncIterator[Topics]:
    pipeline = find("card-fraud", world.pipelines, instance)
    await session.fresh(world, pipeline, addresses)
    producer = kafka.producer(addresses.kafka)
    await producer.start()
    try:
        yield Topics(pipeline, addresses.kafka, producer)
    finally:
        await producer.stop()


async def rows_of(url: str, pipeline: Pipeline, table: str = "predictions") -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        rows: list[Any] = await connection.fetch(
            f"SELECT * FROM ledger.{table} WHERE pipeline = $1", pipeline.instance
        )
        return rows
    finally:
        await connection.close()


async def filled(url: str, pipeline: Pipeline, count: int, table: str = "predictions") -> list[Any]:
    """Wait until a table has so many rows."""
    async with asyncio.timeout(90):
        while len(rows := await rows_of(url, pipeline, table)) < count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.2)
    return rows


def ms(instant: Any) -> int:
    return round(instant.timestamp() * 1000)


def assert_equal(told: dict[tuple[int, int], Any], rows: list[Any]) -> None:
    assert {(r["partition"], r["offset"]) for r in rows} == told.keys()
    assert len(rows) == len(told)
    for row in rows:
        made, sent = told[row["partition"], row["offset"]]
        assert (row["id"], row["event"]) == (str(made.id), made.id)
        assert (ms(row["event_time"]), ms(row["scored_at"])) == (made.event_time, sent)
        for name in ("score", "decision", "model", "version", "definition", "late", "degraded", "stream"):
            assert row[name] == getattr(made, name)
        assert json.loads(row["keys"]) == made.keys
        assert repr(json.loads(row["features"])) == repr(made.features)  # the sign of a zero too


def process(world: Settings, pipeline: Pipeline, number: int = 1) -> session.Process:
    return session.Process(world, pipeline, "ledger run", number)


@pytest.mark.timeout(240)
async def test_the_ledger_equals_the_topic_whoever_is_killed(
    world: Settings, addresses: Addresses, postgres_url: str
) -> None:
    """Two processes share the partitions; one of them is killed at any time, and comes back."""
    async with topics_of(world, addresses, "ledger-killed") as topics:
        pipeline = topics.pipeline
        processes = [process(world, pipeline, n) for n in (1, 2)]
        rng = np.random.default_rng(11)
        try:
            for each in processes:
                each.start()
            for round_ in range(6):
                victim = processes[round_ % 2]
                await topics.predict(4000, again=0.01, seed=round_)
                await topics.label(range(round_ * 500, round_ * 500 + 500), round_ % 2)
                await asyncio.sleep(float(rng.uniform(0.2, 2.5)))
                assert victim.stop(signal.SIGKILL) == -signal.SIGKILL
                victim.start()
            told = await topics.told()
            assert len(told) == topics.made == 24_000
            rows = await filled(postgres_url, pipeline, len(told))
            await filled(postgres_url, pipeline, 3000, "labels")
            for each in processes:
                await each.ready()
                assert each.stop() == 0
        finally:
            for each in processes:
                each.stop(signal.SIGKILL)
        assert_equal(told, rows)
        keys = await rows_of(postgres_url, pipeline, "prediction_keys")
        assert sorted((r["entity"], r["key"], r["partition"], r["offset"]) for r in keys) == sorted(
            (entity, key, *origin)
            for origin, (made, _) in told.items() for entity, key in made.keys.items() if key is not None
        )  # fmt: skip
        labels = await rows_of(postgres_url, pipeline, "labels")
        assert sorted((r["event"], r["label"]) for r in labels) == [(n, n // 500 % 2) for n in range(3000)]
        committed = await kafka.committed_of(addresses.kafka, group_of(pipeline))
        assert committed  # for monitors of lag


@pytest.mark.timeout(240)
async def test_it_waits_for_postgres_and_goes_on(
    world: Settings, addresses: Addresses, postgres_url: str
) -> None:
    async with topics_of(world, addresses, "ledger-waits") as topics:
        ledger = process(world, topics.pipeline)
        try:
            ledger.start()
            await ledger.ready()
            await topics.predict(500)
            await filled(postgres_url, topics.pipeline, 500)
            services.down(world, ["postgres"])
            await topics.predict(1500)
            async with asyncio.timeout(30):
                while await ledger.is_ready():  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.1)
            assert (await ledger.metrics())["headrace_ledger_up"] == 0
            ledger.check()
            services.up(world, ["postgres"])
            rows = await filled(postgres_url, topics.pipeline, 2000)
            await ledger.ready()
            assert (await ledger.metrics())["headrace_ledger_rows_total"] == 2000
            assert_equal(await topics.told(), rows)
            assert ledger.stop() == 0
        finally:
            ledger.stop(signal.SIGKILL)


async def test_migrations_go_up_from_nothing_and_down_again(postgres_url: str) -> None:
    admin = await asyncpg.connect(postgres_url)
    await admin.execute("DROP DATABASE IF EXISTS ledger_empty")
    await admin.execute("CREATE DATABASE ledger_empty")
    await admin.close()
    url = postgres_url.rpartition("/")[0] + "/ledger_empty"
    assert (await migrating.revisions(url)).current is None
    with pytest.raises(migrating.OtherRevision, match="headrace ledger migrate"):
        await migrating.check(url)
    assert (await migrating.migrate(url, "base")).current is None
    after = await migrating.migrate(url)
    assert after.fits and (await migrating.migrate(url)).fits
    await migrating.check(url)
    differences = await migrating._with_connection(url, _differences)
    assert differences == []
    writer = Writer(url, "some")
    await writer.keep(BEGIN, 1)
    await writer.close()
    with pytest.raises(migrating.NoRevision):
        await migrating.migrate(url, "9999")
    assert migrating.is_down(after, "base") and not migrating.is_down(after, "head")
    assert (await migrating.migrate(url, "base")).current is None
    connection = await asyncpg.connect(url)
    left = await connection.fetch("SELECT relname FROM pg_class WHERE relnamespace = 'ledger'::regnamespace")
    assert {r["relname"] for r in left} <= {"alembic_version", "alembic_version_pkc"}
    assert (await migrating.migrate(url)).fits
    await connection.close()


def _differences(connection: Any) -> list[Any]:
    """Between the models and what the migrations made; days are made by the process."""
    context = MigrationContext.configure(
        connection,
        opts={
            "version_table_schema": SCHEMA, "include_schemas": True,
            "include_name": lambda name, kind, _: (
                name in (None, SCHEMA) if kind == "schema" else name != "alembic_version"
            ),
        },
    )  # fmt: skip
    found: list[Any] = compare_metadata(context, Table.metadata)
    return found


# --- the writer ----------------------------------------------------------------------------------


def rows_for(pipeline: Pipeline, numbers: range, place: Place, sent: int) -> Rows:
    recorder = Recorder(pipeline, 36_500)
    records: Any = [
        type("R", (), {"offset": n, "timestamp": sent, "value": prediction(n, 0, n), "key": None})
        for n in numbers
    ]
    return recorder.rows({(pipeline.predictions, 0): records}, {(pipeline.predictions, 0): place}, sent)


async def test_only_who_stands_where_the_ledger_does_may_write(world: Settings, postgres_url: str) -> None:
    """One that was stopped with a batch in hand, and wakes behind its successor, writes nothing."""
    pipeline = find("card-fraud", world.pipelines, "ledger-fenced")
    old, new = Writer(postgres_url, pipeline.instance), Writer(postgres_url, pipeline.instance)
    tp, now = (pipeline.predictions, 0), round(time.time() * 1000)
    await new.forget([pipeline.predictions])
    begin = (await old.places([tp], {tp: 0}))[tp]
    in_hand = rows_for(pipeline, range(10), begin, now)
    ahead = rows_for(pipeline, range(20), (await new.places([tp], {tp: 0}))[tp], now)
    assert await new.write(ahead) == 20
    with pytest.raises(Moved):
        await old.write(in_hand)
    assert (await old.places([tp], {tp: 0}))[tp] == Place(20, 19)
    assert len(await rows_of(postgres_url, pipeline)) == 20
    # without that look at the place it would go back, and what was read would be read again

    async def nothing(*_: Any) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(old, "_hold", nothing)
        await old.write(in_hand)
    assert (await old.places([tp], {tp: 0}))[tp] == Place(10, 9)
    # what is read again from the beginning, is there already
    await new.forget([pipeline.predictions])
    again = rows_for(pipeline, range(25), (await new.places([tp], {tp: 0}))[tp], now)
    assert await new.write(again) == 5
    await old.close()
    await new.close()


async def test_instances_that_share_a_topic_read_all_of_it_each(world: Settings, postgres_url: str) -> None:
    """Labels may be of one topic for two pipelines, or for an instance and its successor."""
    tp = ("labels-of-both", 0)
    writers = [Writer(postgres_url, f"ledger-shares-{n}") for n in range(2)]
    for writer in writers:
        await writer.clear([tp[0]])
    places = [(await writer.places([tp], {tp: 0}))[tp] for writer in writers]
    for writer, place in zip(writers, places, strict=True):
        assert await writer.write(Rows(moves={tp: Move(place, Place(7, 7))})) == 0
    await writers[0].forget([tp[0]])
    assert [(await writer.places([tp], {tp: 0}))[tp].next for writer in writers] == [0, 7]
    for writer in writers:
        await writer.close()


async def test_days_are_made_and_dropped(world: Settings, postgres_url: str) -> None:
    admin = await asyncpg.connect(postgres_url)
    await admin.execute("DROP DATABASE IF EXISTS ledger_days")
    await admin.execute("CREATE DATABASE ledger_days")
    url = postgres_url.rpartition("/")[0] + "/ledger_days"
    await migrating.migrate(url)
    pipeline = find("card-fraud", world.pipelines, "ledger-days")
    writer, other = Writer(url, pipeline.instance), Writer(url, pipeline.instance)
    tp, now = (pipeline.predictions, 0), 20_000 * DAY_MS + 5
    await writer.keep(now, 30)
    place = (await writer.places([tp], {tp: 0}))[tp]
    old = rows_for(pipeline, range(10), place, now - 29 * DAY_MS)
    new = rows_for(pipeline, range(10, 30), old.moves[tp].after, now)
    assert await writer.write(old) + await writer.write(new) == 30
    assert await writer.keep(now + DAY_MS, 30) == []
    dropped = await other.keep(now + 2 * DAY_MS, 30)
    assert dropped == sorted(f"{table}_20240905" for table in PARTED)
    assert len(await rows_of(url, pipeline)) == 20
    # a day that another has dropped is made anew
    late = rows_for(pipeline, range(30, 40), new.moves[tp].after, now - 29 * DAY_MS)
    assert await writer.write(late) == 10
    # who reads for long holds up what is dropped, and nothing else
    reports = await asyncpg.connect(url)
    async with reports.transaction():
        await reports.fetch("SELECT count(*) FROM ledger.outcomes")
        ahead = rows_for(pipeline, range(40, 50), late.moves[tp].after, now + 3 * DAY_MS)
        assert await writer.write(ahead) == 10
        with pytest.raises(asyncpg.LockNotAvailableError):
            await other.keep(now + 40 * DAY_MS, 30)
    assert await other.keep(now + 40 * DAY_MS, 30)
    for each in (reports, admin, writer, other):
        await each.close()


async def test_a_connection_that_breaks_loses_and_doubles_nothing(world: Settings, postgres_url: str) -> None:
    pipeline = find("card-fraud", world.pipelines, "ledger-broken")
    writer, tp, now = (
        Writer(postgres_url, pipeline.instance),
        (pipeline.predictions, 0),
        round(time.time() * 1000),
    )
    await writer.forget([pipeline.predictions])
    place = (await writer.places([tp], {tp: 0}))[tp]
    admin = await asyncpg.connect(postgres_url)
    for start in range(0, 300, 100):
        rows = rows_for(pipeline, range(start, start + 100), place, now)
        pid = await writer._connection.fetchval("SELECT pg_backend_pid()")
        await admin.execute("SELECT pg_terminate_backend($1)", pid)
        with contextlib.suppress(*AWAY):
            await writer.write(rows)
        with contextlib.suppress(Moved):
            await writer.write(rows)
        place = rows.moves[tp].after
    assert len(await rows_of(postgres_url, pipeline)) == 300
    await writer.close()
    await admin.close()


# --- the reader ----------------------------------------------------------------------------------


async def test_look_ups_find_what_a_scan_finds(world: Settings, postgres_url: str) -> None:
    pipeline = find("card-fraud", world.pipelines, "ledger-read")
    assert pipeline.labels is not None
    writer, reader = Writer(postgres_url, pipeline.instance), Ledger(postgres_url, pipeline)
    tp, said = (pipeline.predictions, 0), (pipeline.labels.topic, 0)
    await writer.forget([tp[0], said[0]])
    now = round(time.time() * 1000)
    places = await writer.places([tp, said], {tp: 0, said: 0})
    rows = rows_for(pipeline, range(400), places[tp], now)
    rows.moves[tp].whole_at = now
    await writer.write(rows)
    records: Any = [
        type(
            "R",
            (),
            {"offset": n, "timestamp": now + n, "value": label(pipeline, n % 100, [0, 1, None][n % 7 % 3])},
        )
        for n in range(150)
    ]
    await writer.write(Recorder(pipeline, 90).rows({said: records}, {said: places[said]}, now))
    last = {n % 100: [0, 1, None][n % 7 % 3] for n in range(150)}

    (one,) = await reader.predictions_of(7)
    assert (one.id, one.label, one.keys, one.partition, one.offset) == (
        7,
        last[7],
        {"customer": "7", "terminal": "7"},
        0,
        7,
    )
    assert repr((await reader.predictions_of(3))[0].features) == "{'TX_AMOUNT': -0.0, 'NB': None}"
    assert (one.labelled_at, one.known_at) == (now + 107, BEGIN + 7000 + DAY_MS) or last[7] is None
    assert await reader.predictions_of(400) == [] and await reader.predictions_of("7x") == []

    everything = [(await reader.predictions_of(n))[0] for n in range(400)]
    assert [o.label for o in everything] == [last.get(n) for n in range(400)]
    for entity, key, start, end, least in (
        ("customer", "7", 0, None, None), ("customer", "7", BEGIN + 57_000, BEGIN + 207_000, None),
        ("terminal", "0", 0, None, 0.5), ("terminal", "none", 0, None, None), ("nobody", "7", 0, None, None),
    ):  # fmt: skip
        wanted = [
            o for o in reversed(everything)
            if o.keys.get(entity) == key and start <= o.event_time and (end is None or o.event_time < end)
            and (least is None or (o.score is not None and o.score >= least))
        ]  # fmt: skip
        found: list[Outcome] = []
        cursor = None
        while True:
            page = await reader.predictions_about(
                entity, key, start=start, end=end, min_score=least, cursor=cursor, limit=3
            )
            found += page.outcomes
            cursor = page.cursor
            if cursor is None:
                break
        assert found == wanted
    with pytest.raises(WrongCursor):
        await reader.predictions_about("customer", "7", cursor="1-2-x")

    known = await reader.events([3, 399, 400], 1)
    assert known.whole_at == now
    assert {e: (k[0].time, dict(k[0].keys)) for e, k in known.events.items()} == {
        n: (BEGIN + n * 1000, everything[n].keys) for n in (3, 399)
    }
    assert (await reader.events([], 2)).whole_at is None  # a partition that nobody has read yet
    await reader.close()
    await writer.close()


async def test_what_is_no_row_does_not_stop_it(world: Settings, postgres_url: str) -> None:
    pipeline = find("card-fraud", world.pipelines, "ledger-odd")
    writer, tp, now = (
        Writer(postgres_url, pipeline.instance),
        (pipeline.predictions, 0),
        round(time.time() * 1000),
    )
    await writer.forget([pipeline.predictions])
    values = [
        b"", b"{", prediction(1, 0, 1, event_time=2**62), prediction(2, 0, 2, id=2**64),
        prediction(3, 0, 3, id="a\0b", keys={"customer": "x\0", "terminal": "\\u0000"}),
        prediction(4, 0, 4, features={"TX_AMOUNT": 1e300, "\0": 1}, score=None, model=None),
        prediction(5, 0, 5, keys=[1]),
        prediction(6, 0, 2**63), prediction(7, 0, 7, features=None),
    ]  # fmt: skip
    records: Any = [
        type("R", (), {"offset": n, "timestamp": now, "value": value, "key": None})
        for n, value in enumerate(values)
    ]
    records[-1].timestamp = now + 100 * DAY_MS
    recorder = Recorder(pipeline, 90)
    rows = recorder.rows({tp: records}, await writer.places([tp], {tp: 0}), now)
    assert (await writer.write(rows), recorder.foreign) == (3, 6)
    found = {r["offset"]: r for r in await rows_of(postgres_url, pipeline)}
    assert found[3]["id"] == "a\ufffdb"
    assert ms(found[7]["scored_at"]) == now + DAY_MS and found[7]["features"] is None
    move = Rows(moves={tp: Move(rows.moves[tp].after, rows.moves[tp].after)})
    assert await writer.write(move) == 0
    await writer.close()
