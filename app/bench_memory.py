"""What it costs to have more profiles than memory: a stage's fold and flush, fed by hand, without Kafka."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from agents.flush import Flush
from agents.outbox import Outbox
from app.settings import Settings
from models.errors import HeadraceError
from models.events import Batch
from models.partitions import partitions_of
from models.pipeline import Pipeline, find
from models.windows import EVENT, UNKNOWN, Ints
from tables.profiles import Profiles
from tables.store import Store

FEW = 10_000  # entities that memory always holds
MEASURED = 400_000  # events over which the cost of one is taken, when each entity has had one
POLL = 4000  # events in a micro-batch
BEGIN_MS, APART_MS = 1_600_000_000_000, 50


def memory(settings: Settings, name: str, profiles: int, mib: int) -> dict[str, Any]:
    """The first stage of a pipeline with few entities, and with so many under a bound of `mib`."""
    pipeline = find(name, settings.pipelines)
    folder = settings.data_root / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as few, TemporaryDirectory(dir=folder) as many:
        small = Run(pipeline, settings.partitions, Path(few), FEW, mib)
        asyncio.run(small.measure())
        small.close()
        before = _resident_mib()
        large = Run(pipeline, settings.partitions, Path(many), profiles, mib)
        asyncio.run(large.measure())
        after, stage = _resident_mib(), large.stage
        steps = np.array(large.steps_ms)
        result = {
            "bench": "memory",
            "pipeline": pipeline.name,
            "profiles": profiles,
            "bound_mib": mib,
            "in_memory": stage.size,
            "profiles_mib": round(large.most / 2**20, 1),
            "resident_before_mib": before,
            "resident_after_mib": after,
            "bytes_per_profile": round(stage.nbytes / stage.size),
            "evicted": stage.evicted,
            "loaded": stage.loaded,
            "us_per_event_few": small.us_per_event,
            "us_per_event_many": large.us_per_event,
            "flush_steps": len(steps),
            "flush_step_longest_ms": round(float(steps[:, 0].max()), 2),
            "flush_step_longest_cpu_ms": round(float(steps[:, 1].max()), 2),
            "flush_step_cpu_p99_ms": round(float(np.percentile(steps[:, 1], 99)), 2),
            "flush_steps_over_5_cpu_ms": int((steps[:, 1] > 5).sum()),
        }
        large.close()
        stored = sum(file.stat().st_size for file in Path(many).rglob("*.sst"))
        return result | {"bytes_per_profile_on_disk": round(stored / profiles)}


@dataclass
class _At:
    """Where a record stands; what it says is in the feed's columns."""

    offset: int
    timestamp: int = BEGIN_MS
    key: bytes | None = None
    value: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


class Run:
    """A stage, its flush, and events of so many entities: each once, then any at random. apart_ms: in event time."""

    def __init__(
        self, pipeline: Pipeline, partitions: int, folder: Path, entities: int, mib: int,
        mirrored: bool = False, apart_ms: int = APART_MS,
    ) -> None:  # fmt: skip
        self._apart_ms = apart_ms
        self.steps_ms: list[tuple[float, float]] = []
        self.most, self.us_per_event = 0, 0.0
        self._random = np.random.default_rng(7)
        self._keys = self._random.permutation(entities)
        self._homes = np.array(
            partitions_of([b"%d" % k for k in self._keys.tolist()], self._keys, partitions), np.int64
        )
        self._ends = [0] * partitions
        self._events = 0
        self._batch: Batch
        self._columns = len(pipeline.columns)
        self.stage = Profiles(
            pipeline.entities[0], lambda values, keys, sent: (self._batch, np.arange(len(values)), []),
            lambda partition, at_most: Store(folder / str(partition), pipeline.definition), partitions,
            pipeline.columns, mirrored=mirrored,
        )  # fmt: skip
        self.stage.warm()
        for partition in range(partitions):
            self.stage.start_at(partition, self.stage.open(partition) or 0)
        nowhere: Any = None  # nothing is sent
        outbox = Outbox(nowhere, lambda: 0, lambda error: None)
        self._flush = Flush([self.stage], [], outbox, lambda *_: None, mib * 2**20)

    async def measure(self) -> None:
        """CPU of the process for an event: fold and flush, and not the making of it."""
        gc.collect()
        gc.freeze()  # as a worker does: a collection would count as a step
        gc.set_threshold(50_000, 20, 100)
        entities = len(self._keys)
        flushing = asyncio.create_task(_steps(self._flush.run(), self.steps_ms))
        for start in range(0, entities, POLL):
            await self.fold(np.arange(start, min(start + POLL, entities)))
        spent = 0.0
        for _ in range(MEASURED // POLL):
            spent += await self.fold(self._random.integers(0, entities, POLL))
        self.us_per_event = round(spent / MEASURED * 1e6, 2)
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)

    async def fold(self, picks: Ints) -> float:
        """One micro-batch. Returns its CPU seconds."""
        polled = self._poll(picks)
        began = time.process_time()
        await _steps(self._flush.room(), self.steps_ms)
        self.stage.apply(polled)
        self.most = max(self.most, self.stage.nbytes)
        await asyncio.sleep(0)
        return time.process_time() - began

    def _poll(self, picks: Ints) -> list[tuple[int, list[_At]]]:
        """An event of each of these entities, whose columns `apply` gets for the records of the poll."""
        picks = picks[np.argsort(self._homes[picks], kind="stable")]
        n, homes = len(picks), self._homes[picks]
        ids = np.arange(self._events, self._events + n)
        times = BEGIN_MS + ids * self._apart_ms
        self._events += n
        self._batch = Batch(
            np.full(n, EVENT, np.int8), np.full(n, UNKNOWN, np.int8), times, ids, times,
            self._random.integers(0, 10**6, (n, self._columns)), np.empty((n, 0)),
            self._keys[picks].tolist(), [b""] * n,
        )  # fmt: skip
        polled = []
        for partition, count in enumerate(np.bincount(homes, minlength=len(self._ends)).tolist()):
            first = self._ends[partition]
            self._ends[partition] += count
            polled.append((partition, [_At(first + i) for i in range(count)]))
        return polled

    def close(self) -> None:
        for partition in self.stage.partitions:
            self.stage.close(partition)


class _Steps:
    """Awaits a piece of work, and takes down how long each of its steps holds the event loop.

    In ms, by the clock and by the CPU: the former counts also what others on the machine take meanwhile.
    """

    def __init__(self, work: Coroutine[Any, Any, None], steps_ms: list[tuple[float, float]]) -> None:
        self._work, self._steps_ms = work, steps_ms

    def __await__(self) -> Generator[Any, None, None]:
        while True:
            began, cpu = time.perf_counter(), time.thread_time()
            try:
                waits_for = self._work.send(None)
            except StopIteration:
                return
            finally:
                took = time.perf_counter() - began, time.thread_time() - cpu
                self._steps_ms.append((took[0] * 1000, took[1] * 1000))
            yield waits_for


async def _steps(work: Coroutine[Any, Any, None], steps_ms: list[tuple[float, float]]) -> None:
    await _Steps(work, steps_ms)


def _resident_mib() -> float:
    """Of this process, now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        raise HeadraceError("Resident memory is read from /proc: run this benchmark on Linux.") from None
    return round(pages * resource.getpagesize() / 2**20, 1)
