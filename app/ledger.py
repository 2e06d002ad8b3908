"""The process of the ledger: a member of a group of its own, which reads topics and writes rows.

Where it stands is kept with the rows, so it may lag, die or be stopped at any time; what it has in hand then is
read again by it or by another. PostgreSQL may be away: it waits, and so does nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeVar

import uvloop
from aiohttp import web
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaConnectionError, KafkaError
from asyncpg import PostgresError
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from agents.record import Recorder
from app import kafka
from app.api.server import serve
from models.errors import HeadraceError
from models.pipeline import Pipeline
from models.predictions import Place
from tables.ledger import AWAY, OTHER_TABLES, migrating
from tables.ledger.reading import Ledger as Reader
from tables.ledger.writing import Move, Moved, Rows, Writer

POLL_S = 0.2
NEVER_MS = 1_000_000_000  # while PostgreSQL is away nothing is polled, and partitions stay where they are
POLL_RECORDS = 5000  # in one transaction: some 0.3 s of PostgreSQL's time
FETCH_WAIT_MS = 100
COMMIT_S = 5.0  # of the group's offsets, which only monitors read
KEEP_S, KEEP_AGAIN_S = 3600.0, 60.0  # between looks at which days are too old, also where one was in vain
WHOLE_S = 1.0  # how old what the ledger says of its wholeness may be
PAUSES_S = (0.1, 5.0)  # between two attempts while PostgreSQL is away: the first, and the longest

T = TypeVar("T")
log = logging.getLogger(__name__)


class PlaceGone(HeadraceError):
    """A topic does not reach to where the ledger has read it."""

    def __init__(self, tp: TopicPartition, place: int, end: int) -> None:
        super().__init__(
            f"The ledger has read {tp.topic} partition {tp.partition} up to offset {place}, but it ends at {end}. "
            "If the topic was made anew, run `headrace ledger rewind`: rows stay, and it is read from its beginning."
        )


class RowsRefused(HeadraceError):
    """PostgreSQL is there, and does not take rows: rights, or what a table cannot hold."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"PostgreSQL refuses what the ledger writes ({type(error).__name__}: {error}). Correct the cause and start "
            "it again: it goes on where its rows end."
        )


class KafkaRefused(HeadraceError):
    """Kafka did not do what was asked."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            f"Kafka did not do what was asked ({error!r}). Started again, the ledger goes on where its rows end."
        )


def group_of(pipeline: Pipeline) -> str:
    """The consumer group of the ledger's processes."""
    return f"headrace-{pipeline.instance}-ledger"


