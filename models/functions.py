"""The functions of expressions: float64 in, float64 out, the same bits for a number wherever it stands.

NumPy's own exp, log and log1p give other last bits on a processor with other vector instructions, and
`**` others for one exponent than for a column of it. So those, sin and cos are the C library's here,
called for one number at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import vectorize

_MS_PER_DAY = 86_400_000
_LATEST_MS = 2.0**53  # a time beyond it is no whole number of ms as a float64

_each: Callable[[Callable[..., float]], Callable[..., Any]] = vectorize(cache=True)


@_each
def _exp(x: float) -> float:
    return math.exp(x)


@_each
def _log(x: float) -> float:
    return math.log(x)


@_each
def _log1p(x: float) -> float:
    return math.log1p(x)


@_each
def _sin(x: float) -> float:
    return math.sin(x)


@_each
def _cos(x: float) -> float:
    return math.cos(x)


@_each
def power(x: float, y: float) -> float:
    return math.pow(x, y)


def _hour(times: Any) -> Any:
    return np.floor_divide(times, 3_600_000) % 24


def _minute(times: Any) -> Any:
    return np.floor_divide(times, 60_000) % 60


def _weekday(times: Any) -> Any:
    """1970-01-01 was a Thursday."""
    return (np.floor_divide(times, _MS_PER_DAY) + 3) % 7


def _month(times: Any) -> Any:
    days, there = _days(times)
    return np.where(there, days.astype("M8[M]").astype(np.int64) % 12 + 1, np.nan)


def _day_of_month(times: Any) -> Any:
    days, there = _days(times)
    return np.where(there, (days - days.astype("M8[M]").astype("M8[D]")).astype(np.int64) + 1, np.nan)


def _days(times: Any) -> tuple[Any, Any]:
    """Dates, and which of them are any."""
    there = np.abs(times) <= _LATEST_MS
    days = np.floor_divide(np.where(there, times, 0.0), _MS_PER_DAY)
    return days.astype(np.int64).astype("M8[D]"), there


def _clip(x: Any, low: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high)


def _bucket(x: Any, *edges: Any) -> Any:
    reached = sum(np.asarray(x >= edge, np.float64) for edge in edges)
    return np.where(np.isnan(x), np.nan, reached)


def _coalesce(x: Any, y: Any) -> Any:
    return np.where(np.isnan(x), y, x)


class Function(NamedTuple):
    """`form`: how it is written, with `...` at the end where more arguments may follow; `value`: in
    words; `example`: a call and its value for `SAMPLE`."""

    call: Callable[..., Any]
    form: str
    value: str
    example: tuple[str, float]

    @property
    def arguments(self) -> tuple[int, int]:
        """The fewest and the most that it takes."""
        count = self.form.count(",") + 1
        return (count - 1, 1000) if self.form.endswith("...)") else (count, count)


# The event of the examples: t is 2020-09-13 12:26:40 UTC, a Sunday, and z is absent.
SAMPLE = {"x": 2.5, "y": -1.0, "z": math.nan, "t": 1_600_000_000_000.0}

FUNCTIONS = {
    f.form.partition("(")[0]: f
    for f in (
        Function(_hour, "hour(t)", "hour of the day, 0 to 23", ("hour(t)", 12)),
        Function(_minute, "minute(t)", "minute of the hour, 0 to 59", ("minute(t)", 26)),
        Function(_weekday, "weekday(t)", "Monday 0 to Sunday 6", ("weekday(t)", 6)),
        Function(_month, "month(t)", "January 1 to December 12", ("month(t)", 9)),
        Function(_day_of_month, "day_of_month(t)", "1 to 31", ("day_of_month(t)", 13)),
        Function(np.abs, "abs(x)", "without its sign", ("abs(y)", 1)),
        Function(np.floor, "floor(x)", "the next whole number below", ("floor(x)", 2)),
        Function(np.ceil, "ceil(x)", "the next whole number above", ("ceil(x)", 3)),
        Function(np.rint, "round(x)", "the nearest whole number, of two the even one", ("round(x)", 2)),
        Function(np.sqrt, "sqrt(x)", "the square root, NaN below 0", ("sqrt(x * 10)", 5)),
        Function(_exp, "exp(x)", "e to the power of x", ("exp(y + 1)", 1)),
        Function(_log, "log(x)", "the natural logarithm, NaN below 0", ("log(-y)", 0)),
        Function(_log1p, "log1p(x)", "log(1 + x), exact near 0", ("log1p(y + 1)", 0)),
        Function(_sin, "sin(x)", "of an angle in radians", ("sin(0.5 * pi + 0 * x)", 1)),
        Function(_cos, "cos(x)", "of an angle in radians", ("cos(pi * y)", -1)),
        Function(np.minimum, "minimum(x, y)", "the smaller, NaN if one is", ("minimum(x, y)", -1)),
        Function(np.maximum, "maximum(x, y)", "the larger, NaN if one is", ("maximum(x, y)", 2.5)),
        Function(_clip, "clip(x, low, high)", "x, but at least low and at most high", ("clip(x, 0, 1)", 1)),
        Function(
            _bucket, "bucket(x, e, ...)", "how many of the edges x has reached", ("bucket(x, 1, 2.5, 7)", 2)
        ),
        Function(_coalesce, "coalesce(x, y)", "y where x is NaN, else x", ("coalesce(z, y)", -1)),
        Function(np.isnan, "isnan(x)", "1 where x is NaN or a field is absent, else 0", ("isnan(z)", 1)),
    )
}  # fmt: skip

CONSTANTS = {"pi": math.pi}
