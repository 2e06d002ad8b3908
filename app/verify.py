"""Proof of a run: fold the same logs again, offline and in log order, and compare every prediction.

The logs are read from Kafka whole; what the worker did in micro-batches, with stores, flushes and
rebalances in between, is done here in one call per entity. Nothing may differ by a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app import kafka
from models.events import Batch, EventDecoder, key_bytes, streams_of
from models.fields import Field
from models.filters import Filters
from models.history import History, arena_for, vectors_of
from models.partitions import partitions_of
from models.pipeline import Entity, Pipeline
from models.predictions import Prediction, decode, identities
from models.records import NEVER, NEWS, RecordCodec, fresh, loosened, skew
from models.vectors import Vectors
from models.windows import DUPLICATE, EVENT, LOST, NULL, Floats, Ints


@dataclass
class Verdict:
    """events: those that must have one prediction; differing: predictions with a feature of other bits.

    lost and doubled count events; cells: features compared. rejected: bad input in the stream.
    """

    events: int
    predictions: int
    lost: int
    doubled: int
    differing: int
    cells: int
    rejected: int

    @property
    def features_equal(self) -> bool:
        return self.cells > 0 and not self.differing


@dataclass
class Latest:
    """An entity's profiles as of their newest event: what a mirror should hold. Times in ms."""

    entity: Entity
    keys: list[bytes]
    times: Ints
    features: Floats


