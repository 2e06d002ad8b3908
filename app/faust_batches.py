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
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Protocol

import faust
from faust.transport.consumer import Fetcher
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import Message

from agents.outbox import Outbox
from app.assignor import StickyAssignor
from app.membership import Coordinator
from tables.profiles import Polled

SCHEME = "headrace"  # of broker addresses that use this transport
FETCH_WAIT_MS = 100  # of a quiet partition's fetch, behind which all else waits that is asked of its broker
POLL_S = 0.25  # how long a poll waits; taking partitions over waits for a poll to end

TRANSPORTS.aliases[SCHEME] = f"{__name__}:Transport"

log = logging.getLogger(__name__)


class Positions(Protocol):
    """Who knows where partitions start, and what may be committed: app.worker's Partitions."""

    committable: dict[TP, int]
    first: tuple[str, ...]  # topics whose records go before others of the same poll

    async def take(self, committed: Mapping[TP, int | None], consumer: Consumer) -> Mapping[TP, int]:
        """Open what was assigned, given what the group committed. Returns the next offset of each."""

    def end(self, error: Exception) -> object:
        """End the process: this worker's partitions are another's. Called in any thread."""


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
            share = max(1, max_records // max(1, len(ready)))
            found: dict[TP, list[Any]] = {}
            for tp in ready:
                found.update(await fetcher.fetched_records([tp], timeout=0, max_records=share))
            if found:
                return found
            return dict(
                await fetcher.fetched_records(active_partitions, timeout=timeout, max_records=max_records)
            )


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
        stands; so it has a bound of its own, and what exceeds it stops the worker.
        """
        async with self._polling:  # no poll is under way, and none begins before the seek is done
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
                    active = self._get_active_partitions()
                    found = await self._getmany(active, POLL_S) if active and self.flow_active else {}
                if not found:
                    await asyncio.sleep(0 if active else POLL_S)
                # Labels before events: what was known at a time may be used at that time.
                by_topic: dict[str, list[tuple[int, Any]]] = {t: [] for t in self.positions.first}
                for tp, records in found.items():
                    by_topic.setdefault(tp.topic, []).append((tp.partition, records))
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


async def polls(stream: Any, app: faust.App, outbox: Outbox) -> AsyncIterator[Polled]:
    """The polls of a stream, each given out only when there is room for its outputs.

    What was polled before partitions changed hands is dropped: it is polled again from the position.
    Between this check and the fold nothing waits, so none slips through.
    """
    async for event in stream.events():
        await outbox.room()
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
