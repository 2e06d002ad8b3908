"""The stream worker: one process, built here from its parts, and nowhere else.

Faust gives the application, its agents, the consumer group and the rebalance; `app.faust_batches`
what passes between; `agents` the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import faust
import uvloop
from faust.types import TP

from agents.flush import Flush
from agents.mirror import MirrorAgent
from agents.outbox import Outbox
from agents.route import Route
from agents.score import Score
from agents.stage import Stage
from app import faust_batches, kafka, metrics
from app.api.server import create_api, serve
from app.membership import HEARTBEAT_S, NEVER_S, REBALANCE_S, Membership, Watchdog
from models import dead_letters
from models.errors import HeadraceError
from models.events import EventDecoder
from models.partitions import partition_of
from models.pipeline import Pipeline
from models.records import RecordCodec
from models.scoring import Model
from tables.mirror import Mirror, connect
from tables.profiles import Applied, Profiles, Record
from tables.store import Store

POLL_RECORDS = 4000  # of all topics in one poll at most: some 40 ms of work
QUEUED_POLLS = 2  # decoded work never waits long behind a rebalance
HAND_OVER_S = 10.0  # for a flush of what was folded; the group waits somewhat longer
STOP_S = 30.0

log = logging.getLogger(__name__)


class Partitions:
    """Which log partitions this worker holds: opened at their positions, let go flushed."""

    def __init__(self, worker: Worker, address: str) -> None:
        self._worker, self._address = worker, address
        self.committable: dict[TP, int] = {}
        labels = worker.pipeline.labels
        self.first = (labels.topic,) if labels is not None else ()
        self.held: set[TP] = set()
        self.rebalances = 0
        self._changing = asyncio.Lock()  # a store that opens while all are closed would stay open

    @property
    def taken(self) -> bool:
        return bool(self.held)

    async def take(
        self, committed: Mapping[TP, int | None], consumer: faust_batches.Consumer
    ) -> Mapping[TP, int]:
        """Open what was assigned and find where each starts. What fails stops the worker."""
        try:
            return await asyncio.wait_for(self._take(committed, consumer), 60)
        except Exception as error:
            stop_at_once(error)

    async def _take(
        self, committed: Mapping[TP, int | None], consumer: faust_batches.Consumer
    ) -> Mapping[TP, int]:
        epoch = consumer.epoch
        async with self._changing:
            return await self._open(committed, consumer, epoch)

    async def _open(
        self, committed: Mapping[TP, int | None], consumer: faust_batches.Consumer, epoch: int
    ) -> Mapping[TP, int]:
        worker, score = self._worker, self._worker.score
        assigned = set(committed)
        first = await consumer.earliest_offsets(*assigned) if assigned else {}
        ends = await consumer.highwaters(*assigned) if assigned else {}
        last_log = worker.pipeline.entities[-1].log
        scored = [tp.partition for tp in assigned if tp.topic == last_log]
        score.emitted = await kafka.last_origins(self._address, worker.pipeline.predictions, scored)
        starts: dict[TP, int] = {}
        for tp in assigned:
            if consumer.epoch != epoch:  # revoked meanwhile: `release` waits to close what is open
                return {}
            stage = worker.by_log.get(tp.topic)
            if stage is None:  # labels: the router keeps no store, and sends again what it must
                offset = committed[tp]
                starts[tp] = first[tp] if offset is None or offset < first[tp] else offset
                assert worker.route is not None
                worker.route.positions[tp.partition] = starts[tp]
                continue
            position = await asyncio.to_thread(stage.open, tp.partition)
            if position is not None and not first[tp] <= position <= ends[tp]:
                raise HeadraceError(
                    f"The store of {tp.topic} partition {tp.partition} is at offset {position}, but the log holds "
                    f"{first[tp]} to {ends[tp]}. If the topic was made anew, remove {worker.profiles_root}; "
                    "the profiles are folded again from the log."
                )
            if position is None and first[tp] > 0:
                log.warning(
                    "%s partition %d has no store here and its log begins at offset %d: values lack what "
                    "retention has cut until the longest window has passed", tp.topic, tp.partition, first[tp],
                )  # fmt: skip
            starts[tp] = first[tp] if position is None else position
            stage.start_at(tp.partition, starts[tp])
        self.held = assigned
        self.rebalances += 1
        self.committable = {tp: offset for tp, offset in self.committable.items() if tp in assigned}
        held = ", ".join(f"{len(s.partitions)} of {s.entity.log}" for s in worker.stages)
        say(f"{worker.pipeline.instance}: holds {held}; model {worker.model.card.version}; {worker.url}")
        return starts

    async def release(self) -> None:
        """Flush and close all: before a rebalance, and at the end. What fails stops the worker."""
        try:
            async with asyncio.timeout(HAND_OVER_S), self._changing:
                await self._release()
        except TimeoutError:
            stop_at_once(HandOverSlow())
        except Exception as error:
            stop_at_once(error)

    async def _release(self) -> None:
        worker = self._worker
        self.held = set()
        await worker.flush.once()
        await worker.flush.durable()
        for stage in worker.stages:
            for partition in stage.partitions:
                stage.close(partition)
        if worker.route is not None:
            worker.route.positions.clear()

    def committed(self, topic: str, partition: int, position: int) -> None:
        self.committable[TP(topic, partition)] = position

    def end(self, error: Exception) -> NoReturn:
        stop_at_once(error)


class HandOverSlow(HeadraceError):
    """What was folded could not be flushed in time, so another may fold it already."""

    def __init__(self) -> None:
        super().__init__(
            f"This worker could not flush within {HAND_OVER_S:.0f} s when it was to let its partitions go: see whether "
            "Kafka acknowledges, and the disk. It ends; what was not flushed is folded again."
        )


class Worker:
    """The parts of a worker, wired."""

    def __init__(
        self, pipeline: Pipeline, model: Model, counts: dict[str, int], kafka_address: str, redis_url: str | None,
        data_root: Path, host: str, port: int, membership: Membership,
    ) -> None:  # fmt: skip
        """counts: partitions by topic, from kafka.checked_partitions."""
        self.pipeline, self.model, self.membership = pipeline, model, membership
        self.watchdog = Watchdog(membership.session_s, stop_at_once)
        self.profiles_root = data_root / "profiles" / pipeline.instance / pipeline.definition
        self.dead_letters = 0
        self._counts = counts
        self._producer: Any = None
        self._address = kafka_address
        self._web: Any = None
        self._host, self._port = host, port
        self.url = f"http://{host}:{port}"
        self._tasks: list[asyncio.Task[None]] = []
        self.stages = [self._profiles(number) for number in range(len(pipeline.entities))]
        self.by_log = {stage.entity.log: stage for stage in self.stages}
        self.partitions = Partitions(self, kafka_address)
        self._mirror = Mirror(connect(redis_url), pipeline) if redis_url else None
        self.mirror = MirrorAgent(self.stages, self._mirror) if self._mirror else None
        # Made when the loop runs, by `start`.
        self.outbox: Outbox
        self.score: Score
        self.route: Route | None = None
        self.flush: Flush

    def _profiles(self, number: int) -> Profiles:
        pipeline, entity = self.pipeline, self.pipeline.entities[number]
        partitions = self._counts[entity.log]

        def open_store(partition: int) -> Store:
            return Store(self.profiles_root / entity.name / f"{partition:04d}", pipeline.definition)

        if number:
            codec = RecordCodec(pipeline, number)
            decode: Any = lambda values, keys, sent: codec.decode(values, keys)  # noqa: E731
        else:
            decoder = EventDecoder(pipeline)
            decode = lambda values, keys, sent: decoder.decode(values, sent)  # noqa: E731
        return Profiles(
            entity, decode, open_store,
            # `seen` has a row for each partition of the log, a pair of columns for each of its writers'.
            max(self._counts.values()) if number else partitions,
            [f.name for f in pipeline.stream.numeric],
            None if number else partial(partition_of, count=partitions),
        )  # fmt: skip

    async def start(self) -> None:
        """Before the first partition is assigned."""
        pipeline = self.pipeline
        self._producer = kafka.producer(self._address)
        await self._producer.start()
        await kafka.know_topics(self._producer, pipeline)
        self.outbox = Outbox(self._producer, self._now_ms, stop_at_once)
        self.score = Score(pipeline, self.stages[-1], self.model, self.outbox, self._reject)
        if pipeline.labels is not None and any(e.labelled for e in pipeline.entities):
            self.route = Route(pipeline, self.outbox, self._reject_record, self._counts)
        self.flush = Flush(
            self.stages, self.route, self.outbox, self.partitions.committed,
            pipeline.labels.topic if pipeline.labels else None,
        )  # fmt: skip
        for stage in self.stages:
            stage.warm()
        self._background(self.flush.run())
        if self.mirror is not None:
            self._background(self.mirror.run())
        if self._mirror is not None:
            api = create_api(pipeline, self._mirror, metrics.registry(self), self._ready)
            self._web = await serve(api, self._host, self._port)
        # What exists now lives as long as the process: no collection need look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        self.watchdog.start()

    async def stop(self) -> None:
        """In good order: nothing that was folded has to be folded again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.partitions.release()
        if self.mirror is not None:
            with contextlib.suppress(Exception):  # Redis may be away; the next owner writes it
                await asyncio.wait_for(self.mirror.once(), 2)
        if self._web is not None:
            await self._web.cleanup()
        if self._mirror is not None:
            await self._mirror.close()
        await self._producer.stop()
        self.watchdog.stop()

    def agents(self, app: faust.App) -> None:
        """Declare the Faust agents: one for the labels, one for each entity."""
        pipeline = self.pipeline
        if pipeline.labels is not None and any(e.labelled for e in pipeline.entities):
            self._agent(app, "route", pipeline.labels.topic, lambda: self.route)
        for number, entity in enumerate(pipeline.entities[:-1]):
            following = self._counts[pipeline.entities[number + 1].log]
            self._agent(
                app, f"stage-{entity.name}", entity.log,
                partial(self._stage, number, following),
            )  # fmt: skip
        last = pipeline.entities[-1]
        self._agent(app, f"score-{last.name}", last.log, lambda: self.score)

    def _stage(self, number: int, following: int) -> Stage:
        return Stage(self.pipeline, number, self.stages[number], self.outbox, self._reject, following)

    def _agent(self, app: faust.App, name: str, topic: str, make: Any) -> None:
        async def run(stream: Any) -> None:
            await app.wired.wait()
            try:
                handle = make().handle
                async for polled in faust_batches.polls(stream, app, self.outbox):
                    self.watchdog.check()
                    handle(polled)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # an agent that fails must not acknowledge what it did not handle
                stop_at_once(error)

        run.__qualname__ = run.__name__ = name
        app.agent(app.topic(topic), name=name)(run)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except asyncio.CancelledError:
                raise
            except Exception as error:
                stop_at_once(error)

        self._tasks.append(asyncio.create_task(run()))

    def _reject(self, topic: str, applied: Applied) -> None:
        for partition, record, reason in applied.rejects:
            self._reject_record(topic, partition, record, reason)

    def _reject_record(self, topic: str, partition: int, record: Record, reason: str) -> None:
        self.dead_letters += 1
        letter = dead_letters.encode(
            self.pipeline.instance,
            reason,
            topic,
            partition,
            record.offset,
            record.timestamp,
            record.key,
            record.value,
        )
        home = partition % self._counts[self.pipeline.dead_letters]
        self.outbox.put(self.pipeline.dead_letters, home, record.key, letter)

    def _now_ms(self) -> int:
        """The time of sending. A batch of before a long sleep is not sent."""
        self.watchdog.check()
        return time.time_ns() // 1_000_000

    async def _ready(self) -> str | None:
        if not self.partitions.taken:
            return "The worker holds no partitions yet; it waits for Kafka to assign some."
        if self.mirror is not None and self.mirror.failing is not None:
            return f"Redis does not take the mirror ({self.mirror.failing}); the stream goes on."
        return None


