"""How far topics were read, by instance. Whose a place was is not known: topics are read from their beginning again."""

from alembic import op

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None


def upgrade() -> None:
    op.execute("DELETE FROM ledger.positions")
    op.execute('ALTER TABLE ledger.positions ADD COLUMN pipeline text COLLATE "C" NOT NULL')
    op.execute("ALTER TABLE ledger.positions DROP CONSTRAINT positions_pkey")
    op.execute('ALTER TABLE ledger.positions ADD PRIMARY KEY (pipeline, topic, "partition")')


def downgrade() -> None:
    op.execute("DELETE FROM ledger.positions")
    op.execute("ALTER TABLE ledger.positions DROP CONSTRAINT positions_pkey")
    op.execute("ALTER TABLE ledger.positions DROP COLUMN pipeline")
    op.execute('ALTER TABLE ledger.positions ADD PRIMARY KEY (topic, "partition")')
