"""The ledger in PostgreSQL: every prediction and label, to be looked up by event, by entity and by time.

schema       what the tables hold
migrations   how a database gets there, and back
writing      rows and the places they were read from, in one transaction
reading      look-ups
"""

from asyncpg import exceptions

# What is over by itself: no connection, a server that starts, stops, is full or a copy, a lock that others hold.
# InternalClientError is what asyncpg says of a connection that the server has closed just now.
AWAY = (
    OSError, TimeoutError, exceptions.InterfaceError, exceptions.InternalClientError,
    exceptions.PostgresConnectionError, exceptions.OperatorInterventionError,
    exceptions.InsufficientResourcesError, exceptions.TransactionRollbackError, exceptions.LockNotAvailableError,
    exceptions.ReadOnlySQLTransactionError, exceptions.PostgresSystemError,
)  # fmt: skip

# The tables are not there, or not as this code knows them.
OTHER_TABLES = (
    exceptions.UndefinedTableError,
    exceptions.UndefinedColumnError,
    exceptions.InvalidSchemaNameError,
)
