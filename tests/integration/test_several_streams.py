"""Several streams into one entity, on real servers: nothing lost, doubled or different, whoever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import doctor, history, kafka, lifecycle, replay, session, trial, verify
from app.datasets.network import write_network
from app.explain import explained
from app.local.services import Addresses
from app.model_life import ModelLife
from app.settings import Settings
from models.model_files import ModelFile
from models.pipeline import Pipeline, find, load
from models.predictions import decode
from tables.model_folder import ModelFolder
from tests.integration.test_stream import Run, running

pytestmark = pytest.mark.integration

BANK = """
name: bank
streams:
  payments:
    id: ID
    time: AT
    fields: {ID: int, AT: timestamp, ACCOUNT: int, PAYEE: int, AMOUNT: {type: decimal, scale: 2}}
  logins:
    id: LOGIN
    time: WHEN
    scored: true
    fields: {LOGIN: string, WHEN: timestamp, ACCOUNT: int, DEVICE: string}
labels: {field: FRAUD, known: KNOWN}
reversals: {known: CANCELLED}
entities:
  account:
    key: ACCOUNT
    features:
      LOGINS: {from: logins, aggregate: count, window: 6h}
      DEVICES: {from: logins, aggregate: distinct, of: DEVICE, window: 2d}
      SPENT: {from: payments, aggregate: sum, of: AMOUNT, window: 1d}
      SINCE: {aggregate: since_last, window: 1d}
      RISK: {aggregate: share, of: FRAUD, window: 2d, delay: 1h}
  pair:
    key: [ACCOUNT, PAYEE]
    features:
      TIMES: {aggregate: count, window: lifetime}
vector: [AMOUNT, stream, LOGINS, DEVICES, SPENT, SINCE, RISK, TIMES]
model: {decisions: {ask: 0.1}}
"""
PAYMENTS, LOGINS = 6000, 4000


def write_bank(folder: Path) -> None:
    """Ids of the two streams that are the same, as numbers and as texts."""
    rng, day = np.random.default_rng(5), 86_400_000
    begin = 1_700_000_000_000
    at, when = (np.sort(begin + rng.integers(0, 10 * day, n)) for n in (PAYMENTS, LOGINS))
    utc = pa.timestamp("ms", tz="UTC")
    amounts = rng.integers(1, 50_000, PAYMENTS)
    folder.mkdir()
    payments = {
        "ID": np.arange(PAYMENTS), "AT": pa.array(at, utc), "ACCOUNT": rng.integers(0, 60, PAYMENTS),
        "PAYEE": rng.integers(0, 5, PAYMENTS), "AMOUNT": amounts / 100,
        "FRAUD": (amounts > 45_000).astype(np.int8), "KNOWN": pa.array(at + day // 48, utc),
    }  # fmt: skip
    logins = {
        "LOGIN": [str(i) for i in range(LOGINS)], "WHEN": pa.array(when, utc),
        "ACCOUNT": rng.integers(0, 60, LOGINS), "DEVICE": [f"d{i}" for i in rng.integers(0, 9, LOGINS)],
    }  # fmt: skip
    pq.write_table(pa.table(payments), folder / "payments.parquet")
    pq.write_table(pa.table(logins), folder / "logins.parquet")


@pytest.fixture(scope="module")
def bank(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline's file and its events in `data`; the model is where workers find it."""
    folder = tmp_path_factory.mktemp("bank")
    (folder / "bank.yaml").write_text(BANK)
    write_bank(folder / "data")
    pipeline = load(folder / "bank.yaml")
    history.compute(folder / "data", folder / "features.parquet", pipeline)
    small = ModelFile(parameters={"max_iter": 10}, test_days=2)
    lifecycle.train(_life(world, pipeline), folder / "features.parquet", lambda step: None, model=small)
    return folder


@contextlib.asynccontextmanager
async def at_work(world: Settings, addresses: Addresses, bank: Path, instance: str) -> AsyncIterator[Run]:
    pipeline = load(bank / "bank.yaml", instance)
    await session.fresh(world, pipeline, addresses)
    worker = session.Process(world.model_copy(update={"pipelines": bank}), pipeline, "worker")
    try:
        worker.start()
        await worker.ready()
        yield Run(world, pipeline, addresses, worker)
    finally:
        worker.stop()


@pytest.mark.timeout(180)
async def test_two_streams_are_scored_through_a_kill(
    world: Settings, addresses: Addresses, bank: Path
) -> None:
    async with at_work(world, addresses, bank, "bank-two") as run:
        pipeline, worker = run.pipeline, run.worker
        tape = replay.tape(bank / "data", pipeline)
        assert tape.scored(pipeline) == tape.events == PAYMENTS + LOGINS
        publishing = asyncio.create_task(run.publish(tape, 2500))
        await run.predicted(2000)
        assert worker.stop(signal.SIGKILL) == -signal.SIGKILL
        worker.start()
        await worker.ready()
        await publishing
        async with asyncio.timeout(60):
            while (verdict := (await verify.check(pipeline, addresses.kafka))[0]).predictions < tape.events:
                worker.check()
                await asyncio.sleep(0.2)
        verdict, _ = await verify.check(pipeline, addresses.kafka)  # the last one may have read half a log
    assert (verdict.events, verdict.predictions, verdict.rejected) == (tape.events, tape.events, 0)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    predictions = [decode(r.value) async for r in kafka.read_between(addresses.kafka, pipeline.predictions)]
    assert Counter(p.stream for p in predictions) == {"payments": PAYMENTS, "logins": LOGINS}
    assert {p.id for p in predictions if p.stream == "payments"} == set(range(PAYMENTS))
    assert {p.id for p in predictions if p.stream == "logins"} == {str(i) for i in range(LOGINS)}


