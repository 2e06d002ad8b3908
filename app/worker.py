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
from collections.abc import Coroutine, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import faust
import uvloop
from aiokafka.errors import KafkaError
from faust.types import TP

from agents.checkpoint import CheckpointAgent
from agents.flush import Flush
from agents.in_step import InStep
from agents.mirror import MirrorAgent
from agents.outbox import Outbox
from agents.route import Asking, KnowsEvents, Route, asks, routes
from agents.score import Score
from agents.shadow import Shadow
from agents.stage import Stage
from app import checkpoints, faust_batches, kafka, metrics
from app.api.features import Held
from app.api.server import Backends, create_api, open_to_all, serve
from app.control import Control
from app.local.services import Addresses
from app.membership import HEARTBEAT_S, NEVER_S, REBALANCE_S, Membership, Watchdog
from app.producer import Producer
from app.serving import Serving
from app.settings import Settings
from models import dead_letters
from models.errors import HeadraceError
from models.events import Clocks, EventDecoder, Reason, clocks
from models.partitions import partition_of
from models.pipeline import Pipeline
from models.records import RecordCodec, writers
from tables import homes
from tables.mirror import Mirror, RedisError, connect
from tables.model_folder import CHAMPION
from tables.profiles import Applied, Profiles, Record
from tables.store import Store

POLL_RECORDS = 4000  # of all topics in one poll at most: some 40 ms of work
QUEUED_POLLS = 2  # decoded work never waits long behind a rebalance
HAND_OVER_S = 10.0  # for a flush of what was folded; the group waits somewhat longer
SILENT_MS = 5000  # Kafka acknowledges in some, and in a rebalance of its own in a thousand
MIRROR_S = 2.0  # for what the mirror has yet to take then
SHADOW_S = 1.0  # and, at the end, for what challengers have yet to score
CHALLENGERS_S = (
    5.0  # at the start, for challengers to be loaded, so that the first events have their records too
)
STOP_S = 30.0
LEAVE_S = 8.0  # for Kafka's clients to leave the group after that
TAKE_S = 600.0  # a checkpoint of some GB is restored by then; who hangs for longer is better started anew

log = logging.getLogger(__name__)


