"""What fails around a worker: a disk that takes no more, a clock that jumps, a log that retention has cut."""

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from app import kafka, replay, session, verify
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import Pipeline, find
from models.predictions import Prediction, decode

pytestmark = pytest.mark.timeout(240)

# A worker whose files may not grow: the disk is as good as full.
FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from app.cli import main
sys.argv[0] = "headrace"
main()
"""

# A worker whose clock goes back and forth by hours.
JUMPING = """
import itertools, sys, time
from app import worker
from app.cli import main

class Clock:
    jumps = itertools.cycle([0, -7200, 3600, -86400 * 3, 30])
    def time_ns(self):
        return time.time_ns() + next(self.jumps) * 1_000_000_000
    def __getattr__(self, name):
        return getattr(time, name)

worker.time = Clock()
sys.argv[0] = "headrace"
main()
"""

# A worker whose client of Kafka never comes to leave its group.
CLINGING = """
import asyncio, sys
from aiokafka.consumer.group_coordinator import GroupCoordinator
from app.cli import main

async def close(self):
    await asyncio.Event().wait()

GroupCoordinator.close = close
sys.argv[0] = "headrace"
main()
"""


def changed(process: session.Process, code: str) -> session.Process:
    """The same command, with this before it."""
    process._arguments[:3] = [sys.executable, "-c", code]
    return process


async def predicted(
    pipeline: Pipeline, address: str, count: int, worker: session.Process
) -> list[Prediction]:
    """Wait until there are so many predictions."""
    async with asyncio.timeout(90):
        while True:
            found = [decode(r.value) async for r in kafka.read_between(address, pipeline.predictions)]
            if len(found) >= count:
                return found
            worker.check()
            await asyncio.sleep(0.5)


async def test_a_full_disk_stops_the_worker_before_damage(
    trained: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline = find("card-fraud", trained.pipelines, "cards-full-disk")
    await session.fresh(trained, pipeline, addresses)
    tape = replay.tape(cards, pipeline, "2018-04-10", "2018-04-16")
    worker = changed(session.Process(trained, pipeline, "worker"), FULL)
    try:
        worker.start()
        await worker.ready()
        await replay.publish(tape, pipeline, addresses.kafka, 4000)
        async with asyncio.timeout(60):
            while worker.exit_code is None:  # noqa: ASYNC110 - a process tells nobody
                await asyncio.sleep(0.1)
        assert worker.exit_code == 1
        assert "see whether its disk is full" in worker.log.read_text()
        assert "Traceback" not in worker.log.read_text()
        worker = session.Process(trained, pipeline, "worker", 2)
        worker.start()
        await predicted(pipeline, addresses.kafka, tape.events, worker)
    finally:
        worker.stop()
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)


async def test_a_client_that_clings_to_its_group_keeps_no_worker_from_a_good_end(
    trained: Settings, addresses: Addresses
) -> None:
    """All is flushed and let go by then."""
    pipeline = find("card-fraud", trained.pipelines, "cards-clinging")
    await session.fresh(trained, pipeline, addresses)
    worker = changed(session.Process(trained, pipeline, "worker"), CLINGING)
    worker.start()
    await worker.ready()
    assert worker.stop() == 0


async def test_a_clock_that_jumps_changes_nothing(
    trained: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline = find("card-fraud", trained.pipelines, "cards-jumping-clock")
    await session.fresh(trained, pipeline, addresses)
    tape = replay.tape(cards, pipeline, "2018-04-10", "2018-04-12")
    worker = changed(session.Process(trained, pipeline, "worker"), JUMPING)
    try:
        worker.start()
        await worker.ready()
        await replay.publish(tape, pipeline, addresses.kafka, 2000)
        await predicted(pipeline, addresses.kafka, tape.events, worker)
    finally:
        worker.stop()
    stamps = [r.timestamp async for r in kafka.read_between(addresses.kafka, pipeline.predictions)]
    assert max(stamps) - min(stamps) > 2 * kafka.DAY_MS, "the clock did jump"
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)


async def test_what_retention_has_cut_is_told_and_marked(
    trained: Settings, addresses: Addresses, flights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CHECKPOINTS", "off")
    settings = Settings()
    pipeline = find("flight-delays", settings.pipelines, "flights-cut")
    await session.fresh(settings, pipeline, addresses)
    before = replay.tape(flights, pipeline, "2013-03-01", "2013-03-02")
    after = replay.tape(flights, pipeline, "2013-03-02", "2013-03-03")
    worker = session.Process(settings, pipeline, "worker")
    try:
        worker.start()
        await worker.ready()
        await replay.publish(before, pipeline, addresses.kafka, 2000)
        first = await predicted(pipeline, addresses.kafka, before.events, worker)
        assert worker.stop() == 0
        assert not any(p.degraded for p in first)
        old = await _counts(pipeline, addresses.kafka)
        await replay.publish(after, pipeline, addresses.kafka, None)
        cut = await _cut(pipeline, addresses.kafka, old)
        assert cut > 0
        worker.start()
        found = await predicted(pipeline, addresses.kafka, before.events + after.events - cut, worker)
    finally:
        worker.stop()
    known = {p.id for p in first}
    rest = [p for p in found if p.id not in known]
    assert len(rest) == len(found) - len(first) == after.events - cut
    assert all(p.degraded for p in rest), "of seven days, one and a half are known"
    said = worker.log.read_text()
    assert "retention has cut the log behind every store and checkpoint" in said
    assert "has lost what happened from 2013-03-0" in said


async def _counts(pipeline: Pipeline, address: str) -> Counter[int]:
    return Counter([r.partition async for r in kafka.read_between(address, pipeline.stream.topic)])


async def _cut(pipeline: Pipeline, address: str, old: Counter[int]) -> int:
    """Cut the stream's log as retention would, halfway into what no worker has seen. How many are gone so."""
    topic, gone = pipeline.stream.topic, 0
    async with kafka.admin(address) as admin:
        for partition, count in (await _counts(pipeline, address)).items():
            unseen = (count - old[partition]) // 2
            gone += unseen
            keep = RecordsToDelete(old[partition] + unseen)
            await admin.delete_records({TopicPartition(topic, partition): keep})
    return gone
