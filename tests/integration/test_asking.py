"""Labels that carry the event's id alone, on real servers: they end in the profiles that labels with keys make."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app import dlq, kafka, session, verify
from app.local import services
from app.local.services import Addresses
from app.settings import Settings
from models.partitions import partition_of
from models.pipeline import Pipeline, load
from tables.mirror import Mirror, connect
from tests.conftest import PIPELINES
from tests.fixtures.pipelines import edited
from tests.integration.test_stream import Run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280, func_only=True)]

START, MINUTE, DAY = 1_530_000_000_000, 60_000, 86_400_000
EVENTS, TERMINALS = 1200, 6
NEVER = 10**6  # the id of an event that comes after its label was given up


def event(number: int, minutes: int | None = None) -> dict[str, Any]:
    """Thirty days of payments, one every 36 minutes."""
    return {
        "TRANSACTION_ID": number, "TX_DATETIME": START + (number if minutes is None else minutes) * 36 * MINUTE,
        "CUSTOMER_ID": number % 20, "TERMINAL_ID": number % TERMINALS, "TX_AMOUNT": 10.0 + number % 90,
    }  # fmt: skip


def label(number: int, keys: bool) -> dict[str, Any]:
    of = event(number, 9 if number == NEVER else None)
    said = {
        "TRANSACTION_ID": number,
        "TX_FRAUD": int(number % 7 == 0),
        "LABEL_TS": of["TX_DATETIME"] + DAY,
    }
    return said | ({"TX_DATETIME": of["TX_DATETIME"], "TERMINAL_ID": of["TERMINAL_ID"]} if keys else {})


@contextlib.asynccontextmanager
async def at_work(
    world: Settings, addresses: Addresses, folder: Path, instance: str
) -> AsyncIterator[tuple[Run, session.Process, Any]]:
    """A worker, a process of the ledger, and a producer."""
    settings = world.model_copy(update={"pipelines": folder})
    pipeline = load(folder / "card-fraud.yaml", instance)
    await session.fresh(settings, pipeline, addresses)
    worker = session.Process(settings, pipeline, "worker", HEADRACE_LABEL_WAIT_S="2")
    ledger = session.Process(settings, pipeline, "ledger run")
    producer = kafka.producer(addresses.kafka)
    await producer.start()
    try:
        worker.start()
        ledger.start()
        await worker.ready()
        await ledger.ready()
        yield Run(settings, pipeline, addresses, worker), ledger, producer
    finally:
        await producer.stop()
        worker.stop()
        ledger.stop()


async def publish(run: Run, producer: Any, numbers: range) -> None:
    for number in numbers:
        key = str(number % 20).encode()
        value = json.dumps(event(number)).encode()
        await producer.send(run.pipeline.stream.topic, value, key=key, partition=partition_of(key, 4))
    await producer.flush()


async def tell(run: Run, producer: Any, numbers: range, keys: bool) -> None:
    assert run.pipeline.labels is not None
    for number in numbers:
        value = json.dumps(label(number, keys)).encode()
        await producer.send(run.pipeline.labels.topic, value, partition=number % 4)
    await producer.flush()


async def until(run: Run, name: str, count: float) -> None:
    async with asyncio.timeout(60):
        while (await run.worker.metrics()).get(name, 0) != count:
            run.worker.check()
            await asyncio.sleep(0.1)


def waiting(pipeline: Pipeline) -> str:
    assert pipeline.labels is not None
    return f"headrace_routed_waiting{{{pipeline.labels.topic}}}"


async def passed(run: Run, count: int) -> None:
    """Wait until so many labels were sent on, or given up, and that is committed."""
    assert run.pipeline.labels is not None
    async with asyncio.timeout(60):
        while True:
            run.worker.check()
            offsets = await kafka.committed_of(run.addresses.kafka, kafka.group_of(run.pipeline))
            found = sum(
                offset for (topic, _), offset in offsets.items() if topic == run.pipeline.labels.topic
            )
            assert found <= count
            if found == count:
                return
            await asyncio.sleep(0.3)


async def profiles(run: Run) -> dict[str, Any]:
    """The terminals' features, as the mirror has them once it has all."""
    mirror = Mirror(connect(run.addresses.redis_url), run.pipeline)
    try:
        await asyncio.sleep(1)  # a round of the mirror
        ids = [str(n) for n in range(TERMINALS)]
        terminals = await mirror.read(run.pipeline.entity("terminal"), ids)
        assert None not in terminals
        return {id_: (t.time, t.features) for id_, t in zip(ids, terminals, strict=True) if t is not None}
    finally:
        await mirror.close()


