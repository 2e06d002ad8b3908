"""What the ledger takes: a backlog of predictions into PostgreSQL by one process, and look-ups in it then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console

from agents.record import Recorder
from app import kafka, session
from app.local import services
from app.settings import Settings
from models.errors import HeadraceError
from models.pipeline import Pipeline, find
from models.predictions import PredictionEncoder
from tables.ledger import migrating
from tables.ledger.reading import Ledger
from tables.ledger.writing import Writer

POLL_S = 0.1
AT_ONCE = 2000  # predictions that are made together
LOOK_UPS = 500
ENTITIES = 5000
BEGIN_MS = 1_600_000_000_000


def ledger(settings: Settings, name: str, rows: int) -> dict[str, Any]:
    """So many predictions with features, all sent before the process starts."""
    console = Console(stderr=True)
    pipeline = find(name, settings.pipelines, f"{name}-bench")

    def report(service: str, event: str) -> None:
        console.print(f"  {service}: {event}", highlight=False)

    with session.running_services(settings, report, ("kafka", "redis", "postgres")) as addresses:
        return asyncio.run(_measure(settings, pipeline, addresses, rows, report))


async def _measure(
    settings: Settings, pipeline: Pipeline, addresses: services.Addresses, rows: int, report: Callable[[str, str], None]
) -> dict[str, Any]:  # fmt: skip
    url = addresses.postgres_url
    await migrating.migrate(url)
    writer = Writer(url, pipeline.instance)
    await writer.clear(Recorder(pipeline, 1).topics)
    await writer.close()
    await session.fresh(settings, pipeline, addresses)
    report("bench", f"sending {rows:,} predictions")
    await _send(addresses.kafka, pipeline, rows, settings.partitions)
    process = session.Process(settings, pipeline, "ledger run")
    try:
        process.start()
        await process.ready()
        began, first = time.perf_counter(), await process.metrics()
        report("bench", "the process holds its partitions")
        now, changed = first, began
        while now["headrace_ledger_rows_total"] < rows:
            process.check()
            await asyncio.sleep(POLL_S)
            before, now = now, await process.metrics()
            if now["headrace_ledger_rows_total"] != before["headrace_ledger_rows_total"]:
                changed = time.perf_counter()
            elif time.perf_counter() - changed > session.STALLED_S:
                raise HeadraceError(
                    f"The ledger has {now['headrace_ledger_rows_total']:,.0f} rows, and no more come."
                )
        seconds = changed - began
    finally:
        process.stop()
    written = now["headrace_ledger_rows_total"] - first["headrace_ledger_rows_total"]
    cpu = now["process_cpu_seconds_total"] - first["process_cpu_seconds_total"]
    reader = Ledger(url, pipeline)
    rng = np.random.default_rng(3)
    entity = pipeline.entities[-1].name
    ids, keys = rng.integers(0, rows, LOOK_UPS).tolist(), rng.integers(0, ENTITIES, LOOK_UPS).tolist()
    of_event = await _times(reader.predictions_of(id) for id in ids)
    of_entity = await _times(reader.predictions_about(entity, str(key), limit=50) for key in keys)
    found = await reader.extent(Recorder(pipeline, 1).topics)
    await reader.close()
    return {
        "bench": "ledger",
        "pipeline": pipeline.name,
        "predictions": found["predictions"],
        "rows_per_s": round(written / seconds, 1),
        "cpu_us_per_row": round(cpu / written * 1e6, 2),
        "seconds": round(seconds, 2),
        **{f"event_{name}": value for name, value in of_event.items()},
        **{f"entity_{name}": value for name, value in of_entity.items()},
    }


async def _send(address: str, pipeline: Pipeline, rows: int, partitions: int) -> None:
    producer = kafka.producer(address, linger_ms=5)
    await producer.start()
    try:
        for partition, value in _predictions(pipeline, rows, partitions):
            await producer.send(pipeline.predictions, value, partition=partition)
        await producer.flush()
    finally:
        await producer.stop()


def _predictions(pipeline: Pipeline, rows: int, partitions: int) -> Iterator[tuple[int, bytes]]:
    """Each with its partition, as a worker makes them."""
    encoder, rng = PredictionEncoder(pipeline), np.random.default_rng(7)
    model: Any = SimpleNamespace(
        card=SimpleNamespace(pipeline=pipeline.name, version="0123456789ab"),
        decide=lambda scores: ["pass"] * len(scores),
    )
    for start in range(0, rows, AT_ONCE):
        ids = np.arange(start, min(start + AT_ONCE, rows))
        n, no = len(ids), np.zeros(len(ids), np.bool_)
        keys = [list(map(str, rng.integers(0, ENTITIES, n).tolist())) for _ in pipeline.entities]
        times, vectors = BEGIN_MS + ids * 100, rng.normal(size=(n, len(pipeline.vector)))
        values = encoder.encode(
            [*ids.tolist()], np.zeros(n, np.int64), times, vectors, rng.random(n, np.float32), no, no, model,
            ids % partitions, ids // partitions, keys,
        )  # fmt: skip
        yield from zip((ids % partitions).tolist(), values, strict=True)


async def _times(look_ups: Iterable[Awaitable[Any]]) -> dict[str, float]:
    took = []
    for look_up in look_ups:
        began = time.perf_counter()
        await look_up
        took.append((time.perf_counter() - began) * 1000)
    return {
        "p50_ms": round(float(np.percentile(took, 50)), 2),
        "p99_ms": round(float(np.percentile(took, 99)), 2),
    }
