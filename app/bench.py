"""Benchmarks of a real worker process: a number counts when a command of this file makes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console

from app import demo, history, kafka, lifecycle, replay, session, verify
from app.datasets.cards import write_cards
from app.local import services
from app.settings import Settings
from models.errors import HeadraceError
from models.pipeline import Pipeline, find
from models.windows import Floats

DAYS = 120  # of the default city: 9,600 payments a day
WARM_UP_S = 5.0
POLL_S = 0.2

Report = Callable[[str], None]


def throughput(settings: Settings, name: str, events: int) -> dict[str, Any]:
    """A backlog of so many events, caught up by one worker.

    CPU and memory are of the whole worker process, from when it holds its partitions until the last
    prediction is out: fetching, both stages, scoring, sending, flushes, mirror.
    """
    return run(settings, name, events, _throughput)


def latency(settings: Settings, name: str, rate: float, seconds: float) -> dict[str, Any]:
    """An open load of so many events a second: from when each was due until its prediction arrived here."""

    return run(settings, name, int(rate * (seconds + WARM_UP_S)), lambda load: _latency(load, rate))


@dataclass
class Load:
    """What a benchmark runs on."""

    settings: Settings
    pipeline: Pipeline
    tape: replay.Tape
    addresses: services.Addresses
    report: Report


def run(
    settings: Settings,
    name: str,
    events: int,
    measure: Callable[[Load], Coroutine[Any, Any, dict[str, Any]]],
) -> dict[str, Any]:
    """Measure on services, a pipeline of its own, and a load of so many events."""
    console = Console(stderr=True)

    def report(text: str) -> None:
        console.print(f"  {text}", highlight=False)

    settings = session.with_own_models(settings, "bench")
    pipeline = find(name, settings.pipelines, f"{name}-bench")
    with session.running_services(settings, lambda s, e: report(f"{s}: {e}")) as addresses:
        tape = _prepare(settings, pipeline, events, report)
        return asyncio.run(measure(Load(settings, pipeline, tape, addresses, report)))


def _prepare(settings: Settings, pipeline: Pipeline, events: int, report: Report) -> replay.Tape:
    """Data and a model. The last `events` of the file are the load."""
    if pipeline.name == "card-fraud":
        file = city(settings)
    else:
        story = demo.STORIES.get(pipeline.name)
        if story is None:
            raise HeadraceError(
                f"There is no benchmark of {pipeline.name}; there are {', '.join(demo.STORIES)}."
            )
        file = Path("data") / story.file
        if not file.exists():
            story.make(file, lambda done, total: None)
    lifecycle.ensure(pipeline, file, settings.models_root, report)
    times = history.read(file, pipeline).history.times
    if len(times) < events:
        raise HeadraceError(f"{file} has {len(times):,} events; ask for fewer than {events:,}.")
    start = np.datetime64(int(times[len(times) - events]), "ms")
    return replay.tape(file, pipeline, str(start))


def city(settings: Settings) -> Path:
    """The default city's payments, made once."""
    file = settings.data_root / "bench" / "cards.parquet"
    if not file.exists():
        write_cards(file, days=DAYS)
    return file


async def _throughput(load: Load) -> dict[str, Any]:
    settings, pipeline, tape, addresses = load.settings, load.pipeline, load.tape, load.addresses
    await session.fresh(settings, pipeline, addresses)
    load.report(f"publishing a backlog of {tape.events:,} events and {len(tape.rows) - tape.events:,} labels")
    await replay.publish(tape, pipeline, addresses.kafka, None)
    worker = session.Process(settings, pipeline, "worker")
    try:
        worker.start()
        await worker.ready()
        began, first = time.perf_counter(), await worker.metrics()
        load.report("the worker holds its partitions")
        done, peak, seen_at = 0.0, 0.0, time.perf_counter()
        now = first
        while done < tape.events and time.perf_counter() - seen_at < session.STALLED_S:
            worker.check()
            await asyncio.sleep(POLL_S)
            now = await worker.metrics()
            peak = max(peak, now["process_resident_memory_bytes"])
            if now["headrace_predictions_total"] != done:
                done, seen_at = now["headrace_predictions_total"], time.perf_counter()
        seconds = seen_at - began
    finally:
        worker.stop()
    predicted = sum((await _counts(addresses.kafka, pipeline)).values())
    cpu = now["process_cpu_seconds_total"] - first["process_cpu_seconds_total"]
    scored = done - first["headrace_predictions_total"]
    return {
        "bench": "throughput",
        "pipeline": pipeline.name,
        "events": tape.events,
        "predictions": predicted,
        "cpu_us_per_event": round(cpu / scored * 1e6, 2) if scored else None,
        "events_per_s": round(scored / seconds, 1),
        "rss_mib": round(peak / 2**20, 1),
        "seconds": round(seconds, 2),
    }


