"""How a definition takes what a topic or a file holds, before a worker meets it.

It is decoded by what workers decode with, and nothing is folded, sent or stored.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from app import history, kafka, verify
from app.history import FileWrong
from models.errors import HeadraceError
from models.estimates import rows_per_key
from models.events import LATEST_MS, Batch, EventDecoder, LabelDecoder, Reject
from models.pipeline import Pipeline
from models.records import keys_of
from models.streams import Stream
from models.windows import Ints

NEWEST = 1000  # records of a topic that are tried
TOLD = 20  # kinds of refusals that are told one by one
NDJSON = (".ndjson", ".jsonl")
SUFFIXES = (".parquet", ".csv", *NDJSON)
LINES = 10_000  # of NDJSON that are decoded together
READ_S = 30.0  # for the newest records of a topic


@dataclass
class Trial:
    """How a definition takes what a topic or a file holds.

    refused: by reason's code and sentence, how many; unnamed: fields that occur and that the file does not name;
    never: fields of the file that have no value anywhere.
    """

    source: str
    expected: frozenset[str]
    records: int = 0
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    occurring: set[str] = field(default_factory=set)

    @property
    def unnamed(self) -> list[str]:
        return sorted(self.occurring - self.expected)

    @property
    def never(self) -> list[str]:
        return sorted(self.expected - self.occurring) if self.records else []

    def as_dict(self) -> dict[str, Any]:
        codes: Counter[str] = Counter()
        for (code, _), count in self.refused.items():
            codes[code] += count
        told = [{"reason": code, "error": e, "records": n} for (code, e), n in self.refused.most_common(TOLD)]
        return {
            "source": self.source, "records": self.records, "refused": sum(codes.values()), "by_reason": codes,
            "refusals": told, "unnamed": self.unnamed, "never": self.never,
        }  # fmt: skip


class Sizes:
    """Counts the events of each key, to tell how many rows a profile has."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._entities = pipeline.entities
        self._keys_of = [keys_of(pipeline, number) for number in range(len(pipeline.entities))]
        self._codes: list[dict[bytes | None, int]] = [{None: -1} for _ in pipeline.entities]
        self._times: list[Ints] = []
        self._found: dict[str, list[int]] = {e.name: [] for e in pipeline.entities}

    def add(self, batch: Batch) -> None:
        """Events that were decoded."""
        self._times.append(batch.times)
        for entity, keys, codes in zip(self._entities, self._keys_of, self._codes, strict=True):
            self._found[entity.name] += [codes.setdefault(k, len(codes) - 1) for k in keys(batch)]

    def rows(self) -> dict[str, float]:
        """By entity, the mean number of rows of a profile at the end of what was added."""
        times = np.concatenate([np.empty(0, np.int64), *self._times])
        found = {
            e.name: rows_per_key(times, np.array(self._found[e.name], np.int64), e.retention)
            for e in self._entities
        }
        return {name: rows for name, rows in found.items() if rows is not None}

    def known(self, entity: str) -> str:
        """How well `rows` knows an entity: events that go back less far than its rows give too few."""
        if entity not in self.rows():
            return "assumed"
        times = np.concatenate(self._times)
        retention = next(e.retention for e in self._entities if e.name == entity)
        return "measured" if times.max() - times.min() >= retention else "at least"


@dataclass
class Tried:
    """What was tried: events, and labels where a topic has them; and the rows that events would make."""

    trials: list[Trial]
    sizes: Sizes

    @property
    def refused(self) -> int:
        return sum(sum(trial.refused.values()) for trial in self.trials)


