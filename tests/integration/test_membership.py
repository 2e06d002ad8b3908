"""Workers come, go, die and sleep: who holds which partitions then, and who ends with which sentence."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from app import kafka, replay, session, verify
from app.local import services
from app.local.services import Addresses
from app.settings import Settings
from models import predictions
from models.pipeline import Pipeline, find

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

NUMBERS = {0, 1, 2, 3}  # the world's topics have four partitions


class Workers:
    """A fresh instance, and the workers that a test starts for it."""

    def __init__(self, settings: Settings, addresses: Addresses, pipeline: Pipeline) -> None:
        self.settings, self.addresses, self.pipeline = settings, addresses, pipeline
        self.started: list[session.Process] = []

    def start(self, **environment: str) -> session.Process:
        worker = session.Process(self.settings, self.pipeline, "worker", len(self.started) + 1, **environment)
        self.started.append(worker)
        worker.start()
        return worker

    async def predicted(self, count: int) -> None:
        """Wait until so many events have a prediction."""
        async with asyncio.timeout(90):
            while True:
                records = kafka.read_between(self.addresses.kafka, self.pipeline.predictions)
                if len({predictions.decode(record.value).id async for record in records}) >= count:
                    return
                await asyncio.sleep(0.3)

    async def verdict(self, events: int) -> tuple[int, int, int]:
        """Once all are predicted, and so no log grows any more: lost, doubled and differing ones."""
        await self.predicted(events)
        verdict, _ = await verify.check(self.pipeline, self.addresses.kafka)
        assert verdict.events == events
        return verdict.lost, verdict.doubled, verdict.differing

    async def members(self, count: int) -> None:
        """Wait until the group has so many."""
        async with asyncio.timeout(90):
            group = kafka.group_of(self.pipeline)
            while await kafka.members_of(self.addresses.kafka, group) != count:  # noqa: ASYNC110
                await asyncio.sleep(0.2)


@asynccontextmanager
async def instance(settings: Settings, addresses: Addresses, alias: str) -> AsyncIterator[Workers]:
    pipeline = find("flight-delays", settings.pipelines, alias)
    await session.fresh(settings, pipeline, addresses)
    workers = Workers(settings, addresses, pipeline)
    try:
        yield workers
    finally:
        for worker in workers.started:
            worker.send(signal.SIGCONT)
            worker.stop()


async def held(worker: session.Process) -> dict[str, set[int]]:
    """The partition numbers that a worker holds, by topic; none before it listens."""
    worker.check()
    found: dict[str, set[int]] = {}
    with contextlib.suppress(aiohttp.ClientConnectionError):
        for name in await worker.metrics():
            if name.startswith("headrace_partition_held{"):
                partition, topic = name.split("{")[1].rstrip("}").split(",")
                found.setdefault(topic, set()).add(int(partition))
    return found


async def holding(*workers: session.Process, counts: list[int]) -> list[set[int]]:
    """Wait until workers hold so many numbers each, in any order; which, each the same of every topic."""
    async with asyncio.timeout(60):
        while True:
            all_held = [await held(worker) for worker in workers]
            numbers = [set.union(set(), *one.values()) for one in all_held]
            together = all(
                one == n for each, n in zip(all_held, numbers, strict=True) for one in each.values()
            )
            whole = sorted(n for one in numbers for n in one) == sorted(NUMBERS)
            if together and whole and sorted(map(len, numbers)) == sorted(counts):
                return numbers
            await asyncio.sleep(0.1)


async def ended(worker: session.Process) -> tuple[int, str]:
    """Wait until a worker has ended by itself: its exit code, and what it said."""
    async with asyncio.timeout(60):
        while (code := worker.exit_code) is None:  # noqa: ASYNC110 - a process tells nobody
            await asyncio.sleep(0.05)
    return code, worker.log.read_text(encoding="utf-8")


async def test_workers_share_by_number_and_move_little(trained: Settings, addresses: Addresses) -> None:
    async with instance(trained, addresses, "flights-three") as run:
        first = run.start()
        assert await holding(first, counts=[4]) == [NUMBERS]
        second = run.start()
        two = await holding(first, second, counts=[2, 2])
        third = run.start()
        three = await holding(first, second, third, counts=[2, 1, 1])
        assert two[0] >= three[0]
        assert two[1] >= three[1]
        topics = {run.pipeline.stream.topic, *(entity.log for entity in run.pipeline.entities)}
        assert topics < set(await held(third))  # and the labels' topic
        assert third.stop() == 0
        back = await holding(first, second, counts=[2, 2])
        assert back[0] >= three[0]
        assert back[1] >= three[1]


async def test_the_other_worker_takes_over_from_a_killed_one(
    trained: Settings, addresses: Addresses, flights: Path
) -> None:
    async with instance(trained, addresses, "flights-killed") as run:
        first, second = run.start(), run.start()
        await holding(first, second, counts=[2, 2])
        tape = replay.tape(flights, run.pipeline, "2013-02-01", "2013-02-20")
        publishing = asyncio.create_task(replay.publish(tape, run.pipeline, addresses.kafka, 1000))
        await run.predicted(3000)
        second.stop(signal.SIGKILL)
        assert await holding(first, counts=[4]) == [NUMBERS]
        await publishing
        assert await run.verdict(tape.events) == (0, 0, 0)


async def test_a_static_member_that_is_killed_and_started_again_keeps_its_numbers(
    trained: Settings, addresses: Addresses
) -> None:
    async with instance(trained, addresses, "flights-static") as run:
        # A session that outlasts the restart: nobody else is asked.
        one, two = ({"HEADRACE_INSTANCE_ID": name, "HEADRACE_SESSION_S": "60"} for name in ("one", "two"))
        first, second = run.start(**one), run.start(**two)
        before = await holding(first, second, counts=[2, 2])
        rebalances = (await first.metrics())["headrace_rebalances_total"]
        second.stop(signal.SIGKILL)
        second.start()
        await second.ready()
        assert await holding(first, second, counts=[2, 2]) == before
        assert (await first.metrics())["headrace_rebalances_total"] == rebalances


async def test_a_static_member_that_is_stopped_leaves(trained: Settings, addresses: Addresses) -> None:
    async with instance(trained, addresses, "flights-leaves") as run:
        # A session that is longer than the test would wait for it.
        one, two = ({"HEADRACE_INSTANCE_ID": name, "HEADRACE_SESSION_S": "60"} for name in ("one", "two"))
        first, second = run.start(**one), run.start(**two)
        await holding(first, second, counts=[2, 2])
        assert second.stop() == 0
        async with asyncio.timeout(20):
            assert await holding(first, counts=[4]) == [NUMBERS]


async def test_workers_that_are_stopped_together_end_in_good_order(
    trained: Settings, addresses: Addresses
) -> None:
    """One that leaves makes the others share anew, just when they are told to stop."""
    async with instance(trained, addresses, "flights-together") as run:
        workers = [run.start(), run.start(), run.start()]
        await holding(*workers, counts=[2, 1, 1])
        workers[0].send(signal.SIGTERM)
        before = (await workers[1].metrics())["headrace_rebalances_total"]
        async with asyncio.timeout(30):
            while await held(workers[1]):  # until it has let go
                if (await workers[1].metrics())["headrace_rebalances_total"] > before:
                    break  # it has partitions again already
        for worker in workers[1:]:
            worker.send(signal.SIGTERM)
        for worker in workers:
            code, said = await ended(worker)
            assert (code, "Traceback" in said) == (0, False), said


async def test_of_two_with_one_name_the_older_ends(
    trained: Settings, addresses: Addresses, tmp_path: Path
) -> None:
    async with instance(trained, addresses, "flights-twins") as run:
        older = run.start(HEADRACE_INSTANCE_ID="twin")
        await holding(older, counts=[4])
        newer = run.start(  # on another machine, so to say
            HEADRACE_INSTANCE_ID="twin", HEADRACE_DATA_ROOT=str(tmp_path), HEADRACE_KAFKA=addresses.kafka,
            HEADRACE_REDIS_URL=addresses.redis_url,
        )  # fmt: skip
        code, said = await ended(older)
        assert code == 1
        assert "another worker runs with HEADRACE_INSTANCE_ID=twin" in said
        assert "Traceback" not in said
        assert await holding(newer, counts=[4]) == [NUMBERS]


async def test_a_worker_that_slept_through_its_session_ends_when_it_wakes(
    trained: Settings, addresses: Addresses, flights: Path
) -> None:
    async with instance(trained, addresses, "flights-asleep") as run:
        worker = run.start()
        await holding(worker, counts=[4])
        tape = replay.tape(flights, run.pipeline, "2013-02-01", "2013-02-12")
        publishing = asyncio.create_task(replay.publish(tape, run.pipeline, addresses.kafka, 1000))
        await run.predicted(2000)
        worker.send(signal.SIGSTOP)
        await run.members(0)
        worker.send(signal.SIGCONT)
        code, said = await ended(worker)
        assert code == 1
        assert "This worker stood still for" in said
        assert "Traceback" not in said
        worker.start()
        await publishing
        assert await run.verdict(tape.events) == (0, 0, 0)


async def test_a_broker_that_restarts_ends_no_worker(
    trained: Settings, addresses: Addresses, flights: Path
) -> None:
    if trained.kafka is not None:
        pytest.skip("the broker is not ours to restart")
    async with instance(trained, addresses, "flights-broker") as run:
        worker = run.start(HEADRACE_INSTANCE_ID="one")
        await holding(worker, counts=[4])
        tape = replay.tape(flights, run.pipeline, "2013-02-01", "2013-02-08")
        publishing = asyncio.create_task(replay.publish(tape, run.pipeline, addresses.kafka, 500))
        await run.predicted(500)
        services.down(trained, ["kafka"])
        services.up(trained, ["kafka"])
        await publishing
        assert await run.verdict(tape.events) == (0, 0, 0)
        assert await holding(worker, counts=[4]) == [NUMBERS]


async def test_a_worker_whose_topics_are_deleted_ends(trained: Settings, addresses: Addresses) -> None:
    async with instance(trained, addresses, "flights-gone") as run:
        worker = run.start()
        await holding(worker, counts=[4])
        await kafka.delete_topics(addresses.kafka, run.pipeline)
        code, said = await ended(worker)
        assert code == 1
        assert "Kafka knows no topic" in said
