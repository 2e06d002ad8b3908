"""The memory of one stage: the profiles of one entity's log, in an arena, with RocksDB behind it.

`apply` takes what was polled from the log's partitions, as one micro-batch, through decoding and the
fold. `snapshot` gives what a flush writes. Nothing here waits, sends, or knows the time.
"""

from __future__ import annotations

import datetime as dt
import logging
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.events import Batch, Decoded, Reason, key_bytes
from models.fields import Field
from models.filters import Filters
from models.partitions import partitions_of
from models.pipeline import Entity
from models.records import GAP, NEVER, NEWS, SEEN, chain, fresh, in_step, loosened, skew, tightened
from models.windows import (
    EVENT,
    LABEL_EARLY,
    LABEL_STALE,
    LOST,
    NULL,
    OUTCOMES,
    Arena,
    Bytes,
    Floats,
    Ints,
    lengthen,
    step,
)
from tables.store import Progress, Snapshot, Store, StoreError

# One RocksDB write holds the interpreter for as long as it takes: one or two microseconds for a profile,
# more for a long one. With these bounds and those of a poll it stays below 5 ms.
MOST_CHANGED = 1250  # profiles of a partition
MOST_CHANGED_BYTES = 8 * 2**20  # of memory, by the mean of all profiles; half of it is written
FEW = 100  # profiles that are written together whatever their size
SWEEP = 2048  # slots that one step of an eviction looks at: under a millisecond
LARGEST = 16  # a profile of more than this part of the memory stays while it is in use

log = logging.getLogger(__name__)

_FOR_NOW = np.iinfo(np.int64).max  # degraded, until the first record tells how long
_BY_SLOT_BYTES = 8 + 8 + 3  # the arrays by slot
_SLOT_BYTES = 32 + 32  # a slot's number in `_slots`, and once freed in the arena's list
_OWED_BYTES = 240  # an entry of `_owed` with its key and its numbers

_NO_SLOT, _ABSENT, _MISPLACED = -1, -2, -3  # no key; not in memory; in another partition's log


