"""The agent of the ledger: what is in the topics of predictions, labels and reversals, as rows.

It remembers how far it has read, and that only: what it says may be written whenever the ledger takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from models.events import EARLIEST_MS, LATEST_MS, LabelDecoder
from models.pipeline import Labels, Pipeline, Reversals
from models.predictions import Place
from models.windows import NEGATIVE, POSITIVE
from tables.ledger.writing import DAY_MS, Move, Row, Rows, TopicPartition
from tables.profiles import Record

_LABELS = {NEGATIVE: 0, POSITIVE: 1}
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_NUL = b"\\u0000"


class _Origin(msgspec.Struct):
    offset: _Int64


class _Prediction(msgspec.Struct):
    """A prediction as the tables hold it; its features stay the JSON that they are."""

    id: _Int64 | str
    event_time: Annotated[int, msgspec.Meta(ge=EARLIEST_MS, lt=LATEST_MS)]
    score: float | None
    decision: str | None
    model: str | None
    version: str | None
    definition: str
    late: bool
    origin: _Origin
    keys: dict[str, str | None] = {}
    features: msgspec.Raw = msgspec.Raw(b"null")
    degraded: bool = False
    stream: str | None = None


_decode = msgspec.json.Decoder(_Prediction).decode


class Recorder:
    """Makes rows of the records of a pipeline's topics, each once. `foreign` counts what is none of theirs,
    `dropped` predictions that came twice.

    keep_days: rows of records that were sent longer ago are left out, and count in `expired`.
    """

    def __init__(self, pipeline: Pipeline, keep_days: int) -> None:
        self._identity = {stream.name: stream.identity for stream in pipeline.streams}
        self._first = pipeline.stream.identity
        self._keep_ms = keep_days * DAY_MS
        self._said = {said.topic: _Said(pipeline, said) for said in pipeline.said}
        self.topics = (pipeline.predictions, *self._said)
        self.foreign = self.expired = self.dropped = 0

    def rows(
        self,
        polled: Mapping[TopicPartition, Sequence[Record]],
        places: Mapping[TopicPartition, Place],
        now: int,
    ) -> Rows:
        """What was polled, from these places on. now: ms."""
        rows = Rows()
        oldest = now - self._keep_ms
        for (topic, partition), records in polled.items():
            place = places[topic, partition]
            move = Move(place, Place(place.next, place.highest))
            if topic in self._said:
                found, foreign = self._said[topic].read(partition, records, move.after, now)
                self.foreign += foreign
            else:
                found = self._predictions(partition, records, move.after, now)
            kept = [row for row in found if row[0] >= oldest]
            self.expired += len(found) - len(kept)
            (rows.labels if topic in self._said else rows.predictions).extend(kept)
            rows.moves[topic, partition] = move
        return rows

    def _predictions(self, partition: int, records: Sequence[Record], place: Place, now: int) -> list[Row]:
        rows: list[Row] = []
        for record in records:
            try:
                origin, row = self._row(record.value or b"", min(record.timestamp, now + DAY_MS), partition)
            except ValueError:  # a predictions topic may be written by hand
                origin, row = -1, None
            if place.take(record.offset, origin):
                rows.append(row or ())
            elif row is None:
                self.foreign += 1
            else:
                self.dropped += 1
        return rows

    def _row(self, value: bytes, sent: int, partition: int) -> tuple[int, Row]:
        """Its origin, and its row. Raises ValueError where it is no prediction."""
        made = _decode(value)
        event = self._identity.get(made.stream or "", self._first)(made.id)
        if _NUL in value:  # which no text of PostgreSQL's may have
            made = _decode(value.replace(_NUL, b"\\ufffd"))
        features = str(made.features, "utf-8")
        return made.origin.offset, (
            sent, partition, made.origin.offset, event, str(made.id), made.stream, made.event_time, made.score,
            made.decision, made.model, made.version, made.definition, made.late, made.degraded,
            msgspec.json.encode(made.keys).decode(), None if features == "null" else features,
        )  # fmt: skip


class _Said:
    """Reads labels or reversals."""

    def __init__(self, pipeline: Pipeline, said: Labels | Reversals) -> None:
        self._decode = LabelDecoder(pipeline, said).decode
        self._reversed = isinstance(said, Reversals)

    def read(
        self, partition: int, records: Sequence[Record], place: Place, now: int
    ) -> tuple[list[Row], int]:
        """Rows of those that are good, and how many are not."""
        news = [record for record in records if place.take(record.offset, record.offset)]
        batch, kept, rejects = self._decode([record.value or b"" for record in news])
        rows = [
            (
                min(news[at].timestamp, now + DAY_MS), self._reversed, partition, news[at].offset, event,
                _instant(time), _LABELS.get(state), _instant(known),
            )
            for at, event, time, state, known in zip(
                kept.tolist(), batch.ids.tolist(), batch.times.tolist(), batch.states.tolist(),
                batch.clocks.tolist(), strict=True,
            )
        ]  # fmt: skip
        return rows, len(rejects)


def _instant(time: int) -> int | None:
    """None where nothing is said, or what no calendar has."""
    return time if EARLIEST_MS <= time < LATEST_MS else None
