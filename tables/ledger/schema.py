"""What the ledger's tables hold. `predictions`, `prediction_keys` and `labels` are parted by the day of sending.

A row is kept by the time when its record was sent, for that grows with the topic: a replay of old events makes no
old days. `pipeline` is the instance, so that several share a database.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import Index, MetaData, PrimaryKeyConstraint, Text
from sqlalchemy.dialects.postgresql import BIGINT, DOUBLE_PRECISION, JSON, JSONB, SMALLINT, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA = "ledger"  # not the name of a user, whose every table would come into it unasked

_INSTANT: Any = TIMESTAMP(timezone=True)
_NAME = Text(collation="C")  # compared byte by byte, whatever the language of the database


class Table(DeclarativeBase):
    """A table of the ledger."""

    metadata = MetaData(schema=SCHEMA)


class Prediction(Table):
    """A record of the predictions' topic. Its origin is its key, for an id may be predicted under two definitions.

    event: the 64-bit id (models.fields.event_id) of the event, and id as the stream has it. score, decision, model,
    version: null where there was no model. keys: by entity. features: the topic's own JSON, for `jsonb` would lose
    the sign of a zero.
    """

    __tablename__ = "predictions"

    pipeline: Mapped[str] = mapped_column(_NAME)
    scored_at: Mapped[dt.datetime] = mapped_column(_INSTANT)
    partition: Mapped[int]
    offset: Mapped[int] = mapped_column(BIGINT)
    event: Mapped[int] = mapped_column(BIGINT)
    id: Mapped[str] = mapped_column(_NAME)
    stream: Mapped[str | None] = mapped_column(_NAME)
    event_time: Mapped[dt.datetime] = mapped_column(_INSTANT)
    score: Mapped[float | None] = mapped_column(DOUBLE_PRECISION)
    decision: Mapped[str | None] = mapped_column(_NAME)
    model: Mapped[str | None] = mapped_column(_NAME)
    version: Mapped[str | None] = mapped_column(_NAME)
    definition: Mapped[str] = mapped_column(_NAME)
    late: Mapped[bool]
    degraded: Mapped[bool]
    keys: Mapped[dict[str, str | None]] = mapped_column(JSONB)
    features: Mapped[dict[str, float | None] | None] = mapped_column(JSON)

    __table_args__ = (
        PrimaryKeyConstraint("scored_at", "partition", "offset", "pipeline"),
        Index("predictions_event", "event"),
        {"postgresql_partition_by": "RANGE (scored_at)"},
    )


class PredictionKey(Table):
    """An entity that a prediction is about: one row for each, found by key and event time."""

    __tablename__ = "prediction_keys"

    pipeline: Mapped[str] = mapped_column(_NAME)
    entity: Mapped[str] = mapped_column(_NAME)
    key: Mapped[str] = mapped_column(_NAME)
    event_time: Mapped[dt.datetime] = mapped_column(_INSTANT)
    scored_at: Mapped[dt.datetime] = mapped_column(_INSTANT)
    partition: Mapped[int]
    offset: Mapped[int] = mapped_column(BIGINT)
    score: Mapped[float | None] = mapped_column(DOUBLE_PRECISION)

    __table_args__ = (
        PrimaryKeyConstraint("pipeline", "entity", "key", "event_time", "scored_at", "partition", "offset"),
        {"postgresql_partition_by": "RANGE (scored_at)"},
    )


class Label(Table):
    """A record of the labels' topic, or of the reversals'. label: 0, 1, or null: unknown again.

    event_time: null where the label carries the event's id alone. The last one sent is what counts.
    """

    __tablename__ = "labels"

    pipeline: Mapped[str] = mapped_column(_NAME)
    sent_at: Mapped[dt.datetime] = mapped_column(_INSTANT)
    reversed: Mapped[bool]
    partition: Mapped[int]
    offset: Mapped[int] = mapped_column(BIGINT)
    event: Mapped[int] = mapped_column(BIGINT)
    event_time: Mapped[dt.datetime | None] = mapped_column(_INSTANT)
    label: Mapped[int | None] = mapped_column(SMALLINT)
    known_at: Mapped[dt.datetime | None] = mapped_column(_INSTANT)

    __table_args__ = (
        PrimaryKeyConstraint("sent_at", "partition", "offset", "reversed", "pipeline"),
        Index("labels_event", "event"),
        {"postgresql_partition_by": "RANGE (sent_at)"},
    )


class Position(Table):
    """How far a partition of a topic was read for an instance, for several may share one of labels: moved in the
    transaction of the rows that were read.

    next: the next offset; highest: the highest origin so far (models.predictions.Place); whole_at: all that was
    sent to the partition before is here.
    """

    __tablename__ = "positions"

    pipeline: Mapped[str] = mapped_column(_NAME)
    topic: Mapped[str] = mapped_column(_NAME)
    partition: Mapped[int]
    next: Mapped[int] = mapped_column(BIGINT)
    highest: Mapped[int] = mapped_column(BIGINT)
    whole_at: Mapped[dt.datetime | None] = mapped_column(_INSTANT)

    __table_args__ = (PrimaryKeyConstraint("pipeline", "topic", "partition"),)


# By day of these columns. `outcomes`, a view, is each prediction with what is known of its event now: so a label
# that comes or flips rewrites no prediction.
PARTED = {"predictions": "scored_at", "prediction_keys": "scored_at", "labels": "sent_at"}
