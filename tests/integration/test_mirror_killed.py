"""Redis is killed under load, comes back empty, and is wiped: the mirror equals the profiles again, by itself."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tables.mirror import connect
from tests.integration.test_mirror import Bench
from tests.integration.test_redis_address import eventually, server

pytestmark = pytest.mark.integration

CUSTOMERS = 3000


async def load(bench: Bench, rounds: int) -> None:
    """Events, flushes and evictions, as a worker has them, and the mirror behind them."""
    chance = random.Random(rounds)
    for number in range(rounds):
        bench.fold(*(chance.randrange(CUSTOMERS) for _ in range(200)))
        if number % 5 == 4:
            bench.flush()
        if number % 10 == 9:
            for _ in bench.profiles.sweep(number % 20 == 19):
                pass
        await asyncio.sleep(0.01)


async def test_redis_is_killed_and_wiped_under_load(tmp_path: Path) -> None:
    with server(tmp_path / "redis") as port:
        bench = Bench(tmp_path / "store", connect(f"redis://127.0.0.1:{port}/0"))
        mirroring = asyncio.create_task(bench.agent.run())
        await load(bench, 60)
        await until(lambda: bench.agent.written > 0)  # the first round may take longer than all of that
    await load(bench, 60)  # it is gone
    await until(lambda: bench.agent.failing is not None)
    with server(tmp_path / "redis", port=port):
        await load(bench, 60)  # it is back, with nothing
        await until(lambda: bench.agent.failing is None)
        client = connect(f"redis://127.0.0.1:{port}/0")
        await client.flushall()
        await load(bench, 60)
        await until(lambda: bench.agent.lag_s == 0 and not bench.agent.waiting)
        await client.aclose()
        mirroring.cancel()
        await asyncio.gather(mirroring, return_exceptions=True)
        bench.agent._looked = -1e9
        await bench.settled()
        assert await differing(bench) == []
        await bench.mirror.close()


async def until(true: Callable[[], bool]) -> None:
    async def done() -> bool:
        return true()

    await eventually(done)


async def differing(bench: Bench) -> list[str]:
    """Ids of which the mirror holds something else than the stage: all of them are looked at."""
    after = bench.profiles.owe(0, None, 500)
    while after is not None:
        after = bench.profiles.owe(0, after, 500)
    wrong, seen = [], 0
    for expected in bench.profiles.touched(500):
        ids = [key.decode() for key in expected.keys]
        seen += len(ids)
        for i, held in enumerate(await bench.mirror.read(bench.entity, ids)):
            if (
                held is None
                or (held.time, held.profile) != (expected.times[i], expected.profiles[i])
                or list(held.features.values()) != expected.features[i].tolist()
                or held.at(held.time) != held.features
            ):
                wrong.append(ids[i])
    assert seen > CUSTOMERS * 0.9
    return wrong