def catchup(
    settings: Settings, name: str, customers: int, days: int, late: float, alignment: float
) -> dict[str, Any]:
    """A backlog of so many days, caught up by two workers of which one starts late: in step, and not.

    alignment, late: seconds, of event time and of the clock. The lead is how far an event's log was
    ahead of it when it came, at most: by those who write it, whose own lateness does not count.
    """
    console = Console(stderr=True)

    def report(text: str) -> None:
        console.print(f"  {text}", highlight=False)

    settings = session.with_own_models(settings, "bench")
    pipeline = find(name, settings.pipelines, f"{name}-bench")
    file = settings.data_root / "bench" / f"cards-{customers}-{days}.parquet"
    if not file.exists():
        report(f"making {file}")
        write_cards(file, customers=customers, terminals=2 * customers, days=days)
    with session.running_services(settings, lambda s, e: report(f"{s}: {e}")) as addresses:
        lifecycle.ensure(pipeline, city(settings), settings.models_root, report)
        load = Load(settings, pipeline, replay.tape(file, pipeline), addresses, report)
        runs = {
            way: asyncio.run(_catchup(load, late, seconds))
            for way, seconds in (("in_step", alignment), ("out_of_step", 0.0))
        }
    return {
        "bench": "catchup",
        "pipeline": pipeline.name,
        "events": load.tape.events,
        "days": days,
        "partitions": settings.partitions,
        "late_s": late,
        "alignment_s": alignment,
        **{f"{figure}_{way}": value for way, run in runs.items() for figure, value in run.items()},
        "throughput_ratio": round(runs["in_step"]["events_per_s"] / runs["out_of_step"]["events_per_s"], 3),
    }


async def _catchup(load: Load, late: float, alignment: float) -> dict[str, Any]:
    pipeline, address, tape = load.pipeline, load.addresses.kafka, load.tape
    settings = load.settings.model_copy(update={"alignment_s": alignment})
    await session.fresh(settings, pipeline, load.addresses)
    load.report(f"publishing a backlog of {tape.events:,} events")
    await replay.publish(tape, pipeline, address, None)
    workers = [session.Process(settings, pipeline, "worker", n) for n in (1, 2)]
    reader = session.Predictions(address, pipeline)
    try:
        async with reader.reading():
            workers[0].start()
            await workers[0].ready()
            began = time.time()
            await asyncio.sleep(late)
            alone = len(reader.ids)
            load.report(f"{alone:,} predictions when the second worker starts")
            workers[1].start()
            await reader.until(tape.events, workers[0].check)
        try:
            cpu = sum([(await worker.metrics())["process_cpu_seconds_total"] for worker in workers])
        except aiohttp.ClientError:
            raise HeadraceError(
                "The first worker was through before the second came: take more --customers."
            ) from None
    finally:
        for worker in workers:
            worker.stop()
    return {
        "predictions": len(reader.ids),
        "cpu_us_per_event": round(cpu / len(reader.ids) * 1e6, 2),
        "alone": alone,
        "events_per_s": round(len(reader.ids) / (max(reader.arrived) - began), 1),
        "lead_s": (await verify.lead(pipeline, address)) / 1000,
    }


async def _counts(address: str, pipeline: Pipeline) -> dict[int, int]:
    counts: dict[int, int] = {}
    async for record in kafka.read_between(address, pipeline.predictions):
        counts[record.partition] = counts.get(record.partition, 0) + 1
    return counts


async def _latency(load: Load, rate: float) -> dict[str, Any]:
    await session.fresh(load.settings, load.pipeline, load.addresses)
    worker = session.Process(load.settings, load.pipeline, "worker")
    reader = session.Predictions(load.addresses.kafka, load.pipeline)
    try:
        worker.start()
        await worker.ready()
        before = await worker.metrics()
        due, waited = await open_load(load, rate, reader, [worker])
        after = await worker.metrics()
    finally:
        worker.stop()
    counted = waited[due >= WARM_UP_S]
    cpu = after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
    return {
        "bench": "latency",
        "pipeline": load.pipeline.name,
        "rate": rate,
        "events": len(counted),
        "missing": load.tape.events - len(reader.ids),
        **spread(counted),
        "cpu_us_per_event": round(cpu / load.tape.events * 1e6, 2),
    }


async def open_load(
    load: Load, rate: float, reader: session.Predictions, workers: list[session.Process]
) -> tuple[Floats, Floats]:
    """Send the tape's events, so many a second, and read their predictions until none is missing or comes.

    Of each prediction, in the reader's order: when its event was due, s since the first, and the ms until it was read.
    """
    tape, due = load.tape, np.zeros(load.tape.events)

    def check() -> None:
        for worker in workers:
            worker.check()

    load.report(
        f"{rate:,.0f} events/s for {tape.events / rate:.0f} s, of which the first {WARM_UP_S:.0f} do not count"
    )
    async with reader.reading():
        await replay.publish(tape, load.pipeline, load.addresses.kafka, rate, None, due)
        await reader.until(tape.events, check)
    order = np.argsort(tape.history.ids)
    sent = due[order[np.searchsorted(tape.history.ids, np.array(reader.ids, np.int64), sorter=order)]]
    return sent - due.min(), (np.array(reader.arrived) - sent) * 1000


def spread(waited: Floats, of: str = "") -> dict[str, float]:
    """Median, 99th percentile and the longest of waits in ms, by names that begin with `of`."""
    found = np.percentile(waited, [50, 99, 100]).tolist()
    return {f"{of}{name}_ms": round(ms, 2) for name, ms in zip(("p50", "p99", "max"), found, strict=True)}
