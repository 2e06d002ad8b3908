"""Kafka as Headrace uses it: one home for clients and topics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    KafkaConnectionError,
    KafkaError,
    TopicAlreadyExistsError,
    for_code,
)

from models.errors import HeadraceError
from models.pipeline import Pipeline
from models.predictions import decode

DAY_MS = 86_400_000
SPARE_MS = 7 * DAY_MS  # a log is kept this much longer than its windows reach, for a rebuild
OUTPUT_MS = 30 * DAY_MS
BATCH_BYTES = 512 * 1024
TAIL = 64  # of a partition's last records, among which its highest origin stands
FARTHEST = TAIL * 32**3  # what lies behind so many markers is not looked for

SELDOM_S = 30.0  # between two records of the same text while a broker is away


class _Seldom(logging.Filter):
    """Of what a client says at every attempt, some thirty lines a second, lets one through now and then."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._said.get(record.msg, -SELDOM_S) < SELDOM_S:
            return False
        self._said[record.msg] = now
        return True


# aiokafka builds debug records that nobody shows: an eighth of a busy worker's time.
logging.getLogger("aiokafka").setLevel(logging.WARNING)
_seldom = _Seldom()
for _name in (
    "",
    ".conn",
    ".cluster",
    ".producer.sender",
    ".consumer.fetcher",
    ".consumer.group_coordinator",
):
    logging.getLogger(f"aiokafka{_name}").addFilter(_seldom)


Place = tuple[str, int]  # a topic and one of its partitions


@dataclass(frozen=True)
class Span:
    """The offsets that a partition holds: from `first` on, below `end`."""

    topic: str
    partition: int
    first: int
    end: int


class BrokerUnreachable(HeadraceError):
    """No broker answers at the address."""

    def __init__(self, address: str) -> None:
        super().__init__(f"No Kafka answers at {address}; start it, or set HEADRACE_KAFKA to where it runs.")


class TopicsWrong(HeadraceError):
    """The topics are not there, or not as the pipeline needs them."""


def producer(address: str, **more: Any) -> AIOKafkaProducer:
    """An idempotent producer; it waits while a broker restarts. more: settings of aiokafka's."""
    return AIOKafkaProducer(
        bootstrap_servers=address,
        enable_idempotence=True,
        acks="all",
        max_batch_size=BATCH_BYTES,
        request_timeout_ms=120_000,
        **more,
    )


@asynccontextmanager
async def admin(address: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """A client for topics. Raises BrokerUnreachable."""
    client = AIOKafkaAdminClient(bootstrap_servers=address, request_timeout_ms=15_000)
    try:
        await asyncio.wait_for(client.start(), 15)
    except (KafkaConnectionError, KafkaError, TimeoutError, OSError):
        await client.close()
        raise BrokerUnreachable(address) from None
    try:
        yield client
    finally:
        await client.close()


def wanted_topics(pipeline: Pipeline) -> dict[str, int | None]:
    """The topics of a pipeline, each with how long it keeps records, ms; None: the last of each key."""
    reach = max(e.retention for e in pipeline.entities) + SPARE_MS
    kept = [x.topic for x in (*pipeline.streams, *pipeline.said)] + [e.log for e in pipeline.entities]
    return {
        **dict.fromkeys(kept, reach),
        pipeline.predictions: OUTPUT_MS,
        pipeline.shadow: OUTPUT_MS,
        pipeline.dead_letters: OUTPUT_MS,
        pipeline.control: None,
    }


async def create_topics(address: str, pipeline: Pipeline, partitions: int, replication: int) -> list[str]:
    """Create what is missing, with explicit partitions and retention. Returns what was created."""
    async with admin(address) as client:
        there = set(await client.list_topics())
        new = [
            NewTopic(
                name, partitions if keep else 1, replication,
                topic_configs={"retention.ms": str(keep), "cleanup.policy": "delete"} if keep
                else {"cleanup.policy": "compact"},
            )
            for name, keep in wanted_topics(pipeline).items()
            if name not in there
        ]  # fmt: skip
        if new:
            response = await client.create_topics(new)
            for topic, code, *rest in response.topic_errors:
                error = for_code(code)
                if code and error is not TopicAlreadyExistsError:
                    raise TopicsWrong(f"Kafka did not create {topic}: {rest[0] if rest else error.__name__}.")
            async with asyncio.timeout(30):
                while not {t.name for t in new} <= set(await client.list_topics()):  # noqa: ASYNC110 - as below
                    await asyncio.sleep(0.1)
    return [t.name for t in new]


async def delete_topics(address: str, pipeline: Pipeline) -> None:
    """Delete the pipeline's topics with all that is in them, and wait until they are gone."""
    names = set(wanted_topics(pipeline))
    async with admin(address) as client:
        there = names & set(await client.list_topics())
        if there:
            await client.delete_topics(sorted(there))
        async with asyncio.timeout(30):
            while names & set(await client.list_topics()):  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.1)


