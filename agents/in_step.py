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
_NO_LIMIT = np.iinfo(np.int64).max

Place = tuple[str, int]  # topic and partition


class InStep:
    """groups: topics that are kept in step with each other, and how a record's time is read. Other topics
    pass. alignment: event time, ms; 0 lets all pass.
    """

    def __init__(self, groups: Sequence[Mapping[str, Clocks]], alignment: int) -> None:
        self._groups = [tuple(group) for group in groups] if alignment else []
        self._clocks = {topic: read for group in groups for topic, read in group.items() if alignment}
        self._alignment = alignment
        self._lanes: dict[Place, _Lane] = {}

    def start(self, starts: Mapping[Place, int], ends: Mapping[Place, int], now: float) -> None:
        """These partitions are ours now, read from these offsets; where their logs end at present."""
        self._lanes = {
            place: _Lane(at_end=start >= ends[place], lags=start < ends[place], heard=now, left_end=now)
            for place, start in starts.items()
            if place[0] in self._clocks
        }

    def offer(
        self, topic: str, partition: int, records: list[Record], end: int | None, now: float
    ) -> list[Record]:
        """Take what was polled. end: where the log ends, as far as known. Returns what needs not wait."""
        lane = self._lanes.get((topic, partition))
        if lane is None:
            return records
        times = self._clocks[topic](
            [r.value or b"" for r in records], np.array([r.timestamp for r in records], np.int64)
        )
        reached = np.maximum.accumulate(np.maximum(times, lane.reached))
        lane.reached, lane.heard = int(reached[-1]), now
        lane.records.extend(records)
        lane.times = np.concatenate([lane.times, reached])
        at_end = end is not None and records[-1].offset + 1 >= end
        if lane.at_end and not at_end:
            lane.left_end = now
        lane.at_end = at_end
        return []

    def take(self, others: Mapping[Place, int], now: float) -> dict[Place, list[Record]]:
        """What may go on. others: by partition of other workers, the lowest time that it has yet to pass."""
        taken = {}
        for topics in self._groups:
            lanes = {place: lane for place, lane in self._lanes.items() if place[0] in topics}
            if not any(lane.records for lane in lanes.values()):
                continue
            slowest = min(
                *(lane.known(now) for lane in lanes.values()),
                *(low for place, low in others.items() if place[0] in topics and place not in lanes),
                _NO_LIMIT - self._alignment,
            )  # fmt: skip
            for place, lane in lanes.items():
                if records := lane.take(slowest + self._alignment):
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
    def size(self) -> int:
        """How many partitions are kept in step here."""
        return len(self._lanes)

    @property
    def waiting(self) -> bool:
        return any(lane.records for lane in self._lanes.values())

    def lows(self, now: float) -> dict[Place, int]:
        """By partition that lags, a time that none of what it has yet to hand on is before."""
        lows = {place: lane.low(now) for place, lane in self._lanes.items()}
        return {place: low for place, low in lows.items() if low != _NO_LIMIT}


@dataclass
class _Lane:
    """One partition: what waits, its times (no earlier than those before), and how far it is."""

    at_end: bool
    lags: bool
    heard: float
    left_end: float
    records: list[Record] = field(default_factory=list)
    times: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    reached: int = NULL
    # Let go and not yet handled: up to which offset, and the lowest time of what comes behind it.
    flying: deque[tuple[int, int]] = field(default_factory=deque)
    landed: int = NULL  # while something flies: the lowest time of what was not handled

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
        count = int(np.searchsorted(self.times, limit, "right"))
        if not count:
            return []
        if not self.flying:
            self.landed = self._next
        taken, self.records = self.records[:count], self.records[count:]
        self.times = self.times[count:]
        self.flying.append((taken[-1].offset, self._next))
        return taken

    @property
    def _next(self) -> int:
        """The lowest time of what was not let go."""
        return int(self.times[0]) if self.records else self.reached

    def land(self, offset: int) -> None:
        while self.flying and self.flying[0][0] <= offset:
            self.landed = self.flying.popleft()[1]
