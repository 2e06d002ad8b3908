"""The outbox with a producer that fails or waits on demand, as no real broker does when it is asked to."""

import asyncio
from typing import Any

import pytest

from agents import outbox as module
from agents.outbox import Outbox, SendFailed


class Batch:
    """A batch of at most three records."""

    def __init__(self) -> None:
        self.records: list[bytes] = []

    def append(self, *, key: bytes | None, value: bytes, timestamp: int) -> object | None:
        if len(self.records) == 3 or len(value) > 1000:
            return None
        self.records.append(value)
        return object()


class Producer:
    """Acknowledges a batch when it is told to; `sent` holds all batches in the order of sending."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, list[bytes]]] = []
        self.waiting: list[asyncio.Future[None]] = []

    def create_batch(self, topic: str, partition: int) -> Batch:
        return Batch()

    async def send_batch(self, batch: Batch, topic: str, partition: int) -> None:
        self.sent.append((topic, partition, batch.records))
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        await future

    async def acknowledge(self) -> None:
        """Acknowledge what is in flight, and let what follows from it happen."""
        for future in self.waiting:
            future.set_result(None)
        self.waiting = []
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def outbox(producer: Any, failures: list[Exception] | None = None) -> Outbox:
    return Outbox(producer, lambda: 0, (failures if failures is not None else []).append)


async def test_it_tells_since_when_a_batch_waits() -> None:
    producer = Producer()
    box = Outbox(producer, lambda: 7, [].append)
    assert box.since is None
    box.put("t", 0, None, b"a")
    await settle()
    assert box.since == 7
    await producer.acknowledge()
    assert box.since is None


async def test_what_gathers_while_a_batch_is_in_flight_goes_in_the_next() -> None:
    producer = Producer()
    box = outbox(producer)
    box.put("t", 0, None, b"1")
    await settle()
    box.put_many("t", [0, 0, 0, 0], [None] * 4, [b"2", b"3", b"4", b"5"])
    box.put("t", 1, None, b"other")
    await settle()
    assert producer.sent == [("t", 0, [b"1"]), ("t", 1, [b"other"])]
    await producer.acknowledge()
    await producer.acknowledge()
    assert [b for t, p, b in producer.sent if p == 0] == [[b"1"], [b"2", b"3", b"4"], [b"5"]]


async def test_acknowledged_waits_for_what_was_put_before_and_not_for_what_came_after() -> None:
    producer = Producer()
    box = outbox(producer)
    box.put("t", 0, None, b"1")
    await settle()
    waiter = asyncio.create_task(box.acknowledged())
    await settle()
    box.put("t", 0, None, b"2")
    assert not waiter.done()
    await producer.acknowledge()
    assert waiter.done()
    assert len(producer.waiting) == 1  # the second is still on its way


async def test_a_batch_that_fails_fails_the_worker_and_every_waiter() -> None:
    producer, failures = Producer(), []
    box = outbox(producer, failures)
    box.put("t", 0, None, b"1")
    await settle()
    waiter = asyncio.create_task(box.acknowledged())
    await settle()
    producer.waiting[0].set_exception(RuntimeError("broker gone"))
    with pytest.raises(SendFailed, match="broker gone"):
        await waiter
    assert [str(f) for f in failures] == ["broker gone"]


async def test_a_record_that_no_batch_holds_fails_with_its_size() -> None:
    failures: list[Exception] = []
    box = outbox(Producer(), failures)
    box.put("t", 0, None, b"x" * 1001)
    await settle()
    assert "1001 bytes" in str(failures[0])


async def test_room_waits_while_too_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    producer = Producer()
    box = outbox(producer)
    box.put_many("t", [0] * 3, [None] * 3, [b"1", b"2", b"3"])
    waiter = asyncio.create_task(box.room())
    await settle()
    assert not waiter.done()
    await producer.acknowledge()
    assert waiter.done()
