"""Exact windows over event time: the fold of one entity's log, and the read at any time.

A profile is the rows of one entity, in event-time order, each carrying the sums of all rows before
it. A window is then two binary searches and one subtraction, whatever its length, and any time can
be read. Everything summed is an integer, so neither order nor merging can change a bit; the one
division stands at the end. `models.oracle` says the same in plain Python, to be checked by eye.

Profiles live in one arena of int64 rows, in chunks of powers of two. The row layout:

    0 time   event time, ms
    1 id     64-bit event id
    2 label  0 unknown, 1 negative, 2 positive
    3 positives before this row, then for each value column: the sum before this row, and how many
      of the rows before it had a value

Behind the last row stands a closing row that holds the totals, so a chunk of c rows holds c - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.int8]

NULL = np.iinfo(np.int64).min  # a value that is absent, in an int64 column

# Kinds of log records.
EVENT, LABEL = 0, 1
# What became of a record. Codes up to LATE are events that changed the profile.
FOLDED, LATE, TOO_LATE, DUPLICATE, NO_KEY, LABELLED, LABEL_EARLY, LABEL_STALE = range(8)
OUTCOMES = (
    "folded", "late", "too_late", "duplicate", "no_key", "labelled", "label_early", "label_stale",
)  # fmt: skip
UNKNOWN, NEGATIVE, POSITIVE = 0, 1, 2

COUNT, SUM, MEAN, SHARE = range(4)
AGGREGATES = {"count": COUNT, "sum": SUM, "mean": MEAN, "share": SHARE}

_TIME, _ID, _STATE, _POSITIVES, _VALUES = 0, 1, 2, 3, 4
_SMALLEST = 4  # rows in the smallest chunk: three of the profile and the closing one
_CLASSES = 40  # chunks of up to 4 * 2**39 rows
_TOP, _IN_USE = _CLASSES, _CLASSES + 1  # of the heap, behind the free chunks of each class
_STEP = 16  # arrays grow by a sixteenth, and gaps are closed where that gives as much
_DOUBLE = 4096  # lines up to which they double, some 200 KiB
_RESERVE = 2**24  # lines for which a large array has addresses from the first, a gigabyte at most

# Columns of the profiles' table: the chunk and its class, the first row in use (it moves up as old
# rows are forgotten), how many rows, the newest event time; the chunk of labels that wait for events.
_CHUNK, _CLASS, _START, _LENGTH, _NEWEST, _EARLY, _EARLY_CLASS, _EARLY_LENGTH = range(8)
_EMPTY = (-1, -1, 0, 0, NULL, -1, -1, 0)
_NONE = -1


@dataclass(frozen=True)
class Aggregate:
    """One feature of an entity: `kind` over (t - delay - window, t - delay], times in ms.

    `value` is the index of the value column for sum and mean, `divisor` its unit (100 for cents).
    """

    kind: int
    window: int
    delay: int = 0
    value: int = 0
    divisor: int = 1


class Plan(NamedTuple):
    """The aggregates of one entity, as arrays that the kernel walks. Made by `plan`."""

    bounds: Ints  # distinct distances from the time read to a window's edges, ms
    ops: Ints  # (k, 5): kind, index of the newer bound, of the older one, value column, divisor
    retention: int  # rows this much older than the newest are forgotten, ms
    values: int


def plan(aggregates: list[Aggregate], values: int, lateness: int) -> Plan:
    """Decide once what every read repeats. `lateness`: how late an event may be and still repair, ms."""
    bounds = sorted({a.delay for a in aggregates} | {a.delay + a.window for a in aggregates})
    ops = [
        (a.kind, bounds.index(a.delay), bounds.index(a.delay + a.window), a.value, a.divisor)
        for a in aggregates
    ]
    return Plan(
        np.array(bounds, np.int64),
        np.array(ops, np.int64).reshape(len(ops), 5),
        max(max(bounds, default=0) + lateness, 1),  # the newest row is never forgotten
        values,
    )


class Rows(NamedTuple):
    """A profile's rows in event-time order: times, ids, labels (n,); values (n, v), NULL where absent."""

    times: Ints
    ids: Ints
    labels: Ints
    values: Ints


