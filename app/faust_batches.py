"""What Headrace changes in Faust: batches in place of single events, and positions of its own.

Plain Faust moves one event at a time, each through a dozen coroutines, and commits what an agent has
yielded. Here one poll is one message whose value is all its records of a topic; a poll starts where
the stores' positions say; and what is committed is what was flushed. It extends internals of
faust-streaming 0.15.3, so that version is pinned, and `tests/integration/test_faust_batches.py`
holds them to what is used here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol

import faust
from faust.transport.consumer import Fetcher
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import Message

from agents.in_step import InStep, Place
from app.assignor import StickyAssignor
from app.membership import Coordinator
from tables.profiles import Polled

SCHEME = "headrace"  # of broker addresses that use this transport
FETCH_WAIT_MS = 100  # of a quiet partition's fetch, behind which all else waits that is asked of its broker
MOST_OF_ONE = 1000  # records of one partition in a poll: a flush writes its profiles in one step
POLL_S = 0.25  # how long a poll waits; taking partitions over waits for a poll to end
STEP_S = 0.005  # likewise while records wait for their turn

TRANSPORTS.aliases[SCHEME] = f"{__name__}:Transport"

log = logging.getLogger(__name__)


class Positions(Protocol):
    """Who knows where partitions start, and what may be committed: app.worker's Partitions."""

    committable: dict[TP, int]
    first: tuple[str, ...]  # topics whose records go before others of the same poll
    in_step: InStep

    @property
    def held_back(self) -> frozenset[str]:
        """Topics that are not to be read now."""

    async def take(self, committed: Mapping[TP, int | None], consumer: Consumer) -> Mapping[TP, int]:
        """Open what was assigned, given what the group committed. Returns the next offset of each."""

    async def release(self) -> None:
        """Flush and close all."""

    def end(self, error: Exception) -> object:
        """End the process: this worker's partitions are another's. Called in any thread."""


class Room(Protocol):
    """Who knows whether there is room for another micro-batch: the worker's Flush."""

    async def room(self) -> None: ...


