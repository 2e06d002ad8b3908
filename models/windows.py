"""Exact windows over event time: the fold of one entity's log, and the read at any time.

A profile is the rows of one entity, in event-time order, each carrying the sums of all rows before
it. A window over sums is then two binary searches and one subtraction, whatever its length, and any time
can be read; what is no sum (the largest value, the values that differ) looks at the window's rows.
Everything summed is an integer, so neither order nor merging can change a bit; one formula of float64
stands at the end. `models.oracle` says the same in plain Python, to be checked by eye.

Profiles live in one arena of int64 rows, in chunks of powers of two. The row layout:

    0 time   event time, ms; with a hop, that of its cell
    1 id     64-bit event id
    2 state  the label (0 unknown, 1 negative, 2 positive), and above it a bit for each filter that holds
    3 what `Plan.columns` says, summed over the rows before this one

Behind the last row stands a closing row that holds the totals, so a chunk of c rows holds c - 1.
With a hop, all events of a cell are one row, which has no id, and its sums are all that is kept of them.

A reversal takes its event's row out again: what stays is the fold of the history without that event, but for the
newest time, for what that has made forgotten does not come back. Its id is remembered as long as the row would
have been, among the labels that wait, so that the event does not count when it comes twice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.int8]

NULL = np.iinfo(np.int64).min  # a value that is absent, in an int64 column

# Kinds of log records. LOST says of a writer that retention has cut what it was to send; it has no key, and
# the fold passes over it.
EVENT, LABEL, LOST = 0, 1, 2
# What became of a record. Its row is in the profile after FOLDED and LATE only.
(
    FOLDED, LATE, TOO_LATE, DUPLICATE, NO_KEY, LABELLED, LABEL_EARLY, LABEL_STALE, TAKEN_OUT, CANCELLED,
) = range(10)  # fmt: skip
OUTCOMES = (
    "folded", "late", "too_late", "duplicate", "no_key", "labelled", "label_early", "label_stale", "reversed",
    "cancelled",
)  # fmt: skip
# States that a LABEL record gives its event; the last takes it out. A row has one of the others.
UNKNOWN, NEGATIVE, POSITIVE, REVERSED = range(4)

# Kinds of aggregates: those that are sums, then those that look at the rows of the window.
(
    COUNT, SUM, MEAN, VARIANCE, STDDEV, RATE, SHARE, POSITIVES, COVERAGE,
    FIRST, LAST, LAST_K, MIN, MAX, SINCE_LAST, DISTINCT, QUANTILE, MOST_FREQUENT, DECAYED_COUNT, DECAYED_SUM,
) = range(20)  # fmt: skip

# Columns of Plan.ops: the kind; the bounds of the window (OLDER -1 for life); the running columns of the sum, of how
# many count (-1: all rows) and the first of three of squares; of a row's own value and of whether it has one (-1: the
# value is the row itself, and always there); the unit of the values; a number of the kind's own; the filter (-1
# none); the first output and how many; the window, ms; what a window without anything gives: 0, else NaN.
(
    OP_KIND, OP_NEWER, OP_OLDER, OP_SUM, OP_COUNT, OP_SQUARES, OP_RAW, OP_VALUED, OP_DIVISOR, OP_NUMBER, OP_FILTER,
    OP_OUT, OP_WIDTH, OP_WINDOW, OP_NOTHING,
) = range(15)  # fmt: skip

# What a running column sums: rows, values, how many rows have one, squares in three parts (the value being
# high * 2**23 + low, so that each part of 2**17 squares is exact in int64), labels by state.
ROWS, VALUE, VALUED, HIGH_HIGH, HIGH_LOW, LOW_LOW, POSITIVE_ROWS, LABELLED_ROWS = range(8)
LOW_BITS = 23

# Decay: a weight is an integer of 1/2**24, halved with each half-life, by 4096 steps in between.
HALVINGS = 24
DECAY_STEPS = 4096

_TIME, _ID, _STATE, SUMS = 0, 1, 2, 3  # columns of a row; the running ones begin at SUMS
_LABEL_BITS = 2  # of a state; the filters' bits lie above
_SMALLEST = 4  # rows in the smallest chunk: three of the profile and the closing one
_CLASSES = 40  # chunks of up to 4 * 2**39 rows
_TOP, _IN_USE = _CLASSES, _CLASSES + 1  # of the heap, behind the free chunks of each class
_STEP = 16  # arrays grow by a sixteenth, and gaps are closed where that gives as much
_DOUBLE = 4096  # lines up to which they double, some 200 KiB
_RESERVE = 2**24  # lines for which a large array has addresses from the first, a gigabyte at most

# Columns of the profiles' table: the chunk and its class, the first row in use (it moves up as old
# rows are forgotten), how many rows, the newest event time; the chunk of labels that wait for events, and of
# what was reversed; the chunk of a long profile's index of ids, and how many it has; words with a bit for each id
# of a short one, by which most events are known to be new without a look at the rows.
(
    _CHUNK, _CLASS, _START, _LENGTH, _NEWEST, _EARLY, _EARLY_CLASS, _EARLY_LENGTH, _INDEX, _INDEX_CLASS, _INDEXED,
    _MARKS,
) = range(12)  # fmt: skip
_MARK_WORDS = 4
_EMPTY = (-1, -1, 0, 0, NULL, -1, -1, 0, -1, -1, 0, *(0,) * _MARK_WORDS)
_NONE = -1
_GONE = (
    REVERSED | 1 << _LABEL_BITS
)  # of an event that came and was reversed; a reversal that waits is REVERSED
_COUNT_BITS = 32  # of how many labels wait, in a packed word; how many events are gone stands above
_LONG = 256  # rows from which on a profile has an index of its ids; fewer are faster looked through


class Plan(NamedTuple):
    """The aggregates of one entity, as arrays that the kernel walks. Made by models.aggregates.plan."""

    bounds: Ints  # distinct distances from the time read to a window's edges, ms
    ops: Ints  # (k, 15), see OP_KIND
    columns: (
        Ints  # (c, 4): what a running column sums, of which value, under which filter, and whether for life
    )
    raw: Ints  # (values, 2): each value's running columns of it and of whether it is there, -1 where it always is
    decay: Ints  # (DECAY_STEPS,) weights within a half-life
    retention: int  # rows this much older than the newest are forgotten, ms
    values: int
    filters: int
    hop: int  # ms of a cell, 0 where each event has a row
    width: int  # features


class Rows(NamedTuple):
    """A profile's rows in event-time order: times, ids, labels, flags (n,); values (n, v), NULL where absent."""

    times: Ints
    ids: Ints
    labels: Ints
    flags: Ints
    values: Ints


