"""A worker goes on where another stopped: beside it on the same machine, or on another one."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from app import kafka, replay, session, verify
from app.cli import main
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import Pipeline, find

pytestmark = pytest.mark.integration


@asynccontextmanager
async def worker(settings: Settings, pipeline: Pipeline, number: int) -> AsyncIterator[session.Process]:
    """One worker of an instance; killed at the end, however it stands."""
    process = session.Process(settings, pipeline, "worker", number)
    process.start()
    try:
        await process.ready()
        yield process
    finally:
        process.stop(signal.SIGKILL)


def signalled(process: session.Process, number: signal.Signals) -> None:
    assert process._process is not None
    os.kill(process._process.pid, number)


async def predicted(pipeline: Pipeline, address: str, count: int, check: session.Process) -> None:
    """Wait until the topic has so many predictions, or none comes any more for a minute."""
    last, since = -1, 0
    while since < 300:
        check.check()
        found = [r.offset async for r in kafka.read_between(address, pipeline.predictions)]
        if len(found) >= count:
            return
        since = since + 1 if len(found) == last else 0
        last = len(found)
        await asyncio.sleep(0.2)
    raise AssertionError(f"{last} of {count} predictions, and no more come")


@pytest.fixture
def checkpointing(trained: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """A checkpoint every second, to a folder that outlives data roots."""
    monkeypatch.setenv("HEADRACE_CHECKPOINTS", f"file://{tmp_path / 'copies'}")
    monkeypatch.setenv("HEADRACE_CHECKPOINT_EVERY_S", "1")
    yield Settings()


@pytest.mark.timeout(240)
async def test_a_stopped_worker_does_not_hold_its_successor_up(
    trained: Settings, addresses: Addresses, flights: Path
) -> None:
    pipeline = find("flight-delays", trained.pipelines, "flights-stopped")
    await session.fresh(trained, pipeline, addresses)
    tape = replay.tape(flights, pipeline, "2013-03-01", "2013-03-12")
    async with worker(trained, pipeline, 1) as first:
        publishing = asyncio.create_task(replay.publish(tape, pipeline, addresses.kafka, 800))
        await predicted(pipeline, addresses.kafka, tape.events // 4, first)
        signalled(first, signal.SIGSTOP)
        async with worker(trained, pipeline, 2) as second:
            await publishing
            await predicted(pipeline, addresses.kafka, tape.events, second)
            metrics = await second.metrics()
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.differing) == (0, 0)
    assert verdict.features_equal
    # It went on from the stores of the stopped one, not from the log's beginning.
    folded = metrics["headrace_records_total{origin,folded}"] + metrics["headrace_records_total{origin,late}"]
    assert 0 < folded < tape.events
    homes = list(
        (trained.data_root / "profiles" / pipeline.instance / pipeline.definition / "origin").glob("*/*")
    )
    assert len(homes) == 2 * 4, "the stopped one lived, so its directories stayed"


@pytest.mark.timeout(240)
async def test_another_machine_goes_on_from_the_checkpoints(
    checkpointing: Settings,
    addresses: Addresses,
    flights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = find("flight-delays", checkpointing.pipelines, "flights-moved")
    await session.fresh(checkpointing, pipeline, addresses)
    tape = replay.tape(flights, pipeline, "2013-03-01", "2013-03-12")
    async with worker(checkpointing, pipeline, 1) as first:
        publishing = asyncio.create_task(replay.publish(tape, pipeline, addresses.kafka, 800))
        await predicted(pipeline, addresses.kafka, tape.events // 4, first)
        await checkpointed(first, 4 + 3 + 3 + 3)  # New York has three airports, so one partition stays empty

    monkeypatch.setenv("HEADRACE_DATA_ROOT", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HEADRACE_KAFKA", addresses.kafka)
    monkeypatch.setenv("HEADRACE_REDIS_URL", addresses.redis_url or "")
    moved = Settings()
    async with worker(moved, pipeline, 2) as second:
        await publishing
        await predicted(pipeline, addresses.kafka, tape.events, second)
        metrics = await second.metrics()
        log = second.log.read_text()
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    assert verdict.features_equal
    assert log.count("restored from the checkpoint at offset") >= 4 + 3 + 3 + 3
    folded = metrics["headrace_records_total{origin,folded}"] + metrics["headrace_records_total{origin,late}"]
    assert 0 < folded < tape.events
    commands(pipeline, tmp_path, monkeypatch)
    await session.fresh(moved, pipeline, addresses)
    assert not (tmp_path / "copies" / pipeline.instance).exists()


async def checkpointed(process: session.Process, count: int) -> None:
    """Wait until it has a checkpoint of so many partitions."""
    for _ in range(300):
        metrics = await process.metrics()
        if sum(v > 0 for k, v in metrics.items() if k.startswith("headrace_checkpoint_position{")) >= count:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"not {count} checkpoints: {metrics}")


def commands(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person does with the checkpoints of that run."""
    monkeypatch.setenv("HEADRACE_DATA_ROOT", str(tmp_path / "third"))
    named = ["--pipeline", pipeline.name, "--as", pipeline.instance]
    run = CliRunner().invoke

    found = json.loads(run(main, ["checkpoints", "list", *named, "--json"]).stdout)
    assert {c["entity"] for c in found} == {e.name for e in pipeline.entities}
    good = run(main, ["checkpoints", "verify", *named])
    assert good.exit_code == 0
    assert " 0 damaged" in good.stdout
    restored = json.loads(run(main, ["checkpoints", "restore", *named, "--json"]).stdout)
    assert [r["position"] for r in restored] == [
        max(c["position"] for c in found if (c["entity"], c["partition"]) == (r["entity"], r["partition"]))
        for r in restored
    ]
    assert all(r["restored"] > 0 for r in restored)
    again = run(main, ["checkpoints", "restore", *named, "--partition", "1"])
    assert again.stdout.count("the store here is as new") == len(pipeline.entities)
    assert run(main, ["checkpoints", "restore", *named, "--partition", "9"]).exit_code == 1

    damaged = next((tmp_path / "copies").glob("*/*/*/*/files/*.sst.*"))
    damaged.write_bytes(b"x")
    bad = run(main, ["checkpoints", "verify", *named])
    assert bad.exit_code == 1
    assert damaged.name in bad.stderr
    assert " 1 damaged" in bad.stdout
