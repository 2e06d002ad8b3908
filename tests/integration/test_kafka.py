"""Topics and reads on a real broker."""

import asyncio

import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from app import kafka
from app.local.services import Addresses
from models.pipeline import Pipeline, find
from tests.conftest import PIPELINES

pytestmark = pytest.mark.integration

DAY_MS = 86_400_000


def pipeline(instance: str) -> Pipeline:
    return find("card-fraud", PIPELINES, instance)


async def test_topics_have_explicit_partitions_and_retention(addresses: Addresses) -> None:
    mine = pipeline("kafka-topics")
    made = await kafka.create_topics(addresses.kafka, mine, 3, 1)
    assert set(made) == {
        "kafka-topics.transactions", "kafka-topics.terminal.log", "kafka-topics.labels",
        "kafka-topics.predictions", "kafka-topics.shadow", "kafka-topics.dead-letters", "kafka-topics.control",
    }  # fmt: skip
    assert await kafka.create_topics(addresses.kafka, mine, 3, 1) == []
    assert await kafka.checked_partitions(addresses.kafka, mine) == dict.fromkeys(made, 3) | {mine.control: 1}
    async with kafka.admin(addresses.kafka) as admin:
        log, control = [
            {name: value for name, value, *_ in (await admin.describe_configs([resource]))[0].resources[0][4]}
            for resource in (
                ConfigResource(ConfigResourceType.TOPIC, "kafka-topics.terminal.log"),
                ConfigResource(ConfigResourceType.TOPIC, "kafka-topics.control"),
            )
        ]
    # Thirty days of window behind seven of delay, an hour of lateness, and a week to rebuild in.
    assert int(log["retention.ms"]) == (37 + 7) * DAY_MS + 3_600_000
    assert (log["cleanup.policy"], control["cleanup.policy"]) == ("delete", "compact")
    await kafka.delete_topics(addresses.kafka, mine)
    assert set((await kafka.partitions_of(addresses.kafka, made)).values()) == {0}


@pytest.mark.parametrize("out", ["predictions", "shadow"])
async def test_predictions_need_as_many_partitions_as_the_last_log(addresses: Addresses, out: str) -> None:
    mine = pipeline("kafka-uneven")
    await kafka.create_topics(addresses.kafka, mine, 2, 1)
    await kafka.delete_topics(addresses.kafka, mine)
    async with kafka.admin(addresses.kafka) as admin:
        await admin.create_topics([kafka.NewTopic(getattr(mine, out), 3, 1)])
    await kafka.create_topics(addresses.kafka, mine, 2, 1)
    with pytest.raises(
        kafka.TopicsWrong, match=rf"{out} has 3 partitions and kafka-uneven\.terminal\.log has 2"
    ):
        await kafka.checked_partitions(addresses.kafka, mine)
    await kafka.delete_topics(addresses.kafka, mine)


async def test_a_missing_topic_is_told_with_the_command(addresses: Addresses) -> None:
    with pytest.raises(kafka.TopicsWrong, match="topics create --pipeline card-fraud --as kafka-none"):
        await kafka.checked_partitions(addresses.kafka, pipeline("kafka-none"))


async def test_reads_end_at_the_present_end_and_last_origins_are_the_highest(addresses: Addresses) -> None:
    mine = pipeline("kafka-reads")
    await kafka.create_topics(addresses.kafka, mine, 2, 1)
    producer = kafka.producer(addresses.kafka)
    await producer.start()
    body = (
        b'{"id":1,"event_time":1,"score":0.5,"decision":"pass","model":"m","version":"v","definition":"d",'
        b'"late":false,"origin":{"partition":0,"offset":%d}}'
    )
    for offset in range(100):
        await producer.send_and_wait(mine.predictions, body % (offset * 3), partition=0)
    await producer.send_and_wait(mine.predictions, b"no prediction", partition=0)
    await producer.stop()
    records = [r async for r in kafka.read_between(addresses.kafka, mine.predictions)]
    assert [r.offset for r in records] == list(range(101))
    tail = [r.offset async for r in kafka.read_between(addresses.kafka, mine.predictions, {0: -5})]
    assert tail == list(range(96, 101))
    assert [r async for r in kafka.read_between(addresses.kafka, mine.predictions, {1: 0})] == []
    assert await kafka.last_origins(addresses.kafka, mine.predictions, [0, 1]) == {0: 297}
    await kafka.delete_topics(addresses.kafka, mine)


async def test_no_broker_is_told() -> None:
    with pytest.raises(kafka.BrokerUnreachable, match=r"127\.0\.0\.1:1"):
        await asyncio.wait_for(kafka.partitions_of("127.0.0.1:1", ["t"]), 30)
