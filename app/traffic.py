"""A rough load for `headrace chaos`: a tape of real events with what producers do wrong mixed in.

Doubled, late, too late and malformed events, labels that flip, come early or come twice. What is drawn
depends on the seed alone.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from app.replay import Tape
from models.events import key_bytes
from models.partitions import partition_of
from models.pipeline import Pipeline

# How often, of the events or of the labels.
DOUBLED, DOUBLED_MUCH_LATER, LATE, TOO_LATE, MALFORMED = 0.01, 0.01, 0.02, 0.001, 0.003
FLIPPED, EARLY, LABELLED_TWICE, BAD_LABEL = 0.03, 0.03, 0.01, 0.002

SOON = (1, 100)  # places of the tape
MUCH_LATER_S = (5.0, 60.0)  # at the stream's rate: beyond a flush, often beyond a restart
BEHIND_MS = (60_000, 6 * 3_600_000)
BAD_LABELS = (b"{}", b"no label")


@dataclass
class Traffic:
    """A load. valid: the ids of events that must be predicted; malformed: records that must become dead letters."""

    tape: Tape
    valid: set[int] = field(default_factory=set)
    malformed: Counter[tuple[str, bytes]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Item:
    """A record and its place between those of the tape."""

    place: float
    row: int
    is_label: bool
    key: bytes | None
    value: bytes


def mix(base: Tape, spare: Tape, pipeline: Pipeline, partitions: int, rate: float, seed: int) -> Traffic:
    """spare: events from before `base` began, longer ago than a profile remembers; each is used once at most."""
    rng = random.Random(f"traffic {seed}")  # noqa: S311 - a load that can be repeated, no secret
    return _Mixer(base, spare, pipeline, partitions, rate, rng).run()


class _Mixer:
    def __init__(
        self, base: Tape, spare: Tape, pipeline: Pipeline, partitions: int, rate: float, rng: random.Random
    ) -> None:
        self._base, self._pipeline, self._partitions, self._rate = base, pipeline, partitions, rate
        self._rng = rng
        ids = spare.history.ids[spare.rows].tolist()
        self._spare = (
            (ids[i], spare.keys[i], spare.values[i]) for i in np.flatnonzero(~spare.is_label).tolist()
        )
        events = np.flatnonzero(~base.is_label)
        self._place_of = events  # by row: rows are in order of time, as events on the tape
        self._times = base.history.times
        self._traffic = Traffic(base, set(base.history.ids.tolist()))
        self._items: list[_Item] = []

    def run(self) -> Traffic:
        last = int(self._place_of[-1])  # labels that are known only after the last event are left out
        for place, (is_label, row) in enumerate(
            zip(self._base.is_label, self._base.rows.tolist(), strict=True)
        ):
            if place <= last:
                (self._label if is_label else self._event)(place, row)
        self._items.sort(key=lambda item: item.place)
        items = self._items
        self._traffic.tape = Tape(
            self._base.history, np.array([i.row for i in items]), np.array([i.is_label for i in items]),
            [i.key for i in items], [i.value for i in items],
        )  # fmt: skip
        return self._traffic

    def _put(
        self, kind: str, place: float, row: int, is_label: bool, key: bytes | None, value: bytes
    ) -> None:
        self._traffic.kinds[kind] += 1
        self._items.append(_Item(place, row, is_label, key, value))

    def _draw(self, *shares: float) -> int:
        """Which of these happens, or -1 for none."""
        drawn = self._rng.random()
        for number, share in enumerate(shares):
            if drawn < share:
                return number
            drawn -= share
        return -1

    # --- events --------------------------------------------------------------------------------

    def _event(self, place: int, row: int) -> None:
        what = self._draw(DOUBLED, DOUBLED_MUCH_LATER, LATE, TOO_LATE, MALFORMED)
        key, value = self._base.keys[place], self._base.values[place]
        self._put("event", self._behind(row) if what == 2 else place, row, False, key, value)
        if what == 0:
            self._put("doubled", place + self._rng.uniform(*SOON), row, False, key, value)
        elif what == 1:
            self._put("doubled much later", self._much_later(row), row, False, key, value)
        elif what == 2:
            self._traffic.kinds["late"] += 1
        elif what == 3:
            self._too_late(place, row)
        elif what == 4:
            self._malformed(place, row)

    def _place_at(self, time: float) -> float:
        """Just before the first event that is not older."""
        row = min(int(np.searchsorted(self._times, time)), len(self._times) - 1)
        return float(self._place_of[row]) - 0.5

    def _behind(self, row: int) -> float:
        behind = self._place_at(self._times[row] + self._rng.uniform(*BEHIND_MS))
        return max(behind, float(self._place_of[row]))

    def _much_later(self, row: int) -> float:
        """Later by the clock, but while the first entity still knows the event."""
        known_until = self._place_at(self._times[row] + self._pipeline.entities[0].retention / 2)
        later = min(row + int(self._rng.uniform(*MUCH_LATER_S) * self._rate), len(self._times) - 1)
        return max(min(known_until, float(self._place_of[later])), float(self._place_of[row])) + 0.25

    def _too_late(self, place: int, row: int) -> None:
        spare = next(self._spare, None)
        if spare is not None:
            id_, key, value = spare
            self._put("too late", place + 0.5, row, False, key, value)
            self._traffic.valid.add(id_)

    def _malformed(self, place: int, row: int) -> None:
        """Made of an event that is not sent otherwise: not JSON, lacking its time, or under a wrong key."""
        spare = next(self._spare, None)
        if spare is None:
            return
        _, key, value = spare
        what = self._rng.randrange(3 if key is not None and self._partitions > 1 else 2)
        if what == 0:
            value = value[: len(value) // 2]
        elif what == 1:
            event: dict[str, Any] = msgspec.json.decode(value)
            del event[self._pipeline.stream.time]
            value = msgspec.json.encode(event)
        else:
            key = self._elsewhere(key or b"")
        self._put("malformed", place + 0.5, row, False, key, value)
        self._traffic.malformed[self._pipeline.stream.topic, value] += 1

    def _elsewhere(self, key: bytes) -> bytes:
        """A key of another partition."""
        home = partition_of(key, self._partitions)
        while partition_of(other := key_bytes(self._rng.randrange(1000)), self._partitions) == home:
            pass
        return other

    # --- labels --------------------------------------------------------------------------------

    def _label(self, place: int, row: int) -> None:
        labels = self._pipeline.labels
        assert labels is not None
        what = self._draw(FLIPPED, EARLY, LABELLED_TWICE, BAD_LABEL)
        key, value = self._base.keys[place], self._base.values[place]
        early = float(self._place_of[row]) - self._rng.uniform(*SOON)
        self._put("label", early if what == 1 else place, row, True, key, value)
        if what == 0:
            label: dict[str, Any] = msgspec.json.decode(value)
            label[labels.field] = self._rng.choice([1 - label[labels.field], None])
            flipped = msgspec.json.encode(label)
            self._put("label flipped", place + self._rng.uniform(*SOON), row, True, key, flipped)
        elif what == 1:
            self._traffic.kinds["label early"] += 1
        elif what == 2:
            self._put("label twice", place + self._rng.uniform(*SOON), row, True, key, value)
        elif what == 3:
            bad = self._rng.choice(BAD_LABELS)
            self._put("malformed", place + 0.5, row, True, key, bad)
            self._traffic.malformed[labels.topic, bad] += 1
