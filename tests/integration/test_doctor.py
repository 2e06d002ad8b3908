"""`headrace doctor` on real services: a healthy system is all well, and what is broken in it is told by name."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aiokafka.admin import NewTopic

from app import doctor, kafka, replay, session
from app.diagnosis import Row
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import Pipeline
from models.records import RecordCodec
from tables import homes
from tables.mirror import Mirror, connect
from tables.store import Progress, Snapshot
from tests.integration.test_stream import Run, running

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240, func_only=True)]

WITHIN_S = 40


def command(settings: Settings, pipeline: Pipeline) -> tuple[int, dict[str, object]]:
    """`headrace doctor --json`: its exit code and object."""
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "doctor", "-p", pipeline.name, "--as", pipeline.instance, "--json"],
        env=os.environ | session.as_variables(settings), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done.returncode, json.loads(done.stdout)


def told(rows: list[Row], verdict: str = "wrong") -> set[tuple[str, str]]:
    return {(row.check, row.what) for row in rows if row.verdict == verdict}


async def until(look: Callable[[], Awaitable[list[Row]]], good: Callable[[list[Row]], bool]) -> list[Row]:
    """The rows, once they are as they should be."""
    rows: list[Row] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WITHIN_S):
            while not good(rows := await look()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.2)
    return rows


@dataclass
class System:
    """An instance whose worker has predicted some days and was stopped."""

    run: Run
    settings: Settings
    healthy: list[Row]
    stopped: list[Row]

    async def examine(self, **changes: object) -> list[Row]:
        return await doctor.examine(self.settings.model_copy(update=changes), self.run.pipeline)

    def store_at(self, entity: str, partition: int, position: int | None) -> int:
        """Put the store of a partition to a position, if one is given. Returns where it was."""
        pipeline = self.run.pipeline
        folder = homes.folder_of(self.settings.data_root, pipeline, entity, partition)
        store = homes.open_store(folder, pipeline.definition)
        before, progress = store.position or 0, store.progress or Progress(0)
        if position is not None:
            store.write(Snapshot(partition, msgspec.structs.replace(progress, position=position), []))
            store.flush()
        store.close()
        return before


@contextlib.asynccontextmanager
async def system(settings: Settings, addresses: Addresses, cards: Path) -> AsyncIterator[System]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_CHECKPOINT_EVERY_S", "1")
        settings = Settings()
        async with running(settings, addresses, "card-fraud", "cards-doctor") as run:
            tape = replay.tape(cards, run.pipeline, "2018-04-10", "2018-04-12")
            await run.publish(tape)
            await run.predicted(tape.events)

            async def look() -> list[Row]:
                return await doctor.examine(settings, run.pipeline)

            healthy = await until(look, lambda rows: all(r.verdict == "ok" for r in rows))
            assert run.worker.stop() == 0
            yield System(run, settings, healthy, await look())


async def test_what_is_broken_is_told_by_name(trained: Settings, addresses: Addresses, cards: Path) -> None:
    async with system(trained, addresses, cards) as it:
        pipeline = it.run.pipeline
        # all well, with a worker and without one
        assert {row.verdict for row in it.healthy} == {"ok"}, it.healthy
        assert {row.check for row in it.healthy} == {
            "services", "topics", "model", "group", "lag", "stores", "predictions", "mirror", "checkpoints",
            "dead letters", "holes", "disk",
        }  # fmt: skip
        # Of a running worker only those count that its last flush covers; a stop flushes. How many events are
        # among the last records depends on when the router's labels came between them.
        checked = next(row.seen for row in it.stopped if row.check == "predictions")
        assert int(checked.split()[0].replace(",", "")) > 0
        assert (told(it.stopped), told(it.stopped, "warn")) == (set(), {("group", "")})
        assert command(it.settings, pipeline)[0] == 0

        # a mirrored value, offset and definition that were altered by hand
        redis, entity = connect(addresses.redis_url), pipeline.entities[0]
        mirror = Mirror(redis, pipeline)
        key = await mirror.key_of(entity, (await mirror.sample(entity, 1))[0])
        assert key is not None
        for field, value in ((entity.features[0], "77"), ("_offset", "99999999"), ("_definition", "0123")):
            before = await redis.hget(key, field)
            await redis.hset(key, field, value)
            rows = await it.examine()
            assert told(rows) == {("mirror", entity.name)}, (field, rows)
            await redis.hset(key, field, before)
        await mirror.close()

        # a store beyond its log
        position = it.store_at("customer", 1, None)
        it.store_at("customer", 1, 10**6)
        assert told(await it.examine()) == {("stores", "customer/1")}
        it.store_at("customer", 1, position)

        # no champion
        assert told(await it.examine(models_root=it.settings.data_root / "none")) == {("model", "")}

        # an event that was flushed and not predicted
        position = it.store_at("terminal", 2, None)
        end = await another_event(addresses.kafka, pipeline, 2)
        assert told(await it.examine()) == set()  # it is not flushed yet
        it.store_at("terminal", 2, end)
        rows = await it.examine()
        assert told(rows) == {("predictions", "partition 2")}
        assert any(str(end - 1) in row.seen for row in rows if row.verdict == "wrong"), rows
        code, found = command(it.settings, pipeline)
        assert (code, found["wrong"]) == (1, 1)
        it.store_at("terminal", 2, position)

        # predictions in fewer partitions than the last log has
        async with kafka.admin(addresses.kafka) as client:
            await client.delete_topics([pipeline.predictions])
            async with asyncio.timeout(30):
                while pipeline.predictions in await client.list_topics():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            await client.create_topics([NewTopic(pipeline.predictions, 3, 1)])
        assert ("topics", pipeline.predictions) in told(await it.examine())

        # and with no service at all
        rows = await it.examine(kafka="127.0.0.1:9", redis_url="redis://127.0.0.1:9")
        assert told(rows) == {("services", "Kafka"), ("services", "Redis")}
        assert ("predictions", "") in told(rows, "skipped")


async def another_event(address: str, pipeline: Pipeline, partition: int) -> int:
    """Append an event to the last log: the last one with another id, a day later. The log's end."""
    log, number = pipeline.entities[-1].log, len(pipeline.entities) - 1
    codec = RecordCodec(pipeline, number)
    records = [r async for r in kafka.read_between(address, log, {partition: 0})]
    last = [r for r in records if r.value and codec.decode([r.value], [r.key])[0].kinds[0] == 0][-1]
    size = codec.dtype.itemsize
    head = np.frombuffer(last.value[:size], codec.dtype).copy()
    head["id"] += 10**9
    head["time"] += 86_400_000
    producer = kafka.producer(address)
    await producer.start()
    sent = await producer.send_and_wait(log, head.tobytes() + last.value[size:], last.key, partition)
    await producer.stop()
    return int(sent.offset) + 1
