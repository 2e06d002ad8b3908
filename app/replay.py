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
    """What is to be sent, in its order: events of all streams and labels, n in all.

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

    def scored(self, pipeline: Pipeline) -> int:
        """How many of the events are predicted."""
        scored = np.array([stream.scored for stream in pipeline.streams])
        return int(scored[self.history.streams[self.rows[~self.is_label]]].sum())


def tape(path: Path, pipeline: Pipeline, start: str | None = None, end: str | None = None) -> Tape:
    """Read a file (app.history.read) and encode what of it lies in [start, end), days or times in ISO form, UTC."""
    file = history.read(path, pipeline)
    times = file.history.times
    low = np.searchsorted(times, history.instant(start)) if start else 0
    high = np.searchsorted(times, history.instant(end)) if end else len(times)
    if low >= high:
        raise HeadraceError(f"{path} has no events between {start} and {end}.")
    span = np.arange(low, high)
    part = file.history.take(span)
    values, keys = _events(file, file.rows[span], part, pipeline)
    if pipeline.labels is None or part.labels is None or file.known is None:
        return Tape(part, np.arange(len(span)), np.zeros(len(span), np.bool_), keys, values)
    # Labels go before events of the same time: what is known at t may be used at t.
    labelled = np.flatnonzero(part.labels != UNKNOWN)
    order = np.argsort(np.concatenate([file.known[span][labelled], part.times]), kind="stable")
    label_values, label_keys = _labels(file.tables[0].take(pa.array(file.rows[span][labelled])), pipeline)
    values, keys = label_values + values, label_keys + keys
    rows = np.concatenate([labelled, np.arange(len(span))])
    return Tape(
        part,
        rows[order],
        order < len(labelled),
        [keys[i] for i in order.tolist()],
        [values[i] for i in order.tolist()],
    )


Records = tuple[list[bytes], list[bytes | None]]  # values and keys


def _events(file: history.EventFile, rows: Ints, part: History, pipeline: Pipeline) -> Records:
    """The records of events, of whichever stream each is."""
    first, n = pipeline.entities[0], len(rows)
    values: list[bytes] = [b""] * n
    keys: list[bytes | None] = [None] * n
    for stream, whole in zip(pipeline.streams, file.tables, strict=True):
        places = np.flatnonzero(part.streams == stream.number)
        table = whole.take(pa.array(rows[places]))
        found = history.as_json(table, list(stream.fields.values()))
        named = _keys(history.key_column(table, first.keys)) if first.is_of(stream) else [None] * len(found)
        for place, value, key in zip(places.tolist(), found, named, strict=True):
            values[place], keys[place] = value, key
    return values, keys


def _labels(table: pa.Table, pipeline: Pipeline) -> Records:
    stream, labels = pipeline.stream, pipeline.labels
    assert labels is not None
    named = [stream.id, stream.time, *(k for e in pipeline.entities if e.labelled for k in e.keys)]
    fields = [stream.fields[name] for name in dict.fromkeys(named)]
    known = Field(labels.known, "timestamp", unit=stream.fields[stream.time].unit)
    fields += [Field(labels.field, "int"), known]
    return history.as_json(table, fields), _keys(table[stream.id])


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
    rows = tape.rows[low:high]
    ids, keys, values = tape.history.ids[rows], tape.keys[low:high], tape.values[low:high]
    topics = [stream.topic for stream in pipeline.streams] + (
        [pipeline.labels.topic] if pipeline.labels else []
    )
    which = np.where(tape.is_label[low:high], len(topics) - 1, tape.history.streams[rows])
    for number, topic in enumerate(topics):
        ours = np.flatnonzero(which == number)
        there = [keys[i] for i in ours.tolist()]
        targets = partitions_of(there, ids[ours], counts[topic]).tolist()
        outbox.put_many(topic, targets, there, [values[i] for i in ours.tolist()])


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
