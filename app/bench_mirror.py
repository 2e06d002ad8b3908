"""What the mirror costs: profiles a second, CPU and memory of each, from a stage's profiles to a real Redis."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from agents.mirror import MirrorAgent
from app.bench_memory import POLL, Run
from app.session import running_services
from app.settings import Settings
from models.pipeline import Pipeline, find
from tables.mirror import Mirror, connect

INSTANCE = "bench-mirror"
MIB = 4096  # none is evicted
READ = 100  # ids in a request
READS = 50  # requests


def mirror(settings: Settings, name: str, profiles: int, rows: int, rounds: int) -> dict[str, Any]:
    """The first stage of a pipeline with so many profiles of so many events, all of them mirrored so often.

    Redis is that of the settings, or of `headrace up`, else one that is started for it.
    """
    pipeline = find(name, settings.pipelines, INSTANCE)
    folder = settings.data_root / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        running_services(settings, lambda name, what: None, ["redis"]) as addresses,
        TemporaryDirectory(dir=folder) as home,
    ):
        apart = max(pipeline.entities[0].retention // (profiles * rows), 1)
        run = Run(pipeline, settings.partitions, Path(home), profiles, MIB, mirrored=True, apart_ms=apart)
        try:
            found = asyncio.run(_measure(run, pipeline, addresses.redis_url, profiles, rows, rounds))
        finally:
            run.close()
    return {"bench": "mirror", "pipeline": pipeline.name, "profiles": profiles, "rows": rows, **found}


async def _measure(
    run: Run, pipeline: Pipeline, url: str, profiles: int, rows: int, rounds: int
) -> dict[str, Any]:
    entity, client = pipeline.entities[0], connect(url)
    shown: Any = client
    mirror = Mirror(client, pipeline)
    await mirror.clear()
    counts = {entity.log: len(run.stage.partitions)}
    agent = MirrorAgent([run.stage], mirror, counts, lambda: time.time_ns() // 1_000_000)
    empty = int((await shown.info("memory"))["used_memory"])
    for _ in range(rows):
        picks = np.random.default_rng(7).permutation(profiles)
        for at in range(0, profiles, POLL):
            await run.fold(picks[at : at + POLL])
    rates, ours, theirs = [], [], []
    for _ in range(rounds + 1):  # the first makes room
        for partition in run.stage.partitions:
            run.stage.owe(partition, None, 0)
        before, cpu, began = agent.written, time.process_time(), time.perf_counter()
        server = await _server_s(shown)
        await agent.once()
        took, spent = time.perf_counter() - began, time.process_time() - cpu
        written = agent.written - before
        rates.append(written / took)
        ours.append(spent / written * 1e6)
        theirs.append((await _server_s(shown) - server) / written * 1e6)
    full = int((await shown.info("memory"))["used_memory"])
    ids = [str(i) for i in range(READ)]
    compact = [len(found.profile) for found in await mirror.read(entity, ids) if found is not None]
    reads = []
    for _ in range(READS):
        began = time.perf_counter()
        for found in await mirror.read(entity, ids):
            assert found is not None
            found.at(found.time)
        reads.append((time.perf_counter() - began) / READ * 1e6)
    await mirror.clear()
    await mirror.close()
    return {
        "features": len(entity.features),
        "profiles_per_s": round(float(np.median(rates[1:]))),
        "profiles_per_s_of_each_run": [round(rate) for rate in rates[1:]],
        "worker_us_per_profile": round(float(np.median(ours[1:])), 2),
        "redis_us_per_profile": round(float(np.median(theirs[1:])), 2),
        "bytes_per_profile": round((full - empty) / profiles),
        "compact_bytes_per_profile": round(float(np.mean(compact))),
        "read_us_per_profile": round(float(np.median(reads)), 1),
    }


async def _server_s(client: Any) -> float:
    """CPU seconds of Redis so far."""
    found = await client.info("cpu")
    return float(found["used_cpu_user"] + found["used_cpu_sys"])