class ConsumerThread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """A member of the group by our rules, which takes from all partitions alike what was fetched."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        """Faust's own assignor is for tables; what else asks it (recovery) is told that there are none."""
        consumer = super()._create_worker_consumer(transport)
        instance = self.app.conf.consumer_group_instance_id
        consumer._partition_assignment_strategy = (StickyAssignor(instance),)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS  # 1.5 s are written in Faust's code
        return consumer

    async def on_start(self) -> None:
        await super().on_start()
        Coordinator.take_over(self._consumer._coordinator, self.consumer.positions.end)

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: set[TP],
        timeout: float,  # noqa: ASYNC109 - the signature is Faust's
        max_records: int,
    ) -> dict[TP, list[Any]]:
        """aiokafka empties one partition before the next, which would drive them days apart."""
        if not self.consumer.flow_active:
            return {}
        fetcher = consumer._fetcher
        if consumer._closed or fetcher._closed:
            raise driver.ConsumerStoppedError
        with fetcher._subscriptions.fetch_context():
            ready = [tp for tp in list(fetcher._records) if tp in active_partitions]
            share = max(1, min(max_records // max(1, len(ready)), MOST_OF_ONE))
            found: dict[TP, list[Any]] = {}
            for tp in ready:
                found.update(await fetcher.fetched_records([tp], timeout=0, max_records=share))
            if found:
                return found
            most = min(max_records, MOST_OF_ONE)
            return dict(await fetcher.fetched_records(active_partitions, timeout=timeout, max_records=most))


class Consumer(driver.Consumer):  # type: ignore[misc]
    """One message per topic and poll; starts at the stores' positions; commits what was flushed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Raised whenever partitions change hands: what was polled before counts for nothing.
        self.epoch = 0
        self._polling = asyncio.Lock()

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    @property
    def positions(self) -> Positions:
        positions: Positions = self.app.positions
        return positions

    async def perform_seek(self) -> None:
        """Start each partition at its position. Faust calls this when partitions were assigned.

        Its caller goes on when this takes too long, and would read from wherever the consumer
        stands; so its end does not depend on the caller, no poll begins before it, and it has a bound
        of its own that stops the worker.
        """
        await asyncio.shield(asyncio.ensure_future(self._seek()))

    async def _seek(self) -> None:
        async with self._polling:  # no poll is under way, and none begins before the seek is done
            await self._take()

    async def reopen(self) -> None:
        """Let go of all partitions and take them again, at the positions that stand then."""
        async with self._polling:
            self.epoch += 1
            await self.positions.release()
            await self._take()

    async def _take(self) -> None:
        self.epoch += 1
        committed = await self.seek_to_committed()
        await self.seek_wait(await self.positions.take(committed, self))
        self.epoch += 1

    async def _drain_messages(self, fetcher: Fetcher) -> None:
        """Poll for ever, and deliver each poll's records of a topic as one message."""
        try:
            while not (self.should_stop or fetcher.should_stop):
                if not self.flow_active:
                    await self.wait(self.can_resume_flow)
                async with self._polling:
                    epoch = self.epoch
                    found = await self._poll()
                # Labels before events: what was known at a time may be used at that time.
                by_topic: dict[str, list[tuple[int, Any]]] = {t: [] for t in self.positions.first}
                for (topic, partition), records in found.items():
                    by_topic.setdefault(topic, []).append((partition, records))
                for topic, polled in by_topic.items():
                    if not polled:
                        continue
                    message = _message(topic, polled, epoch, self.app.consumer_generation_id)
                    await self.wait_first(self.callback(message), self.suspend_flow.wait())
        except self.consumer_stopped_errors:
            if not self.app.should_stop:
                raise
        except asyncio.CancelledError:  # while partitions change hands, Faust takes it for a crash
            if not self.app.should_stop:
                raise

    async def _poll(self) -> dict[Place, list[Any]]:
        """What may be handled now: what was fetched, but for what is ahead of the rest."""
        in_step, waits = self.positions.in_step, STEP_S if self.positions.in_step.waiting else POLL_S
        assigned = self._get_active_partitions() if self.flow_active else set()
        in_step.held_back = self.positions.held_back
        active = {tp for tp in assigned if tp.topic not in in_step.held_back and not in_step.full(tp)}
        found = await self._getmany(active, waits) if active else {}
        if not found:
            await asyncio.sleep(0 if active else waits)
        now = time.monotonic()
        passed = {
            tp: in_step.offer(tp.topic, tp.partition, records, self.highwater(tp), now)
            for tp, records in found.items()
        }
        return {tp: records for tp, records in passed.items() if records} | in_step.take(now)

    def on_buffer_full(self, tp: TP) -> None:
        """Faust would stop fetching this one partition, which would put it behind the others.

        When a stage's queue is full, the delivery waits instead, and with it all polling.
        """

    def on_buffer_drop(self, tp: TP) -> None:
        """See on_buffer_full."""

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterable[TP]:
        return [
            tp for tp in self.positions.committable if topics is None or tp in topics or tp.topic in topics
        ]

    def _new_offset(self, tp: TP) -> int | None:
        return self.positions.committable.get(tp)

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust watches single events here, of which there are none."""


class Transport(driver.Transport):  # type: ignore[misc]
    Consumer = Consumer


class Topic(faust.Topic):  # type: ignore[misc]
    """Records pass as they are; the fold decodes them."""

    def _compile_decode(self) -> None:
        async def decode(message: Message, *, propagate: bool = False) -> Any:
            return self._create_event(message.key, message.value, None, message=message)

        self.decode = decode


async def polls(stream: Any, app: faust.App, room: Room) -> AsyncIterator[Polled]:
    """The polls of a stream, each given out only when there is room for it and its outputs.

    What was polled before partitions changed hands is dropped: it is polled again from the position.
    Between this check and the fold nothing waits, so none slips through.
    """
    async for event in stream.events():
        await room.room()
        if event.message.offset == app.consumer.epoch:
            yield event.value


def _message(topic: str, polled: list[tuple[int, Any]], epoch: int, generation: int) -> Message:
    """A message of Faust's, whose streams skip those of another generation of the group.

    Its offset is the epoch in which it was polled.
    """
    tp = TP(topic, polled[0][0])
    return Message(
        topic, tp.partition, epoch, 0.0, 0, None, None, polled, None,
        serialized_key_size=0, serialized_value_size=0, tp=tp, generation_id=generation,
    )  # fmt: skip
