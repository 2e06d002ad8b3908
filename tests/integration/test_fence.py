"""Who has claimed a partition is the only one who can write to it: proved on the broker's own word."""

import pytest

from app import kafka
from app import producer as module
from app.local.services import Addresses
from app.producer import Fenced, Producer
from app.settings import Delivery
from models.pipeline import Pipeline, find
from tests.conftest import PIPELINES


async def made(address: str, name: str) -> Pipeline:
    pipeline = find("card-fraud", PIPELINES, name)
    await kafka.delete_topics(address, pipeline)
    await kafka.create_topics(address, pipeline, 2, 1)
    return pipeline


async def started(address: str, delivery: Delivery = "fenced") -> Producer:
    producer = Producer(address, "fence-test", delivery)
    await producer.start([])
    return producer


async def send(producer: Producer, topic: str, partition: int, *values: bytes) -> None:
    batch = producer.create_batch(topic, partition)
    for value in values:
        batch.append(key=None, value=value, timestamp=1_700_000_000_000)
    await producer.send_batch(batch, topic, partition)


async def values(address: str, topic: str) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    async for record in kafka.read_between(address, topic):
        found.setdefault(record.partition, []).append(record.value)
    return found


@pytest.mark.parametrize("delivery", ["fenced", "transactional"])
async def test_an_older_owner_is_refused_after_a_newer_has_claimed(
    addresses: Addresses, delivery: Delivery
) -> None:
    pipeline = await made(addresses.kafka, f"fence-{delivery}")
    topic = pipeline.predictions
    old, new = await started(addresses.kafka, delivery), await started(addresses.kafka, delivery)
    await old.claim(topic, [0, 1])
    for number in range(5):
        await send(old, topic, 0, b"old %d" % number)
        await send(old, topic, 1, b"old %d" % number)
    await new.claim(topic, [0])
    with pytest.raises(Fenced, match=f"owns {topic} partition 0"):
        await send(old, topic, 0, b"of a zombie")
    await send(old, topic, 1, b"its own still")
    await send(new, topic, 0, b"new 0", b"new 1")
    await send(new, topic, 0, b"new 2")
    await old.stop()
    await new.stop()
    assert await values(addresses.kafka, topic) == {
        0: [*(b"old %d" % n for n in range(5)), b"new 0", b"new 1", b"new 2"],
        1: [*(b"old %d" % n for n in range(5)), b"its own still"],
    }
    await kafka.delete_topics(addresses.kafka, pipeline)


async def test_a_partition_may_be_claimed_again_and_other_topics_need_no_claim(addresses: Addresses) -> None:
    pipeline = await made(addresses.kafka, "fence-again")
    producer = await started(addresses.kafka)
    for number in range(3):
        await producer.claim(pipeline.predictions, [0, 1])
        await send(producer, pipeline.predictions, 0, b"%d" % number)
        await send(producer, pipeline.dead_letters, 0, b"%d" % number)
    await producer.stop()
    expected = {0: [b"0", b"1", b"2"]}
    assert await values(addresses.kafka, pipeline.predictions) == expected
    assert await values(addresses.kafka, pipeline.dead_letters) == expected
    await kafka.delete_topics(addresses.kafka, pipeline)


async def test_a_claim_is_renewed_between_two_batches(
    addresses: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = await made(addresses.kafka, "fence-renewed")
    topic = pipeline.predictions
    producer = await started(addresses.kafka)
    await producer.claim(topic, [0])
    await send(producer, topic, 0, b"0")
    epochs = [identity.epoch for identity in producer._identities.fenced.values()]
    monkeypatch.setattr(module, "RENEW_S", 0.0)
    await send(producer, topic, 0, b"1")
    await send(producer, topic, 0, b"2")
    await send(producer, topic, 1, b"never claimed")
    epochs += [identity.epoch for identity in producer._identities.fenced.values()]
    await producer.stop()
    assert await values(addresses.kafka, topic) == {0: [b"0", b"1", b"2"], 1: [b"never claimed"]}
    assert epochs[1] > epochs[0]
    await kafka.delete_topics(addresses.kafka, pipeline)


async def test_without_a_claim_a_zombie_does_write(addresses: Addresses) -> None:
    """What the fence is for: idempotence alone lets both owners write."""
    pipeline = await made(addresses.kafka, "fence-none")
    old, new = await started(addresses.kafka), await started(addresses.kafka)
    await send(old, pipeline.predictions, 0, b"old")
    await send(new, pipeline.predictions, 0, b"new")
    await send(old, pipeline.predictions, 0, b"of a zombie")
    await old.stop()
    await new.stop()
    assert await values(addresses.kafka, pipeline.predictions) == {0: [b"old", b"new", b"of a zombie"]}
    await kafka.delete_topics(addresses.kafka, pipeline)


async def test_a_tail_of_markers_alone_is_looked_behind(addresses: Addresses) -> None:
    """Owners came and went without an event: their markers fill the tail that tells what is out."""
    pipeline = await made(addresses.kafka, "fence-markers")
    topic = pipeline.predictions
    producer = await started(addresses.kafka)
    body = (
        b'{"id":1,"event_time":1,"score":0.5,"decision":"pass","model":"m","version":"v","definition":"d",'
        b'"late":false,"origin":{"partition":0,"offset":41}}'
    )
    await send(producer, topic, 0, body)
    for _ in range(kafka.TAIL + 1):
        await producer.claim(topic, [0])
    await producer.stop()
    assert await kafka.last_origins(addresses.kafka, topic, [0, 1]) == {0: 41}
    await kafka.delete_topics(addresses.kafka, pipeline)
