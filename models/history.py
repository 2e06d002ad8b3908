"""A whole history at once: the same fold over columns that nobody streamed.

Used to make training data from history, and to fold a log again and compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.filters import Filters
from models.pipeline import Entity, Pipeline
from models.vectors import Vectors
from models.windows import EVENT, LABEL, Arena, Bytes, Floats, Ints


@dataclass
class History:
    """Events as columns, n of them, in event-time order.

    times, ids: (n,) int64; fields: (n, f) numeric block (see models.events); keys: by entity, (n,) codes
    from 0, -1 for null; labels: (n,) states, None where the history has none; streams: (n,) numbers.
    """

    times: Ints
    ids: Ints
    fields: Ints
    keys: dict[str, Ints]
    labels: Bytes | None
    streams: Ints

    def take(self, index: Ints) -> History:
        """These events, in this order. index: (m,)."""
        return History(
            self.times[index], self.ids[index], self.fields[index],
            {entity: codes[index] for entity, codes in self.keys.items()},
            None if self.labels is None else self.labels[index], self.streams[index],
        )  # fmt: skip


def fold_history(pipeline: Pipeline, history: History) -> Floats:
    """The features (n, k) of all entities, in their order, as of each event.

    A label takes its place right behind its event, so a feature sees it from its delay on.
    """
    features = []
    numeric = [f.name for f in pipeline.columns]
    for entity in pipeline.entities:
        columns = np.array([numeric.index(v) for v in entity.values], np.int64)
        values = np.ascontiguousarray(history.fields[:, columns])
        flags = Filters(entity, pipeline.columns).of(history.fields)
        slots, labels = history.keys[entity.name], history.labels
        kinds = np.full(len(slots), EVENT, np.int8)
        if entity.labelled and labels is not None:
            folded, _ = fold_entity(
                entity, np.repeat(slots, 2), np.tile(np.array([EVENT, LABEL], np.int8), len(slots)),
                np.repeat(history.times, 2), np.repeat(history.ids, 2), np.repeat(values, 2, axis=0),
                np.repeat(labels, 2), np.repeat(flags, 2),
            )  # fmt: skip
            folded = folded[::2]
        else:
            none = np.zeros(len(slots), np.int8)
            folded, _ = fold_entity(entity, slots, kinds, history.times, history.ids, values, none, flags)
        features.append(folded)
    return np.hstack(features)


def fold_entity(
    entity: Entity,
    codes: Ints,
    kinds: Bytes,
    times: Ints,
    ids: Ints,
    values: Ints,
    labels: Bytes,
    flags: Ints,
) -> tuple[Floats, Bytes]:
    """Features and outcomes of one entity's records in this order. codes: keys as in History."""
    return arena_for(entity, codes).fold(codes, kinds, times, ids, values, labels, flags)


def arena_for(entity: Entity, codes: Ints) -> Arena:
    """An arena with an empty profile for each of these keys, whose slots are the codes."""
    arena = Arena(entity.plan)
    for _ in range(int(codes.max(initial=-1)) + 1):
        arena.new()
    return arena


def vectors_of(pipeline: Pipeline, history: History) -> Floats:
    """The vectors (n, width) that the events of a history would have been served with, were they scored."""
    return Vectors(pipeline).of(history.fields, fold_history(pipeline, history))
