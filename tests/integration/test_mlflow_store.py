"""MLflow with its tables in a real PostgreSQL: what was registered, promoted and rolled back outlives both servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from app.errors import ServiceFailed
from app.local import mlflow, services
from app.settings import Settings
from models.scoring import Refused
from tables.model_folder import CHAMPION, PREVIOUS
from tests.fixtures.models import graph, sigmoid
from tests.integration.test_registry import life, of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a data root of its own; what is started there ends with the tests."""
    settings = Settings(
        data_root=tmp_path_factory.mktemp("store"), mlflow_store="postgres", mlflow_port=25100, postgres_port=25432
    )  # fmt: skip
    try:
        yield settings
    finally:
        services.down(settings, remove_data=True)


def tables(url: str, database: str) -> set[str]:
    """Those of a database of this server."""
    with psycopg.connect(urlsplit(url)._replace(path=f"/{database}").geturl()) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        return {name for (name,) in rows}


def test_what_is_registered_outlives_both_servers(own: Settings, tmp_path: Path) -> None:
    events: list[tuple[str, str]] = []
    found = services.up(own, ["mlflow"], lambda *event: events.append(event))
    assert [e for e in events if e[1] == "starting"] == [("postgres", "starting"), ("mlflow", "starting")]
    url, address = found.postgres_url, found.mlflow or ""
    assert "registered_models" in tables(url, "mlflow")
    assert not tables(url, "headrace"), "the ledger's database is the ledger's"
    assert not (own.data_root / "mlflow" / "data" / "mlflow.db").exists()
    secret = urlsplit(url).password or "?"
    pid = next(s.pid for s in services.status(own) if s.name == "mlflow")
    command = Path(f"/proc/{pid}/cmdline")
    assert not command.exists() or secret not in command.read_text()
    # 1. registered, promoted, rolled back; a version that is not fit is refused
    here = life(address, tmp_path / "here", "stored")
    here.registry.folder.save(graph(), of("stored", "one"))
    here.registry.folder.save(graph(2.0), of("stored", "two", golden_scores=sigmoid([0, 4]).tolist()))
    here.registry.folder.save(graph(), of("stored", "bad", golden_scores=[0.9, 0.1]))
    assert here.register("one", promote=False)
    here.register("two", promote=True)
    here.registry.publish("stored", "bad")
    with pytest.raises(Refused):
        here.promote("bad")
    assert here.rollback() == "one"
    here.promote("two", "challenger-2")
    named = {CHAMPION: "one", PREVIOUS: "two", "challenger-2": "two"}
    # 2. PostgreSQL starts anew under MLflow, then MLflow, once in good order and once by a crash
    for stop in (
        lambda: services.down(own, ["postgres"]),
        lambda: services.down(own, ["mlflow"]),
        lambda: services.kill(own, "mlflow"),
        lambda: services.kill(own, "postgres"),
    ):
        stop()
        again = services.up(own, ["mlflow"]).mlflow or ""
        there = life(again, tmp_path / "there", "stored")
        assert there.aliases() == named
        assert {v.version for v in there.registry.versions("stored")} == {"one", "two", "bad"}
    # 3. and files can be had of it by a machine that has none
    assert there.champion().card.version == "one"
    assert there.load("two").card == of("stored", "two", golden_scores=sigmoid([0, 4]).tolist())


def test_any_database_by_its_url(own: Settings, tmp_path: Path) -> None:
    url = services.up(own, ["postgres"]).postgres_url
    services.down(own, ["mlflow"])
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE elsewhere")
    store = urlsplit(url)._replace(path="/elsewhere").geturl()
    given = own.model_copy(update={"mlflow_store": store})
    address = services.up(given, ["mlflow"]).mlflow or ""
    here = life(address, tmp_path, "by-url")
    here.registry.folder.save(graph(), of("by-url", "one"))
    assert here.register("one", promote=False)
    assert "registered_models" in tables(url, "elsewhere")
    services.down(given, ["mlflow"])


def test_a_database_that_cannot_be_had_is_told_without_its_password(own: Settings) -> None:
    url = services.up(own, ["postgres"]).postgres_url
    wrong = urlsplit(url)._replace(netloc=f"nobody:grain@{urlsplit(url).netloc.rpartition('@')[2]}").geturl()
    with pytest.raises(
        ServiceFailed, match=r"MLflow has no database in PostgreSQL \(.*nobody.*MLFLOW_STORE\.$"
    ) as told:
        mlflow.database_in(wrong)
    assert "grain" not in str(told.value)