class App(faust.App):  # type: ignore[misc]
    """Faust's application around a worker. `positions` is what app.faust_batches reads."""

    worker: Worker
    positions: Partitions
    wired: asyncio.Event

    async def on_start(self) -> None:
        try:
            await self.worker.start()
        except Exception as error:
            stop_at_once(error)
        self.wired.set()
        await super().on_start()


def create_worker(worker: Worker, address: str, data_root: Path) -> App:
    """The Faust application of one worker process."""
    app = App(
        kafka.group_of(worker.pipeline),
        broker=[f"{faust_batches.SCHEME}://{server}" for server in address.split(",")],
        datadir=str(data_root / "faust"),
        Topic=faust_batches.Topic,
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=worker.membership.session_s,
        broker_heartbeat_interval=HEARTBEAT_S,
        broker_rebalance_timeout=REBALANCE_S,
        broker_max_poll_interval=NEVER_S,
        consumer_group_instance_id=worker.membership.instance,
        broker_max_poll_records=POLL_RECORDS,
        broker_commit_interval=1.0,
        stream_buffer_maxsize=QUEUED_POLLS,
        stream_wait_empty=False,
        worker_redirect_stdouts=False,
    )
    app.worker, app.positions, app.wired = worker, worker.partitions, asyncio.Event()
    worker.agents(app)

    async def revoked(*_: Any, **__: Any) -> None:
        app.consumer.epoch += 1
        await worker.partitions.release()

    async def stopping(*_: Any, **__: Any) -> None:
        # What hangs behind this, a client's socket perhaps, must not keep the process: all is flushed by then.
        last = threading.Timer(STOP_S + 5, os._exit, (1,))
        last.daemon = True
        last.start()
        app.consumer.epoch += 1
        await asyncio.wait_for(worker.stop(), STOP_S)

    app.on_partitions_revoked.connect(revoked, weak=False)
    app.on_before_shutdown.connect(stopping, weak=False)
    return app


def run(worker: Worker, address: str, data_root: Path, log_level: str) -> None:
    """Run a worker until SIGTERM or Ctrl-C. Does not return."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    app = create_worker(worker, address, data_root)
    process = faust.Worker(app, loop=loop, loglevel=log_level, redirect_stdouts=False, quiet=True)
    process.spinner = None  # it hides the cursor, and writes that into logs too
    process.execute_from_commandline()


def stop_at_once(error: BaseException) -> NoReturn:
    """End the process without another step: no position may pass what was not handled.

    Stores are crash-consistent, and what was not flushed is folded again.
    """
    if isinstance(error, HeadraceError):
        say(str(error))
    else:
        log.critical("The worker stops: %s", error or type(error).__name__, exc_info=error)
    os._exit(1)


def say(text: str) -> None:
    """Tell who watches the worker."""
    print(f"headrace worker: {text}", file=sys.stderr, flush=True)  # noqa: T201