class Partitions:
    """Which log partitions this worker holds: opened at their positions, let go flushed."""

    def __init__(self, worker: Worker, address: str) -> None:
        self._worker, self.address = worker, address
        self.committable: dict[TP, int] = {}
        self.in_step = worker.in_step
        # labels and reversals: what is known at a time goes before events of that time
        self.first = worker.pipeline.inputs[len(worker.pipeline.streams) :]
        self.log_starts: dict[tuple[str, int], int] = {}  # of what is being opened
        self.held: set[TP] = set()
        self.rebalances = 0
        self._changing = asyncio.Lock()  # a store that opens while all are closed would stay open
        self._consumer: faust_batches.Consumer
        # By topic and partition: from which offset on outputs are sent again, and until where.
        self._replays: dict[TP, tuple[int | None, int]] = {}

    @property
    def taken(self) -> bool:
        return bool(self.held)

    @property
    def held_back(self) -> frozenset[str]:
        """The log that nobody can score yet, for what was folded passes unscored; and what waits for the ledger."""
        worker = self._worker
        full = {topic for topic, route in worker.routes.items() if isinstance(route, Asking) and route.full}
        if self.unscored:
            full.add(worker.pipeline.entities[-1].log)
        return frozenset(full)

    @property
    def unscored(self) -> bool:
        """Whether events wait for a model."""
        worker = self._worker
        return worker.settings.without_model == "wait" and CHAMPION not in worker.serving.models

    async def take(
        self, committed: Mapping[TP, int | None], consumer: faust_batches.Consumer
    ) -> Mapping[TP, int]:
        """Open what was assigned and find where each starts. What fails stops the worker."""
        try:
            return await asyncio.wait_for(self._take(committed, consumer), TAKE_S)
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
        self._consumer = consumer
        first = await consumer.earliest_offsets(*assigned) if assigned else {}
        ends = await consumer.highwaters(*assigned) if assigned else {}
        last_log = worker.pipeline.entities[-1].log
        scored = [tp.partition for tp in assigned if tp.topic == last_log]
        # No older owner can add to what is read here.
        await worker.producer.claim(worker.pipeline.predictions, scored)
        score.emitted = await kafka.last_origins(self.address, worker.pipeline.predictions, scored)
        await self._check_predictions(consumer, score.emitted)
        positions = await self._stores([tp for tp in assigned if tp.topic in worker.by_log], first)
        await self._check_writers(consumer, list(positions))
        if consumer.epoch != epoch:  # revoked meanwhile: `release` waits to close what is open
            return {}
        starts: dict[TP, int] = {}
        for tp in assigned:
            if tp in positions:
                starts[tp] = self._start(tp, positions[tp] or 0, first[tp], ends[tp])
                continue
            # a router keeps no store, and sends again what it must
            offset, again = committed[tp] or 0, self._again(tp)
            offset = offset if again is None else min(again, offset)
            if offset < first[tp]:
                _tell_cut(tp, offset, first[tp], "what was routed")
                worker.tell_lost(tp.topic, tp.partition, first[tp] - 1)
            starts[tp] = max(first[tp], offset)
        for topic, route in worker.routes.items():
            route.start_at({tp.partition: starts[tp] for tp in assigned if tp.topic == topic})
        self.in_step.start(starts, ends, time.monotonic())
        self.held = assigned
        self.rebalances += 1
        self.committable = {tp: offset for tp, offset in self.committable.items() if tp in assigned}
        held = ", ".join(f"{len(s.partitions)} of {s.entity.log}" for s in worker.stages)
        say(f"{worker.pipeline.instance}: holds {held}; {worker.serving.shown}; {worker.url}")
        return starts

    async def _stores(self, tps: list[TP], first: Mapping[TP, int]) -> dict[TP, int | None]:
        """Open their stores, all at once. Returns their positions."""
        stages = self._worker.by_log
        self.log_starts = {(tp.topic, tp.partition): first[tp] for tp in tps}
        positions = await asyncio.gather(
            *(asyncio.to_thread(stages[tp.topic].open, tp.partition, self._again(tp)) for tp in tps)
        )
        return dict(zip(tps, positions, strict=True))

    async def _check_predictions(self, consumer: faust_batches.Consumer, emitted: dict[int, int]) -> None:
        """Predictions are numbered by the log that is scored; those of another would hide what is to come.

        Where that ends is asked behind the look at them: an older owner may have gone on until the claim.
        """
        pipeline = self._worker.pipeline
        logs = {TP(pipeline.entities[-1].log, partition): offset for partition, offset in emitted.items()}
        ends = await consumer.highwaters(*logs) if logs else {}
        for scored, offset in logs.items():
            if offset >= ends[scored]:
                raise HeadraceError(
                    f"{pipeline.predictions} partition {scored.partition} has a prediction of offset {offset}, but "
                    f"{scored.topic} ends at {ends[scored]}: it is of another log. If the pipeline's first or last "
                    "entity has changed, run it under another name (--as); if the log's topic was made anew, make "
                    "that of the predictions anew, too."
                )

    async def _check_writers(self, consumer: faust_batches.Consumer, opened: list[TP]) -> None:
        """What a topic's successor of the same name holds would be taken for what has been seen."""
        worker = self._worker
        heard = [
            (TP(names[source % len(names)], source // len(names)), tp, offset)
            for tp in opened
            if (names := worker.writers.get(tp.topic))
            for source, offset in worker.by_log[tp.topic].seen(tp.partition).items()
        ]
        ends = await consumer.highwaters(*{source for source, _, _ in heard}) if heard else {}
        for source, tp, offset in heard:
            if offset >= ends[source]:
                raise HeadraceError(
                    f"{tp.topic} has had offset {offset} of {source.topic} partition {source.partition}, which ends at "
                    f"{ends[source]}. If that topic was made anew, run the pipeline under another name (--as), with "
                    "topics of its own."
                )

    def _start(self, tp: TP, position: int, first: int, end: int) -> int:
        """Start a partition, whose store is at `position`, and whose log holds `first` to `end`. Returns where."""
        if position > end:
            raise HeadraceError(
                f"The store of {tp.topic} partition {tp.partition} is at offset {position}, but the log ends at {end}. "
                f"If the topic was made anew, remove {self._worker.profiles_root} and its checkpoints; the profiles "
                "are folded again from the log."
            )
        if position < first:
            _tell_cut(tp, position, first, "every store and checkpoint")
            self._worker.tell_lost(tp.topic, tp.partition, first - 1)
        self._worker.by_log[tp.topic].start_at(tp.partition, max(position, first), cut=position < first)
        return max(position, first)

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
        with contextlib.suppress(RedisError, OSError):  # Redis is away or slow; the next owner writes it
            await asyncio.wait_for(worker.mirror.once(), MIRROR_S)
        for stage in worker.stages:
            for partition in stage.partitions:
                stage.close(partition)
        await worker.producer.release()
        for route in worker.routes.values():
            route.start_at({})

    async def replay(self, topic: str, partition: int, after: int) -> None:
        """Send again what came behind this offset of a partition, if it is ours: a receiver lacks some of it.

        All is closed and opened again, this partition without its store. What was received stays dropped.
        """
        worker = self._worker
        tp = TP(topic, partition)
        holder = worker.routes.get(topic) or worker.by_log[topic]
        position = holder.positions.get(partition, -1)
        if position <= after + 1 or position < self._replays.get(tp, (0, -1))[1]:
            return  # it is another worker's, or comes anyway
        log.warning(
            "%s partition %d: a record sent from behind offset %d has not arrived; what came from there is sent again",
            topic, partition, after,
        )  # fmt: skip
        self._replays[tp] = (after + 1, position)
        await self._consumer.reopen()

    def _again(self, tp: TP) -> int | None:
        """From where at the latest a partition must be read, once, for its outputs are asked for again."""
        start, until = self._replays.get(tp, (None, 0))
        self._replays[tp] = (None, until)
        return start

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
        self, pipeline: Pipeline, serving: Serving, counts: dict[str, int], addresses: Addresses,
        settings: Settings, port: int,
    ) -> None:  # fmt: skip
        """counts: partitions by topic, from kafka.checked_partitions."""
        if settings.without_model == "features" and not pipeline.predictions_carry_features:
            raise HeadraceError(
                f"HEADRACE_WITHOUT_MODEL is features, but predictions of {pipeline.name} carry none; drop "
                "'predictions_carry_features: false' from the pipeline file, or let workers wait or fold."
            )
        self.pipeline, self.serving = pipeline, serving
        self.settings = settings
        self.membership = Membership(settings.session_s, settings.instance_id)
        self.watchdog = Watchdog(settings.session_s, stop_at_once)
        self.profiles_root = homes.root_of(settings.data_root, pipeline)
        self.dead_letters = 0
        self._counts = counts
        self.address = addresses.kafka
        self._web: Any = None
        self._port = port
        self.url = f"http://{settings.api_host}:{port}"
        self._tasks: list[asyncio.Task[None]] = []
        self.stages = [self._profiles(number) for number in range(len(pipeline.entities))]
        self.by_log = {stage.entity.log: stage for stage in self.stages}
        # Of each log but the stream's own topic, into which anyone may write.
        self.writers = {
            e.log: writers(pipeline, n) for n, e in enumerate(pipeline.entities) if n or pipeline.routed
        }
        self.in_step = InStep(_in_step(pipeline), self._counts, round(settings.alignment_s * 1000))
        self.partitions = Partitions(self, self.address)
        self._mirror = Mirror(connect(addresses.redis_url), pipeline)
        self.mirror = MirrorAgent(self.stages, self._mirror, counts, self._now_ms, settings.mirror_every_s)
        self._checkpoints = checkpoints.of(settings, pipeline)
        self.checkpoint = (
            CheckpointAgent(self.stages, self._checkpoints, settings.checkpoint_every_s, self._now_ms)
            if self._checkpoints
            else None
        )
        self._ledger: Any = None
        self._postgres_url = addresses.get("postgres")
        self.events: KnowsEvents | None = self._look_ups(addresses) if asks(pipeline) else None
        # Made when the loop runs, by `start`.
        self.producer: Producer
        self.shadow_producer: Producer
        self.outbox: Outbox
        self.control: Control
        self.score: Score
        self.shadow: Shadow
        self.routes: dict[str, Route] = {}
        self.flush: Flush

    def _profiles(self, number: int) -> Profiles:
        pipeline, entity = self.pipeline, self.pipeline.entities[number]
        partitions = self._counts[entity.log]

        def open_store(partition: int, at_most: int | None) -> Store:
            return homes.open_store(
                homes.folder_of(self.settings.data_root, pipeline, entity.name, partition), pipeline.definition,
                self._checkpoints.place(entity.name, partition) if self._checkpoints else None,
                self.partitions.log_starts[entity.log, partition], at_most,
            )  # fmt: skip

        codec = RecordCodec(pipeline, number)
        own = number > 0 or pipeline.routed  # whether the log is written by stages and routers
        if own:
            decode: Any = lambda values, keys, sent: codec.decode(values, keys)  # noqa: E731
        else:
            decoder = EventDecoder(pipeline, pipeline.stream)
            decode = lambda values, keys, sent: decoder.decode(values, sent)  # noqa: E731
        return Profiles(
            entity, decode, open_store,
            # `seen` has a row for each partition of the log, a pair of columns for each of its writers'.
            max(self._counts.values()) if own else partitions,
            pipeline.columns,
            None if own else partial(partition_of, count=partitions),
            self._counts[pipeline.entities[number + 1].log] if number + 1 < len(pipeline.entities) else 0,
            len(codec.writers) if own else 1,
        )  # fmt: skip

    def _look_ups(self, addresses: Addresses) -> KnowsEvents:
        from tables.ledger import reading  # asyncpg is loaded by whom it is for

        self._ledger = reading.Ledger(addresses.postgres_url, self.pipeline, connections=1)
        return reading.Events(self._ledger, self._counts[self.pipeline.predictions])

    async def start(self) -> None:
        """Before the first partition is assigned."""
        pipeline = self.pipeline
        self.producer = Producer(self.address, f"headrace-{pipeline.instance}", self.settings.delivery)
        await self.producer.start(kafka.wanted_topics(pipeline))
        # Of its own, for a broker takes one request of a producer at a time: no prediction waits behind a shadow.
        self.shadow_producer = Producer(self.address)
        await self.shadow_producer.start([pipeline.shadow])
        self.wire()
        self.control = Control(
            self.address, pipeline.control, self.in_step, self.stages, self.outbox,
            self.writers, self.partitions.replay,
        )  # fmt: skip
        for stage in self.stages:
            stage.warm()
        await self.serving.look()
        if CHAMPION not in self.serving.models:
            say(f"{pipeline.instance}: {self._meanwhile}")
        # a canary decides from the first event on
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.serving.look_at_challengers(), CHALLENGERS_S)
        self._background(self.serving.run())
        self._background(self.shadow.run())
        self._background(self.control.listen())
        self._background(self.control.tell_lows())
        self._background(self.control.tell_missing())
        self._background(self.flush.run())
        self._background(self.mirror.run())
        for route in self.routes.values():
            if isinstance(route, Asking):
                self._background(route.run())
        if self.checkpoint is not None:
            self._background(self.checkpoint.run())
        backends = Backends(
            pipeline, self._mirror, Held(self.stages, self._counts), self.address, self._postgres_url,
            self.serving.life, explains=False,
        )  # fmt: skip
        limits = self.settings.api_limits
        if (warning := open_to_all(limits, self.settings.api_host)) is not None:
            say(warning)
        api = create_api(backends, metrics.registry(self), self._ready, limits, remark=self._remark)
        self._web = await serve(api, self.settings.api_host, self._port)
        # What exists now lives as long as the process: no collection need look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 100)
        self.watchdog.start()

    def wire(self) -> None:
        """Make what lies between the logs and the producer, which is there by now."""
        pipeline = self.pipeline
        self.outbox = Outbox(self.producer, self._now_ms, stop_at_once)
        models = self.serving.models
        self.shadow = Shadow(
            pipeline, models, self.outbox, lambda: Outbox(self.shadow_producer, self._now_ms, _tell_unsent),
            self.serving.drop, self.serving.watch,
        )  # fmt: skip
        self.score = Score(
            pipeline, self.stages[-1], models, self.serving.shares, self.outbox, self._reject, self.shadow.take,
            self.serving.drop, self.settings.without_model,
        )  # fmt: skip
        found = routes(
            pipeline, self.outbox, self._reject_record, self._counts, self.events,
            round(self.settings.label_wait_s * 1000), self._now_ms, lambda: self.partitions.unscored,
        )  # fmt: skip
        self.routes = {route.topic: route for route in found}
        self.flush = Flush(
            self.stages, found, self.outbox, self.partitions.committed, self.settings.profiles_mib * 2**20
        )

    async def stop(self) -> None:
        """In good order: nothing that was folded has to be folded again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.partitions.release()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.shadow.once(), SHADOW_S)
        if self._web is not None:
            await self._web.cleanup()
        await self._mirror.close()
        if self._ledger is not None:
            await self._ledger.close()
        await self.producer.stop()
        await self.shadow_producer.stop()
        self.watchdog.stop()

    def agents(self, app: faust.App) -> None:
        """Declare the Faust agents: one for each topic that is routed, one for each entity."""
        pipeline = self.pipeline
        for topic in pipeline.inputs:
            if topic not in self.by_log:
                self._agent(app, f"route-{topic}", topic, partial(self._route, topic))
        for number, entity in enumerate(pipeline.entities[:-1]):
            following = self._counts[pipeline.entities[number + 1].log]
            self._agent(
                app, f"stage-{entity.name}", entity.log,
                partial(self._stage, number, following),
            )  # fmt: skip
        last = pipeline.entities[-1]
        self._agent(app, f"score-{last.name}", last.log, lambda: self.score)

    def tell_lost(self, topic: str, partition: int, offset: int) -> None:
        """Say in each log that is written from this topic that it lacks what came up to this offset."""
        for number, entity in enumerate(self.pipeline.entities):
            if topic in (names := self.writers.get(entity.log, ())):
                value = RecordCodec(self.pipeline, number).encode_lost(names.index(topic), partition, offset)
                self.outbox.put_everywhere(entity.log, self._counts[entity.log], value)

    def _route(self, topic: str) -> Route:
        return self.routes[topic]

    def _stage(self, number: int, following: int) -> Stage:
        return Stage(self.pipeline, number, self.stages[number], self.outbox, self._reject, following)

    def _agent(self, app: faust.App, name: str, topic: str, make: Any) -> None:
        async def run(stream: Any) -> None:
            await app.wired.wait()
            try:
                handle = make().handle
                async for polled in faust_batches.polls(stream, app, self.flush):
                    self.watchdog.check()
                    handle(polled)
                    for partition, records in polled:
                        self.in_step.handled(topic, partition, records[-1].offset)
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

    def _reject_record(self, topic: str, partition: int, record: Record, reason: Reason) -> None:
        self.dead_letters += 1
        origin = dead_letters.Origin(topic, partition, record.offset)
        letter = dead_letters.encode(
            self.pipeline.instance, reason, origin, record.timestamp, record.key, record.value, record.headers
        )
        home = partition % self._counts[self.pipeline.dead_letters]
        self.outbox.put(self.pipeline.dead_letters, home, str(origin).encode(), letter)

    def _now_ms(self) -> int:
        """The time of sending. A batch of before a long sleep is not sent."""
        self.watchdog.check()
        return time.time_ns() // 1_000_000

    @property
    def _meanwhile(self) -> str:
        """What becomes of events while there is no model, and why there is none."""
        says = {
            "wait": "Nothing is scored:",
            "fold": "Nothing is scored, and what is folded meanwhile never will be:",
            "features": "Predictions carry features and no score:",
        }[self.settings.without_model]
        return f"{says} {self.serving.why}"

    def _remark(self) -> str | None:
        """What a worker that is ready cannot do."""
        return None if CHAMPION in self.serving.models else self._meanwhile

    async def _ready(self) -> str | None:
        return next(self._troubles(), None)

    def _troubles(self) -> Iterator[str]:
        """What keeps it from its work, the worst first."""
        if not self.partitions.taken:
            yield "The worker holds no partitions yet; it waits for Kafka to assign some."
        if CHAMPION not in self.serving.models and self.settings.without_model != "features":
            yield self._meanwhile
        since = self.outbox.since
        if since is not None and (waited := self._now_ms() - since) > SILENT_MS:
            yield f"Kafka has not acknowledged a batch for {waited // 1000} s; the worker waits."
        if self.mirror.failing is not None:
            yield f"Redis does not take the mirror ({self.mirror.failing}); the stream goes on."
        if self.mirror.refused:
            yield f"Others write the mirror of {', '.join(self.mirror.refused)}; the stream goes on."
        if self.mirror.rebuilding:
            yield f"The mirror of {self.mirror.rebuilding} partitions is written anew; the stream goes on."
        if self.events is not None and self.events.failing is not None:
            yield f"The ledger does not answer ({self.events.failing}); labels wait for it, the stream goes on."


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


def create_worker(worker: Worker) -> App:
    """The Faust application of one worker process."""
    folder = worker.settings.data_root / "faust"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # Faust makes no parents
    except OSError as error:
        raise HeadraceError(
            f"The folder {folder} cannot be made ({error}); set HEADRACE_DATA_ROOT to where the worker may write."
        ) from None
    app = App(
        kafka.group_of(worker.pipeline),
        broker=[f"{faust_batches.SCHEME}://{server}" for server in worker.address.split(",")],
        datadir=str(folder),
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
        late = _exit_after(STOP_S + 5, 1)
        app.consumer.epoch += 1
        await asyncio.wait_for(worker.stop(), STOP_S)
        late.cancel()
        # All is flushed and let go. What hangs behind this, a client that waits for its coordinator perhaps, must not
        # keep the process, nor hide that it failed.
        _exit_after(LEAVE_S, 1 if app.crashed else 0)

    app.on_partitions_revoked.connect(revoked, weak=False)
    app.on_before_shutdown.connect(stopping, weak=False)
    return app


def _exit_after(seconds: float, code: int) -> threading.Timer:
    """End the process then, unless it has ended or this is cancelled."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
    return timer


