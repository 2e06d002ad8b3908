"""Events as columns: JSON of a stream in, arrays out, bad input told apart with its reason.

Numbers live in one int64 block, a column for each of the pipeline's `columns` in their order (see
models.fields); what a stream does not carry is absent. So a block moves between stages, and between
stream and batch, without a conversion.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from models.fields import Field, joined
from models.pipeline import Labels, Pipeline, Reversals
from models.streams import WHICH, Stream
from models.windows import EVENT, LABEL, NEGATIVE, NULL, POSITIVE, REVERSED, UNKNOWN, Bytes, Floats, Ints

Key = int | str | bytes | None

# An event time outside these bounds, or further ahead of its sending than a day, is absurd: it would
# push the rows of a whole profile out of its windows.
EARLIEST_MS = 1
LATEST_MS = 4_102_444_800_000  # 2100-01-01
AHEAD_MS = 86_400_000

# Values that are summed stay below this, so that 2**17 of them add up exactly in int64.
LARGEST_VALUE = 2**46

# An event goes on between stages with a header before it, and a broker takes records of a megabyte.
LARGEST_EVENT = 512 * 1024

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_PER_MS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000)}
# What a decoder raises: RecursionError is for JSON nested thousands deep.
_UNDECODABLE = (msgspec.MsgspecError, TypeError, UnicodeDecodeError, RecursionError)
_BLANK_FLOAT = int(np.array(np.nan).view(np.int64))
_LABELS = {0: NEGATIVE, 1: POSITIVE, None: UNKNOWN}


@dataclass
class Batch:
    """Records of one log, n of them, as columns.

    kinds, labels: (n,) int8; times, ids: (n,) int64; clocks: (n,) int64 ms, when the record happened
    (an event's time, or when its label became known); fields: (n, f) int64 block; features: (n, k)
    of the entities before; keys: what each is keyed by; payloads: the original JSON.
    Only in records between stages: sources: (n,) composite origin (see models.records); offsets: (n,) of
    the origin, previous: (n,) of the record before it from there; degraded: (n,) whose features lack
    what retention has cut.
    """

    kinds: Bytes
    labels: Bytes
    times: Ints
    ids: Ints
    clocks: Ints
    fields: Ints
    features: Floats
    keys: list[Any]
    payloads: list[bytes]
    sources: Ints | None = None
    offsets: Ints | None = None
    previous: Ints | None = None
    degraded: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.kinds)

    def where(self, mask: npt.NDArray[np.bool_]) -> Batch:
        """The records that a mask (n,) keeps: this batch itself where it keeps all."""
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def take(self, index: Ints) -> Batch:
        """These records, in this order. index: (m,) int64."""
        picks = index.tolist()
        return Batch(
            self.kinds[index],
            self.labels[index],
            self.times[index],
            self.ids[index],
            self.clocks[index],
            self.fields[index],
            self.features[index],
            [self.keys[i] for i in picks],
            [self.payloads[i] for i in picks],
            None if self.sources is None else self.sources[index],
            None if self.offsets is None else self.offsets[index],
            None if self.previous is None else self.previous[index],
            None if self.degraded is None else self.degraded[index],
        )


Code = Literal[
    "empty", "not-json", "missing-field", "wrong-value", "wrong-decimal", "wrong-time", "time-ahead", "too-large",
    "wrong-label", "wrong-key", "keys-unknown", "not-a-record",
]  # fmt: skip


class Reason(NamedTuple):
    """Why input is bad: a code that stays the same, and a sentence for people."""

    code: Code
    error: str


@dataclass(frozen=True)
class Reject:
    """Bad input: where it stood in what was decoded, and why it is none of the stream's."""

    index: int
    reason: Reason


Decoded = tuple[Batch, Ints, list[Reject]]  # what is good, where it stood, and the rest


def key_bytes(key: int | str | bytes) -> bytes:
    """The record key of an entity: the text of its key field."""
    return key if isinstance(key, bytes) else str(key).encode()


def scaled(values: Floats, divisor: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Decimals as integers of 1/divisor, and which of them have no more decimals than that.

    values: (n,) float64, NaN where absent, which becomes NULL and is valid.

    >>> scaled(np.array([57.16, 0.005]), 100)[1].tolist()
    [True, False]
    """
    with np.errstate(invalid="ignore", over="ignore"):
        exact = values * divisor
        near = np.rint(exact)
        valid = np.abs(exact - near) <= np.maximum(1e-6, 4 * np.spacing(np.abs(near)))
        valid &= np.abs(near) <= LARGEST_VALUE
        absent = np.isnan(values)
        units = np.where(valid, near, 0).astype(np.int64)
    units[absent] = NULL
    return units, valid | absent


class EventDecoder:
    """Decodes a stream's JSON, keyed by the first entity's key."""

    def __init__(self, pipeline: Pipeline, stream: Stream) -> None:
        self.stream = stream
        first = pipeline.entities[0]
        self.keys = first.keys if first.is_of(stream) else ()
        summed = {name for e in pipeline.entities for name in e.values}
        fields = list(stream.fields.values())
        self.columns = [
            (at, stream.fields[f.name], _column(stream.fields[f.name]))
            for at, f in enumerate(pipeline.columns)
            if f.name in stream.fields
        ]
        # what the columns hold that the stream does not carry
        self.blank = np.array(
            [_BLANK_FLOAT if f.type == "float" else NULL for f in pipeline.columns], np.int64
        )
        if len(pipeline.streams) > 1:
            self.blank[[f.name for f in pipeline.columns].index(WHICH)] = stream.number
        self.decode_one = _decoder("Event", [(f, _json_type(f, f.name in summed)) for f in fields])

    def decode(self, values: Sequence[bytes], sent: Ints) -> Decoded:
        """Decode events. values: their JSON; sent: (n,) when their records were sent, ms."""
        events, kept, rejects = _decode_all(self.decode_one, values)
        n, stream = len(events), self.stream
        valid = np.ones(n, np.bool_)
        block = np.tile(self.blank, (n, 1))
        times = None
        for at, field, column in self.columns:
            block[:, at], good = column([getattr(e, field.name) for e in events])
            _refuse(
                rejects, kept, valid, good,
                Reason("wrong-decimal", f"{field.name} has more decimals than its scale, or is too large"),
            )  # fmt: skip
            if field.name == stream.time:
                times = block[:, at].copy()
        assert times is not None
        good = (times >= EARLIEST_MS) & (times < LATEST_MS)
        _refuse(rejects, kept, valid, good, _no_time(stream))
        good = times <= sent[kept] + AHEAD_MS
        ahead = Reason("time-ahead", f"{stream.time} is more than a day ahead of its sending")
        _refuse(rejects, kept, valid, good, ahead)
        if max(map(len, values), default=0) > LARGEST_EVENT:
            good = np.array([len(values[i]) <= LARGEST_EVENT for i in kept.tolist()], np.bool_)
            large = Reason("too-large", f"the event has more than {LARGEST_EVENT:,} bytes")
            _refuse(rejects, kept, valid, good, large)
        batch = Batch(
            kinds=np.full(n, EVENT, np.int8),
            labels=np.zeros(n, np.int8),
            times=times,
            ids=stream.identities([getattr(e, stream.id) for e in events]),
            clocks=times,
            fields=block,
            features=np.empty((n, 0)),
            keys=_keys(events, self.keys),
            payloads=[values[i] for i in kept.tolist()],
        )
        return batch.where(valid), kept[valid], rejects


@dataclass
class LabelBatch:
    """Labels, n of them: of which event, its state, when known, and the event's keys by entity."""

    times: Ints
    ids: Ints
    states: Bytes
    clocks: Ints
    keys: dict[str, list[Key]]

    def take(self, index: Ints) -> LabelBatch:
        """These labels, in this order. index: (m,) int64."""
        picks = index.tolist()
        return LabelBatch(
            self.times[index], self.ids[index], self.states[index], self.clocks[index],
            {entity: [keys[i] for i in picks] for entity, keys in self.keys.items()},
        )  # fmt: skip


class Lack(NamedTuple):
    """Of which event a record does not say all. time: ms, where that is said."""

    event: int
    time: int | None


class Known(NamedTuple):
    """What is known of an event: its time, ms, and its key of each entity."""

    time: int
    keys: Mapping[str, str | None]


class Found(NamedTuple):
    """What the ledger knows of events, by their 64-bit ids, the last one predicted first.

    whole_at: all that was predicted before is in it, ms; None where that is not known.
    """

    events: Mapping[int, Sequence[Known]]
    whole_at: int | None


KEYS_UNKNOWN = Reason(
    "keys-unknown", "the ledger knows no event of this id, by which its time and keys are looked up"
)


class LabelDecoder:
    """Decodes the JSON of labels or reversals: the event's id, time and keys, what is said, and when it was known."""

    def __init__(self, pipeline: Pipeline, said: Labels | Reversals) -> None:
        self.stream, self.labels = pipeline.stream, said if isinstance(said, Labels) else None
        stream = self.stream
        self.entities = [e for e in pipeline.entities if (e.labelled if self.labels else e.is_of(stream))]
        known = Field(said.known, "timestamp", unit=stream.fields[stream.time].unit)
        self.times = _column(replace(stream.fields[stream.time], optional=said.looked_up))
        found = dict.fromkeys([stream.time, *(k for e in self.entities for k in e.keys)])
        found.pop(stream.id, None)
        # what may be looked up
        self._found = list(found) if said.looked_up else []
        typed = [(stream.fields[n], _json_type(stream.fields[n], False)) for n in (stream.id, *found)]
        typed.append((known, _json_type(known, False)))
        if self.labels is not None:
            typed.append((Field(self.labels.field, "int"), int | None))
        self._known = said.known
        self.fields = frozenset(f.name for f, _ in typed)
        self.decode_one = _decoder("Label", typed, self._found)

    def decode(
        self, values: Sequence[bytes], known: Sequence[Known | None] | None = None
    ) -> tuple[LabelBatch, Ints, list[Reject]]:
        """Decode labels. Those that are good, where they stood, and the rest.

        known: (n,) of the event of each that `lacks` something: None refuses it. Without this it is kept, its
        time NULL and its keys None.
        """
        found, kept, rejects = _decode_all(self.decode_one, values)
        stream, labels = self.stream, self.labels
        valid = np.ones(len(found), np.bool_)
        states = np.full(len(found), REVERSED, np.int8)
        if labels is not None:
            given = [getattr(x, labels.field) for x in found]
            good = np.array([g in _LABELS for g in given], np.bool_)
            wrong = Reason("wrong-label", f"{labels.field} is none of 0, 1 and null")
            _refuse(rejects, kept, valid, good, wrong)
            states = np.array([_LABELS.get(g, UNKNOWN) for g in given], np.int8)
        times, _ = self.times([_given(x, stream.time) for x in found])
        clocks, _ = self.times([getattr(x, self._known) for x in found])
        ids = stream.identities([getattr(x, stream.id) for x in found])
        keys = {e.name: _keys(found, e.keys) for e in self.entities}
        lacking = np.array([self._lacks(x) for x in found], np.bool_) if self._found else ~valid
        good = (times >= EARLIEST_MS) & (times < LATEST_MS) | (lacking & (times == NULL))
        _refuse(rejects, kept, valid, good, _no_time(stream))
        for i in np.flatnonzero(lacking & valid).tolist():
            event = None if known is None else known[int(kept[i])]
            times[i] = NULL if event is None else event.time
            for name, of_entity in keys.items():
                of_entity[i] = None if event is None else event.keys[name]
        if known is not None:
            there = np.array([known[i] is not None for i in kept.tolist()], np.bool_)
            _refuse(rejects, kept, valid, ~lacking | there, KEYS_UNKNOWN)
        index = np.flatnonzero(valid)
        return LabelBatch(times, ids, states, clocks, keys).take(index), kept[index], rejects

    def lacks(self, values: Sequence[bytes]) -> list[Lack | None]:
        """Of each record what is to be looked up; None where it says all, or is bad anyway."""
        batch, kept, _ = self.decode(values)
        found, _, _ = _decode_all(self.decode_one, [values[i] for i in kept.tolist()])
        lacks: list[Lack | None] = [None] * len(values)
        for at, event, one in zip(kept.tolist(), batch.ids.tolist(), found, strict=True):
            if self._lacks(one):
                time = _given(one, self.stream.time)
                lacks[at] = Lack(event, None if time is None else int(self.times([time])[0][0]))
        return lacks

    def pick(self, lack: Lack, events: Sequence[Known]) -> Known | None:
        """The first of these that is the event of a record: it is of the time that is said, and has all the keys."""
        for event in events:
            if lack.time in (None, event.time) and all(e.name in event.keys for e in self.entities):
                return event
        return None

    def _lacks(self, one: Any) -> bool:
        return any(getattr(one, name) is msgspec.UNSET for name in self._found)


def _given(one: Any, name: str) -> Any:
    """What a record says, None where it says nothing."""
    value = getattr(one, name)
    return None if value is msgspec.UNSET else value


def _keys(events: list[Any], names: Sequence[str]) -> list[Key]:
    """What each is keyed by; nothing, where it carries no such fields."""
    if len(names) == 1:
        return [getattr(e, names[0]) for e in events]
    return [joined([getattr(e, name) for name in names]) if names else None for e in events]


def _decode_all(
    decode: Callable[[bytes], Any], values: Sequence[bytes]
) -> tuple[list[Any], Ints, list[Reject]]:
    try:
        return [decode(v) for v in values], np.arange(len(values)), []
    except _UNDECODABLE:
        pass  # some are bad: look at each
    good, kept, rejects = [], [], []
    for i, value in enumerate(values):
        try:
            good.append(decode(value))
            kept.append(i)
        except _UNDECODABLE as error:
            rejects.append(Reject(i, _undecodable(value, error)))
    return good, np.array(kept, np.int64), rejects


def _undecodable(value: bytes, error: Exception) -> Reason:
    if not value:
        return Reason("empty", "the record is empty")
    if not isinstance(error, msgspec.ValidationError):
        return Reason("not-json", str(error))
    missing = str(error).startswith("Object missing required field")
    return Reason("missing-field" if missing else "wrong-value", str(error))


def _no_time(stream: Stream) -> Reason:
    return Reason("wrong-time", f"{stream.time} is no time between 1970 and 2100")


def _refuse(
    rejects: list[Reject], kept: Ints, valid: npt.NDArray[np.bool_], good: npt.NDArray[np.bool_],
    reason: Reason,
) -> None:  # fmt: skip
    """Mark what is not good; the first reason found for a record is the one that is told."""
    if good.all():
        return
    rejects.extend(Reject(int(kept[i]), reason) for i in np.flatnonzero(valid & ~good).tolist())
    valid &= good


def _decoder(
    name: str, typed: list[tuple[Field, Any]], lacking: Sequence[str] = ()
) -> Callable[[bytes], Any]:
    """lacking: the fields that may be absent, and are UNSET then; null is another matter."""
    said = [(f, kind) for f, kind in typed if f.name not in lacking]
    fields: list[Any] = [(f.name, kind) for f, kind in said if not f.optional]
    fields += [(f.name, kind | None, None) for f, kind in said if f.optional]
    fields += [
        (f.name, (kind | None if f.optional else kind) | msgspec.UnsetType, msgspec.UNSET)
        for f, kind in typed
        if f.name in lacking
    ]
    struct = msgspec.defstruct(name, fields, gc=False)
    return msgspec.json.Decoder(struct).decode


def _json_type(field: Field, summed: bool) -> Any:
    if field.type == "int":
        largest = LARGEST_VALUE if summed else 2**63 - 1
        return Annotated[int, msgspec.Meta(ge=-largest, le=largest)]
    if field.type == "timestamp":
        return dt.datetime if field.unit == "iso" else Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
    return str if field.textual else float


def _column(field: Field) -> Callable[[list[Any]], tuple[Ints, Any]]:
    """How a list of decoded values becomes an int64 column and a mask of those that are valid."""

    def integers(values: list[Any]) -> tuple[Ints, Any]:
        if field.optional:
            values = [NULL if v is None else v for v in values]
        return np.array(values, np.int64), np.True_

    def instants(values: list[Any]) -> tuple[Ints, Any]:
        if field.unit == "iso":
            values = [None if v is None else _from_datetime(v) for v in values]
            return integers(values)
        column, _ = integers(values)
        times, per = _PER_MS[field.unit]
        return np.where(column == NULL, NULL, column * times // per), np.True_

    def codes(values: list[Any]) -> tuple[Ints, Any]:
        return np.array([NULL if v is None else field.code(v) for v in values], np.int64), np.True_

    def floats(values: list[Any]) -> Floats:
        return np.array(
            [np.nan if v is None else v for v in values] if field.optional else values, np.float64
        )

    match field.type:
        case "int":
            return integers
        case "timestamp":
            return instants
        case "category" | "string":
            return codes
        case "decimal":
            return lambda values: scaled(floats(values), field.divisor)
        case _:
            return lambda values: (floats(values).view(np.int64), np.True_)


def _from_datetime(value: dt.datetime) -> int:
    """Milliseconds; a time without a zone is UTC."""
    if value.tzinfo is None:
        value = value.replace(tzinfo=dt.UTC)
    return (value - _EPOCH) // dt.timedelta(milliseconds=1)


Clocks = Callable[[Sequence[bytes], Ints], Ints]  # records and times of sending to times (n,) ms


def clocks(stream: Stream, name: str | None = None) -> Clocks:
    """A reader of just one time of each record, NULL where there is none that decoding would accept.

    name: the field with that time, where it is another than the stream's: when a label became known.
    """
    name = name or stream.time
    field = Field(name, "timestamp", unit=stream.fields[stream.time].unit)
    decode, column = _decoder("Clock", [(field, _json_type(field, False))]), _column(field)

    def read(values: Sequence[bytes], sent: Ints) -> Ints:
        found, kept, _ = _decode_all(decode, values)
        result = np.full(len(values), NULL, np.int64)
        result[kept], _ = column([getattr(f, name) for f in found])
        result[(result < EARLIEST_MS) | (result > sent + AHEAD_MS)] = NULL
        return result

    return read


def texts(fields: Mapping[str, Field], names: Sequence[str]) -> Callable[[bytes], Any]:
    """A decoder of just these fields of an event that was checked before."""
    return _decoder("Texts", [(fields[n], _json_type(fields[n], False)) for n in names])


def streams_of(pipeline: Pipeline, batch: Batch) -> Ints:
    """The number (n,) of the stream that each event is of."""
    if len(pipeline.streams) == 1:
        return np.zeros(len(batch), np.int64)
    return batch.fields[:, [f.name for f in pipeline.columns].index(WHICH)]


def given_ids(pipeline: Pipeline) -> Callable[[Batch], list[int | str]]:
    """A reader of the ids of events as their streams have them."""
    salts = np.array([stream.salt for stream in pipeline.streams], np.int64)
    decoders = [
        texts(stream.fields, [stream.id]) if stream.fields[stream.id].type == "string" else None
        for stream in pipeline.streams
    ]

    def read(batch: Batch) -> list[int | str]:
        numbers = streams_of(pipeline, batch)
        found: list[int | str] = (batch.ids ^ salts[numbers]).tolist()
        for number, (stream, decode) in enumerate(zip(pipeline.streams, decoders, strict=True)):
            if decode is not None:
                for i in np.flatnonzero(numbers == number).tolist():
                    found[i] = getattr(decode(batch.payloads[i]), stream.id)
        return found

    return read


__all__ = [
    "LABEL", "Batch", "Decoded", "EventDecoder", "Key", "LabelBatch", "LabelDecoder", "Labels", "Reason", "Reject",
    "clocks", "key_bytes", "scaled", "texts",
]  # fmt: skip
