"""What the fold itself costs: the kernel over columns, without Kafka, decoding or disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from app import history
from app.bench import city
from app.settings import Settings
from models.aggregates import IN_CELLS, plan
from models.errors import HeadraceError
from models.filters import Filters
from models.history import History
from models.pipeline import Entity, Pipeline, find
from models.windows import EVENT, Arena, Ints, Plan

POLL = 4000  # events in a micro-batch
WARM_UP = 1 / 5  # of the events, which do not count: memory that is touched for the first time costs more
FLUSHED = 10_000  # events between flushes: a second at this rate
HOT_RATE, HOT_HOP_MS = 10_000, 1000  # events a second of the one key, and the cell that its entity declares
MANY = 1_000_000
BEGIN_MS = 1_600_000_000_000


@dataclass
class _Feed:
    """Events of one entity as columns; keys are slots."""

    slots: Ints
    times: Ints
    ids: Ints
    values: Ints
    flags: Ints

    def polls(self) -> Iterator[slice]:
        return (slice(at, at + POLL) for at in range(0, len(self.slots), POLL))


def fold(settings: Settings, repeats: int, hot_seconds: int) -> dict[str, Any]:
    """The kernel on a history of card-fraud, on one key with 10,000 events a second, on a million keys with one."""
    pipeline = find("card-fraud", settings.pipelines)
    found = history.read(city(settings), pipeline).history
    feeds = {entity.name: _of_history(pipeline, entity, found) for entity in pipeline.entities}
    first = pipeline.entities[0]
    costs = {e.name: [_us(e.plan, feeds[e.name])[0] for _ in range(repeats)] for e in pipeline.entities}
    _, arena = _us(first.plan, feeds[first.name])
    packed = arena.pack(np.arange(int(feeds[first.name].slots.max()) + 1))
    whole = [sum(costs[e.name][r] for e in pipeline.entities) for r in range(repeats)]
    ordinary = float(np.median(costs[first.name]))
    many = [_us(first.plan, _each_once(first))[0] for _ in range(repeats)]
    hot = _hot(first, hot_seconds)
    return {
        "bench": "fold",
        "pipeline": pipeline.name,
        "events": len(found.times),
        "events_per_s": round(1e6 / float(np.median(whole))),
        "events_per_s_of_each_run": [round(1e6 / us) for us in whole],
        "us_per_event": {entity: round(float(np.median(us)), 3) for entity, us in costs.items()},
        "writes_per_event": round(sum(_written(feed) for feed in feeds.values()), 3),
        "bytes_per_profile": round(float(np.mean([len(p) for p in packed]))),
        "memory_per_profile": round(arena.used / len(packed)),
        "hot_us_per_event": round(hot, 3),
        "hot_ratio": round(hot / ordinary, 2),
        "million_us_per_event": round(float(np.median(many)), 3),
        "million_ratio": round(float(np.median(many)) / ordinary, 2),
    }


def _of_history(pipeline: Pipeline, entity: Entity, found: History) -> _Feed:
    columns = pipeline.columns
    names = [field.name for field in columns]
    values = np.ascontiguousarray(found.fields[:, [names.index(v) for v in entity.values]])
    flags = Filters(entity, columns).of(found.fields)
    return _Feed(found.keys[entity.name], found.times, found.ids, values, flags)


def _each_once(entity: Entity) -> _Feed:
    """A million keys with one event each, in random order, a tenth of a millisecond apart."""
    ids = np.arange(MANY)
    slots = np.random.default_rng(7).permutation(ids)
    values = np.ones((MANY, entity.plan.values), np.int64)
    return _Feed(slots, BEGIN_MS + ids // 10, ids, values, np.zeros(MANY, np.int64))


def _us(wanted: Plan, feed: _Feed) -> tuple[float, Arena]:
    """CPU of one event, and the arena at the end."""
    arena = _empty(wanted, int(feed.slots.max()) + 1)
    kinds = np.full(POLL, EVENT, np.int8)
    counted, began = 0, 0.0
    for poll in feed.polls():
        if not counted and poll.start >= WARM_UP * len(feed.slots):
            began = time.process_time()
            counted = len(feed.slots) - poll.start
        _fold(arena, feed, poll, kinds)
    return (time.process_time() - began) / counted * 1e6, arena


def _hot(entity: Entity, seconds: int) -> float:
    """CPU of one event of a key that gets 10,000 a second, whose entity has a hop."""
    if any(a.kind not in IN_CELLS for a in entity.aggregates):
        raise HeadraceError(f"{entity.name} has aggregates that cells do not tell.")
    arena = _empty(plan(entity.aggregates, [False] * entity.plan.values, 0, 0, HOT_HOP_MS), 1)
    kinds, numbers = np.full(POLL, EVENT, np.int8), np.arange(POLL)
    spent = 0.0
    for at in range(0, seconds * HOT_RATE, POLL):
        values, none = np.ones((POLL, entity.plan.values), np.int64), np.zeros(POLL, np.int64)
        feed = _Feed(none, BEGIN_MS + (at + numbers) * 1000 // HOT_RATE, at + numbers, values, none)
        began = time.process_time()
        _fold(arena, feed, slice(0, POLL), kinds)
        spent += time.process_time() - began
    return spent / (seconds * HOT_RATE) * 1e6


def _empty(wanted: Plan, profiles: int) -> Arena:
    arena = Arena(wanted)
    for _ in range(profiles):
        arena.new()
    return arena


def _fold(arena: Arena, feed: _Feed, poll: slice, kinds: Any) -> None:
    n = len(feed.slots[poll])
    labels = np.zeros(n, np.int8)
    arena.fold(
        feed.slots[poll],
        kinds[:n],
        feed.times[poll],
        feed.ids[poll],
        feed.values[poll],
        labels,
        feed.flags[poll],
    )


def _written(feed: _Feed) -> float:
    """Profiles that flushes write, by event: those that changed since the last one, each once."""
    whole = len(feed.slots) // FLUSHED * FLUSHED
    flushes = np.sort(feed.slots[:whole].reshape(-1, FLUSHED), axis=1)
    return float((np.count_nonzero(np.diff(flushes, axis=1), axis=1) + 1).sum() / whole)