def run(worker: Worker) -> None:
    """Run a worker until SIGTERM or Ctrl-C. Does not return."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    app = create_worker(worker)
    process = faust.Worker(
        app, loop=loop, loglevel=worker.settings.log_level, redirect_stdouts=False, quiet=True
    )
    process.spinner = None  # it hides the cursor, and writes that into logs too
    process.execute_from_commandline()


def stop_at_once(error: BaseException) -> NoReturn:
    """End the process without another step: no position may pass what was not handled.

    Stores are crash-consistent, and what was not flushed is folded again.
    """
    if isinstance(error, HeadraceError):
        say(str(error))
    elif isinstance(error, KafkaError):
        say(
            f"Kafka did not do what was asked ({error!r}). Started again, this worker goes on from its stores."
        )
    else:
        log.critical("The worker stops: %s", error or type(error).__name__, exc_info=error)
    os._exit(1)


def say(text: str) -> None:
    """Tell who watches the worker."""
    print(f"headrace worker: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _tell_unsent(error: Exception) -> None:
    say(f"Kafka did not take records of challengers ({error!r}); they are missing, and predictions go on.")


def _tell_cut(tp: TP, position: int, first: int, behind: str) -> None:
    log.warning(
        "%s partition %d: retention has cut the log behind %s, offsets %d to %d are missing",
        tp.topic, tp.partition, behind, position, first - 1,
    )  # fmt: skip


def _in_step(pipeline: Pipeline) -> list[dict[str, Clocks]]:
    """The topics that feed one and the same log, and so are to be read in step."""
    entities = pipeline.entities
    first: dict[str, Clocks] = {stream.topic: clocks(stream) for stream in pipeline.streams}
    for said in pipeline.said:
        if said.topic in pipeline.inputs:
            first[said.topic] = clocks(pipeline.stream, said.known)
    logs: list[dict[str, Clocks]] = [
        {e.log: RecordCodec(pipeline, n).clocks} for n, e in enumerate(entities[:-1])
    ]
    if pipeline.routed:
        return [first, *logs]
    return [first, *logs[1:]] if len(entities) > 1 else []
