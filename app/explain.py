"""Explains the features of a key from its log: as they were when an event was predicted, and as they are now.

The log partition of the key is read from Kafka and folded again, as its stage does; no worker is asked,
and none need run.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec
import numpy as np

from app import kafka
from app.terminal import utc
from app.verify import Intake, same
from models import predictions
from models.errors import HeadraceError
from models.events import Batch, given_ids, key_bytes, streams_of
from models.explain import Explained, Moment, asked, explain, look
from models.filters import Filters
from models.history import arena_for
from models.partitions import partition_of, partitions_of
from models.pipeline import Entity, Pipeline
from models.records import keys_of
from models.windows import CANCELLED, DUPLICATE, EVENT, FOLDED, LATE, OUTCOMES, Arena, Bytes, Ints

CHUNK = 10_000  # records of a log that are in memory at a time, but for those of the key
TAIL = 2000  # records at the end of each partition among which a key that is meant perhaps is looked for


class NotInLog(HeadraceError):
    """The log has nothing of what was asked for."""


class Place(msgspec.Struct, frozen=True):
    """The event that is explained, where it stands in the entity's log, and what became of it there."""

    id: int | str
    time: int
    partition: int
    offset: int
    outcome: str


class Served(msgspec.Struct, frozen=True):
    """The event's prediction: what it holds of the features asked for, and those that differ by a bit.

    score, decision, version: None where there was no model; the score also where it was no number.
    """

    score: float | None
    decision: str | None
    version: str | None
    degraded: bool
    features: dict[str, float | None]
    differing: list[str]


class Explanation(msgspec.Struct, frozen=True):
    """Features of a key at two moments, times in ms. event: None where a time was asked for.

    log_begins: the first time of which the log still has records, None where it is whole; incomplete: the
    features whose window then reaches farther back.
    """

    pipeline: str
    instance: str
    definition: str
    entity: str
    key: str
    then: int
    now: int
    event: Place | None
    prediction: Served | None
    log_begins: int | None
    incomplete: list[str]
    features: list[Explained]


@dataclass(frozen=True)
class KeyLog:
    """What a log says of one key, in log order. newest: the latest event of any key in the partition, ms."""

    partition: int
    batch: Batch
    offsets: Ints
    begins: int | None
    newest: int


async def explained(
    pipeline: Pipeline, address: str, entity_name: str, key: str, features: tuple[str, ...] = (),
    event: str | None = None, at: int | None = None,
) -> Explanation:  # fmt: skip
    """Explain features of a key, all by default: as of an event (its id), a time (ms), or the newest event.

    As of an event: as its prediction was made. As of a time: by what was in the log before anything later
    happened. Raises NotInLog, UnknownFeature, and what Kafka's absence raises.
    """
    entity = pipeline.entity(entity_name)
    names = asked(pipeline, entity, features)
    counts = await kafka.checked_partitions(address, pipeline)
    log = await _read(pipeline, entity, key, counts[entity.log], address)
    ids = _texts_of_ids(pipeline, log.batch)
    now_arena, outcomes = _fold(pipeline, entity, log.batch)
    if at is None:
        row = _row_of(pipeline, log, outcomes, key, event)
        time, stop = int(log.batch.times[row]), row + 1
    else:
        if log.begins is not None and at < log.begins:
            raise NotInLog(f"{entity.log} reaches back to {utc(log.begins)} only; ask for a time after that.")
        row, time = None, at
        stop = int(np.argmax(later)) if (later := log.batch.clocks > at).any() else len(log.batch)
    then_arena, _ = _fold(pipeline, entity, log.batch.take(np.arange(stop)))
    then = look(pipeline.fields, entity, then_arena, 0, time, ids)
    now = look(pipeline.fields, entity, now_arena, 0, max(log.newest, time), ids)
    told = [explain(name, then, now) for name in names]
    place = None if row is None else _place(log, row, outcomes, ids)
    served = None
    if row is not None:
        served = await _served(pipeline, entity, log, row, ids, then, names, counts, address)
    return Explanation(
        pipeline.name, pipeline.instance, pipeline.definition, entity.name, key, then.time, now.time, place,
        prediction=served,
        log_begins=log.begins,
        incomplete=[] if log.begins is None else [t.feature for t in told if (t.then.after or 0) < log.begins],
        features=told,
    )  # fmt: skip


# --- the log -----------------------------------------------------------------------------------


async def _read(pipeline: Pipeline, entity: Entity, key: str, count: int, address: str) -> KeyLog:
    wanted = key.encode()
    partition = partition_of(wanted, count)
    spans = await kafka.offsets_of(address, {entity.log: count})
    cut = next(s for s in spans if s.partition == partition).first > 0
    intake = Intake(pipeline, pipeline.entities.index(entity), count, cut)
    found: list[Batch] = []
    places: list[Ints] = []
    first, newest = None, 0
    async for records in _chunks(kafka.read_between(address, entity.log, {partition: 0})):
        batch, kept = intake.take(records)
        if not len(batch):
            continue
        first = int(batch.clocks[0]) if first is None else first
        newest = max(newest, int(batch.times[batch.kinds == EVENT].max(initial=0)))
        ours = np.array([k is not None and key_bytes(k) == wanted for k in batch.keys], np.bool_)
        found.append(batch.where(ours))
        places.append(np.array([records[i].offset for i in kept[ours].tolist()], np.int64))
    if not any((b.kinds == EVENT).any() for b in found):
        raise await _no_key(entity, key, count, first if cut else None, address)
    return KeyLog(partition, _joined(found), np.concatenate(places), first if cut else None, newest)


