"""Writes rows to the ledger, and in the same transaction the places up to which topics were read.

So whoever dies at any moment, or is stopped and wakes behind its successor, has written all of a batch or
nothing, and no batch twice: a place moves only from where it was thought to be. Rows go by COPY into a table
of the session's own, and from there to where they belong.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from models.predictions import Place
from tables.ledger.schema import PARTED, SCHEMA

AT_MOST_S = 60.0  # for a statement; a server that does not answer for longer is away
LOCK_S = 5  # for making or dropping a day, behind which other writers wait
DAY_MS = 86_400_000
_DAYS_LOCK = 0x6865_6165  # of PostgreSQL's advisory ones: who makes days

_STAGE = """
CREATE TEMP TABLE IF NOT EXISTS staged_predictions (
    scored_at bigint, "partition" int, "offset" bigint, event bigint, id text, stream text, event_time bigint,
    score float8, decision text, model text, version text, definition text, late bool, degraded bool, keys text,
    features text
) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE IF NOT EXISTS staged_labels (
    sent_at bigint, reversed bool, "partition" int, "offset" bigint, event bigint, event_time bigint,
    label smallint, known_at bigint
) ON COMMIT DELETE ROWS;
"""
_INSERT_PREDICTIONS = """
WITH written AS (
    INSERT INTO ledger.predictions
    SELECT $1, to_timestamp(scored_at::float8 / 1000), "partition", "offset", event, id, stream,
        to_timestamp(event_time::float8 / 1000), score, decision, model, version, definition, late, degraded,
        keys::jsonb, features::json
    FROM staged_predictions
    ON CONFLICT DO NOTHING
    RETURNING scored_at, "partition", "offset", event_time, score, keys
), keyed AS (
    INSERT INTO ledger.prediction_keys
    SELECT $1, one.key, one.value, w.event_time, w.scored_at, w."partition", w."offset", w.score
    FROM written w, jsonb_each_text(w.keys) one
    WHERE one.value IS NOT NULL
    ON CONFLICT DO NOTHING
)
SELECT count(*) FROM written
"""
_INSERT_LABELS = """
WITH written AS (
    INSERT INTO ledger.labels
    SELECT $1, to_timestamp(sent_at::float8 / 1000), reversed, "partition", "offset", event,
        to_timestamp(event_time::float8 / 1000), label, to_timestamp(known_at::float8 / 1000)
    FROM staged_labels
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT count(*) FROM written
"""
_PLACES = """
SELECT topic, "partition", next, highest FROM ledger.positions
WHERE pipeline = $1 AND (topic, "partition") IN (SELECT * FROM unnest($2::text[], $3::int[]))
"""
_BEGIN = """
INSERT INTO ledger.positions (pipeline, topic, "partition", next, highest)
SELECT $1, * FROM unnest($2::text[], $3::int[], $4::bigint[], $5::bigint[])
ON CONFLICT DO NOTHING
"""
# In the order of the key, so that two processes never wait for each other.
_LOCK_PLACES = _PLACES + ' ORDER BY topic, "partition" FOR UPDATE'
_MOVE = """
UPDATE ledger.positions p SET next = m.next, highest = m.highest, whole_at = coalesce(m.whole_at, p.whole_at)
FROM unnest($2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::timestamptz[])
    m(topic, "partition", next, highest, whole_at)
WHERE p.pipeline = $1 AND p.topic = m.topic AND p."partition" = m."partition"
"""
_FORGET = "DELETE FROM ledger.positions WHERE pipeline = $1 AND topic = ANY($2::text[])"
_CLEAR = {
    "predictions": "DELETE FROM ledger.predictions WHERE pipeline = $1",
    "prediction_keys": "DELETE FROM ledger.prediction_keys WHERE pipeline = $1",
    "labels": "DELETE FROM ledger.labels WHERE pipeline = $1",
}
_DAYS = """
SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = ANY($1::text[]::regclass[])
"""

TopicPartition = tuple[str, int]
Row = tuple[Any, ...]


class Moved(Exception):
    """Another process has read these partitions meanwhile. Nothing was written: begin again at the places."""


@dataclass
class Move:
    """From which place to which a partition was read. whole_at: all that was sent before is among it, ms."""

    before: Place
    after: Place
    whole_at: int | None = None


@dataclass
class Rows:
    """What was read of topics: rows in the order of the staged columns, times in ms, and how far that goes."""

    predictions: list[Row] = field(default_factory=list)
    labels: list[Row] = field(default_factory=list)
    moves: dict[TopicPartition, Move] = field(default_factory=dict)

    def days(self) -> set[int]:
        """The days of sending, since 1970."""
        return {row[0] // DAY_MS for rows in (self.predictions, self.labels) for row in rows}


class Writer:
    """Writes for one pipeline's instance, over one connection, which is made anew where it was lost.

    Raises what asyncpg raises: AWAY and OTHER_TABLES of tables.ledger among it.
    """

    def __init__(self, url: str, pipeline: str) -> None:
        self._url, self._pipeline = url, pipeline
        self._connection: Any = None
        self._days: set[int] = set()

    async def places(
        self, tps: Iterable[TopicPartition], first: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, Place]:
        """Where to read on; what was never read begins at its `first` offset."""
        tps = list(tps)
        topics, partitions = [t for t, _ in tps], [p for _, p in tps]
        async with self._transaction() as connection:
            start = [first[tp] for tp in tps]
            await connection.execute(_BEGIN, self._pipeline, topics, partitions, start, [-1] * len(tps))
            found = await connection.fetch(_PLACES, self._pipeline, topics, partitions)
        return {(row["topic"], row["partition"]): Place(row["next"], row["highest"]) for row in found}

    async def write(self, rows: Rows) -> int:
        """Write all of it or nothing. How many rows were new. Raises Moved."""
        try:
            await self._have_days(rows.days())
            return await self._write(rows)
        except asyncpg.CheckViolationError:  # somebody has dropped a day that we had made
            self._days.clear()
            await self._have_days(rows.days())
            return await self._write(rows)

    async def _write(self, rows: Rows) -> int:
        async with self._transaction() as connection:
            # 1. who moves a place holds it until the end
            await self._hold(connection, rows.moves)
            # 2. what was read
            new = 0
            for name, insert, staged in (
                ("staged_predictions", _INSERT_PREDICTIONS, rows.predictions),
                ("staged_labels", _INSERT_LABELS, rows.labels),
            ):
                if staged:
                    await connection.copy_records_to_table(name, records=staged)
                    new += await connection.fetchval(insert, self._pipeline)
            # 3. and how far
            await connection.execute(_MOVE, self._pipeline, *_columns(rows.moves))
        return new

    async def _hold(self, connection: Any, moves: Mapping[TopicPartition, Move]) -> None:
        topics, partitions = [t for t, _ in moves], [p for _, p in moves]
        found = await connection.fetch(_LOCK_PLACES, self._pipeline, topics, partitions)
        there = {(row["topic"], row["partition"]): row["next"] for row in found}
        if any(there.get(tp) != move.before.next for tp, move in moves.items()):
            raise Moved

    async def forget(self, topics: Sequence[str]) -> None:
        """Read these topics from their beginning again. Rows stay, and what is there is not written twice."""
        async with self._transaction() as connection:
            await connection.execute(_FORGET, self._pipeline, list(topics))

    async def clear(self, topics: Sequence[str]) -> None:
        """Remove all of this instance: its rows, and how far these topics were read."""
        async with self._transaction() as connection:
            for table in PARTED:
                await connection.execute(_CLEAR[table], self._pipeline)
            await connection.execute(_FORGET, self._pipeline, list(topics))

    async def _have_days(self, days: Iterable[int]) -> None:
        """Make the partitions of these days, where there are none."""
        missing = sorted(set(days) - self._days)
        if not missing:
            return
        async with self._transaction() as connection:
            await self._alone(connection)
            for day, table in itertools.product(missing, PARTED):
                await self._have_day(connection, table, day)
        self._days |= set(missing)

    async def _have_day(self, connection: Any, table: str, day: int) -> None:
        """Made apart and attached, for which nobody who reads or writes has to be waited for."""
        name = f"{SCHEMA}.{table}_{_name(day)}"
        if await connection.fetchval("SELECT to_regclass($1)", name) is None:
            await connection.execute(f"CREATE TABLE {name} (LIKE {SCHEMA}.{table} INCLUDING ALL)")
            await connection.execute(
                f"ALTER TABLE {SCHEMA}.{table} ATTACH PARTITION {name} "
                f"FOR VALUES FROM ('{_date(day)}T00:00Z') TO ('{_date(day + 1)}T00:00Z')"
            )

    async def keep(self, now: int, days: int) -> list[str]:
        """Make the partitions of today and tomorrow, and drop those of more than `days` ago; their names.

        To drop needs a moment in which nobody reads: without one it raises LockNotAvailableError. now: ms.
        """
        today = now // DAY_MS
        await self._have_days({today, today + 1})
        oldest = _name(today - days)
        async with self._transaction() as connection:
            await self._alone(connection)
            found = await connection.fetch(_DAYS, [f"{SCHEMA}.{table}" for table in PARTED])
            old = sorted(row["relname"] for row in found if row["relname"].rpartition("_")[2] < oldest)
            for name in old:
                await connection.execute(f"DROP TABLE {SCHEMA}.{name}")
        self._days = {day for day in self._days if _name(day) >= oldest}
        return old

    async def _alone(self, connection: Any) -> None:
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_S}s'")
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _DAYS_LOCK)

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Any]:
        if self._connection is None or self._connection.is_closed():
            self._days = set()  # it may be another server, or a copy of some time ago
            self._connection = await asyncpg.connect(self._url, timeout=AT_MOST_S, command_timeout=AT_MOST_S)
            await self._connection.execute(_STAGE)
        try:
            transaction = self._connection.transaction()
            await transaction.start()
            try:
                yield self._connection
            except Moved:
                await transaction.rollback()
                raise
            await transaction.commit()
        except Moved:
            raise
        except BaseException:
            self._connection.terminate()  # whatever state it is in: the server rolls back, the next one is new
            raise

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()


def _columns(moves: Mapping[TopicPartition, Move]) -> list[list[Any]]:
    return [
        [topic for topic, _ in moves],
        [partition for _, partition in moves],
        [move.after.next for move in moves.values()],
        [move.after.highest for move in moves.values()],
        [
            None if m.whole_at is None else dt.datetime.fromtimestamp(m.whole_at / 1000, dt.UTC)
            for m in moves.values()
        ],
    ]


def _date(day: int) -> dt.date:
    return dt.date(1970, 1, 1) + dt.timedelta(days=day)


def _name(day: int) -> str:
    return f"{_date(day):%Y%m%d}"