class Arena:
    """All profiles of one stage. Slots are small integers; `new` gives one, `free` takes it back."""

    def __init__(self, plan: Plan, rows: int = 1024) -> None:
        self.plan = plan
        self._rows: Ints = np.zeros((rows, _VALUES + 2 * plan.values), np.int64)
        self._table: Ints = np.zeros((64, len(_EMPTY)), np.int64)
        # Free chunks by class, then the first row that was never in a chunk, then how many rows are in one.
        self._heap: Ints = np.full(_CLASSES + 2, _NONE, np.int64)
        self._heap[[_TOP, _IN_USE]] = 0
        self._free: list[int] = []
        self._slots = 0

    @property
    def nbytes(self) -> int:
        """What is taken from the system."""
        return self._rows.nbytes + self._table.nbytes

    @property
    def used(self) -> int:
        """Bytes of what profiles are in: `nbytes` is a sixteenth above it, more where many were freed."""
        return int(self._heap[_IN_USE]) * self._rows.strides[0] + self._table.nbytes

    def new(self) -> int:
        """An empty profile's slot."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._slots
            self._slots += 1
            if slot == len(self._table):
                self._table = lengthen(self._table, step(slot))
        self._table[slot] = _EMPTY
        return slot

    def free(self, slots: Ints) -> None:
        """Forget these profiles and reuse their room."""
        _release(self._rows, self._table, self._heap, slots)
        self._free.extend(slots.tolist())
        in_use, rows = int(self._heap[_IN_USE]), len(self._rows)
        if rows > 2 * _DOUBLE and in_use < rows // 2:
            self.close_gaps()
            self._rows = lengthen(self._rows[:in_use].copy(), in_use // _STEP + _DOUBLE)

    def fold(
        self, slots: Ints, kinds: Bytes, times: Ints, ids: Ints, values: Ints, labels: Bytes
    ) -> tuple[Floats, Bytes]:
        """Fold one micro-batch in its order.

        slots: (n,) int64, -1 where the record has no key; kinds: (n,) EVENT or LABEL; times: (n,) ms;
        ids: (n,); values: (n, v) int64, NULL where absent; labels: (n,) states, for LABEL records.
        Returns features (n, k) float64 as of each event, NaN where there is no value and for
        labels, and outcomes (n,) int8. An event's own row is in its windows; a row of equal time
        that comes later in the log is not.
        """
        n = len(slots)
        features = np.full((n, len(self.plan.ops)), np.nan)
        outcomes = np.zeros(n, np.int8)
        done = 0
        while True:
            done = _fold(
                self._rows, self._table, self._heap, self.plan, done,
                slots, kinds, times, ids, values, labels, features, outcomes,
            )  # fmt: skip
            if done == n:
                return features, outcomes
            self._grow()

    def read_at(self, slots: Ints, times: Ints) -> Floats:
        """Features (n, k) of these profiles at these times, with no event folded."""
        features = np.empty((len(slots), len(self.plan.ops)))
        _read_many(self._rows, self._table, self.plan, slots, times, features)
        return features

    def rows(self, slot: int) -> Rows:
        """What a profile remembers, as it is now; a copy."""
        words = np.frombuffer(self.pack(np.array([slot]))[0], "<i8").astype(np.int64, copy=False)
        width = 2 + self.plan.values
        rows = words[3 : 3 + words[1] * width].reshape(-1, width)
        return Rows(rows[:, 0] >> 2, rows[:, 1], rows[:, 0] & 3, rows[:, 2:])

    def newest(self, slots: Ints) -> Ints:
        """The newest event time that each profile has seen, ms; NULL where it has seen none."""
        result: Ints = self._table[slots, _NEWEST]
        return result

    def sizes(self, slots: Ints) -> Ints:
        """Bytes of each profile's rows."""
        result: Ints = (_SMALLEST << self._table[slots, _CLASS]) * self._rows.strides[0]
        return result

    def pack(self, slots: Ints) -> list[bytes]:
        """Each profile as bytes that `unpack` reads back; equal profiles give equal bytes.

        Little-endian int64 words: newest time, number of rows, number of early labels; for each
        row time * 4 + label, id, values (NULL where absent); for each early label the first two.
        """
        table = self._table[slots]
        words = 3 + table[:, _LENGTH] * (2 + self.plan.values) + table[:, _EARLY_LENGTH] * 2
        ends = np.cumsum(words)
        packed = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        _pack(self._rows, self._table, self.plan, slots, ends - words, packed)
        view = packed.astype("<i8", copy=False).tobytes()
        edges = [0, *(ends * 8).tolist()]
        return [view[a:b] for a, b in pairwise(edges)]

    def unpack(self, packed: bytes) -> int:
        """A new slot that holds the profile that `pack` wrote."""
        words = np.frombuffer(packed, "<i8").astype(np.int64, copy=False)
        slot = self.new()
        while not _unpack(self._rows, self._table, self._heap, self.plan, slot, words):
            self._grow()
        return slot

    def _grow(self) -> None:
        """Make room at the end of the rows."""
        rows = len(self._rows)
        if rows > _DOUBLE and self._heap[_TOP] - self._heap[_IN_USE] >= rows // _STEP:
            self.close_gaps()
        else:
            self._rows = lengthen(self._rows, step(rows))

    def close_gaps(self) -> None:
        """Move all chunks to the front: free ones of one class are of no use to another."""
        table = self._table[: self._slots]
        whose = [np.flatnonzero(table[:, column] != _NONE) for column in (_CHUNK, _EARLY)]
        chunks = np.concatenate([table[whose[0], _CHUNK], table[whose[1], _EARLY]])
        owners = np.concatenate([whose[0] * 2, whose[1] * 2 + 1])
        _move_down(self._rows, self._table, self._heap, owners[np.argsort(chunks)])


