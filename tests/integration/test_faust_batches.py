"""The extension of Faust against a real broker: it relies on the inside of faust-streaming and aiokafka."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import version
from typing import Any

import faust
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import NewTopic
from faust.types import TP

from agents.in_step import InStep
from agents.outbox import Outbox
from app import faust_batches, kafka
from app.local.services import Addresses

pytestmark = pytest.mark.integration

TOPIC = "faust-batches"
EACH = 3000  # records in each of four partitions: more than one poll


class Positions:
    """Starts every partition at offset 10."""

    def __init__(self) -> None:
        self.committable: dict[TP, int] = {}
        self.first: tuple[str, ...] = ()
        self.taken = asyncio.Event()
        self.in_step = InStep([], {}, 0)
        self.held_back: frozenset[str] = frozenset()

    async def release(self) -> None:
        raise AssertionError("nobody asks for it")

    async def take(
        self, committed: Mapping[TP, int | None], consumer: faust_batches.Consumer
    ) -> Mapping[TP, int]:
        self.taken.set()
        return dict.fromkeys(committed, 10)

    def end(self, error: Exception) -> None:
        raise AssertionError(error)


class App(faust.App):  # type: ignore[misc]
    positions: Positions


@pytest.fixture
async def topic(addresses: Addresses) -> AsyncIterator[str]:
    async with kafka.admin(addresses.kafka) as admin:
        await admin.create_topics([NewTopic(TOPIC, 4, 1)])
    producer = kafka.producer(addresses.kafka)
    await producer.start()
    for i in range(EACH):
        for partition in range(4):
            await producer.send(TOPIC, b"%d" % i, partition=partition)
    await producer.flush()
    await producer.stop()
    yield TOPIC
    async with kafka.admin(addresses.kafka) as admin:
        await admin.delete_topics([TOPIC])


def make_app(address: str) -> App:
    app = App(
        "faust-batches-test", datadir=tempfile.mkdtemp(),
        broker=f"{faust_batches.SCHEME}://{address}", Topic=faust_batches.Topic,
        store="memory://", web_enabled=False, topic_disable_leader=True, topic_allow_declare=False,
        consumer_auto_offset_reset="earliest", broker_max_poll_records=400, stream_buffer_maxsize=2,
        stream_wait_empty=False, broker_commit_interval=0.2,
    )  # fmt: skip
    app.positions = Positions()
    return app


def test_the_versions_are_those_that_were_read() -> None:
    assert (version("faust-streaming"), version("aiokafka")) == ("0.15.3", "0.14.0")


@pytest.mark.timeout(120)
async def test_polls_are_fair_start_at_positions_and_commit_what_was_flushed(
    addresses: Addresses, topic: str
) -> None:
    app = make_app(addresses.kafka)
    outbox = Outbox(None, lambda: 0, lambda error: None)
    polled: list[list[tuple[int, list[Any]]]] = []
    enough = asyncio.Event()

    async def collect(stream: Any) -> None:
        async for poll in faust_batches.polls(stream, app, outbox):
            polled.append(poll)
            for partition, records in poll:
                app.positions.committable[TP(topic, partition)] = records[-1].offset + 1
            if sum(len(records) for each in polled for _, records in each) >= 4 * (EACH - 10):
                enough.set()

    app.agent(app.topic(topic), name="collect")(collect)
    await app.start()
    try:
        await asyncio.wait_for(enough.wait(), 60)
        await asyncio.sleep(0.6)  # two rounds of commits
    finally:
        await app.stop()
    by_partition: dict[int, list[int]] = {}
    for poll in polled:
        for partition, records in poll:
            by_partition.setdefault(partition, []).extend(r.offset for r in records)
    # Each partition from its position on, in order, without a gap.
    assert by_partition == {p: list(range(10, EACH)) for p in range(4)}
    # Once all are fetched, a poll takes from all of them alike.
    full = [poll for poll in polled if len(poll) == 4]
    assert len(full) > len(polled) / 2
    assert all({len(records) for _, records in poll} == {100} for poll in full[:-1])
    # The group's offsets are what was given as flushed.
    consumer = AIOKafkaConsumer(bootstrap_servers=addresses.kafka, group_id="faust-batches-test")
    await consumer.start()
    committed = [await consumer.committed(TopicPartition(topic, p)) for p in range(4)]
    await consumer.stop()
    assert committed == [EACH] * 4


@pytest.mark.timeout(120)
async def test_what_was_polled_before_partitions_changed_hands_is_dropped(
    addresses: Addresses, topic: str
) -> None:
    app = make_app(addresses.kafka)
    given: list[int] = []
    holding, hold = asyncio.Event(), asyncio.Event()

    class Full(Outbox):
        """Has no room until it is told to: a poll waits in front of the fold."""

        async def room(self) -> None:
            holding.set()
            await hold.wait()

    outbox = Full(None, lambda: 0, lambda error: None)

    async def collect(stream: Any) -> None:
        async for poll in faust_batches.polls(
            stream, app, outbox
        ):  # it has no end, so nothing is collected from it
            given.append(len(poll))  # noqa: PERF401

    app.agent(app.topic(topic), name="collect")(collect)
    await app.start()
    try:
        await asyncio.wait_for(holding.wait(), 60)
        app.consumer.epoch += 1  # as a revocation does
        app.consumer.stop_flow()
        hold.set()
        await asyncio.sleep(0.5)
        assert given == []
    finally:
        await app.stop()