class Ledger:
    """Reads and writes until it is stopped. `away`: why PostgreSQL does not take rows, while it does not.

    clock: seconds since the epoch.
    """

    def __init__(
        self, pipeline: Pipeline, address: str, url: str, keep_days: int, session_s: float = 6,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._pipeline, self._address, self._url, self._keep_days = pipeline, address, url, keep_days
        self._session_s, self._clock = session_s, clock
        self.recorder = Recorder(pipeline, keep_days)
        self._writer = Writer(url, pipeline.instance)
        self._consumer: Any = None
        self._places: dict[tuple[str, int], Place] = {}
        self._epoch = 0  # raised whenever partitions change hands, or places must be read anew
        self._placed = -1  # the epoch of the places
        # Of predictions that were not read up to there yet: where they ended, and before when that was asked (ms).
        self._ends: dict[TopicPartition, tuple[int, int]] = {}
        self._due = {"commit": 0.0, "keep": 0.0, "whole": 0.0}
        self.rows = 0
        self.away: str | None = None

    @property
    def holds(self) -> bool:
        """Whether it knows where to read."""
        return self._placed == self._epoch

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. Raises HeadraceError where going on would be wrong or in vain."""
        counts = await kafka.partitions_of(self._address, self.recorder.topics)
        topics = [topic for topic, count in counts.items() if count]
        if self._pipeline.predictions not in topics:
            raise kafka.TopicsWrong(
                f"Kafka has no topic {self._pipeline.predictions}; run `headrace topics create`."
            )
        await self._until(lambda: migrating.check(self._url), stop)
        if stop.is_set():
            return
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self._address, group_id=group_of(self._pipeline), enable_auto_commit=False,
            auto_offset_reset="earliest", isolation_level="read_committed", fetch_max_wait_ms=FETCH_WAIT_MS,
            session_timeout_ms=round(self._session_s * 1000), heartbeat_interval_ms=500,
            max_poll_interval_ms=NEVER_MS,
        )  # fmt: skip
        try:
            await self._consumer.start()
            self._consumer.subscribe(topics, listener=_Handover(self._let_go))
            await self._read(stop)
        except KafkaConnectionError:
            raise kafka.BrokerUnreachable(self._address) from None
        except KafkaError as error:
            raise KafkaRefused(error) from error
        except PostgresError as error:
            if isinstance(error, OTHER_TABLES):
                await migrating.check(self._url)
            raise RowsRefused(error) from error
        finally:
            await self._consumer.stop()
            await self._writer.close()

    async def _read(self, stop: asyncio.Event) -> None:
        writing: asyncio.Task[None] | None = None
        try:
            while not stop.is_set():
                keep = self._is_due("keep", KEEP_S)
                if writing is not None and (keep or not self.holds):
                    await writing  # they share a connection
                if keep:
                    await self._keep()
                if not self.holds and not await self._take_over(stop):
                    continue
                # 1. read on while the last batch is written
                epoch = self._epoch
                found = await self._consumer.getmany(timeout_ms=POLL_S * 1000, max_records=POLL_RECORDS)
                if self._is_due("whole", WHOLE_S):
                    await self._look_at_ends()
                if writing is not None:
                    await writing
                if epoch != self._epoch:
                    continue  # it comes again, here or elsewhere
                # 2. rows and places go together
                rows = self.recorder.rows(
                    {(tp.topic, tp.partition): records for tp, records in found.items()},
                    self._places,
                    self._now_ms,
                )
                await self._note_whole(rows)
                self._places.update({tp: move.after for tp, move in rows.moves.items()})
                writing = asyncio.create_task(self._write(rows, epoch, stop)) if rows.moves else None
                # 3. and monitors may know
                if self._is_due("commit", COMMIT_S):
                    await self._commit()
            if writing is not None:
                await writing
        finally:
            if writing is not None and not writing.done():
                writing.cancel()

    def _let_go(self) -> None:
        self._epoch += 1

    async def _take_over(self, stop: asyncio.Event) -> bool:
        """Find where each partition that is ours is to be read on. False where that is to be tried again."""
        epoch, tps = self._epoch, sorted(self._consumer.assignment())
        if not tps:
            await self._consumer.getmany(timeout_ms=POLL_S * 1000)  # the group works while one polls
            return False
        try:
            first = await self._consumer.beginning_offsets(tps)
            starts = {(tp.topic, tp.partition): first[tp] for tp in tps}
            places = await self._until(lambda: self._writer.places(starts, starts), stop)
            if places is None:
                return False
            # asked behind the places, which an older owner may have moved until then
            ends = await self._consumer.end_offsets(tps)
            for tp in tps:
                await self._consumer.position(tp)  # else the client's own look-up may come behind our seek
        except (IllegalStateError, KafkaError):
            return False  # partitions change hands again just now, or Kafka is away
        if epoch != self._epoch:
            return False
        cut = Rows()
        for tp in tps:
            place = places[tp.topic, tp.partition]
            if place.next > ends[tp]:
                raise PlaceGone(tp, place.next, ends[tp])
            if place.next < first[tp]:
                log.warning(
                    "%s partition %d: retention has cut offsets %d to %d, which the ledger lacks",
                    tp.topic, tp.partition, place.next, first[tp] - 1,
                )  # fmt: skip
                cut.moves[tp.topic, tp.partition] = Move(place, Place(first[tp], place.highest))
            self._consumer.seek(tp, max(place.next, first[tp]))
        self._places = places | {tp: move.after for tp, move in cut.moves.items()}
        self._placed = epoch
        if cut.moves:
            await self._write(cut, epoch, stop)
        return True

    async def _write(self, rows: Rows, epoch: int, stop: asyncio.Event) -> None:
        """Write, however long PostgreSQL is away, as long as the partitions are ours."""
        try:
            new = await self._until(lambda: self._writer.write(rows), stop, epoch)
        except Moved:
            self._epoch += 1  # another was there, or it was us and the answer got lost: begin where it stands
            return
        if new is None:
            self._epoch += 1
        else:
            self.rows += new

    async def _until(
        self, work: Callable[[], Awaitable[T]], stop: asyncio.Event, epoch: int | None = None
    ) -> T | None:
        """Try until PostgreSQL is there. None where it is in vain: stopped, or another epoch by then."""
        pause, longest = PAUSES_S
        while True:
            try:
                result = await work()
            except (*AWAY, migrating.LedgerAway) as error:
                if self.away is None:
                    log.warning("PostgreSQL does not take rows (%s); the ledger waits", error)
                self.away = str(error) or type(error).__name__
            else:
                self.away = None
                return result
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
            if stop.is_set() or epoch not in (None, self._epoch):
                return None
            pause = min(pause * 2, longest)

    async def _look_at_ends(self) -> None:
        """Where predictions end. What a fetch says of it may be as old as this process stood still."""
        ours = [tp for tp in self._consumer.assignment() if tp.topic == self._pipeline.predictions]
        asked = self._now_ms
        with contextlib.suppress(KafkaError):  # away, or another's by now
            ends = await self._consumer.end_offsets([tp for tp in ours if tp not in self._ends])
            self._ends |= {tp: (end, asked) for tp, end in ends.items()}

    async def _note_whole(self, rows: Rows) -> None:
        """Say up to when the ledger has all predictions, of partitions that were read to where they ended then."""
        for tp in self._ends.keys() & self._consumer.assignment():
            (end, asked), place = self._ends[tp], self._places.get((tp.topic, tp.partition))
            if place is None or await self._consumer.position(tp) < end:
                continue
            move = rows.moves.setdefault((tp.topic, tp.partition), Move(place, place))
            move.whole_at = asked
            del self._ends[tp]

    def _end(self, tp: TopicPartition) -> int | None:
        stable: int | None = self._consumer.last_stable_offset(tp)
        end: int | None = self._consumer.highwater(tp) if stable is None or stable < 0 else stable
        return end

    async def _keep(self) -> None:
        """What is too old may wait: for the server, or for those who read."""
        try:
            dropped = await self._writer.keep(self._now_ms, self._keep_days)
        except AWAY as error:
            log.warning("Old days of the ledger are looked at later (%s)", error)
            self._due["keep"] = time.monotonic() + KEEP_AGAIN_S
            return
        for name in dropped:
            log.warning("The ledger's table %s is older than %d days and was dropped", name, self._keep_days)

    async def _commit(self) -> None:
        offsets = {TopicPartition(*tp): place.next for tp, place in self._places.items()}
        with contextlib.suppress(IllegalStateError, KafkaError):
            if offsets and self.holds:
                await self._consumer.commit(offsets)

    def lags(self) -> Iterator[tuple[str, int, int]]:
        """Topic, partition, and how many records are yet to be read."""
        for (topic, partition), place in self._places.items() if self.holds else ():
            with contextlib.suppress(IllegalStateError):
                end = self._end(TopicPartition(topic, partition))
                yield topic, partition, max(0, (end or 0) - place.next)

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due[what]:
            return False
        self._due[what] = now + every_s
        return True

    @property
    def _now_ms(self) -> int:
        return round(self._clock() * 1000)


async def status(pipeline: Pipeline, url: str) -> dict[str, Any]:
    """Revision, rows, days, and how far each topic was read. Raises LedgerAway."""
    found = await migrating.revisions(url)
    result: dict[str, Any] = {
        "revision": found.current, "newest": found.newest, "predictions": 0, "labels": 0, "days": 0, "positions": [],
    }  # fmt: skip
    if found.fits:
        reader = Reader(url, pipeline, 1)
        try:
            result |= await reader.extent(Recorder(pipeline, 1).topics)
        except AWAY as error:
            raise migrating.LedgerAway(error) from None
        finally:
            await reader.close()
    return result


async def rewind(pipeline: Pipeline, url: str) -> None:
    """Forget how far topics were read. Raises LedgerAway, OtherRevision."""
    await migrating.check(url)
    writer = Writer(url, pipeline.instance)
    try:
        await writer.forget(Recorder(pipeline, 1).topics)
    except AWAY as error:
        raise migrating.LedgerAway(error) from None
    finally:
        await writer.close()


class _Handover(ConsumerRebalanceListener):  # type: ignore[misc]
    """Waits for nothing: the group's other members wait for it."""

    def __init__(self, let_go: Callable[[], None]) -> None:
        self._let_go = let_go

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._let_go()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._let_go()


class LedgerCollector(Collector):
    """Metrics of a process of the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        recorder = self._ledger.recorder
        yield CounterMetricFamily("headrace_ledger_rows", "Rows written", value=self._ledger.rows)
        yield CounterMetricFamily(
            "headrace_ledger_dropped", "Predictions that came twice", value=recorder.dropped
        )
        yield CounterMetricFamily(
            "headrace_ledger_foreign", "Records left out: no rows", value=recorder.foreign
        )
        yield CounterMetricFamily(
            "headrace_ledger_expired", "Records left out: too old", value=recorder.expired
        )
        yield GaugeMetricFamily(
            "headrace_ledger_up", "1 while PostgreSQL takes rows", value=self._ledger.away is None
        )
        lag = GaugeMetricFamily(
            "headrace_ledger_lag", "Records yet to be read", labels=["topic", "partition"]
        )
        for topic, partition, behind in self._ledger.lags():
            lag.add_metric([topic, str(partition)], behind)
        yield lag


def run(ledger: Ledger, host: str, port: int) -> None:
    """Run until SIGTERM or Ctrl-C, with pages of its own. Raises HeadraceError."""
    uvloop.run(_run(ledger, host, port))


async def _run(ledger: Ledger, host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = await serve(_pages(ledger), host, port)
    print(f"headrace ledger: http://{host}:{port}/metrics", file=sys.stderr, flush=True)  # noqa: T201
    try:
        await ledger.run(stop)
    finally:
        await runner.cleanup()


def _pages(ledger: Ledger) -> web.Application:
    registry = CollectorRegistry()
    registry.register(LedgerCollector(ledger))
    ProcessCollector(registry=registry)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        if ledger.away is not None:
            return web.json_response(
                {"error": f"PostgreSQL does not take rows ({ledger.away}); the ledger waits."}, status=503
            )
        if not ledger.holds:
            return web.json_response(
                {"error": "The ledger holds no partitions yet; it waits for Kafka to assign some."},
                status=503,
            )
        return web.Response(text="ready\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application()
    application.add_routes(
        [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]
    )
    return application
