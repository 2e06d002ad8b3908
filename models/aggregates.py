"""Aggregates by name, and the plan of an entity: decided once, what every fold and read repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models import windows
from models.windows import Plan

KINDS = {
    "count": windows.COUNT,
    "sum": windows.SUM,
    "mean": windows.MEAN,
    "variance": windows.VARIANCE,
    "stddev": windows.STDDEV,
    "rate": windows.RATE,
    "share": windows.SHARE,
    "positives": windows.POSITIVES,
    "coverage": windows.COVERAGE,
    "first": windows.FIRST,
    "last": windows.LAST,
    "last_k": windows.LAST_K,
    "min": windows.MIN,
    "max": windows.MAX,
    "since_last": windows.SINCE_LAST,
    "distinct": windows.DISTINCT,
    "quantile": windows.QUANTILE,
    "most_frequent": windows.MOST_FREQUENT,
    "decayed_count": windows.DECAYED_COUNT,
    "decayed_sum": windows.DECAYED_SUM,
}
FOR_LIFE = frozenset({windows.COUNT, windows.SUM, windows.MEAN, windows.VARIANCE, windows.STDDEV})
LISTS = frozenset({windows.LAST_K, windows.MOST_FREQUENT})
DECAYED = frozenset({windows.DECAYED_COUNT, windows.DECAYED_SUM})
OF_LABELS = frozenset({windows.SHARE, windows.POSITIVES, windows.COVERAGE})
OF_ROWS = frozenset({windows.COUNT, windows.RATE, windows.SINCE_LAST, windows.DECAYED_COUNT, *OF_LABELS})
IN_CELLS = FOR_LIFE | {windows.RATE}  # what a profile with a hop has
_ZERO_OF_NOTHING = frozenset({
    windows.COUNT, windows.SUM, windows.RATE, windows.SHARE, windows.POSITIVES, windows.DISTINCT,
    windows.DECAYED_COUNT, windows.DECAYED_SUM,
})  # fmt: skip


@dataclass(frozen=True)
class Aggregate:
    """One feature of an entity: `kind` over (t - delay - window, t - delay], times in ms.

    window: None for life. value: the index of the value column, where the kind has one; divisor: its unit (100
    for cents). number: k of last_k and most_frequent, millionths of a quantile, ms of a half-life or of what a
    rate is per. filter: the index of the filter that events must pass, None for all.
    """

    kind: int
    window: int | None
    delay: int = 0
    value: int = 0
    divisor: int = 1
    number: int = 0
    filter: int | None = None

    @property
    def width(self) -> int:
        """How many features it gives."""
        return self.number if self.kind in LISTS else 1


def plan(
    aggregates: Sequence[Aggregate], optional: Sequence[bool], lateness: int, filters: int = 0, hop: int = 0
) -> Plan:
    """optional: of each value column, whether an event may lack it. lateness: how late an event may be and still
    repair, ms. hop: ms of a cell whose events share a row, 0 for a row each.
    """
    return _Planner(aggregates, optional, lateness, filters, hop).plan()


class _Planner:
    def __init__(
        self, aggregates: Sequence[Aggregate], optional: Sequence[bool], lateness: int, filters: int, hop: int
    ) -> None:
        self.aggregates, self.optional, self.filters, self.hop = aggregates, optional, filters, hop
        bounds = {a.delay for a in aggregates} | {
            a.delay + a.window for a in aggregates if a.window is not None
        }
        self.bounds = sorted(bounds)
        self.retention = max(max(bounds, default=0) + lateness, hop, 1)  # the newest row is never forgotten
        self.columns: list[tuple[int, int, int]] = []
        self.lives: set[int] = set()

    def plan(self) -> Plan:
        # A row's values are what it adds to these, so they come first, whatever the aggregates are.
        raw = [] if self.hop else [_places(self.raw(v)) for v in range(len(self.optional))]
        ops, out = [], 0
        for aggregate in self.aggregates:
            ops.append(self.op(aggregate, out))
            out += aggregate.width
        columns = [(*column, int(c in self.lives)) for c, column in enumerate(self.columns)]
        return Plan(
            np.array(self.bounds, np.int64),
            np.array(ops, np.int64).reshape(len(ops), 15),
            np.array(columns, np.int64).reshape(len(columns), 4),
            np.array(raw, np.int64).reshape(len(raw), 2),
            np.array(
                [round(2 ** (windows.HALVINGS - i / windows.DECAY_STEPS)) for i in range(windows.DECAY_STEPS)]
            ),
            self.retention,
            len(self.optional),
            self.filters,
            self.hop,
            out,
        )

    def raw(self, value: int) -> tuple[int, int]:
        summed = self.column(windows.VALUE, value)
        return summed, self.column(windows.VALUED, value) if self.optional[value] else -1

    def column(self, what: int, value: int = -1, of: int = -1) -> int:
        """The running column of this meaning: one for all aggregates that need it."""
        wanted = (what, value, of)
        if wanted not in self.columns:
            self.columns.append(wanted)
        return self.columns.index(wanted)

    def op(self, a: Aggregate, out: int) -> tuple[int, ...]:
        before = -1 if a.filter is None else a.filter
        summed, squares = self.sums(a, before)
        counted = self.counted(a, before) if a.kind < windows.FIRST else -1
        raw, valued = (-1, -1)
        if a.kind not in OF_ROWS and a.kind >= windows.FIRST:
            raw, valued = self.raw(a.value)
        older = -1 if a.window is None else self.bounds.index(a.delay + a.window)
        if a.window is None:
            self.lives |= {c for c in (summed, counted) if c >= 0}
            self.lives |= {squares, squares + 1, squares + 2} if squares >= 0 else set()
        places = _places((summed, counted, squares, raw, valued))
        return (
            a.kind, self.bounds.index(a.delay), older, *places, a.divisor, a.number, before, out, a.width,
            a.window or 0, 0 if a.kind in _ZERO_OF_NOTHING else 1,
        )  # fmt: skip

    def sums(self, a: Aggregate, of: int) -> tuple[int, int]:
        """The running columns of the sum, and the first of three of squares."""
        summed = squares = -1
        if a.kind in (windows.SUM, windows.MEAN, windows.VARIANCE, windows.STDDEV):
            summed = self.column(windows.VALUE, a.value, of)
        elif a.kind in (windows.SHARE, windows.POSITIVES):
            summed = self.column(windows.POSITIVE_ROWS, -1, of)
        elif a.kind == windows.COVERAGE:
            summed = self.column(windows.LABELLED_ROWS, -1, of)
        if a.kind in (windows.VARIANCE, windows.STDDEV):
            squares, *_ = [
                self.column(part, a.value, of)
                for part in (windows.HIGH_HIGH, windows.HIGH_LOW, windows.LOW_LOW)
            ]
        return summed, squares

    def counted(self, a: Aggregate, of: int) -> int:
        """The running column of how many count; -1 where that is all rows."""
        of_values = a.kind in (windows.MEAN, windows.VARIANCE, windows.STDDEV) and self.optional[a.value]
        if of_values:
            return self.column(windows.VALUED, a.value, of)
        if of >= 0 or a.window is None or self.hop:
            return self.column(windows.ROWS, -1, of)
        return -1


def _places(columns: Sequence[int]) -> tuple[int, ...]:
    """Where running columns stand in a row."""
    return tuple(c + windows.SUMS if c >= 0 else -1 for c in columns)
