"""The main job through real servers: what a worker serves equals a fold of the same logs, to the bit."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest

from app import kafka, replay, session, verify
from app.local.services import Addresses
from app.settings import Settings
from models import dead_letters
from models.errors import HeadraceError
from models.partitions import partition_of
from models.pipeline import Pipeline, find

pytestmark = pytest.mark.integration


@dataclass
class Run:
    """A fresh instance with one worker."""

    settings: Settings
    pipeline: Pipeline
    addresses: Addresses
    worker: session.Process

    async def publish(self, tape: replay.Tape, rate: float | None = None) -> None:
        await replay.publish(tape, self.pipeline, self.addresses.kafka, rate)

    async def predicted(self, count: int) -> dict[str, float]:
        """Wait until the worker has made so many predictions; its metrics then."""
        stalled, last = 0, -1.0
        while True:
            self.worker.check()
            metrics = await self.worker.metrics()
            done = metrics["headrace_predictions_total"]
            if done >= count:
                return metrics
            stalled = stalled + 1 if done == last else 0
            assert stalled < 200, f"{done:.0f} of {count} predictions, and no more come"
            last = done
            await asyncio.sleep(0.1)


@asynccontextmanager
async def running(settings: Settings, addresses: Addresses, name: str, instance: str) -> AsyncIterator[Run]:
    pipeline = find(name, settings.pipelines, instance)
    await session.fresh(settings, pipeline, addresses)
    worker = session.Process(settings, pipeline, "worker")
    try:
        worker.start()
        await worker.ready()
        yield Run(settings, pipeline, addresses, worker)
    finally:
        worker.stop()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "start", "end", "rate"),
    [("flight-delays", "2013-04-01", "2013-07-22", 8000), ("card-fraud", "2018-04-05", "2018-04-24", 6000)],
)
async def test_features_equal_a_fold_of_the_logs(
    trained: Settings,
    addresses: Addresses,
    flights: Path,
    cards: Path,
    name: str,
    start: str,
    end: str,
    rate: float,
) -> None:
    file = flights if name == "flight-delays" else cards
    async with running(trained, addresses, name, f"{name}-equal") as run:
        tape = replay.tape(file, run.pipeline, start, end)
        assert tape.events >= 100_000
        await run.publish(tape, rate)
        await run.predicted(tape.events)
    verdict, expected = await verify.check(run.pipeline, addresses.kafka)
    skew = verify.order_skew(run.pipeline, tape.history, expected)
    print(f"\n{name}: {verdict}, order skew {skew} of {verdict.cells} cells")
    assert verdict.events == verdict.predictions == tape.events
    assert (verdict.lost, verdict.doubled, verdict.differing, verdict.rejected) == (0, 0, 0, 0)
    assert verdict.cells == tape.events * len(run.pipeline.vector)
    if name == "card-fraud":  # its second stage looks back past seven days, so arrival order cannot show
        assert skew == 0


@pytest.mark.timeout(120)
async def test_a_planted_difference_is_found(trained: Settings, addresses: Addresses, flights: Path) -> None:
    """The check of the test above can fail: one prediction more, with one feature one bit off."""
    async with running(trained, addresses, "flight-delays", "flights-planted") as run:
        tape = replay.tape(flights, run.pipeline, "2013-01-01", "2013-01-04")
        await run.publish(tape)
        await run.predicted(tape.events)
    records = [r async for r in kafka.read_between(addresses.kafka, run.pipeline.predictions)]
    planted = msgspec.json.decode(records[100].value)
    planted["features"]["ORIGIN_NB_1H"] = float(np.nextafter(planted["features"]["ORIGIN_NB_1H"], 1e9))
    producer = kafka.producer(addresses.kafka)
    await producer.start()
    await producer.send_and_wait(run.pipeline.predictions, msgspec.json.encode(planted))
    await producer.stop()
    verdict, _ = await verify.check(run.pipeline, addresses.kafka)
    assert (verdict.doubled, verdict.differing, verdict.features_equal) == (1, 1, False)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "delivery"),
    [(signal.SIGKILL, "fenced"), (signal.SIGTERM, "fenced"), (signal.SIGKILL, "transactional")],
)
async def test_a_worker_goes_on_from_its_store(
    trained: Settings, addresses: Addresses, cards: Path, number: signal.Signals, delivery: str
) -> None:
    instance = f"cards-{number.name.lower()}-{delivery}"
    settings = trained.model_copy(update={"delivery": delivery})
    async with running(settings, addresses, "card-fraud", instance) as run:
        tape = replay.tape(cards, run.pipeline, "2018-04-10", "2018-04-16")
        publishing = asyncio.create_task(run.publish(tape, 4000))
        await run.predicted(tape.events // 2)
        code = run.worker.stop(number)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        run.worker.start()
        await run.worker.ready()
        await publishing
        verdict = await _all_predicted(run, tape.events)
        metrics = await run.worker.metrics()
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    # It did not begin at the log's beginning again: it folded less than all.
    folded = sum(v for k, v in metrics.items() if k.startswith("headrace_records_total{customer,"))
    assert 0 < folded < tape.events


@pytest.mark.timeout(180)
async def test_workers_come_and_go(trained: Settings, addresses: Addresses, flights: Path) -> None:
    """A second worker joins under load and takes partitions, then leaves, and they come back."""
    async with running(trained, addresses, "flight-delays", "flights-two") as run:
        tape = replay.tape(flights, run.pipeline, "2013-02-01", "2013-03-20")
        second = session.Process(trained, run.pipeline, "worker", 2)
        publishing = asyncio.create_task(run.publish(tape, 1500))
        await run.predicted(5000)
        try:
            second.start()
            await second.ready()
            await _reached(second, 2000)
        finally:
            assert second.stop() == 0
        await publishing
        verdict = await _all_predicted(run, tape.events)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)


async def _reached(worker: session.Process, count: int) -> None:
    """Wait until a worker has made so many predictions itself."""
    async with asyncio.timeout(60):
        while (await worker.metrics())["headrace_predictions_total"] < count:
            worker.check()
            await asyncio.sleep(0.1)


async def _all_predicted(run: Run, events: int) -> verify.Verdict:
    """Wait until the topic has so many predictions, or nothing comes any more."""
    last, since = -1, 0
    while since < 50:
        counts = [r.offset async for r in kafka.read_between(run.addresses.kafka, run.pipeline.predictions)]
        if len(counts) >= events:
            break
        since = since + 1 if len(counts) == last else 0
        last = len(counts)
        await asyncio.sleep(0.2)
    return (await verify.check(run.pipeline, run.addresses.kafka))[0]


@pytest.mark.timeout(120)
async def test_bad_input_goes_to_the_dead_letters_and_the_stream_goes_on(
    trained: Settings, addresses: Addresses
) -> None:
    good: dict[str, Any] = {
        "TRANSACTION_ID": 1, "TX_DATETIME": 1_530_000_000_000, "CUSTOMER_ID": 7, "TERMINAL_ID": 9, "TX_AMOUNT": 12.5,
    }  # fmt: skip
    bad: list[tuple[bytes, bytes, str]] = [
        (b"7", b"not json", "malformed"),
        (b"7", msgspec.json.encode({k: v for k, v in good.items() if k != "TX_AMOUNT"}), "TX_AMOUNT"),
        (b"7", msgspec.json.encode(good | {"TX_AMOUNT": "12.5"}), "TX_AMOUNT"),
        (b"7", msgspec.json.encode(good | {"TX_AMOUNT": 12.505}), "more decimals"),
        (b"7", msgspec.json.encode(good | {"TX_DATETIME": 32_503_680_000_000}), "1970 and 2100"),
        (b"7", b"\xff\xfe", "malformed"),
        (b"7", msgspec.json.encode(good | {"NOTE": "x" * 600_000}), "more than 524,288 bytes"),
        (b"7", b'"' * 800_000, "got `str`"),
        (_elsewhere(b"7"), msgspec.json.encode(good | {"TRANSACTION_ID": 3}), "belongs in partition"),
    ]
    async with running(trained, addresses, "card-fraud", "cards-bad") as run:
        producer = kafka.producer(addresses.kafka)
        await producer.start()
        stream = run.pipeline.stream.topic
        for key, value, _ in bad:
            await producer.send_and_wait(stream, value, key=key)
        label_topic = run.pipeline.labels.topic if run.pipeline.labels else ""
        await producer.send_and_wait(label_topic, b"{}", key=b"1")
        await producer.send_and_wait(stream, msgspec.json.encode(good), key=b"7")
        await producer.send_and_wait(stream, msgspec.json.encode(good), key=b"7")  # once more: a duplicate
        await producer.send_and_wait(stream, msgspec.json.encode(good | {"TRANSACTION_ID": 2}), key=b"7")
        await producer.stop()
        metrics = await run.predicted(2)
        letters = await _letters(run, len(bad) + 1)
        assert metrics["headrace_dead_letters_total"] == len(letters)
        assert metrics["headrace_records_total{customer,duplicate}"] == 1
        async with aiohttp.ClientSession() as http:
            values = await _features(http, f"{run.worker.url}/v1/features/customer/7?at=newest", 2)
    assert {x.topic for x in letters} == {stream, label_topic}
    found = {(dead_letters.original(x).value, x.size, x.error) for x in letters}
    for _, value, reason in bad:
        kept = value[: dead_letters.LARGEST]
        assert any(x == kept and size == len(value) and reason in why for x, size, why in found), (
            reason,
            found,
        )
    assert values["CUSTOMER_ID_AVG_AMOUNT_1DAY_WINDOW"] == 12.5


def _elsewhere(key: bytes) -> bytes:
    """A key of another partition, of the four that the world's topics have."""
    keys = (str(i).encode() for i in range(100))
    return next(k for k in keys if partition_of(k, 4) != partition_of(key, 4))


