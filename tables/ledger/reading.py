"""Look-ups in the ledger: an event's predictions, an entity's, and what a label must know of its event.

Times are ms. What stands here may be some seconds behind the topics; `whole_at` says how far it is whole.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any, NamedTuple

import asyncpg
import msgspec

from models.errors import HeadraceError
from models.events import Found, Known
from models.pipeline import Pipeline
from tables.ledger import AWAY

ANSWER_S = 10.0
MOST = 1000  # predictions of a page

# `found` are the rows of predictions that are wanted, and no more: only of these are labels looked up.
_OUTCOMES = """
SELECT p.*, l.label, l.known_at, l.sent_at AS labelled_at,
    EXISTS (
        SELECT FROM ledger.labels r WHERE r.event = p.event AND r.pipeline = p.pipeline AND r.reversed
    ) AS reversed
FROM found f
JOIN ledger.predictions p USING (pipeline, scored_at, "partition", "offset")
LEFT JOIN LATERAL (
    SELECT label, known_at, sent_at FROM ledger.labels l
    WHERE l.event = p.event AND l.pipeline = p.pipeline AND NOT l.reversed
    ORDER BY sent_at DESC, l."partition" DESC, l."offset" DESC LIMIT 1
) l ON true
"""
_OF_EVENT = f"""
WITH found AS (
    SELECT pipeline, scored_at, "partition", "offset" FROM ledger.predictions
    WHERE event = $1 AND pipeline = $2 AND id = $3
    ORDER BY scored_at DESC, "partition" DESC, "offset" DESC LIMIT $4
)
{_OUTCOMES} ORDER BY scored_at DESC, "partition" DESC, "offset" DESC
"""  # noqa: S608 - of constants
# The keys' rows come in the order of their index, a page of them.
_OF_ENTITY = f"""
WITH found AS (
    SELECT pipeline, scored_at, "partition", "offset" FROM ledger.prediction_keys
    WHERE pipeline = $1 AND entity = $2 AND key = $3 AND event_time >= $4 AND event_time < $5
        AND ($6::float8 IS NULL OR score >= $6)
        AND (event_time, scored_at, "partition", "offset") < ($7, $8, $9, $10)
    ORDER BY event_time DESC, scored_at DESC, "partition" DESC, "offset" DESC LIMIT $11
)
{_OUTCOMES} ORDER BY event_time DESC, scored_at DESC, "partition" DESC, "offset" DESC
"""  # noqa: S608 - likewise
_EVENTS = """
SELECT event, event_time, keys FROM ledger.predictions
WHERE event = ANY($1::bigint[]) AND pipeline = $2 AND (stream IS NULL OR stream = $3)
ORDER BY event, scored_at DESC, "partition" DESC, "offset" DESC
"""
_WHOLE = """
SELECT count(whole_at) AS partitions, min(whole_at) AS whole_at FROM ledger.positions
WHERE pipeline = $1 AND topic = $2
"""
_EXTENT = """
SELECT (SELECT count(*) FROM ledger.predictions WHERE pipeline = $1) AS predictions,
    (SELECT count(*) FROM ledger.labels WHERE pipeline = $1) AS labels,
    (SELECT count(*) FROM pg_inherits WHERE inhparent = 'ledger.predictions'::regclass) AS days