def step(lines: int) -> int:
    """How many lines an array of so many grows by."""
    return min(lines, max(lines // _STEP, _DOUBLE))


def lengthen(array: npt.NDArray[Any], more: int) -> npt.NDArray[Any]:
    """The array with so many lines of zeros behind it.

    A large one lies in a reserve of addresses, which the system backs with memory page by page, and huge pages,
    as lines come into use: so nothing is copied, and no second copy stands beside the first.
    """
    lines = len(array) + more
    reserve: npt.NDArray[Any] = array if array.base is None else array.base
    if len(reserve) < lines:
        least = lines if lines <= _DOUBLE else max(_RESERVE, 2 * lines)
        reserve = np.zeros((least, *array.shape[1:]), array.dtype)
        reserve[: len(array)] = array
    return reserve[:lines]


# ---------------------------------------------------------------------------------------------
# The kernel. Plain functions over arrays: numba compiles them once and caches the result on disk.
# `p` is one profile's line of the table.

_Function = TypeVar("_Function", bound=Callable[..., Any])
jit: Callable[[_Function], _Function] = njit(cache=True, nogil=True)


@jit
def _take(rows: Ints, heap: Ints, size_class: int) -> int:
    """A chunk of this class: its first row, or -1 when the arena is full."""
    chunk = heap[size_class]
    size = _SMALLEST << size_class
    if chunk != _NONE:
        heap[size_class] = rows[chunk, 0]  # a free chunk's first word names the next free one
    else:
        chunk = heap[_TOP]
        if chunk + size > rows.shape[0]:
            return _NONE
        heap[_TOP] = chunk + size
    heap[_IN_USE] += size
    return int(chunk)


@jit
def _give(rows: Ints, heap: Ints, chunk: int, size_class: int) -> None:
    rows[chunk, 0] = heap[size_class]
    heap[size_class] = chunk
    heap[_IN_USE] -= _SMALLEST << size_class


@jit
def _move_down(rows: Ints, table: Ints, heap: Ints, owners: Ints) -> None:
    """owners: of all chunks in use, by address: twice the slot, and one more for its waiting labels."""
    top = 0
    for owner in owners:
        p = table[owner >> 1]
        if owner & 1:
            start, length, size_class = p[_EARLY], p[_EARLY_LENGTH], p[_EARLY_CLASS]
            p[_EARLY] = top
        else:
            start, length, size_class = p[_START], p[_LENGTH] + 1, p[_CLASS]
            p[_CHUNK] = p[_START] = top
        for i in range(length):
            rows[top + i] = rows[start + i]
        top += _SMALLEST << size_class
    heap[:_CLASSES] = _NONE
    heap[_TOP] = top


@jit
def _release(rows: Ints, table: Ints, heap: Ints, slots: Ints) -> None:
    for slot in slots:
        p = table[slot]
        if p[_CHUNK] != _NONE:
            _give(rows, heap, p[_CHUNK], p[_CLASS])
        if p[_EARLY] != _NONE:
            _give(rows, heap, p[_EARLY], p[_EARLY_CLASS])
        p[_CHUNK] = p[_EARLY] = _NONE


@jit
def _class_for(size: int) -> int:
    size_class = 0
    while (_SMALLEST << size_class) < size:
        size_class += 1
    return size_class


@jit
def _room_for_row(rows: Ints, heap: Ints, p: Ints) -> bool:
    """Make room for one more row behind the closing one. False when the arena is full."""
    length = p[_LENGTH]
    if p[_CHUNK] == _NONE:
        chunk = _take(rows, heap, 0)
        if chunk == _NONE:
            return False
        rows[chunk, :] = 0
        p[_CHUNK] = p[_START] = chunk
        p[_CLASS] = 0
        return True
    size = _SMALLEST << p[_CLASS]
    start = p[_START]
    if start + length + 2 <= p[_CHUNK] + size:
        return True
    if (length + 2) * 4 <= size * 3:  # a quarter is forgotten rows: move down, O(1) amortised
        for i in range(length + 1):
            rows[p[_CHUNK] + i] = rows[start + i]
        p[_START] = p[_CHUNK]
        return True
    chunk = _take(rows, heap, p[_CLASS] + 1)
    if chunk == _NONE:
        return False
    for i in range(length + 1):
        rows[chunk + i] = rows[start + i]
    _give(rows, heap, p[_CHUNK], p[_CLASS])
    p[_CHUNK] = p[_START] = chunk
    p[_CLASS] += 1
    return True


@jit
def _room_for_early(rows: Ints, heap: Ints, p: Ints) -> bool:
    """Make room for one more waiting label. False when the arena is full."""
    length = p[_EARLY_LENGTH]
    if p[_EARLY] == _NONE:
        chunk = _take(rows, heap, 0)
        if chunk == _NONE:
            return False
        p[_EARLY] = chunk
        p[_EARLY_CLASS] = 0
    elif length == (_SMALLEST << p[_EARLY_CLASS]):
        chunk = _take(rows, heap, p[_EARLY_CLASS] + 1)
        if chunk == _NONE:
            return False
        for i in range(length):
            rows[chunk + i] = rows[p[_EARLY] + i]
        _give(rows, heap, p[_EARLY], p[_EARLY_CLASS])
        p[_EARLY] = chunk
        p[_EARLY_CLASS] += 1
    return True


@jit
def _behind(rows: Ints, start: int, stop: int, time: int) -> int:
    """The first row in [start, stop) later than `time`; `stop` if there is none."""
    if stop > start and rows[stop - 1, _TIME] <= time:
        return stop  # the usual case: in order
    while start < stop:
        middle = (start + stop) >> 1
        if rows[middle, _TIME] <= time:
            start = middle + 1
        else:
            stop = middle
    return start


@jit
def _read(rows: Ints, p: Ints, plan: Plan, time: int, edges: Ints, out: Floats) -> None:
    """The features of one profile at a time. edges: scratch, as long as plan.bounds."""
    start = p[_START]
    edge = start + p[_LENGTH]
    for b in range(len(plan.bounds)):  # farther back with each bound, so each search ends at the last
        edge = _behind(rows, start, edge, time - plan.bounds[b])
        edges[b] = edge
    empty = p[_CHUNK] == _NONE
    for k in range(len(plan.ops)):
        kind = plan.ops[k, 0]
        newer = edges[plan.ops[k, 1]]
        older = edges[plan.ops[k, 2]]
        count = newer - older
        if kind == COUNT:
            out[k] = count
        elif kind == SHARE:
            out[k] = (rows[newer, _POSITIVES] - rows[older, _POSITIVES]) / count if count else 0.0
        elif empty:
            out[k] = 0.0 if kind == SUM else np.nan
        else:
            column = _VALUES + 2 * plan.ops[k, 3]
            total = rows[newer, column] - rows[older, column]
            if kind == SUM:
                out[k] = total / plan.ops[k, 4]
            else:
                valued = rows[newer, column + 1] - rows[older, column + 1]
                out[k] = total / (valued * plan.ops[k, 4]) if valued else np.nan


@jit
def _early_label(rows: Ints, p: Ints, time: int, event_id: int, horizon: int) -> int:
    """Take the label that waits for this event, UNKNOWN if none; forget those past the horizon."""
    state = UNKNOWN
    early = p[_EARLY]
    kept = 0
    for i in range(p[_EARLY_LENGTH]):
        row = early + i
        if rows[row, _TIME] == time and rows[row, _ID] == event_id:
            state = rows[row, _STATE]
        elif rows[row, _TIME] > horizon:
            if kept != i:
                rows[early + kept] = rows[row]
            kept += 1
    p[_EARLY_LENGTH] = kept
    return state


@jit
def _insert(rows: Ints, p: Ints, plan: Plan, time: int, event_id: int, values: Ints) -> int:
    """Put one event's row in its place. There is room for it. Returns FOLDED or LATE."""
    newest = p[_NEWEST]
    late = newest != NULL and time < newest
    if not late:
        p[_NEWEST] = newest = time
    horizon = newest - plan.retention
    start = p[_START]
    end = start + p[_LENGTH]
    while start < end and rows[start, _TIME] <= horizon:
        start += 1
    p[_START] = start
    state = _early_label(rows, p, time, event_id, horizon) if p[_EARLY_LENGTH] else UNKNOWN
    at = _behind(rows, start, end, time)
    for i in range(end, at - 1, -1):  # the closing row, and behind a late event the later ones
        rows[i + 1] = rows[i]
    rows[at, _TIME] = time
    rows[at, _ID] = event_id
    rows[at, _STATE] = state
    for i in range(at + 1, end + 2):
        rows[i, _POSITIVES] += state == POSITIVE
        for v in range(plan.values):
            if values[v] != NULL:
                rows[i, _VALUES + 2 * v] += values[v]
                rows[i, _VALUES + 2 * v + 1] += 1
    p[_LENGTH] = end + 1 - start
    return LATE if late else FOLDED


@jit
def _label(rows: Ints, p: Ints, plan: Plan, time: int, event_id: int, state: int) -> int:
    """Set the label of one event's row, or let it wait for its event. There is room for it."""
    start = p[_START]
    end = start + p[_LENGTH]
    at = _behind(rows, start, end, time) - 1
    while at >= start and rows[at, _TIME] == time:
        if rows[at, _ID] == event_id:
            change = int(state == POSITIVE) - int(rows[at, _STATE] == POSITIVE)
            rows[at, _STATE] = state
            if change:
                for i in range(at + 1, end + 1):
                    rows[i, _POSITIVES] += change
            return LABELLED
        at -= 1
    if p[_NEWEST] != NULL and time <= p[_NEWEST] - plan.retention:
        return LABEL_STALE
    for i in range(p[_EARLY_LENGTH]):
        row = p[_EARLY] + i
        if rows[row, _TIME] == time and rows[row, _ID] == event_id:
            rows[row, _STATE] = state
            return LABEL_EARLY
    row = p[_EARLY] + p[_EARLY_LENGTH]
    rows[row, _TIME] = time
    rows[row, _ID] = event_id
    rows[row, _STATE] = state
    p[_EARLY_LENGTH] += 1
    return LABEL_EARLY


@jit
def _known(rows: Ints, p: Ints, event_id: int) -> bool:
    for i in range(p[_START] + p[_LENGTH] - 1, p[_START] - 1, -1):  # noqa: SIM110 - numba has no any() of this
        if rows[i, _ID] == event_id:
            return True
    return False


@jit
def _fold(
    rows: Ints, table: Ints, heap: Ints, plan: Plan, done: int,
    slots: Ints, kinds: Bytes, times: Ints, ids: Ints, values: Ints, labels: Bytes,
    features: Floats, outcomes: Bytes,
) -> int:  # fmt: skip
    """Fold records from `done` on. Returns where it stopped: n, or the record that needs more room."""
    edges = np.empty(len(plan.bounds), np.int64)
    for i in range(done, len(slots)):
        if slots[i] < 0:
            outcomes[i] = NO_KEY
            continue
        p = table[slots[i]]
        time = times[i]
        if kinds[i] == LABEL:
            if not _room_for_early(rows, heap, p):
                return i
            outcomes[i] = _label(rows, p, plan, time, ids[i], labels[i])
            continue
        if p[_NEWEST] != NULL and time <= p[_NEWEST] - plan.retention:
            outcomes[i] = TOO_LATE
        elif _known(rows, p, ids[i]):
            outcomes[i] = DUPLICATE
            continue
        else:
            if not _room_for_row(rows, heap, p):
                return i
            outcomes[i] = _insert(rows, p, plan, time, ids[i], values[i])
        _read(rows, p, plan, time, edges, features[i])
    return len(slots)


@jit
def _read_many(rows: Ints, table: Ints, plan: Plan, slots: Ints, times: Ints, features: Floats) -> None:
    edges = np.empty(len(plan.bounds), np.int64)
    for i in range(len(slots)):
        _read(rows, table[slots[i]], plan, times[i], edges, features[i])


@jit
def _pack(rows: Ints, table: Ints, plan: Plan, slots: Ints, starts: Ints, packed: Ints) -> None:
    for s in range(len(slots)):
        p = table[slots[s]]
        at = starts[s]
        packed[at], packed[at + 1], packed[at + 2] = p[_NEWEST], p[_LENGTH], p[_EARLY_LENGTH]
        at += 3
        for i in range(p[_START], p[_START] + p[_LENGTH]):
            packed[at] = rows[i, _TIME] * 4 + rows[i, _STATE]
            packed[at + 1] = rows[i, _ID]
            for v in range(plan.values):
                column = _VALUES + 2 * v
                valued = rows[i + 1, column + 1] != rows[i, column + 1]
                packed[at + 2 + v] = rows[i + 1, column] - rows[i, column] if valued else NULL
            at += 2 + plan.values
        for i in range(p[_EARLY], p[_EARLY] + p[_EARLY_LENGTH]):
            packed[at] = rows[i, _TIME] * 4 + rows[i, _STATE]
            packed[at + 1] = rows[i, _ID]
            at += 2


@jit
def _unpack(rows: Ints, table: Ints, heap: Ints, plan: Plan, slot: int, packed: Ints) -> bool:
    """Fill an empty slot. False, with the slot still empty, when the arena is full."""
    p = table[slot]
    length, early = packed[1], packed[2]
    if length:
        p[_CLASS] = _class_for(length + 1)
        p[_CHUNK] = p[_START] = _take(rows, heap, p[_CLASS])
        if p[_CHUNK] == _NONE:
            return False
    if early:
        p[_EARLY_CLASS] = _class_for(early)
        p[_EARLY] = _take(rows, heap, p[_EARLY_CLASS])
        if p[_EARLY] == _NONE:
            if length:
                _give(rows, heap, p[_CHUNK], p[_CLASS])
                p[_CHUNK] = _NONE
            return False
    p[_NEWEST], p[_LENGTH], p[_EARLY_LENGTH] = packed[0], length, early
    at = 3
    if length:
        rows[p[_START]] = 0
    for i in range(p[_START], p[_START] + length):
        rows[i + 1] = rows[i]
        rows[i, _TIME] = packed[at] >> 2
        rows[i, _STATE] = packed[at] & 3
        rows[i, _ID] = packed[at + 1]
        rows[i + 1, _POSITIVES] += rows[i, _STATE] == POSITIVE
        for v in range(plan.values):
            if packed[at + 2 + v] != NULL:
                rows[i + 1, _VALUES + 2 * v] += packed[at + 2 + v]
                rows[i + 1, _VALUES + 2 * v + 1] += 1
        at += 2 + plan.values
    for i in range(p[_EARLY], p[_EARLY] + early):
        rows[i, _TIME] = packed[at] >> 2
        rows[i, _STATE] = packed[at] & 3
        rows[i, _ID] = packed[at + 1]
        at += 2
    return True
