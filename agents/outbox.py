"""What agents send: one queue per target partition, one batch of it in flight, the rest gathers.

So a quiet stream sends each event at once, and a busy one sends few large batches, with no timer in
between. The producer is idempotent: within a partition, records arrive once and in the order of `put`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from models.errors import HeadraceError

MOST_WAITING = 200_000  # records; above it the agents wait, and with them consumption


class SendFailed(HeadraceError):
    """A batch could not be delivered: the worker stops, and sends it again from its position."""


class Producer(Protocol):
    """Sends batches, each partition's in order and once: app.producer."""

    def create_batch(self, topic: str, partition: int) -> Any:
        """An empty batch: its `append` gives None when it is full."""

    async def send_batch(self, batch: Any, topic: str, partition: int) -> None:
        """Send and wait until it has arrived."""


class Outbox:
    """clock: the time of sending, ms."""

    def __init__(
        self, producer: Producer, clock: Callable[[], int], on_failure: Callable[[Exception], None]
    ) -> None:
        self._producer = producer
        self._clock = clock
        self._on_failure = on_failure
        self._targets: dict[tuple[str, int], _Target] = {}
        self._waiting = 0
        self._progress = asyncio.Event()
        self._failure: Exception | None = None

    def put(self, topic: str, partition: int, key: bytes | None, value: bytes) -> None:
        """Queue one record."""
        self.put_many(topic, (partition,), (key,), (value,))

    def put_many(
        self, topic: str, partitions: Sequence[int], keys: Iterable[bytes | None], values: Iterable[bytes]
    ) -> None:
        """Queue records in their order."""
        queues = {partition: self._target(topic, partition).queue for partition in set(partitions)}
        for partition, key, value in zip(partitions, keys, values, strict=True):
            queues[partition].append((key, value))
        self._waiting += len(partitions)
        for partition in queues:
            target = self._targets[topic, partition]
            if target.sender is None:
                target.sender = asyncio.create_task(self._send(topic, partition, target))

    def put_everywhere(self, topic: str, partitions: int, value: bytes) -> None:
        """Queue a record without a key for each partition of a topic."""
        self.put_many(topic, range(partitions), [None] * partitions, [value] * partitions)

    def _target(self, topic: str, partition: int) -> _Target:
        return self._targets.setdefault((topic, partition), _Target())

    async def room(self) -> None:
        """Wait while too much waits to be sent."""
        while self._waiting > MOST_WAITING:
            await self._next_progress()

    async def acknowledged(self) -> None:
        """Wait until all that was put before this call is acknowledged. Raises SendFailed."""
        marks = [(target, target.acknowledged + len(target.queue)) for target in self._targets.values()]
        for target, mark in marks:
            while target.acknowledged < mark:
                await self._next_progress()

    @property
    def since(self) -> int | None:
        """When the oldest batch that is not acknowledged was first sent, ms."""
        return min((t.since for t in self._targets.values() if t.since is not None), default=None)

    async def _next_progress(self) -> None:
        if self._failure is not None:
            raise SendFailed(f"Kafka did not take a batch ({self._failure}); see the broker's log.")
        self._progress.clear()
        await self._progress.wait()

    async def _send(self, topic: str, partition: int, target: _Target) -> None:
        """Send what is queued, one batch at a time, until nothing is left."""
        try:
            while target.queue:
                batch, count = self._batch(topic, partition, target.queue)
                target.since = self._clock()
                await self._producer.send_batch(batch, topic, partition)
                del target.queue[:count]
                target.acknowledged += count
                self._waiting -= count
                self._progress.set()
        except Exception as error:  # whatever it is, no position may pass it
            self._failure = error
            self._progress.set()
            self._on_failure(error)
        finally:
            target.sender = target.since = None

    def _batch(self, topic: str, partition: int, queue: list[tuple[bytes | None, bytes]]) -> tuple[Any, int]:
        """As much of the queue as one batch holds, and how many records that is."""
        batch, now, count = self._producer.create_batch(topic, partition), self._clock(), 0
        append = batch.append
        for key, value in queue:
            if append(key=key, value=value, timestamp=now) is None:
                break
            count += 1
        if not count:
            raise SendFailed(f"a record of {len(queue[0][1])} bytes is larger than a batch may be")
        return batch, count


class _Target:
    """One partition's queue of what is not acknowledged, and how much ever was."""

    __slots__ = ("acknowledged", "queue", "sender", "since")

    def __init__(self) -> None:
        self.queue: list[tuple[bytes | None, bytes]] = []
        self.acknowledged = 0
        self.sender: asyncio.Task[None] | None = None
        self.since: int | None = None
