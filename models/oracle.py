"""The fold in plain Python, to be checked by eye: what `models.windows` must equal to the bit.

A profile is a list of rows in event-time order. Every window is computed afresh from the rows. It is
the oracle of the property tests and the plain statement of the rules; nothing serves from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from models import windows as w
from models.aggregates import OF_ROWS, Aggregate


@dataclass
class Row:
    time: int
    id: int
    values: list[int | None]
    label: int = w.UNKNOWN
    flags: int = 0


@dataclass
class Profile:
    """One entity. retention: the longest delay + window, plus the allowed lateness, ms.

    hop: times count as the beginning of a cell of so many ms, and ids are not looked at; 0 for neither.
    """

    aggregates: list[Aggregate]
    retention: int
    hop: int = 0
    rows: list[Row] = field(default_factory=list)
    early: dict[tuple[int, int], int] = field(default_factory=dict)  # labels and reversals that wait
    reversed: list[tuple[int, int]] = field(default_factory=list)  # (time, id) of events that were taken out
    newest: int | None = None
    ever: list[Row] = field(default_factory=list)  # of every event that was folded, for what counts for life

    def event(self, time: int, id: int, values: list[int | None], flags: int = 0) -> tuple[int, list[float]]:
        """Fold one event; its outcome, and the features as of its own time."""
        at = time // self.hop * self.hop if self.hop else time
        if self._forgotten(at):
            return w.TOO_LATE, self.read(time)
        if not self.hop and id in [*(row.id for row in self.rows), *(gone for _, gone in self.reversed)]:
            return w.DUPLICATE, [math.nan] * sum(a.width for a in self.aggregates)
        late = self.newest is not None and at < self.newest
        self.newest = at if self.newest is None else max(self.newest, at)
        state = self.early.pop((at, id), w.UNKNOWN)
        if (
            state == w.REVERSED
        ):  # as if it had been folded, and taken out at once: its own row is in no window
            self.reversed.append((at, id))
        else:
            row = Row(at, id, values, state, flags)
            self.ever.append(row)
            self.rows = sorted([*self.rows, row], key=lambda r: r.time)  # stable: equal times keep log order
        self.rows = [r for r in self.rows if not self._forgotten(r.time)]
        self.early = {k: label for k, label in self.early.items() if not self._forgotten(k[0])}
        self.reversed = [k for k in self.reversed if not self._forgotten(k[0])]
        if state == w.REVERSED:
            return w.CANCELLED, self.read(time)
        return (w.LATE if late else w.FOLDED), self.read(time)

    def label(self, time: int, id: int, state: int) -> int:
        """Set the label of the event (time, id), take it out if it is REVERSED, or let that wait for it."""
        if self.hop and state == w.REVERSED:
            return w.LABEL_STALE
        for row in self.rows:
            if (row.time, row.id) == (time, id):
                if state == w.REVERSED:
                    return self._take_out(row)
                row.label = state
                return w.LABELLED
        over = (time, id) in self.reversed or self.early.get((time, id)) == w.REVERSED
        if over or self._forgotten(time):
            return w.LABEL_STALE
        self.early[time, id] = state
        return w.LABEL_EARLY

    def _take_out(self, row: Row) -> int:
        """The newest time stays, and what it has made forgotten."""
        self.rows = [r for r in self.rows if r is not row]
        self.ever = [r for r in self.ever if r is not row]
        self.reversed.append((row.time, row.id))
        return w.TAKEN_OUT

    def read(self, time: int) -> list[float]:
        return [value for a in self.aggregates for value in self._values(a, time)]

    def _forgotten(self, time: int) -> bool:
        return self.newest is not None and time <= self.newest - self.retention

    def _values(self, a: Aggregate, time: int) -> list[float]:
        newer = time - a.delay
        if a.window is None:
            rows = [r for r in self.ever if r.time <= newer or self._forgotten(r.time)]
        else:
            rows = [r for r in self.rows if newer - a.window < r.time <= newer]
        rows = [r for r in rows if a.filter is None or r.flags >> a.filter & 1]
        valued = [(r, 1 if a.kind in OF_ROWS else r.values[a.value]) for r in rows]
        found = [(r, v) for r, v in valued if v is not None]
        result = FORMULAS[a.kind](found, a, newer)
        return (result + [math.nan] * a.width)[: a.width]


# What counts, in event-time order, each row with its value (1 where the aggregate is of rows) in units of
# 1 / divisor; the aggregate; the newer end of its window. A result that is shorter than `width` ends in NaN.
Formula = Callable[[list[tuple[Row, int]], Aggregate, int], list[float]]


def _sum(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    return [float(sum(v for _, v in found)) / a.divisor]  # exact to 2**53, and above it rounded once


def _mean(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    return [float(sum(v for _, v in found)) / (len(found) * a.divisor)] if found else []


def _variance(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    """n * sum(v**2) - sum(v)**2 as an exact integer, over n**2: the variance of a population."""
    if not found:
        return []
    n, divisor = float(len(found)), float(a.divisor)
    spread = len(found) * sum(v * v for _, v in found) - sum(v for _, v in found) ** 2
    exact = (
        float(spread >> 90) * 2.0**90 + float(spread >> 30 & 2**60 - 1) * 2.0**30 + float(spread & 2**30 - 1)
    )
    return [exact / (n * n * divisor * divisor)]


def _share(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    return [sum(r.label == w.POSITIVE for r, _ in found) / len(found) if found else 0.0]


def _coverage(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    return [sum(r.label != w.UNKNOWN for r, _ in found) / len(found)] if found else []


def _quantile(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    """The least value that so large a part of all does not exceed: the nearest rank."""
    values = sorted(v for _, v in found)
    return [values[max(-(-len(values) * a.number // 1_000_000), 1) - 1] / a.divisor] if values else []


def _most_frequent(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    """By how often they occur, and of equally frequent ones the smaller first."""
    counts = Counter(v for _, v in found)
    return [v / a.divisor for v in sorted(counts, key=lambda v: (-counts[v], v))]


def _decayed(found: list[tuple[Row, int]], a: Aggregate, newer: int) -> list[float]:
    """Values times 2**(-age / half-life), weights rounded down to steps of a 4096th half-life and 1 / 2**24."""
    total_high = total_low = 0
    for row, value in found:
        halvings, rest = divmod(newer - row.time, a.number)
        step = rest * w.DECAY_STEPS // a.number
        weight = round(2 ** (w.HALVINGS - step / w.DECAY_STEPS)) >> halvings
        total_high += (value >> w.LOW_BITS) * weight
        total_low += (value % 2**w.LOW_BITS) * weight
    return [(float(total_high) * 2**w.LOW_BITS + float(total_low)) / (float(2**w.HALVINGS) * a.divisor)]


FORMULAS: dict[int, Formula] = {
    w.COUNT: lambda found, a, newer: [float(len(found))],
    w.SUM: _sum,
    w.MEAN: _mean,
    w.VARIANCE: _variance,
    w.STDDEV: lambda found, a, newer: [math.sqrt(v) for v in _variance(found, a, newer)],
    w.RATE: lambda found, a, newer: [len(found) * a.number / (a.window or 1)],
    w.SHARE: _share,
    w.POSITIVES: lambda found, a, newer: [float(sum(r.label == w.POSITIVE for r, _ in found))],
    w.COVERAGE: _coverage,
    w.FIRST: lambda found, a, newer: [v / a.divisor for _, v in found[:1]],
    w.LAST: lambda found, a, newer: [v / a.divisor for _, v in found[-1:]],
    w.LAST_K: lambda found, a, newer: [v / a.divisor for _, v in reversed(found)],
    w.MIN: lambda found, a, newer: [v / a.divisor for v in sorted(v for _, v in found)[:1]],
    w.MAX: lambda found, a, newer: [v / a.divisor for v in sorted(v for _, v in found)[-1:]],
    w.SINCE_LAST: lambda found, a, newer: [(newer - r.time) / 1000 for r, _ in found if r.time < newer][-1:],
    w.DISTINCT: lambda found, a, newer: [float(len({v for _, v in found}))],
    w.QUANTILE: _quantile,
    w.MOST_FREQUENT: _most_frequent,
    w.DECAYED_COUNT: _decayed,
    w.DECAYED_SUM: _decayed,
}
