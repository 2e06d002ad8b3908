"""The dead letters of a pipeline: look at them, and send what was refused, or its repair, once more."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from app import kafka
from models.dead_letters import DeadLetter, Origin, Original, Replayed, decode, original
from models.errors import HeadraceError
from models.events import EventDecoder, LabelDecoder, Reject, key_bytes
from models.partitions import partitions_of
from models.pipeline import Pipeline


class NoLetter(HeadraceError):
    """No dead letter is of this origin."""

    def __init__(self, topic: str, text: object) -> None:
        super().__init__(
            f"{topic} has no letter of {text}; `headrace dlq list` shows which there are, as topic/partition/offset."
        )


class CannotReplay(HeadraceError):
    """A letter cannot be sent again as it is."""


@dataclass
class Letter:
    """A dead letter, where it lies in the topic, and whether it was sent again."""

    letter: DeadLetter
    home: int
    replayed: Replayed | None = None

    @property
    def origin(self) -> Origin:
        return self.letter.origin


@dataclass(frozen=True)
class Wanted:
    """Which letters: of these origins, for these reasons, of records sent from `since` on (ms). Empty: all."""

    origins: frozenset[Origin] = frozenset()
    reasons: frozenset[str] = frozenset()
    since: int = 0

    def has(self, letter: DeadLetter) -> bool:
        return (
            (not self.origins or letter.origin in self.origins)
            and (not self.reasons or letter.reason in self.reasons)
            and letter.timestamp >= self.since
        )


async def read(pipeline: Pipeline, address: str, wanted: Wanted) -> list[Letter]:
    """The letters that are wanted, each once, by the time when their records were sent.

    Raises NoLetter where an origin has none.
    """
    letters: dict[Origin, Letter] = {}
    marks: dict[Origin, Replayed] = {}
    if not (await kafka.partitions_of(address, [pipeline.dead_letters]))[pipeline.dead_letters]:
        raise kafka.TopicsWrong(f"Kafka has no topic {pipeline.dead_letters}; run `headrace topics create`.")
    async for record in kafka.read_between(address, pipeline.dead_letters):
        try:
            found = decode(record.value or b"")
        except msgspec.MsgspecError:
            continue  # none of ours: the topic may be written by hand
        if isinstance(found, Replayed):
            marks[found.origin] = found
        elif wanted.has(found):  # one that a worker wrote twice counts once
            letters.setdefault(found.origin, Letter(found, record.partition))
    for origin, letter in letters.items():
        letter.replayed = marks.get(origin)
    for origin in wanted.origins - set(letters):
        raise NoLetter(pipeline.dead_letters, origin)
    return sorted(letters.values(), key=lambda x: (x.letter.timestamp, x.origin))


def parse_origin(pipeline: Pipeline, text: str) -> Origin:
    """topic/partition/offset. Raises NoLetter."""
    try:
        return Origin.parse(text)
    except ValueError:
        raise NoLetter(pipeline.dead_letters, text) from None


async def whole(letter: DeadLetter, address: str) -> Original | None:
    """The record as it came: of a letter that was cut, from its origin; None where it is gone there."""
    if not letter.cut:
        return original(letter)
    topic, partition, offset = letter.origin
    if (await kafka.partitions_of(address, [topic]))[topic] <= partition:
        return None
    async with contextlib.aclosing(kafka.read_between(address, topic, {partition: offset})) as records:
        async for record in records:
            if record.offset == offset and record.timestamp == letter.timestamp:
                return Original(record.key, record.value or b"", record.headers)
            break
    return None


async def replay(
    pipeline: Pipeline, address: str, letters: Iterable[Letter], repaired: bytes | None = None,
    again: bool = False, dry_run: bool = False,
) -> AsyncIterator[tuple[Letter, str, Literal["sent", "passed", "stuck"]]]:  # fmt: skip
    """Send letters to the topics they came from, in the order of their origins; `repaired` in a letter's place.

    Yields each letter with what came of it, in words and in one. One that was sent before is passed
    over unless `again`; what a worker would refuse again is not sent.
    """
    counts = await kafka.checked_partitions(address, pipeline)
    sender = _Sender(pipeline, counts)
    producer = kafka.producer(address)
    await producer.start()
    try:
        for letter in sorted(letters, key=lambda x: x.origin):
            if letter.replayed is not None and not again:
                yield letter, f"was replayed before, {describe(letter.replayed)}", "passed"
                continue
            try:
                record = await _record(letter.letter, address, repaired)
                partition, key = sender.target(letter.origin, record)
            except CannotReplay as error:
                yield letter, str(error), "stuck"
                continue
            if dry_run:
                yield letter, f"would go to partition {partition}", "sent"
                continue
            mark = await sender.send(producer, letter, partition, key, record)
            yield letter, f"replayed {describe(mark)}", "sent"
    finally:
        await producer.stop()


async def _record(letter: DeadLetter, address: str, repaired: bytes | None) -> Original:
    """What is to be sent in a letter's place."""
    record = await whole(letter, address)
    if repaired is not None:
        return (record or original(letter))._replace(value=repaired)
    if record is None:
        raise CannotReplay("is larger than a letter keeps, and gone from its topic")
    return record