async def test_labels_by_id_make_the_profiles_of_labels_with_keys(
    trained: Settings, addresses: Addresses, postgres_url: str, tmp_path: Path
) -> None:
    """Through a kill of the worker, and PostgreSQL that is away; one label is given up, and replayed."""
    text = (PIPELINES / "card-fraud.yaml").read_text()
    (tmp_path / "asking").mkdir()
    (tmp_path / "asking" / "card-fraud.yaml").write_text(
        edited(text, "  known: LABEL_TS", "  known: LABEL_TS\n  keys: ledger")
    )
    async with at_work(trained, addresses, tmp_path / "asking", "cards-asking") as (run, _, producer):
        pipeline, worker = run.pipeline, run.worker
        await publish(run, producer, range(1000))
        await run.predicted(1000)
        # 1. known ones, through a kill
        await tell(run, producer, range(300), keys=False)
        assert worker.stop(signal.SIGKILL) == -signal.SIGKILL
        worker.start()
        await worker.ready()
        await passed(run, 300)
        # 2. PostgreSQL is away: events go on, labels wait, the worker says so
        services.down(trained, ["postgres"])
        before = await worker.metrics()
        await tell(run, producer, range(300, 600), keys=False)
        await publish(run, producer, range(1000, 1100))
        await until(run, "headrace_predictions_total", before["headrace_predictions_total"] + 100)
        await until(run, waiting(pipeline), 300)
        async with asyncio.timeout(30):
            while await worker.is_ready():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.1)
        services.up(trained, ["postgres"])
        await passed(run, 600)
        await worker.ready()
        # 3. one of which the ledger knows nothing, and one behind it
        await tell(run, producer, range(NEVER, NEVER + 1), keys=False)
        await tell(run, producer, range(600, 800), keys=False)
        await passed(run, 801)
        (letter,) = await dlq.read(pipeline, addresses.kafka, dlq.Wanted())
        assert (letter.letter.reason, json.loads(letter.letter.value)["TRANSACTION_ID"]) == (
            "keys-unknown",
            NEVER,
        )
        late = event(NEVER, 9)
        key = str(NEVER % 20).encode()
        await producer.send_and_wait(
            pipeline.stream.topic, json.dumps(late).encode(), key=key, partition=partition_of(key, 4)
        )
        await publish(run, producer, range(1100, EVENTS))
        async with asyncio.timeout(60):
            while (await verify.check(pipeline, addresses.kafka))[0].predictions < EVENTS + 1:  # noqa: ASYNC110
                await asyncio.sleep(0.3)
        again = ["-m", "app.cli", "dlq", "replay", "-p", "card-fraud", "--as", pipeline.instance]
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, *again, "--reason", "keys-unknown"], capture_output=True, timeout=60,
            check=False, env=os.environ | {"HEADRACE_PIPELINES": str(tmp_path / "asking")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        await passed(run, 802)
        asked = await profiles(run)
        verdict, _ = await verify.check(pipeline, addresses.kafka)
        assert (verdict.events, verdict.lost, verdict.doubled, verdict.differing) == (EVENTS + 1, 0, 0, 0)
    async with at_work(trained, addresses, PIPELINES, "cards-keyed") as (run, ledger, producer):
        assert run.pipeline.definition == pipeline.definition
        await publish(run, producer, range(1000))
        await producer.send_and_wait(
            run.pipeline.stream.topic, json.dumps(late).encode(), key=key, partition=partition_of(key, 4)
        )
        await publish(run, producer, range(1000, EVENTS))
        await run.predicted(EVENTS + 1)
        await tell(run, producer, range(800), keys=True)
        await tell(run, producer, range(NEVER, NEVER + 1), keys=True)
        await passed(run, 801)
        keyed = await profiles(run)
        ledger.check()
    assert asked == keyed
    assert any(features["TERMINAL_ID_RISK_30DAY_WINDOW"] for _, features in keyed.values())
