"""Why a feature has its value: the events in its window, then and now, and what has changed between.

A `Moment` is a profile as it was known at one point of its log, looked at at one time. Its values are
the kernel's, and its events the kernel's rows; nothing is computed a second time here, so an aggregate
of any kind is explained.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from models.aggregates import Aggregate
from models.errors import HeadraceError
from models.fields import Field, as_float
from models.pipeline import Entity, Pipeline
from models.windows import NULL, Arena, Ints

Label = Literal["unknown", "negative", "positive"]

_LABELS: tuple[Label, ...] = ("unknown", "negative", "positive")  # by state


class UnknownFeature(HeadraceError):
    """An entity has no feature of this name."""

    def __init__(self, pipeline: Pipeline, entity: Entity, name: str) -> None:
        owners = {n: e.name for e in pipeline.entities for n in e.features}
        near = difflib.get_close_matches(name, entity.features, 1)
        if name in owners:
            hint = f"it is one of {owners[name]}."
        else:
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(entity.features) or 'none'}."
        super().__init__(f"{entity.name} has no feature {name!r}; {hint}")


class Event(msgspec.Struct, frozen=True):
    """A row of a profile. time: ms; values: of the fields that the entity's features read, in their own
    unit, a category's text, a string's hash, None where absent; label: None where no feature of the entity looks at
    labels."""

    id: int | str
    time: int
    values: dict[str, float | str | None]
    label: Label | None


class View(msgspec.Struct, frozen=True):
    """A feature at one moment. value: NaN where there is none; the window is (after, until], in ms, after None for
    life.

    events: those in the window that pass the filter, in event-time order; outside: how many others the profile
    remembers. A profile with a hop remembers none, and what counts for life may be of forgotten ones.
    """

    value: float
    after: int | None
    until: int
    events: list[Event]
    outside: int


class Relabelled(msgspec.Struct, frozen=True):
    """An event that is in both windows, with another label."""

    id: int | str
    time: int
    before: Label
    now: Label


class Explained(msgspec.Struct, frozen=True):
    """A feature at two moments, and by which events its windows differ."""

    feature: str
    then: View
    now: View
    came: list[Event]
    left: list[Event]
    relabelled: list[Relabelled]


@dataclass(frozen=True)
class Moment:
    """A profile as it was known at one point of its log, at a time in ms. values: by feature; flags: of each
    event, the filters that it passes (models.filters).
    """

    entity: Entity
    time: int
    values: dict[str, float]
    events: list[Event]
    flags: list[int]

    def view(self, feature: str) -> View:
        """One feature."""
        one = _aggregate(self.entity, feature)
        until = self.time - one.delay
        after = None if one.window is None else until - one.window
        start = 0 if after is None else bisect_right(self.events, after, key=lambda e: e.time)
        stop = bisect_right(self.events, until, key=lambda e: e.time)
        events = [
            self.events[i]
            for i in range(start, stop)
            if one.filter is None or self.flags[i] >> one.filter & 1
        ]
        return View(self.values[feature], after, until, events, len(self.events) - len(events))


def look(
    fields: Mapping[str, Field],
    entity: Entity,
    arena: Arena,
    slot: int,
    time: int,
    ids: Mapping[int, int | str],
) -> Moment:
    """A profile of an arena as it is now, at a time in ms.

    ids: of the events as the stream has them, by 64-bit id, where they are known and strings.
    """
    (features,) = arena.read_at(np.array([slot]), np.array([time]))
    rows = arena.rows(slot)
    of_values = [fields[name] for name in entity.values]
    columns = [_readable(np.ascontiguousarray(rows.values[:, v]), field) for v, field in enumerate(of_values)]
    events = [
        Event(ids.get(id_, id_), at, found, _LABELS[state] if entity.labelled else None)
        for id_, at, found, state in zip(
            rows.ids.tolist(), rows.times.tolist(), _by_name(entity, columns, len(rows.ids)),
            rows.labels.tolist(), strict=True,
        )
    ]  # fmt: skip
    values = dict(zip(entity.features, features.tolist(), strict=True))
    return Moment(entity, time, values, events, rows.flags.tolist())


def explain(feature: str, then: Moment, now: Moment) -> Explained:
    """One feature of one profile at two moments."""
    before, after = then.view(feature), now.view(feature)
    old, new = ({(e.id, e.time): e for e in view.events} for view in (before, after))
    return Explained(
        feature,
        before,
        after,
        came=[e for at, e in new.items() if at not in old],
        left=[e for at, e in old.items() if at not in new],
        relabelled=[
            Relabelled(e.id, e.time, old[at].label or "unknown", e.label or "unknown")
            for at, e in new.items()
            if at in old and old[at].label != e.label
        ],
    )


def _aggregate(entity: Entity, feature: str) -> Aggregate:
    """The aggregate that gives this feature, alone or with others."""
    return [a for a in entity.aggregates for _ in range(a.width)][entity.features.index(feature)]


def asked(pipeline: Pipeline, entity: Entity, names: tuple[str, ...]) -> tuple[str, ...]:
    """These features, all of the entity's where none is named. Raises UnknownFeature."""
    for name in names:
        if name not in entity.features:
            raise UnknownFeature(pipeline, entity, name)
    return names or entity.features


def _readable(column: Ints, field: Field) -> list[float | str | None]:
    """A column's values as a person reads them."""
    if not field.textual:
        return [None if x != x else x for x in as_float(column, field).tolist()]  # noqa: PLR0124
    if field.type == "category":
        names = dict(enumerate(field.values))
        return [None if code == NULL else names.get(code, "other") for code in column.tolist()]
    return [None if code == NULL else f"hash {code & 2**64 - 1:016x}" for code in column.tolist()]


def _by_name(
    entity: Entity, columns: list[list[float | str | None]], n: int
) -> list[dict[str, float | str | None]]:
    rows = zip(*columns, strict=True) if columns else [()] * n
    return [dict(zip(entity.values, row, strict=True)) for row in rows]
