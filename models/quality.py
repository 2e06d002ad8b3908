"""How good versions turn out to be, as labels come: counts by version and day that any order of records leads to.

An event's score counts in one of BINS bins by what it is labelled, under all versions that have scored the event, its
company. So the figures of a version, and of two versions on the events of both, are sums of counts; a label
that changes, or a score that comes behind its label, moves the event from one count to another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models import evaluation
from models.evaluation import DAY_MS, Curve
from models.windows import Floats, Ints

TOP = 100  # events of a day that can be looked at
PARTS = 1024  # of a doubling of the score: scores of a bin differ by a thousandth of themselves at most
DOUBLINGS = 24  # below 2^-24 all scores are one
BINS = DOUBLINGS * PARTS + 1  # the last one is for 1 alone

_SHIFT = 23 - 10  # of a float32's bits, whose fraction has 23: 2^10 are PARTS
_LOWEST = int(np.float32(2.0**-DOUBLINGS).view(np.int32)) >> _SHIFT
_NUMBERS = list(range(BINS))  # so that an event does not keep integers of its own


class Judged(msgspec.Struct):
    """What came of scores whose labels are known. NaN where there are none, or of one kind only."""

    labelled: int
    positives: int
    auc: float
    ap: float
    precision_at_top: float
    calibration_error: float
    calibration_ratio: float


def judged(whole: Curve, days: Iterable[Curve]) -> Judged:
    """whole: over all events; days: over those of each day."""
    firsts = [evaluation.precision_at(day, TOP) for day in days if day.rows]
    bins, nan = evaluation.calibration_of(whole) if whole.rows else [], float("nan")
    return Judged(
        whole.rows, whole.positives, **evaluation.areas(whole),
        precision_at_top=float(np.mean(firsts)) if firsts else nan,
        calibration_error=evaluation.calibration_error(bins) if bins else nan,
        calibration_ratio=evaluation.calibration_ratio(whole),
    )  # fmt: skip


def bin_of(score: float) -> int:
    """The bin of a score in [0, 1]; higher scores have no lower one.

    >>> bin_of(0.0), bin_of(0.5), bin_of(1.0)
    (0, 23552, 24576)
    """
    place = (int(np.float32(score).view(np.int32)) >> _SHIFT) - _LOWEST
    return _NUMBERS[min(max(place, 0), BINS - 1)]


def middles() -> Floats:
    """The score that stands for each bin, (BINS,)."""
    edges = (np.arange(BINS + 1, dtype=np.int32) + _LOWEST) << _SHIFT
    edges = edges.astype(np.int32).view(np.float32).astype(np.float64)
    found = (edges[:-1] + edges[1:]) / 2
    found[0], found[-1] = 0.0, 1.0
    return found


@dataclass(slots=True)
class _Event:
    """day: of event time; label: 0 or 1, None where it is not known; stamp: which label was sent last."""

    day: int
    label: int | None = None
    stamp: int = -1
    company: tuple[str, ...] = ()
    bins: tuple[int, ...] = ()


Counts = npt.NDArray[np.int32]


@dataclass
class Realised:
    """The last `days` whole days of event time before the newest event less `delay`, in ms, by when labels are known.

    most: events that are kept; the oldest are let go beyond that, with their counts as they are. let_go: how many
    of them had no label by then.
    """

    days: int
    delay: int
    most: int
    newest: int = 0  # ms
    let_go: int = 0
    _events: dict[int, _Event] = field(default_factory=dict)
    # by day and company: (versions, labels, BINS)
    _counts: dict[int, dict[tuple[str, ...], Counts]] = field(default_factory=dict)
    _middles: Floats = field(default_factory=middles)

    @property
    def until(self) -> int:
        """The day, as a number, with which the window ends."""
        return (self.newest - self.delay) // DAY_MS - 1

    @property
    def kept(self) -> int:
        return len(self._events)

    def scored(self, id_: int, time: int, scores: dict[str, float]) -> None:
        """What versions gave an event, by its 64-bit id, at `time`, ms. Given again it changes nothing."""
        self._reach(time)
        event = self._event(id_, time)
        if event is None or scores.keys() <= set(event.company):
            return
        self._count(event, -1)
        event.day = time // DAY_MS  # a label that came first may not have known it
        known = dict(zip(event.company, event.bins, strict=True))
        known = {version: bin_of(score) for version, score in scores.items()} | known
        event.company = tuple(sorted(known))
        event.bins = tuple(known[version] for version in event.company)
        self._count(event, 1)

    def labelled(self, id_: int, time: int, label: int | None, stamp: int) -> None:
        """What is known of an event; None: it is known no more. stamp: of two labels the higher one is the later.

        time: of the event, ms, or what is not before it: then its scores tell.
        """
        event = self._event(id_, time)
        if event is None or stamp <= event.stamp:
            return
        self._count(event, -1)
        event.label, event.stamp = label, stamp
        self._count(event, 1)

    def versions(self) -> list[str]:
        """Those that have scored events of the window whose labels are known."""
        return sorted({v for day in self._window() for company in self._counts[day] for v in company})

    def of(self, version: str, company: Iterable[str] = ()) -> tuple[Judged, Curve]:
        """Of a version on the events that all of the company have scored too. With the curve that is behind it."""
        days = [self._sum(day, version, {version, *company}) for day in self._window()]
        whole = self._curve(sum(days, _nothing()))
        return judged(whole, map(self._curve, days)), whole

    def _window(self) -> list[int]:
        return [day for day in sorted(self._counts) if day <= self.until]

    def _sum(self, day: int, version: str, company: set[str]) -> Ints:
        """Counts (labels, BINS) of a day."""
        found: Ints = _nothing()
        for versions, counts in self._counts[day].items():
            if company <= set(versions):
                found += counts[versions.index(version)]
        return found

    def _curve(self, counts: Ints) -> Curve:
        return evaluation.counted(self._middles, counts[0], counts[1])

    def _event(self, id_: int, time: int) -> _Event | None:
        """None where it is older than the window."""
        day = time // DAY_MS
        if day <= self.until - self.days:
            return None
        event = self._events.get(id_)
        if event is None:
            event = self._events[id_] = _Event(day)
            if len(self._events) > self.most:
                oldest = self._events.pop(next(iter(self._events)))
                self.let_go += oldest.label is None
        return event

    def _count(self, event: _Event, by: int) -> None:
        if event.label is None or not event.company:
            return
        day = self._counts.setdefault(event.day, {})
        counts = day.get(event.company)
        if counts is None:
            counts = day[event.company] = np.zeros((len(event.company), 2, BINS), np.int32)
        for place, bin_ in enumerate(event.bins):
            counts[place, event.label, bin_] += by

    def _reach(self, time: int) -> None:
        """Go on to a newer event: what leaves the window is forgotten."""
        before, self.newest = self.until, max(self.newest, time)
        if self.until == before:
            return
        first = self.until - self.days + 1
        self._counts = {day: counts for day, counts in self._counts.items() if day >= first}
        self._events = {id_: event for id_, event in self._events.items() if event.day >= first}


def _nothing() -> Any:
    return np.zeros((2, BINS), np.int64)