class Arena:
    """All profiles of one stage. Slots are small integers; `new` gives one, `free` takes it back."""

    def __init__(self, plan: Plan, rows: int = 1024) -> None:
        self.plan = plan
        self._rows: Ints = np.zeros((rows, SUMS + len(plan.columns)), np.int64)
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
        self, slots: Ints, kinds: Bytes, times: Ints, ids: Ints, values: Ints, labels: Bytes, flags: Ints
    ) -> tuple[Floats, Bytes]:
        """Fold one micro-batch in its order.

        slots: (n,) int64, -1 where the record has no key; kinds: (n,) EVENT or LABEL; times: (n,) ms;
        ids: (n,); values: (n, v) int64, NULL where absent; labels: (n,) states, for LABEL records;
        flags: (n,) int64, bit f where filter f holds.
        Returns features (n, k) float64 as of each event, NaN where there is no value and for labels, and
        outcomes (n,) int8. An event's own row is in its windows; a row of equal time that comes later in the log
        is not. An event whose reversal came before it has no row, so its windows are those of the other events.
        """
        n = len(slots)
        features = np.full((n, self.plan.width), np.nan)
        outcomes = np.zeros(n, np.int8)
        done = 0
        while True:
            done = _fold(
                self._rows, self._table, self._heap, self.plan, done,
                slots, kinds, times, ids, values, labels, flags, features, outcomes,
            )  # fmt: skip
            if done == n:
                return features, outcomes
            self._grow()

    def read_at(self, slots: Ints, times: Ints) -> Floats:
        """Features (n, k) of these profiles at these times, with no event folded."""
        features = np.empty((len(slots), self.plan.width))
        _read_many(self._rows, self._table, self.plan, slots, times, features)
        return features

    def rows(self, slot: int) -> Rows:
        """What a profile remembers, as it is now; a copy. With a hop it remembers no events."""
        p, plan = self._table[slot], self.plan
        rows = self._rows[p[_START] : p[_START] + (0 if plan.hop else p[_LENGTH])]
        below = self._rows[p[_START] + 1 : p[_START] + 1 + len(rows)]
        values = below[:, plan.raw[:, 0]] - rows[:, plan.raw[:, 0]]
        for v, valued in enumerate(plan.raw[:, 1].tolist()):
            if valued != _NONE:
                values[below[:, valued] == rows[:, valued], v] = NULL
        states = rows[:, _STATE]
        return Rows(
            rows[:, _TIME].copy(),
            rows[:, _ID].copy(),
            states & (1 << _LABEL_BITS) - 1,
            states >> _LABEL_BITS,
            values,
        )

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

        Little-endian int64 words: newest time, number of rows, number of early labels plus 2**32 for each
        reversed event; of each column that is summed for life, what was forgotten; for each row time * 4 + label,
        id, the filters' bits where there are any, values (NULL where absent); with a hop time and what each column
        adds; for each early label, then for each reversed event, time * 4 + label and id.
        """
        table, plan = self._table[slots], self.plan
        row = 1 + len(plan.columns) if plan.hop else 2 + plan.values + (plan.filters > 0)
        lives = int(plan.columns[:, 3].sum())
        words = 3 + lives + table[:, _LENGTH] * row + table[:, _EARLY_LENGTH] * 2
        ends = np.cumsum(words)
        packed = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
        _pack(self._rows, self._table, self.plan, slots, ends, words, packed)
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
        parts = (_CHUNK, _EARLY, _INDEX)
        whose = [np.flatnonzero(table[:, part] != _NONE) for part in parts]
        chunks = np.concatenate([table[slots, part] for slots, part in zip(whose, parts, strict=True)])
        owners = np.concatenate([slots * len(parts) + n for n, slots in enumerate(whose)])
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
def _copy(rows: Ints, to: int, row: int) -> None:
    """By columns: an assignment of slices costs several times as much."""
    for column in range(rows.shape[1]):
        rows[to, column] = rows[row, column]


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
    """owners: of all chunks in use, by address: thrice the slot, and 1 more for its waiting labels, 2 for its index."""
    top = 0
    for owner in owners:
        p = table[owner // 3]
        part = owner % 3
        if part == 0:
            start, length, size_class = p[_START], p[_LENGTH] + 1, p[_CLASS]
            p[_CHUNK] = p[_START] = top
        elif part == 1:
            start, length, size_class = p[_EARLY], p[_EARLY_LENGTH], p[_EARLY_CLASS]
            p[_EARLY] = top
        else:
            start, length, size_class = p[_INDEX], _SMALLEST << p[_INDEX_CLASS], p[_INDEX_CLASS]
            p[_INDEX] = top
        for i in range(length):
            _copy(rows, top + i, start + i)
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
        if p[_INDEX] != _NONE:
            _give(rows, heap, p[_INDEX], p[_INDEX_CLASS])
        p[_CHUNK] = p[_EARLY] = p[_INDEX] = _NONE


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
        _mark_all(rows, p)
        return True
    chunk = _take(rows, heap, p[_CLASS] + 1)
    if chunk == _NONE:
        return False
    for i in range(length + 1):
        _copy(rows, chunk + i, start + i)
    _give(rows, heap, p[_CHUNK], p[_CLASS])
    p[_CHUNK] = p[_START] = chunk
    p[_CLASS] += 1
    _mark_all(rows, p)
    return True


@jit
def _room_for_early(rows: Ints, heap: Ints, p: Ints) -> bool:
    """Make room for one more waiting label or reversed event. False when the arena is full."""
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
def _value(rows: Ints, op: Ints, row: int) -> int:
    """A row's value for an aggregate that looks at rows; NULL where it has none, or the filter does not hold."""
    if op[OP_FILTER] != _NONE and not (rows[row, _STATE] >> (_LABEL_BITS + op[OP_FILTER])) & 1:
        return NULL
    if op[OP_RAW] == _NONE:  # of the row itself
        return 1
    if op[OP_VALUED] != _NONE and rows[row + 1, op[OP_VALUED]] == rows[row, op[OP_VALUED]]:
        return NULL
    return int(rows[row + 1, op[OP_RAW]] - rows[row, op[OP_RAW]])


