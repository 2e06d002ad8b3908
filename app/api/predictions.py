"""Look-ups of predictions in the ledger, and predictions as they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from app.api import schemas
from app.api.live import WAITING, Live, as_answer
from app.api.problems import ProblemError, invalid
from app.api.schemas import EventPredictions, EventQuery, Page, PageQuery, StreamQuery, instant
from app.api.security import HEADERS
from app.client import Received
from models.pipeline import Pipeline

if TYPE_CHECKING:
    from tables.ledger.reading import Ledger, Outcome

HEARTBEAT_S = 15.0  # proxies cut a connection that is silent for longer
MOST_STREAMS = 100  # of one process
_LARGEST = 2**63 - 1


class Ledgers:
    """Look-ups in the ledger. url: None where the settings name none."""

    def __init__(self, pipeline: Pipeline, url: str | None) -> None:
        self._pipeline, self._url = pipeline, url
        self._reader: Ledger | None = None

    async def of_event(self, request: web.Request, query: EventQuery, _: Any) -> EventPredictions:
        """GET /v1/predictions/{event_id}"""
        stream = self._pipeline.stream
        if query.stream is not None:
            known = {s.name: s for s in self._pipeline.streams}
            if query.stream not in known:
                raise invalid("stream", f"there is no {query.stream!r}; there are {', '.join(known)}.")
            stream = known[query.stream]
        text = request.match_info["event_id"]
        id_: int | str = text
        if stream.fields[stream.id].type == "int":
            if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) <= 20):
                raise invalid("event_id", f"{text!r} is no integer, and {stream.id} is one.")
            id_ = int(text)
            if abs(id_) > _LARGEST:
                raise invalid("event_id", f"{text} does not fit into 64 bits.")
        found = await self._ask(lambda ledger: ledger.predictions_of(id_, stream.name))
        if not found:
            raise ProblemError(
                "not-found",
                f"The ledger has no prediction of event {text}: it is unknown, not predicted yet, or older than "
                "what is kept.",
            )
        return EventPredictions([self._answer(outcome) for outcome in found])

    async def of_entity(self, _: web.Request, query: PageQuery, __: Any) -> Page:
        """GET /v1/predictions"""
        from tables.ledger.reading import WrongCursor

        known = [entity.name for entity in self._pipeline.entities]
        if query.entity not in known:
            raise invalid("entity", f"there is no {query.entity!r}; there are {', '.join(known)}.")
        if "\0" in query.id:
            return Page([], None)  # no text of PostgreSQL holds one
        start, end = self._time("from", query.start) or 0, self._time("to", query.end)
        try:
            page = await self._ask(
                lambda ledger: ledger.predictions_about(
                    query.entity, query.id, start=start, end=end, min_score=query.min_score,
                    cursor=query.cursor, limit=query.limit,
                )
            )  # fmt: skip
        except WrongCursor as error:
            raise invalid("cursor", str(error)) from None
        return Page([self._answer(outcome) for outcome in page.outcomes], page.cursor)

    async def close(self) -> None:
        if self._reader is not None:
            await self._reader.close()

    async def _ask(self, look: Callable[[Ledger], Any]) -> Any:
        if self._url is None:
            raise ProblemError(
                "unavailable",
                "There is no ledger: set HEADRACE_POSTGRES_URL, and run `headrace ledger run`.",
                retry_s=60,
            )
        import asyncpg  # a worker loads it only where somebody asks

        from tables.ledger import AWAY, OTHER_TABLES, reading

        if self._reader is None:
            self._reader = reading.Ledger(self._url, self._pipeline)
        try:
            return await look(self._reader)
        except OTHER_TABLES:
            raise ProblemError(
                "unavailable",
                "The ledger has no tables, or others; run `headrace ledger migrate`.",
                retry_s=60,
            ) from None
        except asyncpg.DataError as error:
            raise invalid("cursor", f"the ledger cannot hold it ({error}).") from None
        except (*AWAY, asyncpg.PostgresError) as error:
            raise ProblemError(
                "unavailable", f"The ledger does not answer ({type(error).__name__}); try again."
            ) from None

    def _time(self, field: str, text: str | None) -> int | None:
        if text is None:
            return None
        found = schemas.parsed_time(text)
        if found is None:
            raise invalid(field, f"{text!r} is no time like 2018-07-25T12:00:00Z, nor its ms.")
        return found

    def _answer(self, found: Outcome) -> schemas.Prediction:
        known = found.labelled_at is not None
        label = schemas.Label(found.label, _instant(found.known_at), _instant(found.labelled_at))
        return schemas.Prediction(
            self._pipeline.name, found.id, found.stream or self._pipeline.stream.name, instant(found.event_time),
            instant(found.scored_at), found.score, found.decision, found.model, found.version, found.definition,
            found.late, found.degraded,
            schemas.Origin(self._pipeline.entities[-1].log, found.partition, found.offset),
            found.keys, found.features, label if known else None, found.reversed,
        )  # fmt: skip


def _instant(ms: int | None) -> Any:
    return None if ms is None else instant(ms)


class Streams:
    """Predictions as server-sent events."""

    def __init__(self, pipeline: Pipeline, live: Live | None) -> None:
        self._pipeline, self._live = pipeline, live
        self.open = 0

    async def stream(self, request: web.Request, query: StreamQuery, _: Any) -> web.StreamResponse:
        """GET /v1/stream/predictions"""
        wanted = self._filter(query)
        if self._live is None:
            raise ProblemError("unavailable", "This process has no Kafka; set HEADRACE_KAFKA.", retry_s=60)
        if self.open >= MOST_STREAMS:
            raise ProblemError(
                "unavailable", f"{self.open} streams are open; close some, or ask another process."
            )
        queue: asyncio.Queue[Received | None] = asyncio.Queue(WAITING + 1)

        def put(prediction: Received | None) -> None:
            if prediction is not None and not wanted(prediction):
                return
            if queue.qsize() >= WAITING:
                prediction = None  # who is so slow is told, and comes again
            if not queue.full():
                queue.put_nowait(prediction)

        self.open += 1
        try:
            async with self._live.listening(put):
                return await self._write(request, query, queue)
        finally:
            self.open -= 1

    async def _write(
        self, request: web.Request, query: StreamQuery, queue: asyncio.Queue[Received | None]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={**HEADERS, "X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        await response.write(b": predictions from now on\n\n")
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(query.for_s):
                while True:
                    try:
                        found = await asyncio.wait_for(queue.get(), HEARTBEAT_S)
                    except TimeoutError:
                        await response.write(b": still here\n\n")
                        continue
                    if found is None:
                        await response.write(b"event: end\ndata: {}\n\n")
                        break
                    await response.write(
                        b"id: %d-%d\nevent: prediction\ndata: %b\n\n"
                        % (found.partition, found.offset, schemas.encode(as_answer(self._pipeline, found)))
                    )
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    def _filter(self, query: StreamQuery) -> Callable[[Received], bool]:
        known = [entity.name for entity in self._pipeline.entities]
        if (query.entity is None) != (query.id is None):
            raise invalid("id" if query.id is None else "entity", "give both entity and id, or neither.")
        if query.entity is not None and query.entity not in known:
            raise invalid("entity", f"there is no {query.entity!r}; there are {', '.join(known)}.")

        def wanted(found: Received) -> bool:
            return (
                (query.min_score is None or (found.score is not None and found.score >= query.min_score))
                and (query.decision is None or found.decision == query.decision)
                and (query.entity is None or found.keys.get(query.entity) == query.id)
            )

        return wanted