def group_of(pipeline: Pipeline) -> str:
    """The consumer group of a pipeline's workers. Another definition is another group: it starts afresh."""
    return f"headrace-{pipeline.instance}-{pipeline.definition}"


@dataclass(frozen=True)
class Member:
    """A worker of a group: where it connects from, and the partitions that it was given, by topic."""

    host: str
    holds: Mapping[str, list[int]]


@dataclass(frozen=True)
class Group:
    """state: Kafka's word for it; who holds what is settled while it is Stable."""

    state: str
    members: list[Member]


async def group_as_it_is(address: str, group: str) -> Group:
    """Who is in a group, and who holds what."""
    async with admin(address) as client:
        try:
            (answer,) = await client.describe_consumer_groups([group])
        except GroupCoordinatorNotAvailableError:  # a new broker, which no group has used yet
            return Group("Empty", [])
        _, _, state, _, _, members, *_ = answer.groups[0]
        return Group(state, [Member(host, _holds(given)) for _, _, host, _, given in members])


def _holds(assignment: bytes) -> dict[str, list[int]]:
    return dict(ConsumerProtocolMemberAssignment.decode(assignment).assignment) if assignment else {}


async def members_of(address: str, group: str) -> int:
    """How many workers are in a group."""
    return len((await group_as_it_is(address, group)).members)


async def committed_of(address: str, group: str) -> dict[Place, int]:
    """The offsets that a group has committed, by topic and partition."""
    async with admin(address) as client:
        try:
            found = await client.list_consumer_group_offsets(group)
        except GroupCoordinatorNotAvailableError:
            return {}
        return {(tp.topic, tp.partition): at.offset for tp, at in found.items()}


