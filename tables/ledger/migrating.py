"""Brings a database to a revision of the ledger's tables, up or down, and tells at which it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from models.errors import HeadraceError
from tables.ledger import AWAY
from tables.ledger.schema import SCHEMA

_LOCK = 0x6865_6164  # of PostgreSQL's advisory ones: two migrations at once would meet half of each other
_T = TypeVar("_T")


class NoRevision(HeadraceError):
    """The ledger's tables have no such revision."""

    exit_code = 2


class LedgerAway(HeadraceError):
    """PostgreSQL does not answer."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(
            f"PostgreSQL does not answer ({error or type(error).__name__}); start it, or set HEADRACE_POSTGRES_URL."
        )


class LedgerRefuses(HeadraceError):
    """PostgreSQL answers, and does not let us in, or do what we ask."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"PostgreSQL refuses ({error}): correct the rights, or HEADRACE_POSTGRES_URL.")


class OtherRevision(HeadraceError):
    """The tables are not those that this code knows."""

    def __init__(self, found: Revisions) -> None:
        remedy = "run `headrace ledger migrate`"
        if found.current is not None and found.current > found.newest:
            remedy = "run the newer Headrace that made them"
        super().__init__(
            f"The ledger's tables are at revision {found.current or 'none'}, and this Headrace needs {found.newest}: "
            f"{remedy}."
        )


@dataclass(frozen=True)
class Revisions:
    """At which revision a database is, None where it has no ledger, and the newest that this code knows."""

    current: str | None
    newest: str

    @property
    def fits(self) -> bool:
        return self.current == self.newest


async def revisions(url: str) -> Revisions:
    """At which a database is. Raises LedgerAway, LedgerRefuses."""
    return await _with_connection(url, _revisions)


async def check(url: str) -> None:
    """Raises OtherRevision, where a database is not at the revision of this code, and LedgerAway."""
    found = await revisions(url)
    if not found.fits:
        raise OtherRevision(found)


async def migrate(url: str, to: str = "head") -> Revisions:
    """Bring a database to a revision; to `base` drops all. Raises NoRevision, LedgerAway."""

    def go(connection: Connection) -> Revisions:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        config = _config(connection)
        try:
            down = is_down(_revisions(connection), to)
            (command.downgrade if down else command.upgrade)(config, to)
        except CommandError as error:
            raise NoRevision(f"The ledger cannot be brought to revision {to}: {error}.") from None
        return _revisions(connection)

    return await _with_connection(url, go)


def is_down(before: Revisions, to: str) -> bool:
    """Whether it is a way down, on which rows are lost."""
    if to in ("head", "base"):
        return to == "base" and before.current is not None
    return _place(to) < _place(before.current)


def _place(revision: str | None) -> int:
    """In the line of revisions, which are numbered by their names."""
    return int(revision) if revision is not None and revision.isdigit() else 0


def _config(connection: Connection | None = None) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _revisions(connection: Connection) -> Revisions:
    context = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    assert newest is not None
    return Revisions(context.get_current_revision(), newest)


async def _with_connection(url: str, work: Callable[[Connection], _T]) -> _T:
    engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(url))
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    except (*AWAY, OperationalError) as error:
        raise LedgerAway(error) from None
    except (asyncpg.PostgresError, DBAPIError) as error:
        # SQLAlchemy wraps what asyncpg says twice
        said = getattr(error, "orig", None) or error
        kind = LedgerAway if isinstance(said.__cause__, AWAY) else LedgerRefuses
        raise kind(said) from error
    finally:
        await engine.dispose()
