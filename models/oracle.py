"""The fold in plain Python, to be checked by eye: what `models.windows` must equal to the bit.

A profile is a list of rows in event-time order. Every window is summed afresh from the rows. It is
the oracle of the property tests and the plain statement of the rules; nothing serves from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from models.windows import (
    COUNT,
    DUPLICATE,
    FOLDED,
    LABEL_EARLY,
    LABEL_STALE,
    LABELLED,
    LATE,
    MEAN,
    POSITIVE,
    SHARE,
    TOO_LATE,
    UNKNOWN,
    Aggregate,
)  # fmt: skip


@dataclass
class Row:
    time: int
    id: int
    values: list[int | None]
    label: int = UNKNOWN


@dataclass
class Profile:
    """One entity. retention: the longest delay + window, plus the allowed lateness, ms."""

    aggregates: list[Aggregate]
    retention: int
    rows: list[Row] = field(default_factory=list)
    early: dict[tuple[int, int], int] = field(default_factory=dict)
    newest: int | None = None

    def event(self, time: int, id: int, values: list[int | None]) -> tuple[int, list[float]]:
        """Fold one event; its outcome, and the features as of its own time."""
        if self._forgotten(time):
            return TOO_LATE, self.read(time)
        if any(row.id == id for row in self.rows):
            return DUPLICATE, [math.nan] * len(self.aggregates)
        late = self.newest is not None and time < self.newest
        self.newest = time if self.newest is None else max(self.newest, time)
        row = Row(time, id, values, self.early.pop((time, id), UNKNOWN))
        self.rows = sorted([*self.rows, row], key=lambda r: r.time)  # stable: equal times keep log order
        self.rows = [r for r in self.rows if not self._forgotten(r.time)]
        self.early = {k: label for k, label in self.early.items() if not self._forgotten(k[0])}
        return (LATE if late else FOLDED), self.read(time)

    def label(self, time: int, id: int, state: int) -> int:
        """Set the label of the event (time, id), or let the label wait for it."""
        for row in self.rows:
            if (row.time, row.id) == (time, id):
                row.label = state
                return LABELLED
        if self._forgotten(time):
            return LABEL_STALE
        self.early[time, id] = state
        return LABEL_EARLY

    def read(self, time: int) -> list[float]:
        return [self._value(a, time) for a in self.aggregates]

    def _forgotten(self, time: int) -> bool:
        return self.newest is not None and time <= self.newest - self.retention

    def _value(self, a: Aggregate, time: int) -> float:
        newer, older = time - a.delay, time - a.delay - a.window
        rows = [r for r in self.rows if older < r.time <= newer]
        if a.kind == COUNT:
            return float(len(rows))
        if a.kind == SHARE:
            return sum(r.label == POSITIVE for r in rows) / len(rows) if rows else 0.0
        values = [v for r in rows if (v := r.values[a.value]) is not None]
        total = float(sum(values))  # exact to 2**53, and above it rounded once, as the kernel does
        if a.kind == MEAN:
            return total / (len(values) * a.divisor) if values else math.nan
        return total / a.divisor