async def try_topic(address: str, pipeline: Pipeline) -> Tried:
    """Decode the newest records of what others write. Raises TopicsWrong, BrokerUnreachable."""
    counts = await kafka.partitions_of(address, [x.topic for x in (*pipeline.streams, *pipeline.said)])
    for stream in pipeline.streams:
        if not counts[stream.topic]:
            raise kafka.TopicsWrong(
                f"Kafka has no topic {stream.topic}; name an instance whose topics exist (--as)."
            )
    sizes = Sizes(pipeline)
    trials = [await _try_stream(address, pipeline, s, counts[s.topic], sizes) for s in pipeline.streams]
    for said in pipeline.said:
        if counts[said.topic]:
            decoder = LabelDecoder(pipeline, said)
            trials.append(Trial(f"topic {said.topic}", decoder.fields))
            values = [r.value or b"" for r in await _newest(address, said.topic, counts[said.topic])]
            _note(trials[-1], values, decoder.decode(values)[2])
    return Tried(trials, sizes)


async def _try_stream(
    address: str, pipeline: Pipeline, stream: Stream, partitions: int, sizes: Sizes
) -> Trial:
    trial = Trial(f"topic {stream.topic}", frozenset(stream.fields))
    records = await _newest(address, stream.topic, partitions)
    sent = np.array([r.timestamp for r in records], np.int64)
    values = [r.value or b"" for r in records]
    batch, kept, rejects = EventDecoder(pipeline, stream).decode(values, sent)
    _note(trial, values, rejects)
    logs = np.array([r.partition for r in records], np.int64)[kept]
    home = verify.at_home(batch, logs, partitions)
    if not pipeline.routed and not home.all():
        key = pipeline.entities[0].key
        wrong = ("wrong-key", f"it is not in the partition of its {key}: publish it with that as record key")
        trial.refused[wrong] = int((~home).sum())
    sizes.add(batch)
    return trial


async def _newest(address: str, topic: str, partitions: int) -> list[Any]:
    """Up to NEWEST records, as many of each partition."""
    starts = dict.fromkeys(range(partitions), -max(NEWEST // partitions, 1))
    try:
        async with asyncio.timeout(READ_S):
            return [r async for r in kafka.read_between(address, topic, starts)]
    except TimeoutError:
        raise HeadraceError(f"Kafka did not give the newest records of {topic} in time; ask again.") from None


def try_file(path: Path, pipeline: Pipeline) -> Tried:
    """Decode a Parquet, CSV or NDJSON file as if it were published, or a folder with one for each stream.

    Raises FileWrong.
    """
    sizes = Sizes(pipeline)
    trials = [_try_stream_file(p, pipeline, stream, sizes) for stream, p in history.files_of(path, pipeline)]
    return Tried(trials, sizes)


def _try_stream_file(path: Path, pipeline: Pipeline, stream: Stream, sizes: Sizes) -> Trial:
    decode = EventDecoder(pipeline, stream).decode
    trial = Trial(str(path), frozenset(stream.fields))
    labels = pipeline.labels
    for values, names in (_lines if path.suffix in NDJSON else _rows)(path, stream):
        sent = np.full(len(values), LATEST_MS, np.int64)  # a file does not say when it was sent
        batch, _, rejects = decode(values, sent)
        _note(trial, values, rejects)
        trial.occurring |= names
        sizes.add(batch)
    # a file may carry the labels of its events
    trial.occurring -= {labels.field, labels.known} if labels else set()
    return trial


Pieces = Iterator[tuple[list[bytes], set[str]]]  # JSON of events, and columns with a value that are not in it


def _lines(path: Path, _: Stream) -> Pieces:
    try:
        with path.open("rb") as file:
            while lines := [line.rstrip(b"\r\n") for line in islice(file, LINES)]:
                yield lines, set()
    except OSError as error:
        raise FileWrong(f"{path} cannot be read ({error.strerror}).") from None


def _rows(path: Path, stream: Stream) -> Pieces:
    for table in history.tables(path, stream):
        names = {name for name in table.column_names if table[name].null_count < len(table)}
        fields = [f for f in stream.fields.values() if f.name in table.column_names]
        yield history.as_json(table, fields), names


def _note(trial: Trial, values: Sequence[bytes], rejects: Iterable[Reject]) -> None:
    trial.records += len(values)
    trial.refused.update((reject.reason.code, reject.reason.error) for reject in rejects)
    for value in values:
        try:
            event = msgspec.json.decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(event, dict):
            trial.occurring.update(name for name, v in event.items() if v is not None)
