"""The client of predictions on a real broker: doubles are dropped, through restarts and rebalances too."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from app import kafka
from app.client import PositionGone, Predictions, Received
from app.local.services import Addresses

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120, func_only=True)]

BODY = (
    b'{"id":%d,"event_time":1,"score":0.5,"decision":"pass","model":"m","version":"v","definition":"d",'
    b'"late":false,"origin":{"partition":%d,"offset":%d}}'
)
Place = tuple[int, int]  # partition and origin offset


def value(place: Place) -> bytes:
    partition, origin = place
    return BODY % (partition * 1000 + origin, partition, origin)


def doubled(partition: int, count: int) -> list[Place]:
    """A partition's predictions up to `count`, in which owners send again from earlier points."""
    ends = [count // 3, count // 2, count]
    starts = [0, count // 6, count // 4]
    return [(partition, o) for start, end in zip(starts, ends, strict=True) for o in range(start, end)]


async def send(address: str, topic: str, places: Iterable[Place]) -> None:
    producer = kafka.producer(address)
    await producer.start()
    for place in places:
        await producer.send(topic, value(place), partition=place[0])
    await producer.stop()


@asynccontextmanager
async def made(address: str, topic: str, partitions: int = 2) -> AsyncIterator[str]:
    async with kafka.admin(address) as admin:
        await admin.create_topics([kafka.NewTopic(topic, partitions, 1)])
    yield topic
    async with kafka.admin(address) as admin:
        await admin.delete_topics([topic])


def places_of(predictions: Iterable[Received]) -> list[Place]:
    return sorted((p.origin.partition, p.origin.offset) for p in predictions)


def all_of(counts: Sequence[int]) -> list[Place]:
    return [(partition, origin) for partition, count in enumerate(counts) for origin in range(count)]


async def take(predictions: Predictions, count: int) -> list[Received]:
    async with asyncio.timeout(30):
        return [await anext(predictions) for _ in range(count)]


async def test_each_comes_once_and_says_where_it_stood(addresses: Addresses) -> None:
    async with made(addresses.kafka, "client.once") as topic:
        await send(addresses.kafka, topic, [*doubled(0, 120), (1, 0), *doubled(1, 60)])
        async with Predictions(addresses.kafka, topic) as predictions:
            got = await take(predictions, 180)
            assert places_of(got) == all_of([120, 60])
            for p in (0, 1):  # in order, too
                offsets = [(x.origin.offset, x.offset) for x in got if x.partition == p]
                assert offsets == sorted(offsets)
            assert all(p.timestamp > 1_600_000_000_000 for p in got)
            await send(addresses.kafka, topic, [(0, 100), (0, 119), (0, 120), (1, 60)])
            assert places_of(await take(predictions, 2)) == [(0, 120), (1, 60)]
            assert predictions.dropped == len(doubled(0, 120)) - 120 + len(doubled(1, 60)) + 1 - 60 + 2


async def pass_over(predictions: Predictions, count: int) -> None:
    """Let it drop so many doubles more while it looks for something new."""
    count += predictions.dropped
    looking = asyncio.create_task(anext(predictions))
    async with asyncio.timeout(30):
        while predictions.dropped < count:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


async def test_what_was_kept_amid_doubles_knows_all_that_was_seen(addresses: Addresses) -> None:
    """The highest is further back than the tail: only what was kept can tell it."""
    async with made(addresses.kafka, "client.amid", 1) as topic:
        await send(addresses.kafka, topic, [(0, o) for o in [*range(200), *range(100)]])
        async with Predictions(addresses.kafka, topic) as alone:
            await take(alone, 200)
            await pass_over(alone, 100)
        async with Predictions(addresses.kafka, topic, "amid") as grouped:
            await take(grouped, 200)
            await pass_over(grouped, 100)
            assert await grouped.commit()
        await send(addresses.kafka, topic, [(0, o) for o in range(100, 201)])
        async with Predictions(addresses.kafka, topic, positions=alone.positions) as again:
            assert places_of(await take(again, 1)) == [(0, 200)]
        async with Predictions(addresses.kafka, topic, "amid") as again:
            assert places_of(await take(again, 1)) == [(0, 200)]


@pytest.mark.parametrize("stop", [0, 1, 39, 40, 41, 100, 179])
async def test_it_goes_on_from_what_was_kept(addresses: Addresses, stop: int) -> None:
    async with made(addresses.kafka, f"client.kept-{stop}") as topic:
        await send(addresses.kafka, topic, [*doubled(0, 120), *doubled(1, 60)])
        async with Predictions(addresses.kafka, topic) as predictions:
            before = await take(predictions, stop)
            kept = json.dumps(predictions.positions)
        # A stopped owner wakes up, and sends what the reader has seen and some of what it has not.
        await send(addresses.kafka, topic, [(0, o) for o in range(30, 125)])
        async with Predictions(addresses.kafka, topic, positions=json.loads(kept)) as predictions:
            after = await take(predictions, 185 - stop)
        assert places_of(before + after) == all_of([125, 60])


async def test_what_was_seen_before_a_start_in_the_middle_is_not_given_out(addresses: Addresses) -> None:
    async with made(addresses.kafka, "client.latest") as topic:
        await send(addresses.kafka, topic, all_of([100, 0]))
        async with Predictions(addresses.kafka, topic, start="latest") as predictions:
            reading = asyncio.create_task(take(predictions, 2))
            await send(addresses.kafka, topic, [(0, 98), (0, 99), (0, 100), (1, 0)])
            assert places_of(await reading) == [(0, 100), (1, 0)]
            assert predictions.dropped == 2


async def test_code_without_asyncio_reads_the_same(addresses: Addresses) -> None:
    async with made(addresses.kafka, "client.plain") as topic:
        await send(addresses.kafka, topic, [*doubled(0, 120), *doubled(1, 60)])

        def plain(
            count: int, group: str | None = None, **how: dict[int, list[int]]
        ) -> tuple[list[Received], dict]:
            got = []
            with Predictions(addresses.kafka, topic, group, **how) as predictions:
                for prediction in predictions:
                    got.append(prediction)
                    if len(got) == count:
                        break
                if group:
                    assert predictions.commit()
                return got, predictions.positions

        before, kept = await asyncio.to_thread(plain, 100)
        after, _ = await asyncio.to_thread(plain, 80, positions=kept)
        assert places_of(before + after) == all_of([120, 60])
        before, _ = await asyncio.to_thread(plain, 100, "plain")
        after, _ = await asyncio.to_thread(plain, 80, "plain")
        assert places_of(before + after) == all_of([120, 60])


async def test_a_group_drops_doubles_across_a_restart_and_another_s_commit(addresses: Addresses) -> None:
    async with made(addresses.kafka, "client.restart", 1) as topic:
        await send(addresses.kafka, topic, [(0, o) for o in [*range(200), *range(50, 100)]])
        async with Predictions(addresses.kafka, topic, "restart") as predictions:
            assert places_of(await take(predictions, 200)) == all_of([200])
            await send(addresses.kafka, topic, [(0, 200)])
            await take(predictions, 1)  # and with it over all doubles
            await send(addresses.kafka, topic, [(0, o) for o in [*range(100, 201), *range(150, 203)]])
            assert await predictions.commit()
        # The highest is more than the tail before the committed offset, so only the commit can tell it.
        async with Predictions(addresses.kafka, topic, "restart") as predictions:
            assert places_of(await take(predictions, 2)) == [(0, 201), (0, 202)]
            assert predictions.dropped == 101 + 51
        other = AIOKafkaConsumer(
            bootstrap_servers=addresses.kafka, group_id="restart", enable_auto_commit=False
        )
        await other.start()
        await other.stop()
        other = AIOKafkaConsumer(
            topic, bootstrap_servers=addresses.kafka, group_id="restart", enable_auto_commit=False
        )
        await other.start()
        end = (await other.end_offsets([TopicPartition(topic, 0)]))[TopicPartition(topic, 0)]
        await other.commit({TopicPartition(topic, 0): end})
        await other.stop()
        await send(addresses.kafka, topic, [(0, o) for o in range(190, 204)])
        async with Predictions(addresses.kafka, topic, "restart") as predictions:
            assert places_of(await take(predictions, 1)) == [(0, 203)]


async def test_two_of_a_group_share_and_a_rebalance_loses_and_doubles_nothing(addresses: Addresses) -> None:
    counts = [300, 300, 300, 300]
    handled: list[Place] = []

    async def read(predictions: Predictions, most: int) -> int:
        """Handle what comes; what counts is what was committed."""
        batch: list[Place] = []
        done = 0
        while done < most and len(handled) < sum(counts):
            try:
                async with asyncio.timeout(0.3):
                    prediction = await anext(predictions)
                batch.append((prediction.origin.partition, prediction.origin.offset))
            except TimeoutError:
                pass
            if len(batch) >= 20 or not predictions._ready:
                if await predictions.commit():
                    handled.extend(batch)
                    done += len(batch)
                batch = []
        return done

    async with made(addresses.kafka, "client.two", 4) as topic:
        await send(addresses.kafka, topic, [x for p in range(4) for x in doubled(p, 300)][:900])
        async with asyncio.timeout(90), Predictions(addresses.kafka, topic, "two") as first:
            await read(first, 200)
            one = asyncio.create_task(read(first, 10_000))
            async with Predictions(addresses.kafka, topic, "two") as second:
                two = asyncio.create_task(read(second, 150))
                await shared(first, second)
                await send(addresses.kafka, topic, [x for p in range(4) for x in doubled(p, 300)])
                assert await two >= 150
            assert await one > 0  # the second one has left, and the first has all of it again
            assert len(first.positions) == 4
        assert sorted(handled) == all_of(counts)


async def shared(*members: Predictions) -> None:
    """Wait until each has two of the four partitions."""
    async with asyncio.timeout(30):
        while any(len(x.positions) != 2 for x in members):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.05)


async def test_what_a_rebalance_tears_comes_again_whole(addresses: Addresses) -> None:
    async with made(addresses.kafka, "client.torn", 4) as topic:
        await send(addresses.kafka, topic, all_of([30, 30, 30, 30]))
        async with Predictions(addresses.kafka, topic, "torn") as first:
            handled = await take(first, 40)
            assert await first.commit()
            await take(first, 10)
            async with Predictions(addresses.kafka, topic, "torn") as second:
                await shared(first, second)
                await take(first, 10)  # of what it has now; its own commit must not pass these
                assert not await first.commit()
                handled += await take(first, 1)
                assert await first.commit()
            while len(first.positions) != 4:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            handled += await take(first, 79)
            assert await first.commit()
        assert places_of(handled) == all_of([30, 30, 30, 30])


async def test_what_was_not_committed_is_not_read(addresses: Addresses) -> None:
    async with made(addresses.kafka, "client.transactions", 1) as topic:
        producer = AIOKafkaProducer(bootstrap_servers=addresses.kafka, transactional_id="client-test")
        await producer.start()
        for origin in range(40):
            await producer.begin_transaction()
            await producer.send_and_wait(topic, value((0, origin)), partition=0)
            await (producer.abort_transaction() if origin % 10 == 9 else producer.commit_transaction())
        await producer.stop()
        kept = [(0, o) for o in range(40) if o % 10 != 9]
        async with Predictions(addresses.kafka, topic) as predictions:
            got = await take(predictions, 20)
            positions = predictions.positions
        async with Predictions(addresses.kafka, topic, positions=positions) as predictions:
            assert places_of(got + await take(predictions, len(kept) - 20)) == kept


async def test_what_is_no_prediction_is_passed_over(addresses: Addresses) -> None:
    async with made(addresses.kafka, "client.foreign", 1) as topic:
        producer = kafka.producer(addresses.kafka)
        await producer.start()
        for body in (value((0, 0)), b"no prediction", None, value((0, 1))):
            await producer.send_and_wait(topic, body, key=b"", partition=0)
        await producer.stop()
        async with Predictions(addresses.kafka, topic) as predictions:
            assert places_of(await take(predictions, 2)) == [(0, 0), (0, 1)]
            assert (predictions.foreign, predictions.positions) == (2, {0: [4, 1]})


async def test_what_cannot_be_read_is_told(addresses: Addresses) -> None:
    with pytest.raises(kafka.TopicsWrong, match=r"no topic client\.none"):
        await Predictions(addresses.kafka, "client.none").__aenter__()
    with pytest.raises(kafka.BrokerUnreachable):
        await asyncio.to_thread(Predictions("127.0.0.1:1", "client.none").__enter__)
    async with made(addresses.kafka, "client.gone", 1) as topic:
        with pytest.raises(PositionGone, match=r"offset 7 of partition 0, which holds 0 to 0"):
            await Predictions(addresses.kafka, topic, positions={0: [7, 3]}).__aenter__()
