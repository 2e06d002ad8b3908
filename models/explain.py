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

from models.errors import HeadraceError
from models.events import as_float
from models.pipeline import Entity, Pipeline, Stream
from models.windows import Arena, Floats

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
    unit, None where absent; label: None where no feature of the entity looks at labels."""

    id: int | str
    time: int
    values: dict[str, float | None]
    label: Label | None


class View(msgspec.Struct, frozen=True):
    """A feature at one moment. value: NaN where there is none; the window is (after, until], in ms.

    events: those in the window, in event-time order; outside: how many others the profile remembers.
    """

    value: float
    after: int
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
    """A profile as it was known at one point of its log, at a time in ms. values: by feature."""

    entity: Entity
    time: int
    values: dict[str, float]
    events: list[Event]

    def view(self, feature: str) -> View:
        """One feature."""
        after, until = window(self.entity, feature, self.time)
        start, stop = (bisect_right(self.events, edge, key=lambda e: e.time) for edge in (after, until))
        return View(
            self.values[feature], after, until, self.events[start:stop], len(self.events) - (stop - start)
        )


def look(
    stream: Stream, entity: Entity, arena: Arena, slot: int, time: int, ids: Mapping[int, int | str]
) -> Moment:
    """A profile of an arena as it is now, at a time in ms.

    ids: of the events as the stream has them, by 64-bit id, where they are known and strings.
    """
    (features,) = arena.read_at(np.array([slot]), np.array([time]))
    rows = arena.rows(slot)
    fields = [stream.fields[name] for name in entity.values]
    columns = [as_float(np.ascontiguousarray(rows.values[:, v]), field) for v, field in enumerate(fields)]
    events = [
        Event(ids.get(id_, id_), at, values, _LABELS[state] if entity.labelled else None)
        for id_, at, values, state in zip(
            rows.ids.tolist(), rows.times.tolist(), _by_name(entity, columns, len(rows.ids)),
            rows.labels.tolist(), strict=True,
        )
    ]  # fmt: skip
    return Moment(entity, time, dict(zip(entity.features, features.tolist(), strict=True)), events)


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


def window(entity: Entity, feature: str, time: int) -> tuple[int, int]:
    """The bounds of a feature's window at a time: after the first, until and with the second, ms."""
    _, newer, older, *_ = entity.plan.ops[entity.features.index(feature)].tolist()
    return time - int(entity.plan.bounds[older]), time - int(entity.plan.bounds[newer])


def asked(pipeline: Pipeline, entity: Entity, names: tuple[str, ...]) -> tuple[str, ...]:
    """These features, all of the entity's where none is named. Raises UnknownFeature."""
    for name in names:
        if name not in entity.features:
            raise UnknownFeature(pipeline, entity, name)
    return names or entity.features


def _by_name(entity: Entity, columns: list[Floats], n: int) -> list[dict[str, float | None]]:
    rows = zip(*(c.tolist() for c in columns), strict=True) if columns else [()] * n
    return [
        {name: None if x != x else x for name, x in zip(entity.values, row, strict=True)}  # noqa: PLR0124
        for row in rows
    ]