async def _chunks(records: Any) -> AsyncIterator[list[Any]]:
    chunk: list[Any] = []
    async with contextlib.aclosing(records):
        async for record in records:
            chunk.append(record)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of several, without what only concerns the way from stage to stage."""
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(Batch)):
        parts = [getattr(b, name) for b in batches]
        if isinstance(parts[0], list):
            columns[name] = [x for part in parts for x in part]
        elif name not in ("sources", "offsets", "previous", "degraded"):
            columns[name] = np.concatenate(parts)
    return Batch(**columns)


async def _no_key(entity: Entity, key: str, count: int, begins: int | None, address: str) -> NotInLog:
    tails = kafka.read_between(address, entity.log, dict.fromkeys(range(count), -TAIL))
    known = {r.key.decode(errors="replace") async for r in tails if r.key}
    near = difflib.get_close_matches(key, known - {key}, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"is it a {entity.key}?"
    return NotInLog(f"{entity.log} has no event of {entity.name} {key}{_since(begins)}; {hint}")


def _row_of(pipeline: Pipeline, log: KeyLog, outcomes: Bytes, key: str, event: str | None) -> int:
    """Which record of the key is the event that was asked for; the newest, and of those the last, if none was."""
    batch = log.batch
    if event is None:
        rows = np.flatnonzero((batch.kinds == EVENT) & np.isin(outcomes, (FOLDED, LATE, CANCELLED)))
        times = batch.times[rows]
        return int(rows[np.flatnonzero(times == times.max())[-1]])
    events = (batch.kinds == EVENT) & (outcomes != DUPLICATE)
    rows = np.flatnonzero(events & np.isin(batch.ids, _ids_of(pipeline, event)))
    if not len(rows):
        known = list(_texts_of_ids(pipeline, batch).values())[-3:]
        raise NotInLog(
            f"The log of {key} has no event {event}{_since(log.begins)}; its last are {', '.join(map(str, known))}."
        )
    return int(rows[0])


def _since(begins: int | None) -> str:
    return "" if begins is None else f" since {utc(begins)}, from when on the log reaches"


def _ids_of(pipeline: Pipeline, text: str) -> Ints:
    """What a text may mean, in each of the streams."""
    found = []
    for stream in pipeline.streams:
        if stream.fields[stream.id].type == "string":
            found.append(stream.identity(text))
        elif text.lstrip("-").isdigit():
            found.append(stream.identity(int(text)))
    return np.array(found, np.int64)


def _texts_of_ids(pipeline: Pipeline, batch: Batch) -> dict[int, int | str]:
    """By 64-bit id, the ids of the events as their streams have them."""
    events = batch.where(batch.kinds == EVENT)
    return dict(zip(events.ids.tolist(), given_ids(pipeline)(events), strict=True))


def _fold(pipeline: Pipeline, entity: Entity, batch: Batch) -> tuple[Arena, Bytes]:
    """The key's profile, in slot 0, and the outcomes."""
    numeric = [f.name for f in pipeline.columns]
    columns = np.array([numeric.index(v) for v in entity.values], np.int64)
    arena = arena_for(entity, np.zeros(1, np.int64))
    _, outcomes = arena.fold(
        np.zeros(len(batch), np.int64), batch.kinds, batch.times, batch.ids,
        np.ascontiguousarray(batch.fields[:, columns]), batch.labels,
        Filters(entity, pipeline.columns).of(batch.fields),
    )  # fmt: skip
    return arena, outcomes


def _place(log: KeyLog, row: int, outcomes: Bytes, ids: dict[int, int | str]) -> Place:
    return Place(
        ids[int(log.batch.ids[row])], int(log.batch.times[row]), log.partition, int(log.offsets[row]),
        OUTCOMES[outcomes[row]],
    )  # fmt: skip


# --- the prediction ----------------------------------------------------------------------------


async def _served(
    pipeline: Pipeline, entity: Entity, log: KeyLog, row: int, ids: dict[int, int | str], then: Moment,
    names: tuple[str, ...], counts: dict[str, int], address: str,
) -> Served | None:  # fmt: skip
    """What was predicted of the event under this definition, None where that is not out or not kept any more."""
    last, event = pipeline.entities[-1], log.batch.take(np.array([row]))
    if not pipeline.streams[int(streams_of(pipeline, event)[0])].scored:
        return None
    if entity is last:
        partition, offset = log.partition, int(log.offsets[row])
    else:
        keys = keys_of(pipeline, len(pipeline.entities) - 1)(event)
        partition, offset = int(partitions_of(keys, event.ids, counts[last.log])[0]), None
    record_key = str(ids[int(event.ids[0])]).encode()
    async with contextlib.aclosing(
        kafka.read_between(address, pipeline.predictions, {partition: 0})
    ) as records:
        async for record in records:
            if record.key != record_key:
                continue
            with contextlib.suppress(msgspec.MsgspecError):  # a predictions topic may be written by hand
                found = predictions.decode(record.value)
                of_it = predictions.identity(pipeline, found) == int(event.ids[0])
                if (
                    of_it
                    and found.definition == pipeline.definition
                    and offset in (None, found.origin.offset)
                ):
                    return _compared(found, then, names)
    return None


def _compared(found: predictions.Prediction, then: Moment, names: tuple[str, ...]) -> Served:
    held = {name: found.features[name] for name in names if name in found.features}
    a = np.array(list(held.values()), np.float64)
    b = np.array([then.values[name] for name in held], np.float64)
    differing = [name for name, equal in zip(held, same(a, b), strict=True) if not equal]
    return Served(found.score, found.decision, found.version, found.degraded, held, differing)