@jit
def _between(rows: Ints, column: int, newer: int, older: int) -> int:
    """What a column sums up to between two rows; for life where the older is _NONE."""
    if older == _NONE:
        return int(rows[newer, column])
    return int(rows[newer, column] - rows[older, column])


@jit
def _read(  # noqa: PLR0912 - by kind
    rows: Ints, p: Ints, bounds: Ints, ops: Ints, decay: Ints, time: int, edges: Ints, out: Floats
) -> None:
    """The features of one profile at a time. edges: scratch, as long as bounds."""
    start = p[_START]
    edge = start + p[_LENGTH]
    for b in range(len(bounds)):  # farther back with each bound, so each search ends at the last
        edge = _behind(rows, start, edge, time - bounds[b])
        edges[b] = edge
    if p[_CHUNK] == _NONE:
        for k in range(len(ops)):
            for o in range(ops[k, OP_OUT], ops[k, OP_OUT] + ops[k, OP_WIDTH]):
                out[o] = 0.0 if ops[k, OP_NOTHING] == 0 else np.nan
        return
    for k in range(len(ops)):
        kind, at = ops[k, OP_KIND], ops[k, OP_OUT]
        newer = edges[ops[k, OP_NEWER]]
        older = edges[ops[k, OP_OLDER]] if ops[k, OP_OLDER] != _NONE else _NONE
        if kind >= FIRST:
            until = time - bounds[ops[k, OP_NEWER]]
            _look(rows, decay, ops[k], newer, older, until, out[at : at + ops[k, OP_WIDTH]])
            continue
        column = ops[k, OP_COUNT]
        count = newer - older if column == _NONE else _between(rows, column, newer, older)
        if kind == COUNT:
            out[at] = count
            continue
        if kind == RATE:
            out[at] = count * ops[k, OP_NUMBER] / ops[k, OP_WINDOW]
            continue
        total = _between(rows, ops[k, OP_SUM], newer, older)
        if kind == SUM:
            out[at] = total / ops[k, OP_DIVISOR]
        elif kind == POSITIVES:
            out[at] = total
        elif count == 0:
            out[at] = 0.0 if ops[k, OP_NOTHING] == 0 else np.nan
        elif kind == MEAN:
            out[at] = total / (count * ops[k, OP_DIVISOR])
        elif kind in (SHARE, COVERAGE):
            out[at] = total / count
        else:
            squares = ops[k, OP_SQUARES]
            spread = _spread(
                count, total, _between(rows, squares, newer, older), _between(rows, squares + 1, newer, older),
                _between(rows, squares + 2, newer, older),
            )  # fmt: skip
            n, divisor = float(count), float(ops[k, OP_DIVISOR])
            variance = spread / (n * n * divisor * divisor)
            out[at] = variance if kind == VARIANCE else np.sqrt(variance)