@dataclass
class Expected:
    """What the logs say: vectors (n, width) of the events with these ids (n,), sorted by id.

    places: (n, entities, 2), partition and offset in each entity's log, -1 where it is not in it.
    rejected: bad input of the streams; unrouted: good events of which the first log has nothing.
    """

    ids: Ints
    vectors: Floats
    places: Ints
    latest: list[Latest]
    rejected: int
    unrouted: int = 0

    def rows(self, ids: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """Where these ids stand, and which are there at all."""
        if not len(self.ids):
            return np.zeros(len(ids), np.int64), np.zeros(len(ids), np.bool_)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return at, self.ids[at] == ids


async def check(pipeline: Pipeline, address: str) -> tuple[Verdict, Expected]:
    """Fold the logs as they are now, and compare with the predictions as they are now."""
    expected = await fold_logs(pipeline, address)
    predictions = [decode(r.value) async for r in kafka.read_between(address, pipeline.predictions)]
    ids = identities(pipeline, predictions)
    unique, counts = np.unique(ids, return_counts=True)
    wrong = differing(pipeline, expected, predictions)
    return (
        Verdict(
            events=len(expected.ids),
            predictions=len(predictions),
            lost=int((~np.isin(expected.ids, unique)).sum()) + expected.unrouted,
            doubled=int((counts - 1).sum()),
            differing=int(wrong.sum()),
            cells=len(predictions) * len(pipeline.vector),
            rejected=expected.rejected,
        ),
        expected,
    )


def order_skew(pipeline: Pipeline, history: History, expected: Expected) -> int:
    """Cells that would be other values, had the logs been in event-time order."""
    ideal = vectors_of(pipeline, history)
    rows, known = expected.rows(history.ids)
    return int((~same(ideal[known], expected.vectors[rows[known]])).sum())


async def lead(pipeline: Pipeline, address: str) -> int:
    """How far, at most, the last entity's log was ahead of an event when it came, ms of event time.

    Each writer's times count as no earlier than those before: what was late at the source is so here.
    """
    number = len(pipeline.entities) - 1
    records, logs, _ = await _read(address, pipeline.entities[number].log)
    codec = RecordCodec(pipeline, number)
    batch, kept, _ = codec.decode([r.value or b"" for r in records], [r.key for r in records])
    assert batch.sources is not None
    events = batch.kinds == EVENT
    sources, logs = batch.sources[events], logs[kept][events]
    reached = np.full((int(logs.max(initial=0)) + 1, int(sources.max(initial=0)) + 1), NULL, np.int64)
    return int(skew(logs, sources, batch.clocks[events], reached))


async def _inputs(pipeline: Pipeline, address: str, routed: Ints) -> tuple[int, int]:
    """Of all that was sent to the streams: what is bad, and good events that are not in the first log."""
    rejected = unrouted = 0
    for stream in pipeline.streams:
        records, _, _ = await _read(address, stream.topic)
        sent = np.array([r.timestamp for r in records], np.int64)
        batch, _, rejects = EventDecoder(pipeline, stream).decode([r.value or b"" for r in records], sent)
        rejected += len(rejects)
        unrouted += int((~np.isin(batch.ids, routed)).sum())
    return rejected, unrouted


async def fold_logs(pipeline: Pipeline, address: str) -> Expected:
    """The vectors of all events that are scored, by a fold of the logs in log order."""
    first = pipeline.entities[0]
    count = (await kafka.partitions_of(address, [first.log]))[first.log]
    records, logs, offsets = await _read(address, first.log)
    batch, kept = Intake(pipeline, 0, count).take(records)
    features, outcomes, latest = _fold(first, batch, pipeline.columns)
    scored = np.array([stream.scored for stream in pipeline.streams])[streams_of(pipeline, batch)]
    on = np.flatnonzero((batch.kinds == EVENT) & (outcomes != DUPLICATE) & scored)
    order = on[np.argsort(batch.ids[on], kind="stable")]
    places = np.full((len(order), len(pipeline.entities), 2), -1, np.int64)
    places[:, 0] = np.stack([logs[kept[order]], offsets[kept[order]]], axis=1)
    expected = Expected(
        batch.ids[order], np.empty((len(order), 0)), places, [latest], len(records) - len(kept)
    )
    if pipeline.routed:
        expected.rejected, expected.unrouted = await _inputs(
            pipeline, address, batch.ids[batch.kinds == EVENT]
        )
    fields, gathered = batch.fields[order], [features[order]]
    for number, entity in enumerate(pipeline.entities[1:], 1):
        records, logs, offsets = await _read(address, entity.log)
        batch, kept = Intake(pipeline, number, int(logs.max(initial=0)) + 1).take(records)
        features, outcomes, latest = _fold(entity, batch, pipeline.columns)
        expected.latest.append(latest)
        on = np.flatnonzero((batch.kinds == EVENT) & (outcomes != DUPLICATE))
        rows, known = expected.rows(batch.ids[on])
        placed = np.full((len(expected.ids), features.shape[1]), np.nan)
        placed[rows[known]] = features[on][known]
        at = kept[on][known]
        places[rows[known], number] = np.stack([logs[at], offsets[at]], axis=1)
        gathered.append(placed)
    expected.vectors = Vectors(pipeline).of(fields, np.hstack(gathered))
    return expected


def differing(pipeline: Pipeline, expected: Expected, predictions: list[Prediction]) -> npt.NDArray[np.bool_]:
    """Which predictions (n,) have a feature of other bits, or are of no event of the logs."""
    rows, known = expected.rows(identities(pipeline, predictions))
    if not known.any():
        return ~known
    return ~known | ~same(vectors(pipeline, predictions), expected.vectors[rows]).all(axis=1)


def vectors(pipeline: Pipeline, predictions: list[Prediction]) -> Floats:
    """The features that predictions carry, (n, width), null as NaN."""
    names = pipeline.vector
    return np.array([[p.features.get(n) for n in names] for p in predictions], np.float64).reshape(
        -1, len(names)
    )


def same(a: Floats, b: Floats) -> npt.NDArray[np.bool_]:
    """Which cells have the same bits, any NaN being as good as another."""
    equal: npt.NDArray[np.bool_] = (a.view(np.int64) == b.view(np.int64)) | (np.isnan(a) & np.isnan(b))
    return equal


class Intake:
    """What a stage takes of its log's records: those that are good, in their key's partition, and not seen before.

    number: of the entity; count: partitions of its log; cut: the log has lost its beginning, so what comes
    first of each source is taken as it is.
    """

    def __init__(self, pipeline: Pipeline, number: int, count: int, cut: bool = False) -> None:
        self._count = count
        self._events = None if number or pipeline.routed else EventDecoder(pipeline, pipeline.stream)
        self._codec = RecordCodec(pipeline, number)
        never = np.full((count, 1), NEVER, np.int64)
        self._seen: Ints = loosened(never) if cut else never
        self._never = self._seen[0, 0]

    def take(self, records: Sequence[Any]) -> tuple[Batch, Ints]:
        """The batch, and which of the records they are. Each partition's come in log order, in any pieces."""
        values, logs = [r.value or b"" for r in records], np.array([r.partition for r in records], np.int64)
        if self._events is not None:
            sent = np.array([r.timestamp for r in records], np.int64)
            batch, kept, _ = self._events.decode(values, sent)
            good = at_home(batch, logs[kept], self._count)
        else:
            batch, kept, _ = self._codec.decode(values, [r.key for r in records])
            good = self._fresh(batch, logs[kept]) & (batch.kinds != LOST)
        return batch.where(good), kept[good]

    def _fresh(self, batch: Batch, logs: Ints) -> npt.NDArray[np.bool_]:
        assert batch.sources is not None and batch.offsets is not None and batch.previous is not None
        more = int(batch.sources.max(initial=0)) + 1 - self._seen.shape[1]
        if more > 0:
            self._seen = np.pad(self._seen, ((0, 0), (0, more)), constant_values=self._never)
        news: npt.NDArray[np.bool_] = (
            fresh(logs, batch.sources, batch.offsets, batch.previous, self._seen) == NEWS
        )
        return news


def at_home(batch: Batch, logs: Ints, count: int) -> npt.NDArray[np.bool_]:
    """Which records stand in their key's partition, as workers ask of the stream's."""
    keys = [None if k is None else key_bytes(k) for k in batch.keys]
    keyless = np.array([k is None for k in keys], np.bool_)
    home: npt.NDArray[np.bool_] = keyless | (partitions_of(keys, batch.ids, count) == logs)
    return home


def _fold(entity: Entity, batch: Batch, fields: Sequence[Field]) -> tuple[Floats, Any, Latest]:
    codes: dict[Any, int] = {None: -1}
    slots = np.array([codes.setdefault(k, len(codes) - 1) for k in batch.keys], np.int64)
    names = [field.name for field in fields]
    columns = np.array([names.index(v) for v in entity.values], np.int64)
    values = np.ascontiguousarray(batch.fields[:, columns])
    arena = arena_for(entity, slots)
    features, outcomes = arena.fold(
        slots,
        batch.kinds,
        batch.times,
        batch.ids,
        values,
        batch.labels,
        Filters(entity, fields).of(batch.fields),
    )
    del codes[None]
    newest = arena.newest(np.arange(len(codes)))
    used = np.flatnonzero(newest != NULL)  # a label that came before any event has made no values yet
    keys = [key_bytes(k) for k in codes]
    latest = Latest(entity, [keys[i] for i in used.tolist()], newest[used], arena.read_at(used, newest[used]))
    return features, outcomes, latest


async def _read(address: str, topic: str) -> tuple[list[Any], Ints, Ints]:
    """A log's records in log order, and where each stands."""
    records = [r async for r in kafka.read_between(address, topic)]
    records.sort(key=lambda r: (r.partition, r.offset))
    return (
        records,
        np.array([r.partition for r in records], np.int64),
        np.array([r.offset for r in records], np.int64),
    )
