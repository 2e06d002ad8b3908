"""What Alembic runs: the migrations, over the connection that tables.ledger.migrating gives it."""

from alembic import context

from tables.ledger.schema import SCHEMA, Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
)
with context.begin_transaction():
    context.run_migrations()