@jit
def _spread(count: int, total: int, high_high: int, high_low: int, low_low: int) -> float:
    """count * (sum of squares) - total**2: exact in digits of 30 bits, then float64. count: below 2**31.

    The sum of squares is high_high * 2**46 + high_low * 2**24 + low_low (see LOW_BITS).
    """
    digit = (1 << 30) - 1
    d0 = (low_low & digit) + ((high_low & 63) << 24)
    d1 = (low_low >> 30 & digit) + (high_low >> 6 & digit) + ((high_high & 0x3FFF) << 16) + (d0 >> 30)
    d2 = (low_low >> 60) + (high_low >> 36) + (high_high >> 14 & digit) + (d1 >> 30)
    d3 = (high_high >> 44) + (d2 >> 30)
    size = abs(total)
    s0, s1, s2 = size & digit, size >> 30 & digit, size >> 60
    d0 = count * (d0 & digit) - s0 * s0
    d1 = count * (d1 & digit) - 2 * s0 * s1 + (d0 >> 30)
    d2 = count * (d2 & digit) - 2 * s0 * s2 - s1 * s1 + (d1 >> 30)
    d3 = count * d3 - 2 * s1 * s2 + (d2 >> 30)
    high, middle = d3 - (s2 * s2 << 30), (d2 & digit) << 30 | (d1 & digit)
    return float(high) * 2.0**90 + float(middle) * 2.0**30 + float(d0 & digit)


@jit
def _look(  # noqa: PLR0912 - by kind
    rows: Ints, decay: Ints, op: Ints, newer: int, older: int, until: int, out: Floats
) -> None:
    """Aggregates that are no sums: they look at the window's rows. until: the window's newer end."""
    out[:] = np.nan
    kind = op[OP_KIND]
    divisor = op[OP_DIVISOR]
    if kind in (FIRST, MIN, MAX):
        best = NULL
        for row in range(older, newer):
            value = _value(rows, op, row)
            if value != NULL and (
                best == NULL or (kind == MIN and value < best) or (kind == MAX and value > best)
            ):
                best = value
                if kind == FIRST:
                    break
        if best != NULL:
            out[0] = best / divisor
    elif kind in (LAST, LAST_K):
        found = 0
        for row in range(newer - 1, older - 1, -1):
            value = _value(rows, op, row)
            if value != NULL:
                out[found] = value / divisor
                found += 1
                if found == len(out):
                    break
    elif kind == SINCE_LAST:
        for row in range(newer - 1, older - 1, -1):
            if rows[row, _TIME] < until and _value(rows, op, row) != NULL:
                out[0] = (until - rows[row, _TIME]) / 1000
                break
    elif kind in (DECAYED_COUNT, DECAYED_SUM):
        _decayed(rows, decay, op, newer, older, until, out)
    else:
        values = np.empty(newer - older, np.int64)
        count = 0
        for row in range(older, newer):
            value = _value(rows, op, row)
            if value != NULL:
                values[count] = value
                count += 1
        _ranked(op, np.sort(values[:count]), out)