async def _letters(run: Run, count: int) -> list[dead_letters.DeadLetter]:
    for _ in range(100):
        topic = run.pipeline.dead_letters
        letters = [dead_letters.decode(r.value) async for r in kafka.read_between(run.addresses.kafka, topic)]
        if len(letters) >= count:
            return letters
        await asyncio.sleep(0.1)
    raise AssertionError(f"{len(letters)} dead letters, not {count}")


async def _features(http: aiohttp.ClientSession, url: str, count: float) -> dict[str, float]:
    """An entity's features, once the mirror counts so many events."""
    for _ in range(100):
        async with http.get(url) as response:
            body = await response.json()
        if response.status == 200 and body["features"]["CUSTOMER_ID_NB_TX_1DAY_WINDOW"] == count:
            return dict(body["features"])
        await asyncio.sleep(0.05)
    raise AssertionError(body)


@pytest.mark.timeout(120)
async def test_a_run_does_not_clear_an_instance_that_is_at_work(
    trained: Settings, addresses: Addresses
) -> None:
    async with running(trained, addresses, "card-fraud", "cards-busy") as run:
        with pytest.raises(HeadraceError, match="Workers of cards-busy run already"):
            await session.fresh(trained, run.pipeline, addresses)
        assert await kafka.partitions_of(addresses.kafka, [run.pipeline.predictions]) == {
            run.pipeline.predictions: 4
        }