"""
_POSITIONS = """
SELECT topic, "partition", next, whole_at FROM ledger.positions WHERE pipeline = $1 AND topic = ANY($2::text[])
ORDER BY topic, "partition"
"""

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MS = dt.timedelta(milliseconds=1)
_EVER = dt.datetime(9999, 1, 1, tzinfo=dt.UTC)


class WrongCursor(HeadraceError):
    """A cursor that no page has given."""

    exit_code = 2

    def __init__(self) -> None:
        super().__init__("This is no cursor of a page of predictions; leave it out to begin with the newest.")


class Outcome(msgspec.Struct):
    """A prediction, and what is known of its event. label: 0, 1, or None; labelled_at: when the last one was sent.

    keys: by entity. features: by name, None where the topic's predictions have none.
    """

    id: int | str
    stream: str | None
    event_time: int
    scored_at: int
    score: float | None
    decision: str | None
    model: str | None
    version: str | None
    definition: str
    late: bool
    degraded: bool
    partition: int
    offset: int
    keys: dict[str, str | None]
    features: dict[str, float | None] | None
    label: int | None
    known_at: int | None
    labelled_at: int | None
    reversed: bool


class Page(NamedTuple):
    """Predictions, and where the next page begins; None behind the last one."""

    outcomes: list[Outcome]
    cursor: str | None


class Ledger:
    """Look-ups of one pipeline's instance. Raises what asyncpg raises, and OSError, where the server is away."""

    def __init__(self, url: str, pipeline: Pipeline, connections: int = 4) -> None:
        self._url, self._pipeline, self._connections = url, pipeline, connections
        self._pool: Any = None

    async def predictions_of(
        self, id: int | str, stream: str | None = None, limit: int = 10
    ) -> list[Outcome]:
        """Those of an event, the newest first. stream: the first one where it is not named."""
        of = next((s for s in self._pipeline.streams if s.name == stream), self._pipeline.stream)
        rows = await self._fetch(_OF_EVENT, of.identity(id), self._pipeline.instance, _stored(id), limit)
        return [self._outcome(row) for row in rows]

    async def predictions_about(
        self, entity: str, key: str, *, start: int = 0, end: int | None = None, min_score: float | None = None,
        cursor: str | None = None, limit: int = 100,
    ) -> Page:  # fmt: skip
        """A page of those about an entity, of events from `start` on and before `end`, the newest event first.

        Raises WrongCursor.
        """
        limit = min(limit, MOST)
        after = (_EVER, _EVER, 0, 0) if cursor is None else _place(cursor)
        rows = await self._fetch(
            _OF_ENTITY, self._pipeline.instance, entity, key, _instant(start),
            _EVER if end is None else _instant(end), min_score, *after, limit,
        )  # fmt: skip
        found = [self._outcome(row) for row in rows]
        return Page(found, _cursor(found[-1]) if len(found) == limit else None)

    async def events(self, ids: Sequence[int], partitions: int) -> Found:
        """What is known of events of the first stream, in one query. partitions: of the predictions' topic."""
        whole = (await self._fetch(_WHOLE, self._pipeline.instance, self._pipeline.predictions))[0]
        rows = await self._fetch(_EVENTS, ids, self._pipeline.instance, self._pipeline.stream.name)
        events: dict[int, list[Known]] = {}
        for row in rows:
            events.setdefault(row["event"], []).append(Known(_ms(row["event_time"]), row["keys"]))
        complete = whole["partitions"] >= partitions
        return Found(events, _ms(whole["whole_at"]) if complete else None)

    async def extent(self, topics: Sequence[str]) -> dict[str, Any]:
        """How many rows there are, of how many days, and how far these topics were read."""
        counts = dict((await self._fetch(_EXTENT, self._pipeline.instance))[0])
        positions = [
            dict(row) | {"whole_at": row["whole_at"] and row["whole_at"].isoformat(timespec="milliseconds")}
            for row in await self._fetch(_POSITIONS, self._pipeline.instance, topics)
        ]
        return counts | {"positions": positions}

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()

    async def _fetch(self, sql: str, *values: Any) -> list[Any]:
        if self._pool is None:
            self._pool = await asyncpg.create_pool(
                self._url, min_size=0, max_size=self._connections, timeout=ANSWER_S, command_timeout=ANSWER_S,
                init=_prepare,
            )  # fmt: skip
        rows: list[Any] = await self._pool.fetch(sql, *values)
        return rows

    def _outcome(self, row: Any) -> Outcome:
        of = next((s for s in self._pipeline.streams if s.name == row["stream"]), self._pipeline.stream)
        return Outcome(
            id=int(row["id"]) if of.fields[of.id].type == "int" else row["id"],
            stream=row["stream"],
            event_time=_ms(row["event_time"]),
            scored_at=_ms(row["scored_at"]),
            score=row["score"],
            decision=row["decision"],
            model=row["model"],
            version=row["version"],
            definition=row["definition"],
            late=row["late"],
            degraded=row["degraded"],
            partition=row["partition"],
            offset=row["offset"],
            keys=row["keys"],
            features=row["features"],
            label=row["label"],
            known_at=None if row["known_at"] is None else _ms(row["known_at"]),
            labelled_at=None if row["labelled_at"] is None else _ms(row["labelled_at"]),
            reversed=row["reversed"],
        )


class Events:
    """What a router asks the ledger. `failing`: why it cannot say, while it cannot.

    partitions: of the predictions' topic.
    """

    def __init__(self, ledger: Ledger, partitions: int) -> None:
        self._ledger, self._partitions = ledger, partitions
        self.failing: str | None = None

    async def find(self, ids: Sequence[int]) -> Found | None:
        """What is known of these events, in one query. None while the ledger cannot say."""
        try:
            found = await self._ledger.events(ids, self._partitions)
        except (*AWAY, asyncpg.PostgresError) as error:  # tables that are not made yet, too
            self.failing = str(error) or type(error).__name__
            return None
        self.failing = None
        return found


async def _prepare(connection: Any) -> None:
    for kind in ("json", "jsonb"):
        await connection.set_type_codec(
            kind, encoder=msgspec.json.encode, decoder=msgspec.json.decode, schema="pg_catalog"
        )


def _stored(id: int | str) -> str:
    return str(id).replace("\0", "\ufffd")


def _instant(time: int) -> dt.datetime:
    return _EPOCH + time * _MS


def _ms(instant: dt.datetime) -> int:
    return (instant - _EPOCH) // _MS


def _cursor(last: Outcome) -> str:
    return f"{last.event_time}-{last.scored_at}-{last.partition}-{last.offset}"


def _place(cursor: str) -> tuple[dt.datetime, dt.datetime, int, int]:
    try:
        time, sent, partition, offset = map(int, cursor.split("-"))
        return _instant(time), _instant(sent), partition, offset
    except (ValueError, OverflowError):
        raise WrongCursor from None