async def configs_of(address: str, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The settings of topics that exist, as Kafka holds them."""
    async with admin(address) as client:
        answers = await client.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
        )
        return {
            resource[3]: {entry[0]: entry[1] for entry in resource[4]}
            for answer in answers
            for resource in answer.resources
        }


async def topics_as_they_are(
    address: str, pipeline: Pipeline
) -> tuple[dict[str, int], dict[str, dict[str, str]]]:
    """Partitions of each topic of a pipeline, 0 where it does not exist, and the settings of those that do."""
    counts = await partitions_of(address, wanted_topics(pipeline))
    there = [name for name, count in counts.items() if count]
    return counts, await configs_of(address, there) if there else {}


async def offsets_of(address: str, counts: Mapping[str, int], time_ms: int | None = None) -> list[Span]:
    """What each partition of these topics holds now; from a time on: of records that came no earlier."""
    tps = [TopicPartition(topic, p) for topic, count in counts.items() for p in range(count)]
    async with _asking(address) as consumer:
        if not tps:
            return []
        first = await consumer.beginning_offsets(tps)
        since = await consumer.offsets_for_times(dict.fromkeys(tps, time_ms)) if time_ms is not None else {}
        ends = await consumer.end_offsets(tps)
    later = {tp: ends[tp] if found is None else found.offset for tp, found in since.items()}
    return [Span(tp.topic, tp.partition, later.get(tp, first[tp]), ends[tp]) for tp in tps]


async def partitions_of(address: str, names: Iterable[str]) -> dict[str, int]:
    """How many partitions each topic has, 0 where it does not exist."""
    async with admin(address) as client:
        there = set(await client.list_topics())
        known = [n for n in names if n in there]
        counts = (
            {d["topic"]: len(d["partitions"]) for d in await client.describe_topics(known)} if known else {}
        )
        return {n: counts.get(n, 0) for n in names}


async def checked_partitions(address: str, pipeline: Pipeline) -> dict[str, int]:
    """Partitions of the pipeline's topics. Raises TopicsWrong where a worker could not run on them."""
    counts = await partitions_of(address, wanted_topics(pipeline))
    missing = [name for name, count in counts.items() if not count]
    if missing:
        alias = "" if pipeline.instance == pipeline.name else f" --as {pipeline.instance}"
        raise TopicsWrong(
            f"Kafka has no topic {missing[0]}; run `headrace topics create --pipeline {pipeline.name}"
            f"{alias}`."
        )
    last = pipeline.entities[-1].log
    for topic in (pipeline.predictions, pipeline.shadow):
        if counts[last] != counts[topic]:
            raise TopicsWrong(
                f"{topic} has {counts[topic]} partitions and {last} has {counts[last]}; "
                "a prediction goes to the partition of its log's number, so make them equal."
            )
    return counts


async def last_origins(address: str, topic: str, partitions: Iterable[int]) -> dict[int, int]:
    """The highest log offset whose prediction is out, by partition: what a crashed worker had sent.

    A tail may hold nothing but the markers of owners that came and went; then look farther back.
    """
    found: dict[int, int] = {}
    missing, tail = set(partitions), TAIL
    while missing and tail <= FARTHEST:
        async for record in read_between(address, topic, dict.fromkeys(missing, -tail)):
            try:
                offset = decode(record.value).origin.offset
            except ValueError:
                continue  # not one of ours: a predictions topic may be written by hand
            found[record.partition] = max(found.get(record.partition, -1), offset)
        missing -= found.keys()
        tail *= 32
    return found


async def follow(address: str, topic: str) -> AsyncIterator[Any]:
    """All records of a topic, and those that come, for ever."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=address, auto_offset_reset="earliest", fetch_max_wait_ms=100
    )
    await consumer.start()
    try:
        async for record in consumer:
            yield record
    finally:
        await consumer.stop()


@asynccontextmanager
async def _asking(address: str) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer without a group. Raises BrokerUnreachable."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=address, auto_offset_reset="earliest", isolation_level="read_committed",
        max_partition_fetch_bytes=4 * 2**20,
    )  # fmt: skip
    try:
        await asyncio.wait_for(consumer.start(), 30)
    except (KafkaConnectionError, TimeoutError, OSError):
        await consumer.stop()
        raise BrokerUnreachable(address) from None
    try:
        yield consumer
    finally:
        await consumer.stop()


async def read_between(
    address: str, topic: str, starts: dict[int, int] | None = None, stops: Mapping[int, int] | None = None
) -> AsyncGenerator[Any, None]:
    """All records of a topic from `starts` to its present end, in batches of partitions' order.

    What a transaction wrote and did not commit is none of them.

    starts: offset by partition; below 0, so many before the end; None: the whole topic.
    stops: offsets from which on a partition is not read, though it has more.
    """
    async with _asking(address) as consumer:
        if starts is None:
            await consumer._client._wait_on_metadata(topic)
            starts = dict.fromkeys(consumer.partitions_for_topic(topic) or (), 0)
        tps = [TopicPartition(topic, p) for p in starts]
        if not tps:
            return
        consumer.assign(tps)
        first, ends = await consumer.beginning_offsets(tps), await consumer.end_offsets(tps)
        ends = {tp: min(end, (stops or {}).get(tp.partition, end)) for tp, end in ends.items()}
        open_ = set()
        for tp in tps:
            start = starts[tp.partition]
            start = max(first[tp], ends[tp] + start if start < 0 else start)
            if start < ends[tp]:
                await consumer.position(tp)
                consumer.seek(tp, start)
                open_.add(tp)
        while open_:
            got = await consumer.getmany(*open_, timeout_ms=1000)
            for tp, records in got.items():
                for record in records:
                    if record.offset < ends[tp]:
                        yield record
            # Control records have offsets and are never given out: the position tells, not the count.
            open_ = {tp for tp in open_ if await consumer.position(tp) < ends[tp]}


@dataclass(frozen=True)
class Some:
    """Records that were read. left: how many are there that were not; whole: all that was there at the start was."""

    records: list[Any]
    left: int
    whole: bool


async def tail(address: str, topics: Iterable[str], since_ms: int) -> AsyncGenerator[Some, None]:
    """Records of topics that came from a time on, and those that come, for ever.

    Those of a partition are in its order. Without any it gives an empty list about twice a second.
    """
    spans = await offsets_of(address, await partitions_of(address, topics), since_ms)
    ends = {TopicPartition(s.topic, s.partition): s.end for s in spans}
    async with _asking(address) as consumer:
        consumer.assign(list(ends))
        for span in spans:
            await consumer.position(TopicPartition(span.topic, span.partition))
            consumer.seek(TopicPartition(span.topic, span.partition), span.first)
        while True:
            got = await consumer.getmany(timeout_ms=500, max_records=5000)
            at = {tp: await consumer.position(tp) for tp in ends}
            now = {tp: max(end, consumer.highwater(tp) or end) for tp, end in ends.items()}
            yield Some(
                [record for records in got.values() for record in records],
                sum(max(0, now[tp] - at[tp]) for tp in ends),
                all(at[tp] >= end for tp, end in ends.items()),
            )
