"""What is told of a PostgreSQL that does not answer, or refuses. Real ones: tests/integration/test_ledger.py."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from models.errors import HeadraceError
from tables.ledger import migrating
from tables.ledger.migrating import LedgerAway, LedgerRefuses, Revisions, is_down


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("no route"), LedgerAway),
        (TimeoutError(), LedgerAway),
        (asyncpg.CannotConnectNowError("the database system is starting up"), LedgerAway),
        (asyncpg.TooManyConnectionsError("sorry, too many clients already"), LedgerAway),
        (asyncpg.InvalidPasswordError("password authentication failed"), LedgerRefuses),
        (asyncpg.InvalidCatalogNameError("database does not exist"), LedgerRefuses),
    ],
)
async def test_what_passes_by_itself_is_told_from_what_does_not(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: type[HeadraceError]
) -> None:
    async def connect(_: str) -> Any:
        raise error

    monkeypatch.setattr(asyncpg, "connect", connect)
    with pytest.raises(told):
        await migrating.revisions("postgresql://nowhere")


def test_a_way_down_is_known() -> None:
    at = Revisions("0002", "0003")
    assert [is_down(at, to) for to in ("head", "0003", "0002", "0001", "base")] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert not is_down(Revisions(None, "0003"), "base")
