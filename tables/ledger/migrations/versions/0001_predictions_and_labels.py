"""Predictions, the entities they are about, labels, outcomes, and how far the topics were read."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import BIGINT, DOUBLE_PRECISION, JSON, JSONB, SMALLINT, TIMESTAMP

revision, down_revision, branch_labels, depends_on = "0001", None, None, None

SCHEMA = "ledger"  # not the name of a user, whose every table would come into it unasked
INSTANT = TIMESTAMP(timezone=True)
NAME = sa.Text(collation="C")


def _column(name: str, kind: Any, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=nullable, autoincrement=False)


def upgrade() -> None:
    op.create_table(
        "predictions",
        _column("pipeline", NAME), _column("scored_at", INSTANT), _column("partition", sa.Integer),
        _column("offset", BIGINT), _column("event", BIGINT), _column("id", NAME), _column("stream", NAME, True),
        _column("event_time", INSTANT), _column("score", DOUBLE_PRECISION, True), _column("decision", NAME, True),
        _column("model", NAME, True), _column("version", NAME, True), _column("definition", NAME),
        _column("late", sa.Boolean), _column("degraded", sa.Boolean), _column("keys", JSONB),
        _column("features", JSON, True),
        sa.PrimaryKeyConstraint("scored_at", "partition", "offset", "pipeline"),
        schema=SCHEMA, postgresql_partition_by="RANGE (scored_at)",
    )  # fmt: skip
    op.create_index("predictions_event", "predictions", ["event"], schema=SCHEMA)
    op.create_table(
        "prediction_keys",
        _column("pipeline", NAME), _column("entity", NAME), _column("key", NAME), _column("event_time", INSTANT),
        _column("scored_at", INSTANT), _column("partition", sa.Integer), _column("offset", BIGINT),
        _column("score", DOUBLE_PRECISION, True),
        sa.PrimaryKeyConstraint("pipeline", "entity", "key", "event_time", "scored_at", "partition", "offset"),
        schema=SCHEMA, postgresql_partition_by="RANGE (scored_at)",
    )  # fmt: skip
    op.create_table(
        "labels",
        _column("pipeline", NAME), _column("sent_at", INSTANT), _column("reversed", sa.Boolean),
        _column("partition", sa.Integer), _column("offset", BIGINT), _column("event", BIGINT),
        _column("event_time", INSTANT, True), _column("label", SMALLINT, True), _column("known_at", INSTANT, True),
        sa.PrimaryKeyConstraint("sent_at", "partition", "offset", "reversed", "pipeline"),
        schema=SCHEMA, postgresql_partition_by="RANGE (sent_at)",
    )  # fmt: skip
    op.create_index("labels_event", "labels", ["event"], schema=SCHEMA)
    op.create_table(
        "positions",
        _column("topic", NAME), _column("partition", sa.Integer), _column("next", BIGINT),
        _column("highest", BIGINT), _column("whole_at", INSTANT, True),
        sa.PrimaryKeyConstraint("topic", "partition"),
        schema=SCHEMA,
    )  # fmt: skip
    op.execute(
        """
        CREATE VIEW ledger.outcomes AS
        SELECT p.*, l.label, l.known_at, l.sent_at AS labelled_at, r.event IS NOT NULL AS reversed
        FROM ledger.predictions p
        LEFT JOIN (
            SELECT DISTINCT ON (pipeline, event) pipeline, event, label, known_at, sent_at
            FROM ledger.labels WHERE NOT reversed
            ORDER BY pipeline, event, sent_at DESC, "partition" DESC, "offset" DESC
        ) l ON l.pipeline = p.pipeline AND l.event = p.event
        LEFT JOIN (
            SELECT DISTINCT pipeline, event FROM ledger.labels WHERE reversed
        ) r ON r.pipeline = p.pipeline AND r.event = p.event
        """
    )


def downgrade() -> None:
    op.execute("DROP VIEW ledger.outcomes")
    for table in ("positions", "labels", "prediction_keys", "predictions"):
        op.drop_table(table, schema=SCHEMA)