@pytest.mark.timeout(180)
async def test_a_reversed_payment_counts_no_more(world: Settings, addresses: Addresses, bank: Path) -> None:
    async with at_work(world, addresses, bank, "bank-reversed") as run:
        pipeline = run.pipeline
        producer = kafka.producer(addresses.kafka)
        await producer.start()
        for id, amount in enumerate([100.0, 20.0, 3.0]):
            payment = {"ID": id, "AT": 1_700_000_000_000 + id, "ACCOUNT": 1, "PAYEE": 2, "AMOUNT": amount}
            await producer.send_and_wait(pipeline.stream.topic, json.dumps(payment).encode())
            await run.predicted(id + 1)
            if id == 1:
                first = {
                    "ID": 0,
                    "AT": 1_700_000_000_000,
                    "ACCOUNT": 1,
                    "PAYEE": 2,
                    "CANCELLED": 1_700_000_000_002,
                }
                assert pipeline.reversals is not None
                await producer.send_and_wait(pipeline.reversals.topic, json.dumps(first).encode())
                async with asyncio.timeout(30):
                    while await reversed_in(run) < 2:  # noqa: ASYNC110 - nobody tells
                        await asyncio.sleep(0.1)
        await producer.stop()
        verdict, _ = await verify.check(pipeline, addresses.kafka)
        found = [decode(r.value) async for r in kafka.read_between(addresses.kafka, pipeline.predictions)]
        pair = await explained(pipeline, addresses.kafka, "pair", "1|2", ("TIMES",))
        rows = {row.verdict for row in await doctor.examine(world, pipeline)}
        tried = await trial.try_topic(addresses.kafka, pipeline)
    assert (verdict.events, verdict.lost, verdict.doubled, verdict.differing) == (3, 0, 0, 0)
    (times,) = pair.features
    assert [event.id for event in times.now.events] == [1, 2] and times.now.value == 2
    assert pair.prediction is not None and pair.prediction.differing == []
    assert "wrong" not in rows
    assert [(t.source, t.records, sum(t.refused.values())) for t in tried.trials] == [
        ("topic bank-reversed.payments", 3, 0), ("topic bank-reversed.logins", 0, 0),
        ("topic bank-reversed.labels", 0, 0), ("topic bank-reversed.reversals", 1, 0),
    ]  # fmt: skip
    assert {p.id: (p.features["SPENT"], p.features["TIMES"]) for p in found} == {
        0: (100, 1), 1: (120, 2), 2: (23, 2),
    }  # fmt: skip


async def reversed_in(run: Run) -> float:
    """How many rows were taken out, in all entities."""
    metrics = await run.worker.metrics()
    return sum(v for k, v in metrics.items() if k.startswith("headrace_records_total{") and "reversed" in k)


@pytest.mark.timeout(180)
async def test_what_never_reached_the_first_log_counts_as_lost(
    world: Settings, addresses: Addresses, bank: Path
) -> None:
    pipeline = load(bank / "bank.yaml", "bank-lost")
    await session.fresh(world, pipeline, addresses)
    producer = kafka.producer(addresses.kafka)
    await producer.start()
    login = {"LOGIN": "a", "WHEN": 1_700_000_000_000, "ACCOUNT": 1, "DEVICE": "d"}
    await producer.send_and_wait(pipeline.streams[1].topic, json.dumps(login).encode())
    await producer.stop()
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.events, verdict.lost) == (0, 1)


@pytest.mark.timeout(240)
async def test_flights_arrivals_and_weather_by_two_workers(
    world: Settings, addresses: Addresses, tmp_path: Path
) -> None:
    """The shipped pipeline on its real data; the worker that was first is killed, and the other takes over."""
    pipeline = find("flight-network", world.pipelines)
    write_network(tmp_path / "network")
    features = tmp_path / "features.parquet"
    history.compute(tmp_path / "network", features, pipeline)
    lifecycle.train(_life(world, pipeline), features, lambda step: None)
    async with running(world, addresses, "flight-network", "network-two") as run:
        tape = replay.tape(tmp_path / "network", run.pipeline, "2013-02-01", "2013-02-10")
        second = session.Process(world, run.pipeline, "worker", 2)
        publishing = asyncio.create_task(run.publish(tape, 1500))
        await run.predicted(1000)
        try:
            second.start()
            await second.ready()
            assert run.worker.stop(signal.SIGKILL) == -signal.SIGKILL
            await publishing
            scored = tape.scored(run.pipeline)
            async with asyncio.timeout(90):
                while (
                    verdict := (await verify.check(run.pipeline, addresses.kafka))[0]
                ).predictions < scored:
                    second.check()
                    await asyncio.sleep(0.5)
            verdict, _ = await verify.check(
                run.pipeline, addresses.kafka
            )  # the last one may have read half a log
        finally:
            second.stop()
    assert (verdict.events, verdict.predictions) == (scored, scored)
    assert 0 < scored < tape.events
    assert (verdict.lost, verdict.doubled, verdict.differing, verdict.rejected) == (0, 0, 0, 0)


def _life(world: Settings, pipeline: Pipeline) -> ModelLife:
    return ModelLife(pipeline, ModelFolder(world.models_root))
