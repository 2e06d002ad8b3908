"""A worker that begins with nothing ends where one is that never stopped, bit for bit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from app import kafka, replay, session, verify
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import Pipeline, find
from tables import homes
from tables.store import _PROFILE, StoreError

pytestmark = pytest.mark.integration

Packed = dict[tuple[str, int], dict[bytes, bytes]]  # by entity and partition, then by key


@asynccontextmanager
async def worker(
    settings: Settings, pipeline: Pipeline, addresses: Addresses, number: int, root: Path
) -> AsyncIterator[session.Process]:
    """A worker with this data root and no checkpoints. It is stopped in good order."""
    process = session.Process(
        settings, pipeline, "worker", number, HEADRACE_DATA_ROOT=str(root), HEADRACE_CHECKPOINTS="off",
        HEADRACE_KAFKA=addresses.kafka, HEADRACE_REDIS_URL=addresses.redis_url or "",
    )  # fmt: skip
    process.start()
    try:
        await process.ready()
        yield process
    finally:
        process.stop()


async def ends(address: str, topic: str) -> dict[int, int]:
    found: dict[int, int] = {}
    async for record in kafka.read_between(address, topic):
        found[record.partition] = record.offset + 1
    return found


async def stored_to_the_end(pipeline: Pipeline, address: str, root: Path, process: session.Process) -> None:
    """Wait until all logs are folded and stored, one stage behind the other."""
    for entity in pipeline.entities:
        for _ in range(600):
            process.check()
            wanted = await ends(address, entity.log)
            reached = {p: position(homes.folder_of(root, pipeline, entity.name, p), pipeline) for p in wanted}
            if reached == wanted:
                break
            await asyncio.sleep(0.2)
        else:
            raise AssertionError(f"{entity.log} ends at {wanted}, and the stores are at {reached}")


def position(folder: Path, pipeline: Pipeline) -> int | None:
    try:
        return homes.newest_position(folder, pipeline.definition)
    except (OSError, StoreError):  # its owner compacts it
        return None


def profiles(pipeline: Pipeline, root: Path, partitions: int) -> Packed:
    """All that the stores under a data root hold. No worker runs on it."""
    found: Packed = {}
    for entity in pipeline.entities:
        for p in range(partitions):
            store = homes.open_store(homes.folder_of(root, pipeline, entity.name, p), pipeline.definition)
            found[entity.name, p] = {
                key[len(_PROFILE) :]: packed for key, packed in store._db.items() if key.startswith(_PROFILE)
            }
            store.close()
    return found


@pytest.mark.timeout(240)
async def test_a_worker_that_begins_with_nothing_ends_in_the_same_profiles(
    trained: Settings, addresses: Addresses, cards: Path, tmp_path: Path
) -> None:
    pipeline = find("card-fraud", trained.pipelines, "cards-empty")
    await session.fresh(trained, pipeline, addresses)
    tape = replay.tape(cards, pipeline, "2018-04-10", "2018-04-14")
    first, second = tmp_path / "first", tmp_path / "second"
    async with worker(trained, pipeline, addresses, 1, first) as process:
        await replay.publish(tape, pipeline, addresses.kafka, 4000)
        await stored_to_the_end(pipeline, addresses.kafka, first, process)
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    assert verdict.predictions == tape.events

    async with worker(trained, pipeline, addresses, 2, second) as process:
        await stored_to_the_end(pipeline, addresses.kafka, second, process)
        metrics = await process.metrics()
    assert metrics["headrace_records_total{terminal,seen}"] >= tape.events, "else it folded nothing again"
    again, _ = await verify.check(pipeline, addresses.kafka)
    assert again == verdict
    expected = profiles(pipeline, first, trained.partitions)
    assert sum(map(len, expected.values())) > 1000
    assert profiles(pipeline, second, trained.partitions) == expected