class _Sender:
    """Knows where a record belongs, and that a worker will take it."""

    def __init__(self, pipeline: Pipeline, counts: dict[str, int]) -> None:
        self._pipeline, self._counts = pipeline, counts
        self._events = {stream.topic: EventDecoder(pipeline, stream) for stream in pipeline.streams}
        self._labels = {said.topic: LabelDecoder(pipeline, said) for said in pipeline.said}

    def target(self, origin: Origin, record: Original) -> tuple[int, bytes | None]:
        """Partition and key. Raises CannotReplay where the record would be refused again."""
        if origin.topic in self._labels:
            _raise(self._labels[origin.topic].decode([record.value])[2])
            return origin.partition, record.key
        if origin.topic not in self._events:
            raise CannotReplay("is of a log that only workers write; replay the event that it was made of")
        batch, _, rejects = self._events[origin.topic].decode([record.value], np.array([_now_ms()]))
        _raise(rejects)
        if self._pipeline.routed:  # the router finds its place
            return origin.partition, record.key
        # The key of the event, not the record's: a profile has one partition.
        key = None if batch.keys[0] is None else key_bytes(batch.keys[0])
        return int(partitions_of([key], batch.ids, self._counts[origin.topic])[0]), key

    async def send(
        self, producer: Any, letter: Letter, partition: int, key: bytes | None, record: Original
    ) -> Replayed:
        """Send the record, and then note that it was: a record sent twice is a duplicate, one noted too early lost."""
        sent = await producer.send_and_wait(
            letter.origin.topic, record.value, key=key, partition=partition, headers=list(record.headers)
        )
        mark = Replayed(*letter.origin, sent.partition, sent.offset)
        await producer.send_and_wait(
            self._pipeline.dead_letters, msgspec.json.encode(mark), key=str(letter.origin).encode(),
            partition=letter.home,
        )  # fmt: skip
        return mark


def as_json(letter: Letter) -> bytes:
    """One line of NDJSON: the letter's fields, and whether it was replayed."""
    return msgspec.json.encode(msgspec.to_builtins(letter.letter) | {"replayed": letter.replayed is not None})


def shown_bytes(data: bytes | None) -> str:
    """Bytes as people read them: text where they are UTF-8, else hex."""
    if data is None:
        return "-"
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.hex(" ", -4)


def _raise(rejects: list[Reject]) -> None:
    for reject in rejects:
        raise CannotReplay(f"would be refused again: {reject.reason.error}")


def describe(mark: Replayed | None) -> str:
    """Where a letter was sent to."""
    return "no" if mark is None else f"to {mark.topic}/{mark.to_partition}/{mark.to_offset}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
