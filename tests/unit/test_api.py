"""The API without services: what is down is told, what fails inside stays inside, and every route is described."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from prometheus_client import CollectorRegistry

from app.api import features
from app.api.security import Guard, hash_of
from app.api.server import Backends, Limits, create_api
from app.cli import main
from models.pipeline import find
from tables.memory_mirror import MemoryMirror
from tables.profiles import Looked
from tests.conftest import PIPELINES

Client = TestClient  # type: ignore[type-arg]
PIPELINE = find("card-fraud", PIPELINES)
NOW_S = 1_530_000_100.0
NEWEST = 1_530_000_000_000


async def ready() -> str | None:
    return None


class Silent(MemoryMirror):
    """A mirror that does not answer."""

    def __init__(self, error: Exception) -> None:
        super().__init__(PIPELINE, lambda: 0)
        self.error = error
        self.asked = 0

    async def read(self, *_: Any) -> Any:
        self.asked += 1
        raise self.error


class Holds(features.Held):
    """A worker that holds the customers below 5."""

    def __init__(self) -> None:
        pass

    def read(self, entity: Any, ids: Any, at: int | None) -> list[Looked | bool | None]:
        width = len(entity.features)
        looked = Looked(NEWEST, NEWEST if at is None else at, 7, False, [1.0] * (width - 1) + [float("nan")])
        return [(looked if i != "4" else None) if i < "5" else False for i in ids]


async def client_of(backends: Backends, limits: Limits | None = None) -> Client:
    api = create_api(backends, CollectorRegistry(), ready, limits, lambda: NOW_S)
    client: Client = TestClient(TestServer(api))
    await client.start_server()
    return client


@pytest.fixture
async def worker() -> AsyncIterator[Client]:
    client = await client_of(Backends(PIPELINE, Silent(ConnectionRefusedError("away")), held=Holds()))
    yield client
    await client.close()


async def asked(client: Client, path: str, **body: Any) -> tuple[int, Any]:
    method = "POST" if body else "GET"
    async with client.request(method, path, **({"json": body} if body else {})) as response:
        return response.status, await response.json()


async def test_what_is_here_is_answered_without_a_mirror(worker: Client) -> None:
    status, found = await asked(worker, "/v1/features/customer/3")
    assert (status, found["source"], found["as_of"]) == (200, "worker", "2018-06-26T08:01:40Z")
    assert list(found["features"].values())[-1] is None
    assert (await asked(worker, "/v1/features/customer/4"))[0] == 404
    status, found = await asked(worker, "/v1/features/customer/7")
    assert (status, found["status"]) == (503, 503)
    # of many, one that is elsewhere is enough: no answer in part, which would look like none
    held, other = {"entity": "customer", "id": "3"}, {"entity": "customer", "id": "7"}
    assert (await asked(worker, "/v1/features", entities=[held, held]))[0] == 200
    assert (await asked(worker, "/v1/features", entities=[held, other]))[0] == 503


async def test_a_mirror_that_is_silent_is_not_waited_for_again_and_again() -> None:
    mirror = Silent(TimeoutError("away"))
    client = await client_of(Backends(PIPELINE, mirror))
    for _ in range(5):
        assert (await asked(client, "/v1/features/customer/7"))[0] == 503
    assert mirror.asked == 1
    await client.close()


async def test_what_fails_inside_is_not_told_outside(caplog: pytest.LogCaptureFixture) -> None:
    client = await client_of(Backends(PIPELINE, Silent(KeyError("secret"))))
    status, found = await asked(client, "/v1/features/customer/7")
    assert status == 500
    assert "secret" not in json.dumps(found)
    assert "secret" in caplog.text
    await client.close()


@pytest.mark.parametrize("path", ["/v1/predictions/7", "/v1/predictions?entity=customer&id=7"])
async def test_a_ledger_that_is_down_is_told(path: str) -> None:
    mirror = MemoryMirror(PIPELINE, lambda: 0)
    for url, sentence in (
        (None, "HEADRACE_POSTGRES_URL"), ("postgresql://headrace@127.0.0.1:1/headrace", "does not answer"),
    ):  # fmt: skip
        client = await client_of(Backends(PIPELINE, mirror, ledger_url=url))
        async with client.get(path) as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert sentence in (await response.json())["detail"]
        await client.close()


async def test_a_kafka_that_is_down_is_told() -> None:
    client = await client_of(Backends(PIPELINE, MemoryMirror(PIPELINE, lambda: 0)))
    event = {"TRANSACTION_ID": 1, "TX_DATETIME": NEWEST, "CUSTOMER_ID": 1, "TERMINAL_ID": 1, "TX_AMOUNT": 1.5}
    status, found = await asked(client, "/v1/events/transactions", **event)
    assert (status, found["title"]) == (503, "Something that is needed does not answer")
    assert (await asked(client, "/v1/stream/predictions"))[0] == 503
    assert (await asked(client, "/v1/events/nowhere", **event))[1]["errors"][0]["field"] == "stream"
    await client.close()


async def test_the_description_is_one_and_describes_every_route() -> None:
    client = await client_of(Backends(PIPELINE, MemoryMirror(PIPELINE, lambda: 0)))
    async with client.get("/openapi.json") as response:
        described = await response.json()
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    paths = set(described["paths"])
    assert {"/v1/events/transactions", "/v1/events/labels", "/v1/features/{entity}/{id}"} <= paths
    assert "/v1/events/{stream}" not in paths
    required = described["components"]["schemas"]["Event_transactions"]["required"]
    assert required == [f.name for f in PIPELINE.stream.fields.values() if not f.optional]
    for path, methods in described["paths"].items():
        for method, told in methods.items():
            assert told["summary"], (path, method)
            scoped = told.get("security") != []
            assert scoped == (path not in ("/healthz", "/readyz"))
            assert ("401" in told["responses"]) == scoped
    references = {part.split('"')[0] for part in json.dumps(described).split('"#/components/schemas/')[1:]}
    assert references <= set(described["components"]["schemas"])
    await client.close()


def test_a_token_is_made_and_lets_in(tmp_path: Any) -> None:
    file = tmp_path / "tokens.txt"
    first = CliRunner().invoke(main, ["token", "new", "a", "--file", str(file)])
    second = CliRunner().invoke(
        main, ["token", "new", "b", "--scope", "publish", "--rate", "5", "--file", str(file)]
    )
    assert first.exit_code == second.exit_code == 0
    assert file.stat().st_mode & 0o077 == 0
    guard = Guard(file)
    assert guard.admit(f"Bearer {first.output.strip()}", "read").name == "a"
    caller = guard.admit(f"Bearer {second.output.strip()}", "publish")
    assert caller.bucket is not None
    assert caller.bucket.rate == 5
    assert first.output.strip() not in file.read_text()
    assert hash_of(first.output.strip()) in file.read_text()
    assert CliRunner().invoke(main, ["token", "new", "a b"]).exit_code == 2
    printed = CliRunner().invoke(main, ["token", "new", "c"])
    assert printed.output.count("hr_") == 1