class Record(Protocol):
    """A record as it was fetched (aiokafka's ConsumerRecord)."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]: ...


Mask = npt.NDArray[np.bool_]
Polled = Sequence[tuple[int, Sequence[Record]]]  # records by partition, each in offset order
# Values, keys and times of sending (ms) to columns: models.events or models.records.
Decode = Callable[[list[bytes], list[bytes | None], Ints], Decoded]


@dataclass
class Applied:
    """What a micro-batch came to, in the order in which it was folded.

    logs, offsets: (n,) where each record stood; features: (n, k) of this entity; outcomes: (n,)
    codes of models.windows; degraded: (n,) whose features, of this entity or one before, lack what
    retention has cut. rejects: bad input, with partition, record and reason.
    """

    batch: Batch
    logs: Ints
    offsets: Ints
    features: Floats
    outcomes: Bytes
    degraded: Mask
    rejects: list[tuple[int, Record, Reason]]


@dataclass
class Touched:
    """Profiles that changed, n of them, in the order of their partitions.

    features: (n, k) as of `times`, those of their newest events, ms; profiles: compact, as Arena.pack has them;
    degraded_until: (n,) values as of a time before this, ms, lack what retention has cut, 0 where none do;
    clocks: (n,) the latest event time of each one's partition.
    """

    slots: Ints
    keys: list[bytes]
    profiles: list[bytes]
    features: Floats
    times: Ints
    offsets: Ints
    degraded_until: Ints
    clocks: Ints
    partitions: Ints

    @property
    def degraded(self) -> Mask:
        """Which features lack what retention has cut."""
        result: Mask = self.times < self.degraded_until
        return result

    def of(self, partitions: Container[int]) -> Touched:
        """Those of these partitions."""
        return self.take([i for i, p in enumerate(self.partitions.tolist()) if p in partitions])

    def without(self, partitions: Container[int]) -> Touched:
        """The others."""
        return self.take([i for i, p in enumerate(self.partitions.tolist()) if p not in partitions])

    def take(self, picks: list[int]) -> Touched:
        """Those at these places."""
        if len(picks) == len(self.keys):
            return self
        at = np.array(picks, np.int64)
        return Touched(
            self.slots[at], [self.keys[i] for i in picks], [self.profiles[i] for i in picks], self.features[at],
            self.times[at], self.offsets[at], self.degraded_until[at], self.clocks[at], self.partitions[at],
        )  # fmt: skip


@dataclass(frozen=True)
class Looked:
    """A profile read at a time. newest: its newest event, ms; time: at which it was read; offset: of its last record.

    degraded: what retention has cut is missing at that time. features: NaN where one has no value.
    """

    newest: int
    time: int
    offset: int
    degraded: bool
    features: list[float]


class Profiles:
    """partitions: of the log, or of its writers' topics where those have more. columns: the fields of the
    numeric block. targets: partitions of the next entity's log. writers: of the log, for each partition.

    partition_of: where a key belongs, checked for each record where others than stages write the log.
    mirrored: whether someone takes what is `touched`.
    """

    def __init__(
        self,
        entity: Entity,
        decode: Decode,
        open_store: Callable[[int, int | None], Store],
        partitions: int,
        columns: Sequence[Field],
        partition_of: Callable[[bytes], int] | None = None,
        targets: int = 0,
        writers: int = 1,
        mirrored: bool = True,
    ) -> None:
        self.entity = entity
        self.loaded = self.evicted = 0  # profiles read from a store, and let go while their partition stays
        self.recalled = 0  # of those loaded, the ones that the mirror had yet to take
        self.counts = dict.fromkeys((*OUTCOMES, "seen", "gap", "rejected"), 0)
        # By partition and source: the highest offset that came before one that is missing.
        self.gaps: dict[tuple[int, int], int] = {}
        self._decode = decode
        self._open_store = open_store
        self._partition_of = partition_of
        self._mirrored = mirrored
        self._arena = Arena(entity.plan)
        names = [field.name for field in columns]
        self._value_columns: Ints = np.array([names.index(v) for v in entity.values], np.int64)
        self._filters = Filters(entity, columns)
        self._slots: dict[Any, int] = {None: _NO_SLOT}
        self._stores: dict[int, Store] = {}
        self._positions: dict[int, int] = {}
        self.starts: dict[int, int] = {}  # where each was when it was taken over
        # Records of each partition since its last snapshot; at least as many as profiles that changed.
        self._moved: dict[int, int] = {}
        self._seen: Ints = np.full((partitions, writers * partitions), NEVER, np.int64)
        self._sent: Ints = np.full((partitions, targets), NEVER, np.int64)
        self._reached: Ints = np.full((partitions, writers * partitions), NULL, np.int64)
        self.order_skew = 0  # how far writers of a log were apart at most, ms of event time
        self._clock: Ints = np.full(partitions, NULL, np.int64)
        self._degraded_until: Ints = np.full(partitions, NULL, np.int64)
        self._reach = int(entity.plan.bounds.max(initial=0))
        # By slot: whose it is, where its last record stood, what flush and mirror have yet to take, and
        # whether it was in use since a sweep came by.
        self._keys: list[Any] = []
        self._partition: Ints = np.full(64, -1, np.int64)
        self._offset: Ints = np.full(64, -1, np.int64)
        self._dirty = np.zeros(64, np.bool_)
        self._stale = np.zeros(64, np.bool_)
        self._recent = np.zeros(64, np.bool_)
        self._hand = 0  # where the next sweep begins
        self._key_bytes = 0
        # Partition and last offset of profiles that were evicted before the mirror took them.
        self._owed: dict[bytes, tuple[int, int]] = {}

    def warm(self) -> None:
        """Load the compiled kernel, so that the first event need not wait for it."""
        arena, one = Arena(self.entity.plan), np.zeros(1, np.int64)
        arena.fold(
            np.array([arena.new()]), np.zeros(1, np.int8), one, one,
            np.zeros((1, self.entity.plan.values), np.int64), np.zeros(1, np.int8), np.zeros(1, np.int64),
        )  # fmt: skip
        arena.unpack(arena.pack(one)[0])
        arena.read_at(one, one)
        arena.close_gaps()
        arena.free(one)
        partitions_of([b"0"], one, 1)
        fresh(one, one, one, one, np.zeros((1, 1), np.int64))
        chain(one, one, one, np.zeros((1, 1), np.int64))
        skew(one, one, one, np.zeros((1, 1), np.int64))
        in_step(one, one)

    # --- partitions ----------------------------------------------------------------------------

    def open(self, partition: int, at_most: int | None = None) -> int | None:
        """Take a partition over. Returns its position, None where nothing was ever stored.

        at_most: its position may not be behind this offset; what is stored of later ones does not count.
        """
        store = self._stores[partition] = self._open_store(partition, at_most)
        progress = store.progress or Progress(0)
        self._seen[partition] = self._sent[partition] = NEVER
        self._reached[partition] = NULL
        for source, offset in progress.seen.items():
            self._seen[partition, source] = offset
        for target, offset in progress.sent.items():
            self._sent[partition, target] = offset
        self._clock[partition], self._degraded_until[partition] = progress.clock, progress.degraded_until
        return store.progress.position if store.progress else None

    def start_at(self, partition: int, position: int, cut: bool = False) -> None:
        """The next offset to apply. Records before it are dropped.

        cut: the log has lost records before it that were not applied. What is missing is told when
        the next one comes, and values are marked as degraded until the longest window has passed.
        """
        self._positions[partition] = self.starts[partition] = position
        if cut:
            self._seen[partition] = loosened(self._seen[partition])
            self._degraded_until[partition] = _FOR_NOW
            self._moved[partition] = self._moved.get(partition, 0)

    def close(self, partition: int) -> None:
        """Let a partition go. What was not flushed is folded again by its next owner."""
        store = self._stores.pop(partition, None)
        if store is None:
            return
        store.close()
        self._positions.pop(partition, None)
        self.gaps = {at: highest for at, highest in self.gaps.items() if at[0] != partition}
        self._moved.pop(partition, None)
        self._forget(np.flatnonzero(self._partition == partition))
        self._owed = {k: owed for k, owed in self._owed.items() if owed[0] != partition}

    def seen(self, partition: int) -> dict[int, int]:
        """By source, the highest offset that has come of it."""
        heard = np.flatnonzero(self._seen[partition] != NEVER)
        return dict(zip(heard.tolist(), tightened(self._seen[partition, heard]).tolist(), strict=True))

    @property
    def positions(self) -> Mapping[int, int]:
        """By partition that is ours, the next offset to apply."""
        return self._positions

    @property
    def partitions(self) -> list[int]:
        return sorted(self._stores)

    @property
    def stores(self) -> dict[int, Store]:
        """The open stores, by partition."""
        return dict(self._stores)

    @property
    def size(self) -> int:
        """Profiles in memory."""
        return len(self._slots) - 1

    @property
    def nbytes(self) -> int:
        """Memory that is taken for profiles, with their keys."""
        return self._arena.nbytes + self._beside_the_arena + len(self._owed) * _OWED_BYTES

    @property
    def used(self) -> int:
        """Memory that profiles are in, in bytes: what eviction can give back."""
        return self._arena.used + self._beside_the_arena

    @property
    def _beside_the_arena(self) -> int:
        return (
            len(self._partition) * _BY_SLOT_BYTES
            + sys.getsizeof(self._slots) + sys.getsizeof(self._keys) + len(self._keys) * _SLOT_BYTES
            + self._key_bytes
        )  # fmt: skip

    @property
    def unmirrored(self) -> int:
        """How many profiles the mirror has yet to take."""
        return int(np.count_nonzero(self._stale)) + len(self._owed)

    # --- the path of a micro-batch -------------------------------------------------------------

    def apply(self, polled: Polled) -> Applied:
        """Fold what was polled. Records before the position, or seen before, change nothing."""
        # 1. accept what comes next in each partition
        records, logs = self._accept(polled)
        offsets = np.array([r.offset for r in records], np.int64)
        # 2. bytes to columns
        batch, kept, rejected = self._decode(
            [r.value or b"" for r in records],
            [r.key for r in records],
            np.array([r.timestamp for r in records], np.int64),
        )
        rejects = [(int(logs[r.index]), records[r.index], r.reason) for r in rejected]
        logs, offsets = logs[kept], offsets[kept]
        # 3. drop what was seen, in each partition's order, and find profiles
        if batch.sources is not None and batch.offsets is not None:
            if batch.sources.max(initial=0) >= self._seen.shape[1]:
                raise StoreError(
                    f"{self.entity.log} has records of more partitions than its writers' topics had at the start; "
                    "restart the worker."
                )
            assert batch.previous is not None
            found = fresh(logs, batch.sources, batch.offsets, batch.previous, self._seen)
            news = found == NEWS
            if not news.all():
                self.counts["seen"] += int((found == SEEN).sum())
                self._note_gaps(batch, logs, found == GAP)
                batch, logs, offsets = batch.where(news), logs[news], offsets[news]
            if self.gaps:
                self._forget_gaps()
            self._note_skew(batch, logs)
        slots = self._slots_of(batch.keys, logs)
        if self._partition_of is not None:
            at_home = self._at_home(slots, logs)
            if not at_home.all():
                away = np.flatnonzero(~at_home).tolist()
                rejects += [self._misplaced(batch.keys[i], logs[i], records[kept[i]]) for i in away]
                batch, slots = batch.where(at_home), slots[at_home]
                logs, offsets = logs[at_home], offsets[at_home]
        # 4. take partitions in step, and fold
        order = in_step(logs, batch.clocks)
        if order is not None:
            batch, slots, logs, offsets = batch.take(order), slots[order], logs[order], offsets[order]
        values = np.ascontiguousarray(batch.fields[:, self._value_columns])
        features, outcomes = self._arena.fold(
            slots, batch.kinds, batch.times, batch.ids, values, batch.labels, self._filters.of(batch.fields)
        )
        # 5. remember what flush, mirror and metrics have to tell
        keyed = slots >= 0
        self._dirty[slots[keyed]] = self._recent[slots[keyed]] = True
        self._offset[slots[keyed]] = offsets[keyed]
        degraded = self._degraded(batch, logs)
        # A label that waits for its event changes no value, nor does one that is ignored.
        changed = keyed & (outcomes != LABEL_EARLY) & (outcomes != LABEL_STALE)
        self._stale[slots[changed]] = self._mirrored
        for code, count in enumerate(np.bincount(outcomes, minlength=len(OUTCOMES)).tolist()):
            self.counts[OUTCOMES[code]] += count
        self.counts["rejected"] += len(rejects)
        return Applied(batch, logs, offsets, features, outcomes, degraded, rejects)

    def chain(self, logs: Ints, targets: Ints, offsets: Ints) -> Ints:
        """The offset of the record that went before each to the same target, which the next stage checks."""
        return chain(logs, targets, offsets, self._sent)

    def _note_gaps(self, batch: Batch, logs: Ints, gap: Mask) -> None:
        """Records behind one that is missing: left out, for they come again behind it."""
        assert batch.sources is not None
        self.counts["gap"] += int(gap.sum())
        for i in np.flatnonzero(gap).tolist():
            log_, source = int(logs[i]), int(batch.sources[i])
            self.gaps.setdefault((log_, source), int(self._seen[log_, source]))

    def _note_skew(self, batch: Batch, logs: Ints) -> None:
        assert batch.sources is not None
        events = batch.kinds == EVENT
        found = skew(logs[events], batch.sources[events], batch.clocks[events], self._reached)
        self.order_skew = max(self.order_skew, int(found))

    def _forget_gaps(self) -> None:
        self.gaps = {at: highest for at, highest in self.gaps.items() if self._seen[at] == highest}

    def _degraded(self, batch: Batch, logs: Ints) -> Mask:
        """Which values lack what retention has cut. Follows the clocks of the partitions on the way."""
        before, events = self._clock.copy(), batch.kinds == EVENT
        np.maximum.at(self._clock, logs[events], batch.clocks[events])
        result = np.zeros(len(batch), np.bool_) if batch.degraded is None else batch.degraded
        lost = batch.kinds == LOST
        if self._degraded_until.max() == NULL and not lost.any():
            return result
        until = self._degraded_until[logs]
        unsure = {*np.flatnonzero(self._degraded_until == _FOR_NOW).tolist(), *logs[lost].tolist()}
        for partition in unsure:
            ours = np.flatnonzero(logs == partition)
            until[ours] = self._degraded_from(
                partition, batch.kinds[ours], batch.clocks[ours], int(before[partition])
            )
        return result | (batch.times < until)

    def _degraded_from(self, partition: int, kinds: Bytes, clocks: Ints, before: int) -> list[int]:
        """Until when, as of each record of a partition: the first event behind a loss tells how long.

        That one may be late, and what is gone was not: the latest event counts. kinds, clocks: (n,); before: the
        latest event time before them.
        """
        until, result = int(self._degraded_until[partition]), []
        newest = before
        for kind, clock in zip(kinds.tolist(), clocks.tolist(), strict=True):
            if kind == EVENT:
                newest = max(newest, clock)
            if kind == LOST:
                until = _FOR_NOW
            elif kind == EVENT and until == _FOR_NOW:
                until = newest + self._reach
                since = "before" if before == NULL else f"from {_utc(before)} to"
                log.warning(
                    "%s partition %d has lost what happened %s %s: values are marked as degraded until "
                    "the events of %s", self.entity.log, partition, since, _utc(clock), _utc(until),
                )  # fmt: skip
            result.append(until)
        self._degraded_until[partition] = until
        return result

    def _accept(self, polled: Polled) -> tuple[list[Record], Ints]:
        """What was polled from the positions on, which move behind it, and the partition of each record."""
        records: list[Record] = []
        owners: list[int] = []
        lengths: list[int] = []
        for partition, fetched in polled:
            position = self._positions.get(partition)
            if position is None:
                continue  # revoked while it was on its way
            behind = bool(fetched) and fetched[0].offset < position
            found = [r for r in fetched if r.offset >= position] if behind else fetched
            if not found:
                continue
            records.extend(found)
            owners.append(partition)
            lengths.append(len(found))
            self._positions[partition] = found[-1].offset + 1
            self._moved[partition] = self._moved.get(partition, 0) + len(found)
        return records, np.repeat(np.array(owners, np.int64), lengths)

    def _slots_of(self, keys: list[Any], logs: Ints) -> Ints:
        get = self._slots.get
        slots = np.array([get(k, _ABSENT) for k in keys], np.int64)
        for i in np.flatnonzero(slots == _ABSENT).tolist():
            slot = self._slots.get(keys[i])  # the same key may stand earlier in this batch
            slots[i] = self._load(keys[i], int(logs[i])) if slot is None else slot
        return slots

    def _load(self, key: Any, partition: int) -> int:
        """The slot of a profile that is not in memory: from its store, or an empty one."""
        if self._partition_of is not None and self._partition_of(key_bytes(key)) != partition:
            return _MISPLACED
        packed = self._stores[partition].get(key_bytes(key))
        slot = self._arena.new() if packed is None else self._arena.unpack(packed)
        self.loaded += packed is not None
        while slot >= len(self._partition):  # the mirror may have had slots in between
            self._widen()
        while len(self._keys) <= slot:
            self._keys.append(None)
        self._keys[slot] = key
        self._key_bytes += _size(key)
        self._partition[slot] = partition
        self._slots[key] = slot
        owed = self._owed.pop(key_bytes(key), None) if self._owed else None
        if owed is not None:
            self._stale[slot], self._offset[slot] = True, owed[1]
            self.recalled += 1
        return slot

    def _widen(self) -> None:
        slots = len(self._partition)
        for name in ("_partition", "_offset", "_dirty", "_stale", "_recent"):
            setattr(self, name, lengthen(getattr(self, name), step(slots)))
        self._partition[slots:] = -1

    def _forget(self, slots: Ints) -> None:
        """Free these slots."""
        self._arena.free(slots)
        for slot in slots.tolist():
            key = self._keys[slot]
            del self._slots[key]
            self._key_bytes -= _size(key)
            self._keys[slot] = None
        self._partition[slots] = -1
        self._dirty[slots] = self._stale[slots] = self._recent[slots] = False

    def _at_home(self, slots: Ints, logs: Ints) -> Mask:
        """An entity has one log partition: what comes in another one would split its profile."""
        home: Mask = (slots != _MISPLACED) & ((slots < 0) | (self._partition[slots] == logs))
        return home

    def _misplaced(self, key: Any, log: int, record: Record) -> tuple[int, Record, Reason]:
        assert self._partition_of is not None
        name = key_bytes(key)
        error = (
            f"{self.entity.key} {name.decode()} belongs in partition {self._partition_of(name)}, not {log}; "
            f"publish it with the record key {name.decode()}"
        )
        return int(log), record, Reason("wrong-key", error)

    # --- look-ups ------------------------------------------------------------------------------

    def holds(self, partition: int) -> bool:
        """Whether this is where the partition is folded."""
        return partition in self._positions

    def look(self, keys: Sequence[bytes], partitions: Sequence[int], time: int | None) -> list[Looked | None]:
        """Read profiles at a time, or each as of its newest event; None where there is none, or no event in it.

        keys: as text; partitions: where each belongs, all held.
        """
        found: list[Looked | None] = [None] * len(keys)
        slots, passing, offsets, places = [], [], [], []
        for i, (key, partition) in enumerate(zip(keys, partitions, strict=True)):
            slot = self._slot_of(key)
            if slot is None:
                packed = self._stores[partition].get(key)
                if packed is None:
                    continue
                slot = self._arena.unpack(packed)
                passing.append(slot)
                # its own is not stored; it is no later than this
                offset = (self._stores[partition].position or 0) - 1
            else:
                offset = int(self._offset[slot])
            slots.append(slot)
            offsets.append(offset)
            places.append(i)
        wanted = np.array(slots, np.int64)
        newest = self._arena.newest(wanted)
        times = newest if time is None else np.full(len(wanted), time, np.int64)
        features = self._arena.read_at(wanted, times).tolist()
        until = self._degraded_until[[partitions[i] for i in places]]
        for n, i in enumerate(places):
            if newest[n] != NULL:  # else nothing but labels that wait for their events
                found[i] = Looked(
                    int(newest[n]), int(times[n]), offsets[n], bool(times[n] < until[n]), features[n]
                )
        self._arena.free(np.array(passing, np.int64))
        return found

    def _slot_of(self, key: bytes) -> int | None:
        """The slot of a key in memory. Streams' own logs have it as the field is, others as text."""
        text = key.decode(errors="replace")
        forms: list[Any] = [key, text]
        if len(text) < 20 and text.isascii() and text.removeprefix("-").isdigit():
            forms.append(int(text))
        for form in forms:
            slot = self._slots.get(form)
            if slot is not None and key_bytes(form) == key:
                return slot
        return None

    # --- what others take ----------------------------------------------------------------------

    def snapshots(self) -> Iterator[Snapshot]:
        """The state between two micro-batches of each partition that moved since it was last given out.

        Each is of the moment in which it is taken from here. Write them, in order, once all outputs up
        to there are acknowledged.
        """
        for partition in sorted(self._moved):
            if self._moved.pop(partition, None) is None:
                continue  # let go meanwhile
            slots = np.flatnonzero(self._dirty)
            slots = slots[self._partition[slots] == partition]
            self._dirty[slots] = False
            keys = [key_bytes(self._keys[s]) for s in slots.tolist()]
            packed = list(zip(keys, self._arena.pack(slots), strict=True))
            yield Snapshot(partition, self._progress(partition), packed)

    def crowded(self) -> bool:
        """Whether more profiles of a partition have changed than one write should hold."""
        moved = max(self._moved.values(), default=0)
        if moved <= FEW:
            return False
        mean = self._arena.used // max(self.size, 1)
        most = min(MOST_CHANGED, max(MOST_CHANGED_BYTES // max(mean, 1), FEW))
        if moved <= most:
            return False
        changed = np.bincount(self._partition[np.flatnonzero(self._dirty)], minlength=len(self._seen))
        self._moved.update((p, int(changed[p])) for p in self._moved)
        return max(self._moved.values()) > most

    def _progress(self, partition: int) -> Progress:
        return Progress(
            self._positions[partition],
            {s: o for s, o in enumerate(self._seen[partition].tolist()) if o != NEVER},
            {t: o for t, o in enumerate(self._sent[partition].tolist()) if o != NEVER},
            int(self._clock[partition]),
            int(self._degraded_until[partition]),
        )

    def write(self, snapshot: Snapshot) -> None:
        """Profiles and position in one step; nothing if the partition was let go meanwhile."""
        if snapshot.partition in self._stores:
            self._stores[snapshot.partition].write(snapshot)

    def flush(self) -> None:
        """Make what was written durable. Call it in a thread."""
        for store in list(self._stores.values()):
            store.flush()

    def sweep(self, forced: bool) -> Iterator[int]:
        """Let go of profiles that are stored and were not in use since the last sweep. Yields how many, by steps.

        Only while all snapshots that were given out are written. Those that the mirror has yet to take
        stay, unless they are most of what there is: those it is owed, and gets from the store.
        forced: right after another sweep; of those that were in use lately, too, but for the largest.
        """
        behind = 2 * self.unmirrored > self.size
        for owing in (False, True) if forced else (behind,):
            for _ in range(0, len(self._keys), SWEEP):
                yield self._sweep(owing, forced)

    def _sweep(self, owing: bool, forced: bool) -> int:
        """One step of the clock's hand: what was in use since its last round is spared once."""
        here = slice(self._hand, min(self._hand + SWEEP, len(self._keys)))
        gone = (self._partition[here] >= 0) & ~self._dirty[here] & ~self._recent[here]
        self._recent[here] = False
        if not owing:
            gone &= ~self._stale[here]
        slots = np.flatnonzero(gone) + here.start
        if forced:
            slots = slots[self._arena.sizes(slots) * LARGEST < self.used]
        for slot in slots[self._stale[slots]].tolist():
            self._owed[key_bytes(self._keys[slot])] = int(self._partition[slot]), int(self._offset[slot])
        self._forget(slots)
        self._hand = here.stop if here.stop < len(self._keys) else 0
        self.evicted += len(slots)
        return len(slots)

    def touched(self, most: int, without: Container[int] = ()) -> Iterator[Touched]:
        """Each profile that has changed by now and was not given out since, once, up to `most` at a time.

        What they are is read when it is taken from here. without: partitions that are left out. What changes
        while it is taken comes with the next call, but for what comes back from a store meanwhile: see `recalled`.
        """
        waiting = np.flatnonzero(self._stale)
        waiting = waiting[np.argsort(self._partition[waiting], kind="stable")]
        for at in range(0, len(waiting), most):
            slots = waiting[at : at + most]
            slots = slots[self._stale[slots]]  # the others were evicted, or let go
            slots = slots[
                np.argsort(self._partition[slots], kind="stable")
            ]  # and a slot may be another's by now
            if without:
                slots = slots[[p not in without for p in self._partition[slots].tolist()]]
            if len(slots):
                self._stale[slots] = False
                keys = [key_bytes(self._keys[s]) for s in slots.tolist()]
                yield self._touched(slots, keys, self._offset[slots], self._partition[slots])
        owed = sorted((p, key) for key, (p, _) in self._owed.items() if p not in without)
        for at in range(0, len(owed), most):
            found = self._read_owed([key for _, key in owed[at : at + most]])
            if found.keys:
                yield found

    def owe(self, partition: int, after: bytes | None, most: int) -> bytes | None:
        """Give out all of a partition again: those in memory (after None), then some more of those that are not.

        after: the key behind which to go on. Returns that for the next call, None at the end.
        """
        if after is None:
            self._stale[self._partition == partition] = self._mirrored
            return b""
        store = self._stores[partition]
        keys = store.keys(after, most)
        offset = (store.position or 0) - 1
        self._owed.update(
            (key, (partition, offset)) for key in keys if key not in self._owed and not self._in_memory(key)
        )
        return keys[-1] if keys else None

    def _in_memory(self, key: bytes) -> bool:
        """Keys are as they were decoded: bytes, or text, or a number."""
        text = key.decode()
        return key in self._slots or text in self._slots or (_is_number(text) and int(text) in self._slots)

    def _read_owed(self, wanted: Sequence[bytes]) -> Touched:
        """Those that are evicted still: they are in memory for as long as it takes to read them."""
        keys, offsets, partitions, slots = [], [], [], []
        for key in wanted:
            partition, offset = self._owed.pop(key, (_NO_SLOT, 0))
            packed = self._stores[partition].get(key) if partition in self._stores else None
            if packed is not None:
                slots.append(self._arena.unpack(packed))
                keys.append(key)
                offsets.append(offset)
                partitions.append(partition)
        passing = np.array(slots, np.int64)
        found = self._touched(passing, keys, np.array(offsets, np.int64), np.array(partitions, np.int64))
        self._arena.free(passing)
        return replace(found, slots=np.full(len(keys), _NO_SLOT))

    @property
    def nothing(self) -> Touched:
        """What `touched` gives where nothing was."""
        none = np.zeros(0, np.int64)
        return self._touched(none, [], none, none)

    def _touched(self, slots: Ints, keys: list[bytes], offsets: Ints, partitions: Ints) -> Touched:
        times = self._arena.newest(slots)
        until = np.maximum(self._degraded_until[partitions], 0)
        found = Touched(
            slots, keys, self._arena.pack(slots), self._arena.read_at(slots, times), times, offsets, until,
            self._clock[partitions], partitions,
        )  # fmt: skip
        if (times == NULL).any():  # labels alone, whose events have yet to come: there are no values yet
            found = found.take(np.flatnonzero(times != NULL).tolist())
        return found

    def touch(self, touched: Touched) -> None:
        """Give these out again: they could not be used. Profiles that were let go meanwhile are not."""
        where = zip(
            touched.slots.tolist(), touched.partitions.tolist(), touched.offsets.tolist(), strict=True
        )
        for key, (slot, partition, offset) in zip(touched.keys, where, strict=True):
            if slot >= 0 and self._partition[slot] >= 0 and key_bytes(self._keys[slot]) == key:
                self._stale[slot] = True
            elif partition in self._stores:  # evicted meanwhile
                self._owed[key] = partition, offset


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _size(key: Any) -> int:
    """Bytes of a key as the allocator counts them."""
    return (sys.getsizeof(key) + 15) // 16 * 16


def _utc(time: int) -> str:
    return dt.datetime.fromtimestamp(time / 1000, dt.UTC).isoformat(timespec="minutes")