@jit
def _decayed(rows: Ints, decay: Ints, op: Ints, newer: int, older: int, until: int, out: Floats) -> None:
    """Sums of value times weight, in two halves so that none overflows; a weight is an integer of 1 / 2**24."""
    high = low = 0
    life = op[OP_NUMBER]
    for row in range(older, newer):
        age = until - rows[row, _TIME]
        weight = decay[(age % life) * DECAY_STEPS // life] >> (age // life)
        value = _value(rows, op, row)
        if value != NULL:
            high += (value >> LOW_BITS) * weight
            low += (value & ((1 << LOW_BITS) - 1)) * weight
    out[0] = (float(high) * (1 << LOW_BITS) + float(low)) / (float(1 << HALVINGS) * op[OP_DIVISOR])


@jit
def _ranked(op: Ints, values: Ints, out: Floats) -> None:
    """Aggregates of the values in their order."""
    kind, count = op[OP_KIND], len(values)
    if kind == QUANTILE:
        if count:
            out[0] = values[max((count * op[OP_NUMBER] + 999_999) // 1_000_000, 1) - 1] / op[OP_DIVISOR]
        return
    # runs of equal values
    runs = 0
    starts = np.empty(count + 1, np.int64)
    for i in range(count):
        if i == 0 or values[i] != values[i - 1]:
            starts[runs] = i
            runs += 1
    starts[runs] = count
    if kind == DISTINCT:
        out[0] = runs
        return
    lengths = starts[1 : runs + 1] - starts[:runs]
    for o in range(min(len(out), runs)):
        best = int(np.argmax(lengths))  # the first of those of equal length: the smaller value
        out[o] = values[starts[best]] / op[OP_DIVISOR]
        lengths[best] = 0


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
                _copy(rows, early + kept, row)
            kept += 1
    p[_EARLY_LENGTH] = kept
    return state


@jit
def _put_early(rows: Ints, p: Ints, time: int, event_id: int, state: int) -> None:
    """Let a label wait, or remember what was reversed. There is room for it."""
    row = p[_EARLY] + p[_EARLY_LENGTH]
    rows[row, _TIME] = time
    rows[row, _ID] = event_id
    rows[row, _STATE] = state
    p[_EARLY_LENGTH] += 1


@jit
def _gain(columns: Ints, column: int, values: Ints, state: int) -> int:  # noqa: PLR0911 - by meaning
    """What a row adds to a running column."""
    what, value, of = columns[column, 0], columns[column, 1], columns[column, 2]
    if of != _NONE and not (state >> (_LABEL_BITS + of)) & 1:
        return 0
    if what == ROWS:
        return 1
    label = state & ((1 << _LABEL_BITS) - 1)
    if what == POSITIVE_ROWS:
        return int(label == POSITIVE)
    if what == LABELLED_ROWS:
        return int(label != UNKNOWN)
    if values[value] == NULL:
        return 0
    if what == VALUE:
        return int(values[value])
    if what == VALUED:
        return 1
    size = abs(values[value])
    high, low = size >> LOW_BITS, size & ((1 << LOW_BITS) - 1)
    if what == HIGH_HIGH:
        return int(high * high)
    return int(high * low if what == HIGH_LOW else low * low)


@jit
def _insert(
    rows: Ints,
    p: Ints,
    columns: Ints,
    retention: int,
    hop: int,
    time: int,
    event_id: int,
    values: Ints,
    flags: int,
) -> int:
    """Put one event's row in its place. There is room for it. Returns FOLDED, LATE, or, with no row, CANCELLED."""
    newest = p[_NEWEST]
    late = newest != NULL and time < newest
    if not late:
        p[_NEWEST] = newest = time
    horizon = newest - retention
    start = p[_START]
    end = start + p[_LENGTH]
    while start < end and rows[start, _TIME] <= horizon:
        start += 1
    p[_START] = start
    state = _early_label(rows, p, time, event_id, horizon) if p[_EARLY_LENGTH] else UNKNOWN
    if state == REVERSED:  # as if it were folded, and taken out at once
        p[_LENGTH] = end - start
        _put_early(rows, p, time, event_id, _GONE)
        return CANCELLED
    state |= flags << _LABEL_BITS
    at = _behind(rows, start, end, time)
    if hop and at > start and rows[at - 1, _TIME] == time:
        at -= 1  # into its cell
    else:
        for i in range(end, at - 1, -1):  # the closing row, and behind a late event the later ones
            _copy(rows, i + 1, i)
        rows[at, _TIME] = time
        rows[at, _ID] = event_id
        rows[at, _STATE] = state
        end += 1
    for c in range(len(columns)):
        gain = _gain(columns, c, values, state)
        if gain:
            for i in range(at + 1, end + 1):
                rows[i, SUMS + c] += gain
    p[_LENGTH] = end - start
    return LATE if late else FOLDED


@jit
def _take_out(rows: Ints, p: Ints, at: int) -> None:
    """Take a row out, and what it adds out of the sums behind it. The index keeps its id, as of forgotten rows."""
    for column in range(SUMS, rows.shape[1]):
        gain = rows[at + 1, column] - rows[at, column]
        for i in range(at, p[_START] + p[_LENGTH]):
            rows[i, column] = rows[i + 1, column] - gain
    for i in range(at, p[_START] + p[_LENGTH]):
        for column in range(SUMS):
            rows[i, column] = rows[i + 1, column]
    p[_LENGTH] -= 1


@jit
def _label(  # noqa: PLR0911 - by outcome
    rows: Ints, p: Ints, plan: Plan, time: int, event_id: int, state: int
) -> int:
    """Set the label of one event's row, take the row out if it is REVERSED, or let that wait for its event.

    There is room for it. A cell has no ids to find an event by, so nothing is taken out of it.
    """
    if plan.hop and state == REVERSED:
        return LABEL_STALE
    start = p[_START]
    end = start + p[_LENGTH]
    at = _behind(rows, start, end, time) - 1
    while at >= start and rows[at, _TIME] == time:
        if rows[at, _ID] == event_id:
            if state == REVERSED:
                _take_out(rows, p, at)
                _put_early(rows, p, time, event_id, _GONE)
                return TAKEN_OUT
            before = rows[at, _STATE]
            after = (before >> _LABEL_BITS) << _LABEL_BITS | state
            rows[at, _STATE] = after
            for c in range(len(plan.columns)):
                if plan.columns[c, 0] in (POSITIVE_ROWS, LABELLED_ROWS):
                    change = _gain(plan.columns, c, rows[at], after) - _gain(
                        plan.columns, c, rows[at], before
                    )
                    if change:
                        for i in range(at + 1, end + 1):
                            rows[i, SUMS + c] += change
            return LABELLED
        at -= 1
    if p[_NEWEST] != NULL and time <= p[_NEWEST] - plan.retention:
        return LABEL_STALE
    for i in range(p[_EARLY_LENGTH]):
        row = p[_EARLY] + i
        if rows[row, _TIME] == time and rows[row, _ID] == event_id:
            if rows[row, _STATE] >= REVERSED:
                return LABEL_STALE  # a reversal is the last word
            rows[row, _STATE] = state
            return LABEL_EARLY
    _put_early(rows, p, time, event_id, state)
    return LABEL_EARLY


@jit
def _known(rows: Ints, p: Ints, event_id: int) -> bool:
    """Whether a row has this id, or had it and was reversed."""
    for row in range(p[_EARLY], p[_EARLY] + p[_EARLY_LENGTH]):
        if rows[row, _ID] == event_id and rows[row, _STATE] == _GONE:
            return True
    # A forgotten row's id stays in the index and in the marks for a while, so a hit is looked up.
    if p[_LENGTH] >= _LONG:
        if p[_INDEX] != _NONE and not _place(rows, p, event_id)[1]:
            return False
    elif not _mark(p, event_id, False):
        return False
    for i in range(p[_START] + p[_LENGTH] - 1, p[_START] - 1, -1):  # noqa: SIM110 - numba has no any() of this
        if rows[i, _ID] == event_id:
            return True
    return False


@jit
def _spread_of(event_id: int) -> int:
    """Ids come in sequences, too: each bit of the result depends on many of the id's."""
    return int(event_id ^ (event_id >> 17) ^ (event_id >> 41))


@jit
def _mark(p: Ints, event_id: int, put: bool) -> bool:
    """Whether an id's bit is set; set it, if asked to."""
    place = _spread_of(event_id) & (64 * _MARK_WORDS - 1)
    word, bit = _MARKS + (place >> 6), np.int64(1) << np.int64(place & 63)
    found = p[word] & bit != 0
    if put:
        p[word] |= bit
    return bool(found)


@jit
def _mark_all(rows: Ints, p: Ints) -> None:
    """Marks of the ids that there are; those of forgotten rows are gone."""
    p[_MARKS : _MARKS + _MARK_WORDS] = 0
    for i in range(p[_START], p[_START] + p[_LENGTH]):
        _mark(p, rows[i, _ID], True)


@jit
def _place(rows: Ints, p: Ints, event_id: int) -> tuple[int, bool]:
    """Where an id is in the index, or would be. The index is a hash table with open addresses, NULL where free."""
    width = rows.shape[1]
    cells = (_SMALLEST << p[_INDEX_CLASS]) * width
    place = _spread_of(event_id) % cells
    while True:
        found = rows[p[_INDEX] + place // width, place % width]
        if found in (event_id, NULL):
            return place, found == event_id
        place = place + 1 if place + 1 < cells else 0


@jit
def _note(rows: Ints, heap: Ints, p: Ints, event_id: int) -> bool:
    """Note the id of an event that gets a row. False when the arena is full."""
    _mark(p, event_id, True)
    if p[_LENGTH] < _LONG:
        if p[_INDEX] != _NONE:  # it would miss what comes until the profile is long again
            _give(rows, heap, p[_INDEX], p[_INDEX_CLASS])
            p[_INDEX] = _NONE
        return True
    width = rows.shape[1]
    if p[_INDEX] == _NONE or 2 * p[_INDEXED] >= (_SMALLEST << p[_INDEX_CLASS]) * width:
        size_class = _class_for((4 * p[_LENGTH] + width - 1) // width)
        chunk = _take(rows, heap, size_class)
        if chunk == _NONE:
            return False
        if p[_INDEX] != _NONE:
            _give(rows, heap, p[_INDEX], p[_INDEX_CLASS])
        p[_INDEX], p[_INDEX_CLASS], p[_INDEXED] = chunk, size_class, 0
        rows[chunk : chunk + (_SMALLEST << size_class)] = NULL
        for i in range(p[_START], p[_START] + p[_LENGTH]):
            _enter(rows, p, rows[i, _ID])
    _enter(rows, p, event_id)
    return True


@jit
def _enter(rows: Ints, p: Ints, event_id: int) -> None:
    place, found = _place(rows, p, event_id)
    if not found:
        width = rows.shape[1]
        rows[p[_INDEX] + place // width, place % width] = event_id
        p[_INDEXED] += 1


@jit
def _fold(
    rows: Ints, table: Ints, heap: Ints, plan: Plan, done: int,
    slots: Ints, kinds: Bytes, times: Ints, ids: Ints, values: Ints, labels: Bytes, flags: Ints,
    features: Floats, outcomes: Bytes,
) -> int:  # fmt: skip
    """Fold records from `done` on. Returns where it stopped: n, or the record that needs more room."""
    edges = np.empty(len(plan.bounds), np.int64)
    columns, retention, hop = plan.columns, plan.retention, plan.hop
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
        cell = time // hop * hop if hop else time
        if p[_NEWEST] != NULL and cell <= p[_NEWEST] - retention:
            outcomes[i] = TOO_LATE
        elif not hop and _known(rows, p, ids[i]):
            outcomes[i] = DUPLICATE
            continue
        else:
            if not _room_for_row(rows, heap, p):
                return i
            if not hop and not _note(rows, heap, p, ids[i]):
                return i
            outcomes[i] = _insert(
                rows, p, columns, retention, hop, cell, 0 if hop else ids[i], values[i], flags[i]
            )
        _read(rows, p, plan.bounds, plan.ops, plan.decay, time, edges, features[i])
    return len(slots)


@jit
def _read_many(rows: Ints, table: Ints, plan: Plan, slots: Ints, times: Ints, features: Floats) -> None:
    edges = np.empty(len(plan.bounds), np.int64)
    for i in range(len(slots)):
        _read(rows, table[slots[i]], plan.bounds, plan.ops, plan.decay, times[i], edges, features[i])


@jit
def _pack(rows: Ints, table: Ints, plan: Plan, slots: Ints, ends: Ints, words: Ints, packed: Ints) -> None:
    """ends, words: of each profile in `packed`."""
    for s in range(len(slots)):
        p = table[slots[s]]
        at = ends[s] - words[s]
        packed[at], packed[at + 1] = p[_NEWEST], p[_LENGTH]
        packed[at + 2] = _pack_early(rows, p, packed[ends[s] - 2 * p[_EARLY_LENGTH] : ends[s]])
        at += 3
        for c in range(len(plan.columns)):
            if plan.columns[c, 3]:
                packed[at] = rows[p[_START], SUMS + c] if p[_CHUNK] != _NONE else 0
                at += 1
        for i in range(p[_START], p[_START] + p[_LENGTH]):
            if plan.hop:
                packed[at] = rows[i, _TIME]
                for c in range(len(plan.columns)):
                    packed[at + 1 + c] = rows[i + 1, SUMS + c] - rows[i, SUMS + c]
                at += 1 + len(plan.columns)
                continue
            packed[at] = rows[i, _TIME] * 4 + (rows[i, _STATE] & 3)
            packed[at + 1] = rows[i, _ID]
            at += 2
            if plan.filters:
                packed[at] = rows[i, _STATE] >> _LABEL_BITS
                at += 1
            for v in range(plan.values):
                column, valued = plan.raw[v, 0], plan.raw[v, 1]
                packed[at + v] = rows[i + 1, column] - rows[i, column]
                if valued != _NONE and rows[i + 1, valued] == rows[i, valued]:
                    packed[at + v] = NULL
            at += plan.values


@jit
def _pack_early(rows: Ints, p: Ints, packed: Ints) -> int:
    """What waits, then what is gone, however they came; how many there are of both, in one word."""
    at = counts = 0
    for gone in (False, True):
        for i in range(p[_EARLY], p[_EARLY] + p[_EARLY_LENGTH]):
            if (rows[i, _STATE] == _GONE) == gone:
                packed[at] = rows[i, _TIME] * 4 + (rows[i, _STATE] & REVERSED)
                packed[at + 1] = rows[i, _ID]
                at += 2
                counts += 1 << (_COUNT_BITS * gone)
    return counts


@jit
def _unpack(  # noqa: PLR0912 - by part
    rows: Ints, table: Ints, heap: Ints, plan: Plan, slot: int, packed: Ints
) -> bool:
    """Fill an empty slot. False, with the slot still empty, when the arena is full."""
    p = table[slot]
    length, waiting = packed[1], packed[2] & ((1 << _COUNT_BITS) - 1)
    early = waiting + (packed[2] >> _COUNT_BITS)
    begun = packed[0] != NULL  # it has a closing row, even if all others are forgotten or taken out
    if begun:
        p[_CLASS] = _class_for(length + 1)
        p[_CHUNK] = p[_START] = _take(rows, heap, p[_CLASS])
        if p[_CHUNK] == _NONE:
            return False
    if early:
        p[_EARLY_CLASS] = _class_for(early)
        p[_EARLY] = _take(rows, heap, p[_EARLY_CLASS])
        if p[_EARLY] == _NONE:
            if begun:
                _give(rows, heap, p[_CHUNK], p[_CLASS])
                p[_CHUNK] = _NONE
            return False
    p[_NEWEST], p[_LENGTH], p[_EARLY_LENGTH] = packed[0], length, early
    at = 3
    start, columns = p[_START], len(plan.columns)
    if begun:
        rows[start] = 0
    for c in range(columns):
        if plan.columns[c, 3]:
            if begun:
                rows[start, SUMS + c] = packed[at]
            at += 1
    for i in range(start, start + length):
        _copy(rows, i + 1, i)
        if plan.hop:
            rows[i, _TIME], rows[i, _ID], rows[i, _STATE] = packed[at], 0, 0
            for c in range(columns):
                rows[i + 1, SUMS + c] += packed[at + 1 + c]
            at += 1 + columns
            continue
        rows[i, _TIME] = packed[at] >> 2
        state = packed[at] & 3
        rows[i, _ID] = packed[at + 1]
        at += 2
        if plan.filters:
            state |= packed[at] << _LABEL_BITS
            at += 1
        rows[i, _STATE] = state
        for c in range(columns):
            rows[i + 1, SUMS + c] += _gain(plan.columns, c, packed[at : at + plan.values], state)
        at += plan.values
    _mark_all(rows, p)
    for i in range(p[_EARLY], p[_EARLY] + early):
        rows[i, _TIME] = packed[at] >> 2
        rows[i, _STATE] = packed[at] & 3 if i < p[_EARLY] + waiting else _GONE
        rows[i, _ID] = packed[at + 1]
        at += 2
    return True
