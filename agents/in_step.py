"""Catching up in step: of what was polled, what is far ahead of the rest waits.

A log that several partitions write has the order of arrival. Live that is event-time order to some
milliseconds; a backlog whose partitions are read at different speeds would drive it days apart. So
each partition is held back as long as it is more than `alignment` of event time ahead of the slowest,
here or at another worker. A partition that has caught up with its log's end holds nobody back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.events import Clocks
from models.windows import NULL, Ints
from tables.profiles import Record

IDLE_S = 30.0  # a partition that has more and does not give it holds others back no longer than this
LAGGING_S = 1.0  # who is behind its log's end for less is not waited for by other workers
HELD = 4000  # records; a partition of which so many wait is not polled
SAMPLE = 16  # records, of which the time of the first is read; those between lie between two of these
_PARTS = 8  # of the alignment, that a sample may span
_NO_LIMIT = np.iinfo(np.int64).max

Place = tuple[str, int]  # topic and partition


class InStep:
    """groups: topics that are kept in step with each other, and how a record's time is read. Other topics
    pass. partitions: how many each topic has. alignment: event time, ms; 0 lets all pass.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Clocks]], partitions: Mapping[str, int], alignment: int
    ) -> None:
        self._groups = [tuple(group) for group in groups] if alignment else []
        self._clocks = {topic: read for group in groups for topic, read in group.items() if alignment}
        self._all = {(topic, n) for topic in self._clocks for n in range(partitions[topic])}
        self._alignment = alignment
        self._lanes: dict[Place, _Lane] = {}
        self._others: dict[Place, tuple[int | None, float]] = {}  # low, None where unheard, and since when
        self.starts = 0  # how often partitions were taken over
        self.held_back: frozenset[str] = frozenset()  # topics that are not read now, so they hold nobody back

    def start(self, starts: Mapping[Place, int], ends: Mapping[Place, int], now: float) -> None:
        """These partitions are ours now, read from these offsets; where their logs end at present."""
        before = self.lows(now)
        self._lanes = {
            place: _Lane(at_end=start >= ends[place], lags=start < ends[place], heard=now, left_end=now)
            for place, start in starts.items()
            if place[0] in self._clocks
        }
        # What we had is where we left it, until its new owner speaks.
        for place in self._all - self._lanes.keys():
            if place in before:
                self.hear(place, before[place], now)
            elif place not in self._others or now - self._others[place][1] > IDLE_S:
                self._others[place] = (None, now)
        self.starts += 1

    def hear(self, place: Place, low: int | None, now: float) -> None:
        """The lowest time that a partition of another worker has yet to pass; None where it lags no more."""
        self._others[place] = (_NO_LIMIT if low is None else low, now)

    def offer(
        self, topic: str, partition: int, records: list[Record], end: int | None, now: float
    ) -> list[Record]:
        """Take what was polled. end: where the log ends, as far as known. Returns what needs not wait."""
        lane = self._lanes.get((topic, partition))
        if lane is None:
            return records
        count = len(records)
        marks = np.append(np.arange(0, count - 1, SAMPLE), count - 1)
        reached = self._reached(topic, [records[i] for i in marks], lane.reached)
        if count > 2 and (reached[1:] > reached[:-1] + self._alignment // _PARTS).any():
            marks = np.arange(count)
            reached = self._reached(topic, records, lane.reached)
        each = np.arange(count)
        lane.records.extend(records)
        lane.least = np.append(lane.least, reached[np.searchsorted(marks, each, "right") - 1])
        lane.most = np.append(lane.most, reached[np.searchsorted(marks, each)])
        lane.reached, lane.heard = int(reached[-1]), now
        if lane.first == NULL:
            lane.first = int(reached[0])
        at_end = end is not None and records[-1].offset + 1 >= end
        if lane.at_end and not at_end:
            lane.left_end = now
        lane.at_end = at_end
        return []

    def _reached(self, topic: str, records: Sequence[Record], before: int) -> Ints:
        """The time of each, no earlier than those before it."""
        sent = np.array([r.timestamp for r in records], np.int64)
        times = self._clocks[topic]([r.value or b"" for r in records], sent)
        return np.maximum.accumulate(np.maximum(times, before))

    def take(self, now: float) -> dict[Place, list[Record]]:
        """What may go on."""
        taken = {}
        for topics in self._groups:
            lanes = {place: lane for place, lane in self._lanes.items() if place[0] in topics}
            if not any(lane.records for lane in lanes.values()):
                continue
            lows = [lane.known(now) for place, lane in lanes.items() if place[0] not in self.held_back]
            others = [
                low for place, (low, at) in self._others.items()
                if place[0] in topics and place not in lanes and now - at <= IDLE_S
            ]  # fmt: skip
            if None in others:  # it may be behind all of ours
                lows += [lane.first - self._alignment for lane in lanes.values() if lane.behind]
            lows += [low for low in others if low is not None]
            limit = min([*lows, _NO_LIMIT - self._alignment]) + self._alignment
            for place, lane in lanes.items():
                if records := lane.take(limit):
                    taken[place] = records
        return taken

    def handled(self, topic: str, partition: int, offset: int) -> None:
        """What was let go up to this offset went through the fold, and its outputs are on their way."""
        lane = self._lanes.get((topic, partition))
        if lane is not None:
            lane.land(offset)

    def full(self, place: Place) -> bool:
        """Whether so much waits that no more should be polled."""
        lane = self._lanes.get(place)
        return lane is not None and len(lane.records) >= HELD

    @property
    def shared(self) -> bool:
        """Whether some partitions are kept in step here, and some elsewhere."""
        return 0 < len(self._lanes) < len(self._all)

    @property
    def waiting(self) -> bool:
        return any(lane.records for lane in self._lanes.values())

    def lows(self, now: float) -> dict[Place, int | None]:
        """What others are to hear of our partitions."""
        lows = {place: lane.low(now) for place, lane in self._lanes.items()}
        return {
            place: None if low == _NO_LIMIT or place[0] in self.held_back else low
            for place, low in lows.items()
        }

    def differ(self, told: Mapping[Place, int | None], lows: Mapping[Place, int | None]) -> bool:
        """Whether it matters that others heard this and not that."""
        return any(
            was != low and (was is None or low is None or low - was > self._alignment // (4 * _PARTS))
            for place, low in lows.items()
            for was in (told.get(place),)
        )


@dataclass
class _Lane:
    """One partition: what waits, between which times each of that lies, and how far it is. A record counts
    as no earlier than those before it.
    """

    at_end: bool
    lags: bool
    heard: float
    left_end: float
    records: list[Record] = field(default_factory=list)
    least: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    most: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    reached: int = NULL
    first: int = NULL  # the time of the first record since the start
    # Let go and not yet handled: up to which offset, and the lowest time of what comes behind it.
    flying: deque[tuple[int, int]] = field(default_factory=deque)
    landed: int = NULL  # while something flies: the lowest time of what was not handled

    @property
    def behind(self) -> bool:
        return not self.at_end and self.first != NULL

    def known(self, now: float) -> int:
        """The time up to which all records are here, to be folded in the order of their times."""
        idle = not self.records and now - self.heard > IDLE_S
        return _NO_LIMIT if self.at_end or idle else self.reached

    def low(self, now: float) -> int:
        if self.known(now) == _NO_LIMIT:
            self.lags = self.lags and bool(self.flying or self.records)
        elif now - self.left_end >= LAGGING_S:
            self.lags = True
        if not self.lags:
            return _NO_LIMIT
        return self.landed if self.flying else self._next

    def take(self, limit: int) -> list[Record]:
        count = int(np.searchsorted(self.most, limit, "right"))
        if not count:
            return []
        if not self.flying:
            self.landed = self._next
        taken, self.records = self.records[:count], self.records[count:]
        self.least, self.most = self.least[count:], self.most[count:]
        self.flying.append((taken[-1].offset, self._next))
        return taken

    @property
    def _next(self) -> int:
        """The lowest time of what was not let go."""
        return int(self.least[0]) if self.records else self.reached

    def land(self, offset: int) -> None:
        while self.flying and self.flying[0][0] <= offset:
            self.landed = self.flying.popleft()[1]
