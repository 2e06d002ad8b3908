"""The memory of one stage: the profiles of one entity's log, in an arena, with RocksDB behind it.

`apply` takes what was polled from the log's partitions, as one micro-batch, through decoding and the
fold. `snapshot` gives what a flush writes. Nothing here waits, sends, or knows the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.events import Batch, Decoded, Reason, key_bytes
from models.partitions import partitions_of
from models.pipeline import Entity
from models.records import fresh, in_step
from models.windows import LABEL_EARLY, OUTCOMES, Arena, Bytes, Floats, Ints
from tables.store import Snapshot, Store, StoreError

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
    codes of models.windows. rejects: bad input, with partition, record and reason.
    """

    batch: Batch
    logs: Ints
    offsets: Ints
    features: Floats
    outcomes: Bytes
    rejects: list[tuple[int, Record, Reason]]


@dataclass
class Touched:
    """Profiles that changed: their keys, and their values as of their newest event."""

    slots: Ints
    keys: list[bytes]
    features: Floats
    times: Ints
    offsets: Ints


class Profiles:
    """partitions: of the log. numeric: the names of the numeric block's columns.

    partition_of: where a key belongs, checked for each record where others than stages write the log.
    """

    def __init__(
        self,
        entity: Entity,
        decode: Decode,
        open_store: Callable[[int], Store],
        partitions: int,
        numeric: Sequence[str],
        partition_of: Callable[[bytes], int] | None = None,
    ) -> None:
        self.entity = entity
        self.counts = dict.fromkeys((*OUTCOMES, "seen", "rejected"), 0)
        self._decode = decode
        self._open_store = open_store
        self._partition_of = partition_of
        self._arena = Arena(entity.plan)
        self._value_columns: Ints = np.array([numeric.index(v) for v in entity.values], np.int64)
        self._slots: dict[Any, int] = {None: _NO_SLOT}
        self._stores: dict[int, Store] = {}
        self._positions: dict[int, int] = {}
        self._moved: set[int] = set()  # partitions that changed since the last snapshot
        self._seen: Ints = np.full((partitions, 2 * partitions), -1, np.int64)
        # By slot: whose it is, where its last record stood, what flush and mirror have yet to take.
        self._keys: list[Any] = []
        self._partition: Ints = np.full(64, -1, np.int64)
        self._offset: Ints = np.full(64, -1, np.int64)
        self._dirty = np.zeros(64, np.bool_)
        self._stale = np.zeros(64, np.bool_)

    def warm(self) -> None:
        """Load the compiled kernel, so that the first event need not wait for it."""
        arena, one = Arena(self.entity.plan), np.zeros(1, np.int64)
        arena.fold(
            np.array([arena.new()]), np.zeros(1, np.int8), one, one,
            np.zeros((1, self.entity.plan.values), np.int64), np.zeros(1, np.int8),
        )  # fmt: skip
        arena.unpack(arena.pack(one)[0])
        arena.read_at(one, one)
        partitions_of([b"0"], one, 1)
        fresh(one, one, one, np.zeros((1, 1), np.int64))
        in_step(one, one)

    # --- partitions ----------------------------------------------------------------------------

    def open(self, partition: int) -> int | None:
        """Take a partition over. Returns its position, None where nothing was ever stored."""
        store = self._stores[partition] = self._open_store(partition)
        self._seen[partition] = -1
        for source, offset in store.seen.items():
            self._seen[partition, source] = offset
        return store.position

    def start_at(self, partition: int, position: int) -> None:
        """The next offset to apply. Records before it are dropped."""
        self._positions[partition] = position

    def close(self, partition: int) -> None:
        """Let a partition go. What was not flushed is folded again by its next owner."""
        store = self._stores.pop(partition, None)
        if store is None:
            return
        store.close()
        self._positions.pop(partition, None)
        self._moved.discard(partition)
        slots = np.flatnonzero(self._partition == partition)
        self._arena.free(slots)
        for slot in slots.tolist():
            del self._slots[self._keys[slot]]
        self._partition[slots] = -1
        self._dirty[slots] = self._stale[slots] = False

    @property
    def partitions(self) -> list[int]:
        return sorted(self._stores)

    @property
    def size(self) -> int:
        """Profiles in memory."""
        return len(self._slots) - 1

    @property
    def nbytes(self) -> int:
        return self._arena.nbytes

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
            news = fresh(logs, batch.sources, batch.offsets, self._seen)
            if not news.all():
                self.counts["seen"] += int((~news).sum())
                batch, logs, offsets = batch.where(news), logs[news], offsets[news]
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
            slots, batch.kinds, batch.times, batch.ids, values, batch.labels
        )
        # 5. remember what flush, mirror and metrics have to tell
        keyed = slots >= 0
        self._dirty[slots[keyed]] = True
        self._offset[slots[keyed]] = offsets[keyed]
        changed = keyed & (outcomes != LABEL_EARLY)  # a label that waits for its event changes no value
        self._stale[slots[changed]] = True
        for code, count in enumerate(np.bincount(outcomes, minlength=len(OUTCOMES)).tolist()):
            self.counts[OUTCOMES[code]] += count
        self.counts["rejected"] += len(rejects)
        return Applied(batch, logs, offsets, features, outcomes, rejects)

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
            self._moved.add(partition)
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
        if slot >= len(self._partition):
            self._widen()
        while len(self._keys) <= slot:
            self._keys.append(None)
        self._keys[slot] = key
        self._partition[slot] = partition
        self._slots[key] = slot
        return slot

    def _widen(self) -> None:
        more = len(self._partition)
        self._partition = np.concatenate([self._partition, np.full(more, -1, np.int64)])
        self._offset = np.concatenate([self._offset, np.full(more, -1, np.int64)])
        self._dirty = np.concatenate([self._dirty, np.zeros(more, np.bool_)])
        self._stale = np.concatenate([self._stale, np.zeros(more, np.bool_)])

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

    # --- what others take ----------------------------------------------------------------------

    def snapshots(self) -> list[Snapshot]:
        """The state between two micro-batches of each partition that moved since the last call.

        Write them, in order, once all outputs up to here are acknowledged.
        """
        result = []
        for partition in sorted(self._moved):
            slots = np.flatnonzero(self._dirty & (self._partition == partition))
            self._dirty[slots] = False
            keys = [key_bytes(self._keys[s]) for s in slots.tolist()]
            seen = {int(s): int(o) for s, o in enumerate(self._seen[partition]) if o >= 0}
            packed = list(zip(keys, self._arena.pack(slots), strict=True))
            result.append(Snapshot(partition, self._positions[partition], seen, packed))
        self._moved.clear()
        return result

    def write(self, snapshot: Snapshot) -> None:
        """Profiles and position in one step; nothing if the partition was let go meanwhile."""
        if snapshot.partition in self._stores:
            self._stores[snapshot.partition].write(snapshot)

    def flush(self) -> None:
        """Make what was written durable. Call it in a thread."""
        for store in list(self._stores.values()):
            store.flush()

    def touched(self, most: int) -> Touched:
        """Up to `most` profiles that changed since they were last given out here."""
        slots = np.flatnonzero(self._stale)[:most]
        self._stale[slots] = False
        times = self._arena.newest(slots)
        return Touched(
            slots,
            [key_bytes(self._keys[s]) for s in slots.tolist()],
            self._arena.read_at(slots, times),
            times,
            self._offset[slots],
        )

    def touch(self, touched: Touched) -> None:
        """Give these out again: they could not be used. Profiles that were let go meanwhile are not."""
        for slot, key in zip(touched.slots.tolist(), touched.keys, strict=True):
            if self._partition[slot] >= 0 and key_bytes(self._keys[slot]) == key:
                self._stale[slot] = True
