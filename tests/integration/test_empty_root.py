"""A worker with an empty data root and no checkpoint ends in the profiles of one that never stopped, bit for bit."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from app import replay, session, verify
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import Pipeline, find
from tables import homes


def profiles(data_root: Path, pipeline: Pipeline, partitions: int) -> dict[tuple[str, int], Any]:
    """All that is stored, by entity and partition: progress, and the packed profiles by key."""
    found: dict[tuple[str, int], Any] = {}
    for entity in pipeline.entities:
        for partition in range(partitions):
            folder = homes.folder_of(data_root, pipeline, entity.name, partition)
            store = homes.open_store(folder, pipeline.definition)
            keys = store.keys(b"", 10**6)
            found[entity.name, partition] = (store.progress, {key: store.get(key) for key in keys})
            store.close()
    return found


@pytest.mark.timeout(240)
async def test_an_empty_data_root_ends_in_the_same_profiles(
    trained: Settings, addresses: Addresses, cards: Path, tmp_path: Path
) -> None:
    settings = trained.model_copy(update={"checkpoints": "off"})
    pipeline = find("card-fraud", settings.pipelines, "cards-empty-root")
    await session.fresh(settings, pipeline, addresses)
    tape = replay.tape(cards, pipeline, "2018-04-10", "2018-04-14")
    never_stopped = session.Process(settings, pipeline, "worker")
    other = settings.model_copy(update={"data_root": tmp_path / "empty"})
    from_nothing = session.Process(
        other,
        pipeline,
        "worker",
        HEADRACE_KAFKA=addresses.kafka,
        HEADRACE_REDIS_URL=addresses.redis_url or "",
    )
    try:
        never_stopped.start()
        await never_stopped.ready()
        await replay.publish(tape, pipeline, addresses.kafka, 4000)
        await _folded(never_stopped, len(tape.rows))
        assert never_stopped.stop() == 0
        from_nothing.start()
        await from_nothing.ready()
        # the log as the first worker left it, and what this one's first stage sends into it again
        await _folded(from_nothing, len(tape.rows) + tape.events)
        assert from_nothing.stop() == 0
    finally:
        never_stopped.stop()
        from_nothing.stop()
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    first, second = (profiles(s.data_root, pipeline, settings.partitions) for s in (settings, other))
    assert sum(len(found) for _, found in first.values()) > 3000
    for place, (progress, stored) in first.items():
        again, found = second[place]
        assert found == stored, place
        assert (again.seen, again.sent, again.clock) == (progress.seen, progress.sent, progress.clock)


async def _folded(worker: session.Process, records: int) -> None:
    """Wait until the last stage has met so many records."""
    async with asyncio.timeout(90):
        while True:
            metrics = await worker.metrics()
            if (
                sum(v for k, v in metrics.items() if k.startswith("headrace_records_total{terminal,"))
                >= records
            ):
                return
            worker.check()
            await asyncio.sleep(0.2)
