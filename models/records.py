"""The record between stages: what a stage hands on, as fixed-width bytes and the original event.

A record carries its origin (which log of whom, partition, offset) so that its receiver can drop
what it has seen, and the offset of the record that went before it from there to this partition, so
that the receiver notices one that is missing; further the numeric block of the event, and the
features so far. Decoding a batch is one `frombuffer`, whatever the number of fields. Little-endian throughout:

    magic u4 | layout u4 | kind i1 | label i1 | source i1 | degraded i1 | partition i4 | offset i8 | previous i8
    | time i8 | id i8 | clock i8 | fields i8 x f | features f8 x k | the original JSON
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.events import Batch, Decoded, LabelBatch, Reason, Reject, key_bytes, streams_of, texts
from models.fields import joined
from models.pipeline import Pipeline
from models.windows import EVENT, LABEL, LOST, NULL, Bytes, Floats, Ints, jit

Mask = npt.NDArray[np.bool_]

_MAGIC = 0x52_44_52_48  # "HRDR"

# What `fresh` makes of a record: seen before, news, or behind one that is missing.
SEEN, NEWS, GAP = 0, 1, 2
NEVER = -1  # in `seen`: nothing has come of this source
LOOSE = -3  # in `seen`: LOOSE - h, where h was the highest, and the log has lost what came behind it


class RecordCodec:
    """Records of the log that stage number `stage` of a pipeline reads (1 is the second entity's)."""

    def __init__(self, pipeline: Pipeline, stage: int) -> None:
        self.writers = writers(pipeline, stage)
        self.carried = sum(len(e.features) for e in pipeline.entities[:stage])
        self.fields = len(pipeline.columns)
        self.dtype = np.dtype(
            [
                ("magic", "<u4"), ("layout", "<u4"), ("kind", "i1"), ("label", "i1"), ("source", "i1"),
                ("degraded", "i1"), ("partition", "<i4"),
                ("offset", "<i8"), ("previous", "<i8"), ("time", "<i8"), ("id", "<i8"), ("clock", "<i8"),
                ("fields", "<i8", (self.fields,)), ("features", "<f8", (self.carried,)),
            ]
        )  # fmt: skip
        # Another definition must not read these bytes as its own.
        self.layout = zlib.crc32(f"{pipeline.definition} {stage} {self.dtype}".encode())

    def encode(
        self, batch: Batch, features: Floats, partitions: Ints, offsets: Ints, previous: Ints, degraded: Mask,
        writer: int = 0,
    ) -> list[bytes]:  # fmt: skip
        """Records for events, of a stage or the router.

        features: (n, k) that are added to what came with the events; partitions, offsets: (n,) where each stood in its
        log; previous: (n,) by `chain`; degraded: (n,) whose features lack what retention has cut; writer: who
        writes them, the stage before.
        """
        heads = self._heads(len(batch), writer, partitions, offsets, previous)
        heads["kind"], heads["degraded"] = EVENT, degraded
        heads["time"], heads["id"], heads["clock"] = batch.times, batch.ids, batch.clocks
        heads["fields"] = batch.fields
        heads["features"][:, : batch.features.shape[1]] = batch.features
        heads["features"][:, batch.features.shape[1] :] = features
        size = self.dtype.itemsize
        raw = heads.tobytes()
        return [raw[i * size : (i + 1) * size] + json for i, json in enumerate(batch.payloads)]

    def encode_labels(
        self, batch: LabelBatch, partitions: Ints, offsets: Ints, previous: Ints, writer: int
    ) -> list[bytes]:
        """The router's records for labels and reversals."""
        heads = self._heads(len(batch.times), writer, partitions, offsets, previous)
        heads["kind"], heads["label"] = LABEL, batch.states
        heads["time"], heads["id"], heads["clock"] = batch.times, batch.ids, batch.clocks
        size = self.dtype.itemsize
        raw = heads.tobytes()
        return [raw[i : i + size] for i in range(0, len(raw), size)]

    def encode_lost(self, writer: int, partition: int, offset: int, previous: int = NEVER) -> bytes:
        """The record that says: up to this offset, what was to come of this partition is gone.

        previous: by `chain`.
        """
        one = np.array([partition]), np.array([offset]), np.array([previous])
        heads = self._heads(1, writer, *one)
        heads["kind"], heads["clock"] = LOST, NULL
        return heads.tobytes()

    def decode(self, values: Sequence[bytes], keys: Sequence[bytes | None]) -> Decoded:
        """Decode a log's records. keys: their record keys.

        Records of another definition are left out, for they will come again under this one.
        """
        size = self.dtype.itemsize
        blank = bytes(size)
        heads = np.frombuffer(
            b"".join([v[:size] if v and len(v) >= size else blank for v in values]), self.dtype
        )
        ours = heads["magic"] == _MAGIC
        foreign = Reason("not-a-record", "this is no record of a stage")
        rejects = [Reject(i, foreign) for i in np.flatnonzero(~ours).tolist()]
        kept = np.flatnonzero(ours & (heads["layout"] == self.layout))
        if len(kept) < len(heads):
            heads = heads[kept]
        picks = kept.tolist()
        batch = Batch(
            kinds=heads["kind"].copy(),
            labels=heads["label"].copy(),
            times=heads["time"].copy(),
            ids=heads["id"].copy(),
            clocks=heads["clock"].copy(),
            fields=heads["fields"].copy(),
            features=heads["features"].copy(),
            keys=[keys[i] for i in picks],
            payloads=[values[i][size:] for i in picks],
            sources=heads["partition"].astype(np.int64) * len(self.writers) + heads["source"],
            offsets=heads["offset"].copy(),
            previous=heads["previous"].copy(),
            degraded=heads["degraded"] != 0,
        )
        return batch, kept, rejects

    def clocks(self, values: Sequence[bytes], sent: Ints) -> Ints:
        """Just when each record happened (models.events.clocks)."""
        batch, kept, _ = self.decode(values, [None] * len(values))
        result = np.full(len(values), NULL, np.int64)
        result[kept] = batch.clocks
        return result

    def _heads(
        self, n: int, writer: int, partitions: Ints, offsets: Ints, previous: Ints
    ) -> npt.NDArray[np.void]:
        heads = np.zeros(n, self.dtype)
        heads["magic"], heads["layout"] = _MAGIC, self.layout
        heads["source"] = writer
        heads["partition"], heads["offset"], heads["previous"] = partitions, offsets, previous
        return heads


def writers(pipeline: Pipeline, stage: int) -> tuple[str, ...]:
    """Who writes the log of a stage, by the topic that each reads: a source is partition * writers + writer.

    The stage before it, or for the first the router for each stream; and the router for what is said of events.
    """
    events = len(pipeline.streams)
    said = pipeline.inputs[events:]
    return (*(pipeline.inputs[:events] if stage == 0 else (pipeline.entities[stage - 1].log,)), *said)


def keys_of(pipeline: Pipeline, stage: int) -> Callable[[Batch], list[bytes | None]]:
    """How the keys of stage number `stage` are read from the events of the stage before it."""
    entity = pipeline.entities[stage]
    columns = {f.name: i for i, f in enumerate(pipeline.columns)}
    strings = [name for name in entity.keys if pipeline.fields[name].type == "string"]
    decode = texts(pipeline.fields, strings)
    # What a stream does not declare is not read, although its JSON may have it.
    carried = np.array([entity.is_of(stream) for stream in pipeline.streams])
    nothing = SimpleNamespace(**dict.fromkeys(strings))

    def read(batch: Batch) -> list[bytes | None]:
        found: list[Any] = []
        if strings:
            here = carried[streams_of(pipeline, batch)].tolist()
            found = [decode(p) if ours else nothing for p, ours in zip(batch.payloads, here, strict=True)]
        parts: list[list[Any]] = [
            [getattr(e, name) for e in found] if name in strings
            else [None if v == NULL else v for v in batch.fields[:, columns[name]].tolist()]
            for name in entity.keys
        ]  # fmt: skip
        keys = parts[0] if len(parts) == 1 else [joined(values) for values in zip(*parts, strict=True)]
        return [None if key is None else key_bytes(key) for key in keys]

    return read


@jit
def chain(partitions: Ints, targets: Ints, offsets: Ints, sent: Ints) -> Ints:
    """The offset of the record that went before each to the same target, -1 where none did; remember these.

    partitions, targets, offsets: (n,) of origin, receiver, origin; sent: (partitions, targets).
    """
    previous = np.empty(len(offsets), np.int64)
    for i in range(len(offsets)):
        previous[i] = sent[partitions[i], targets[i]]
        sent[partitions[i], targets[i]] = offsets[i]
    return previous


@jit
def skew(logs: Ints, sources: Ints, clocks: Ints, reached: Ints) -> int:
    """How far, at most, a record's source is behind the one that is farthest in its log, ms; 0 at least.

    logs, sources, clocks: (n,) in log order; reached: (logs, sources) times, NULL where none, which follow.
    """
    most = 0
    for i in range(len(clocks)):
        own = reached[logs[i]]
        own[sources[i]] = max(own[sources[i]], clocks[i])
        most = max(most, own.max() - own[sources[i]])
    return most


@jit
def fresh(logs: Ints, sources: Ints, offsets: Ints, previous: Ints, seen: Ints) -> Bytes:
    """Which records are news, and remember them. logs: (n,) rows of seen; seen: (logs, sources).

    Sound because each writer's offsets in one log increase: what is not above the highest seen is
    an old record sent again. A record whose predecessor has not come is no news either: it comes
    again, when its writer has sent what is missing.
    """
    result = np.empty(len(logs), np.int8)
    for i in range(len(logs)):
        highest = seen[logs[i], sources[i]]
        loose = highest < NEVER
        if loose:
            highest = LOOSE - highest
        if offsets[i] <= highest:
            result[i] = SEEN
        elif previous[i] > highest and not loose:
            result[i] = GAP
        else:
            result[i] = NEWS
            seen[logs[i], sources[i]] = offsets[i]
    return result


def loosened(seen: Ints) -> Ints:
    """`seen` where the log may have lost records: what comes next of each source is taken as it is."""
    return np.where(seen >= NEVER, LOOSE - seen, seen)


def tightened(seen: Ints) -> Ints:
    """The highest offsets of `seen`, whether something may be lost behind them or not."""
    return np.where(seen < NEVER, LOOSE - seen, seen)


def in_step(partitions: Ints, clocks: Ints) -> Ints | None:
    """The order in which the records of several partitions happened; None if they are in it.

    Each partition keeps its own order: a record counts as no earlier than those before it.
    partitions: (n,), in runs; clocks: (n,) ms.
    """
    reached = _reached(partitions, clocks)
    if len(reached) < 2 or bool((reached[1:] >= reached[:-1]).all()):
        return None
    return np.argsort(reached, kind="stable")


@jit
def _reached(partitions: Ints, clocks: Ints) -> Ints:
    result = clocks.copy()
    for i in range(1, len(clocks)):
        if partitions[i] == partitions[i - 1] and result[i] < result[i - 1]:
            result[i] = result[i - 1]
    return result
