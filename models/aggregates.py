"""Aggregates by name, and the plan of an entity: decided once, what every fold and read repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models import windows
from models.windows import Plan


class Described(NamedTuple):
    """An aggregate as the reference shows it. value: the formula; example: a feature as a pipeline file has it, and
    its values for the payments of models.reference.
    """

    kind: int
    value: str
    example: tuple[str, tuple[float, ...]]


AGGREGATES = {
    "count": Described(windows.COUNT, "n", ("{aggregate: count, window: 10s}", (4,))),
    "sum": Described(windows.SUM, "sum(v) / unit", ("{aggregate: sum, of: AMOUNT, window: 10s}", (12,))),
    "mean": Described(
        windows.MEAN, "sum(v) / (m x unit)", ("{aggregate: mean, of: AMOUNT, window: 10s}", (3,))
    ),
    "variance": Described(
        windows.VARIANCE,
        "(m x sum(v^2) - sum(v)^2) / (m^2 x unit^2): of a population; the numerator is exact in 128 bits",
        ("{aggregate: variance, of: AMOUNT, window: 10s}", (2,)),
    ),
    "stddev": Described(
        windows.STDDEV,
        "the square root of `variance`",
        ("{aggregate: stddev, of: AMOUNT, window: 10s}", (1.4142135623730951,)),
    ),
    "rate": Described(windows.RATE, "n x per / window", ("{aggregate: rate, window: 10s, per: 1m}", (24,))),
    "share": Described(
        windows.SHARE,
        "positive labels / n, unknown ones counting in n",
        ("{aggregate: share, of: FRAUD, window: 10s, delay: 1s}", (0.3333333333333333,)),
    ),
    "positives": Described(
        windows.POSITIVES,
        "positive labels",
        ("{aggregate: positives, of: FRAUD, window: 10s, delay: 1s}", (1,)),
    ),
    "coverage": Described(
        windows.COVERAGE,
        "labels that are known / n",
        ("{aggregate: coverage, of: FRAUD, window: 10s, delay: 1s}", (0.6666666666666666,)),
    ),
    "first": Described(
        windows.FIRST,
        "the oldest v / unit; of equal times the first in the log",
        ("{aggregate: first, of: AMOUNT, window: 10s}", (1,)),
    ),
    "last": Described(
        windows.LAST,
        "the newest v / unit; of equal times the last in the log",
        ("{aggregate: last, of: AMOUNT, window: 10s}", (5,)),
    ),
    "last_k": Described(
        windows.LAST_K,
        "the newest v / unit, the one before it, and so on, k of them",
        ("{aggregate: last_k, k: 3, of: AMOUNT, window: 10s}", (5, 3, 3)),
    ),
    "min": Described(
        windows.MIN, "the smallest v / unit", ("{aggregate: min, of: AMOUNT, window: 10s}", (1,))
    ),
    "max": Described(
        windows.MAX, "the largest v / unit", ("{aggregate: max, of: AMOUNT, window: 10s}", (5,))
    ),
    "since_last": Described(
        windows.SINCE_LAST,
        "seconds from the newest event *before* t - delay until then, so the event itself does not count",
        ("{aggregate: since_last, window: 10s}", (2,)),
    ),
    "distinct": Described(
        windows.DISTINCT,
        "how many different v there are, exactly",
        ("{aggregate: distinct, of: AMOUNT, window: 10s}", (3,)),
    ),
    "quantile": Described(
        windows.QUANTILE,
        "v / unit at the place ceil(m x quantile) of all m in ascending order (nearest rank), exactly",
        ("{aggregate: quantile, quantile: 0.5, of: AMOUNT, window: 10s}", (3,)),
    ),
    "most_frequent": Described(
        windows.MOST_FREQUENT,
        "the v / unit that occurs most often, the next one, and so on; of equally frequent ones the smaller first",
        ("{aggregate: most_frequent, k: 2, of: AMOUNT, window: 10s}", (3, 1)),
    ),
    "decayed_count": Described(
        windows.DECAYED_COUNT,
        "sum(w), w being 2^(-age / half_life) as below",
        ("{aggregate: decayed_count, half_life: 1s}", (1.4375,)),
    ),
    "decayed_sum": Described(
        windows.DECAYED_SUM,
        "sum(v x w) / unit",
        ("{aggregate: decayed_sum, of: AMOUNT, half_life: 2s}", (7.8106600642204285,)),
    ),
}
KINDS = {name: aggregate.kind for name, aggregate in AGGREGATES.items()}
FOR_LIFE = frozenset({windows.COUNT, windows.SUM, windows.MEAN, windows.VARIANCE, windows.STDDEV})
LISTS = frozenset({windows.LAST_K, windows.MOST_FREQUENT})
DECAYED = frozenset({windows.DECAYED_COUNT, windows.DECAYED_SUM})
OF_LABELS = frozenset({windows.SHARE, windows.POSITIVES, windows.COVERAGE})
OF_ROWS = frozenset({windows.COUNT, windows.RATE, windows.SINCE_LAST, windows.DECAYED_COUNT, *OF_LABELS})
IN_CELLS = FOR_LIFE | {windows.RATE}  # what a profile with a hop has
OF_TEXTS = frozenset({windows.DISTINCT})  # whose field may be a category or a string
ZERO_OF_NOTHING = frozenset({
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
            a.window or 0, 0 if a.kind in ZERO_OF_NOTHING else 1,
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
