"""Replay: a file's events on their stream in order of time, its labels when they became known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from agents.outbox import Outbox
from app import history, kafka
from app.producer import Producer
from models.errors import HeadraceError
from models.events import key_bytes
from models.fields import Field
from models.history import History
from models.partitions import partitions_of
from models.pipeline import Pipeline
from models.windows import UNKNOWN, Ints

TICK_S = 0.002  # between looks at what is due: the grain of an even rate


@dataclass
class Tape:
    """What is to be sent, in its order: events and labels, n in all.

    rows: (n,) of the history; is_label: (n,); keys, values: the records.
    """

    history: History
    rows: Ints
    is_label: Any
    keys: list[bytes | None]
    values: list[bytes]

    @property
    def events(self) -> int:
        return int((~self.is_label).sum())


def tape(path: Path, pipeline: Pipeline, start: str | None = None, end: str | None = None) -> Tape:
    """Read a file and encode what of it lies in [start, end), days or times in ISO form, UTC."""
    file = history.read(path, pipeline)
    times = file.history.times
    low = np.searchsorted(times, history.instant(start)) if start else 0
    high = np.searchsorted(times, history.instant(end)) if end else len(times)
    if low >= high:
        raise HeadraceError(f"{path} has no events between {start} and {end}.")
    span = slice(int(low), int(high))
    table = file.table.slice(span.start, span.stop - span.start)
    h = file.history
    part = History(
        h.times[span], h.ids[span], h.fields[span], {k: v[span] for k, v in h.keys.items()},
        None if h.labels is None else h.labels[span],
    )  # fmt: skip
    return _record(table, part, None if file.known is None else file.known[span], pipeline)


def _record(table: pa.Table, part: History, known: Ints | None, pipeline: Pipeline) -> Tape:
    stream, labels = pipeline.stream, pipeline.labels
    n = len(table)
    values = history.as_json(table, list(stream.fields.values()))
    keys = _keys(table[pipeline.entities[0].key])
    if labels is None or part.labels is None or known is None:
        return Tape(part, np.arange(n), np.zeros(n, np.bool_), keys, values)
    # Labels go before events of the same time: what is known at t may be used at t.
    labelled = np.flatnonzero(part.labels != UNKNOWN)
    order = np.argsort(np.concatenate([known[labelled], part.times]), kind="stable")
    named = [stream.id, stream.time, *dict.fromkeys(e.key for e in pipeline.entities if e.labelled)]
    fields = [stream.fields[name] for name in named]
    fields += [
        Field(labels.field, "int"),
        Field(labels.known, "timestamp", unit=stream.fields[stream.time].unit),
    ]
    label_table = table.take(pa.array(labelled))
    values = history.as_json(label_table, fields) + values
    keys = _keys(label_table[stream.id]) + keys
    rows = np.concatenate([labelled, np.arange(n)])
    return Tape(
        part,
        rows[order],
        order < len(labelled),
        [keys[i] for i in order.tolist()],
        [values[i] for i in order.tolist()],
    )


async def publish(
    tape: Tape, pipeline: Pipeline, address: str, rate: float | None,
    progress: Callable[[int, int], None] | None = None, sent_at: Any = None,
) -> dict[str, float]:  # fmt: skip
    """Send a tape, at so many events a second or as fast as Kafka takes it.

    The load is open: an event is due at its place whatever came of those before. sent_at: an array
    (events,) that is filled with when each event was due, seconds since the epoch.
    """
    counts = await kafka.partitions_of(address, kafka.wanted_topics(pipeline))
    missing = [t for t, count in counts.items() if not count]
    if missing:
        raise kafka.TopicsWrong(f"Kafka has no topic {missing[0]}; run `headrace topics create`.")
    producer = Producer(address)
    await producer.start(kafka.wanted_topics(pipeline))
    failures: list[Exception] = []
    outbox = Outbox(producer, lambda: time.time_ns() // 1_000_000, failures.append)
    started = time.time()
    try:
        async for low, high in _due(tape, rate, started, outbox, sent_at):
            _put(tape, low, high, pipeline, counts, outbox)
            if progress is not None:
                progress(int((~tape.is_label[:high]).sum()), tape.events)
        await outbox.acknowledged()
    finally:
        await producer.stop()
    return {
        "events": tape.events,
        "labels": len(tape.rows) - tape.events,
        "seconds": round(time.time() - started, 3),
    }


async def _due(tape: Tape, rate: float | None, started: float, outbox: Outbox, sent_at: Any) -> Any:
    """Yield stretches [low, high) of the tape as they fall due."""
    number = np.cumsum(~tape.is_label)  # events up to and including each place
    low, n = 0, len(tape.rows)
    while low < n:
        if rate is None:
            await outbox.room()
            high = min(n, low + 2000)
            if sent_at is not None:
                sent_at[number[low - 1] if low else 0 : number[high - 1]] = time.time()
        else:
            due = (time.time() - started) * rate
            high = int(np.searchsorted(number, due, side="right"))
            if sent_at is not None and high > low:
                events = np.arange(number[low - 1] if low else 0, number[high - 1])
                sent_at[events] = started + (events + 1) / rate
        if high > low:
            yield low, high
            low = high
        await asyncio.sleep(0 if rate is None else TICK_S)


def _put(tape: Tape, low: int, high: int, pipeline: Pipeline, counts: dict[str, int], outbox: Outbox) -> None:
    ids = tape.history.ids[tape.rows[low:high]]
    keys, values = tape.keys[low:high], tape.values[low:high]
    event_targets = partitions_of(keys, ids, counts[pipeline.stream.topic]).tolist()
    labels = pipeline.labels
    label_targets = partitions_of(keys, ids, counts[labels.topic]).tolist() if labels else event_targets
    for i, is_label in enumerate(tape.is_label[low:high].tolist()):
        if is_label and labels is not None:
            outbox.put(labels.topic, label_targets[i], keys[i], values[i])
        else:
            outbox.put(pipeline.stream.topic, event_targets[i], keys[i], values[i])


def parse_rate(text: str) -> float | None:
    """Events a second; None for max."""
    if text == "max":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise HeadraceError(f"--rate {text!r} is no rate; write a number of events a second, or max.")
    return rate


def _keys(column: Any) -> list[bytes | None]:
    return [None if v is None else key_bytes(v) for v in column.to_pylist()]
