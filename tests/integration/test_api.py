"""The query API over HTTP, with a real mirror behind it, and with none."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from app.api.server import create_api, mirror_ready
from tables.mirror import Mirror, connect
from tests.integration.test_mirror import mirror, pipeline, put, touched

pytestmark = pytest.mark.integration
__all__ = ["mirror"]  # a fixture

NOW_S = 1_378_000_010.5
Client = TestClient  # type: ignore[type-arg]


async def serving(mirror: Mirror) -> Client:
    ready: Callable[[], Awaitable[str | None]] = mirror_ready(mirror)
    api = create_api(pipeline(), mirror, CollectorRegistry(), ready, lambda: NOW_S)
    client: Client = TestClient(TestServer(api))
    await client.start_server()
    return client


@pytest.fixture
async def client(mirror: Mirror) -> AsyncIterator[Client]:
    client = await serving(mirror)
    yield client
    await client.close()


@pytest.fixture
async def cut_off() -> AsyncIterator[Client]:
    """An API whose Redis is nowhere."""
    nowhere = Mirror(connect("redis://127.0.0.1:1/0"), pipeline())
    client = await serving(nowhere)
    yield client
    await client.close()
    await nowhere.close()


async def test_features_with_their_age(client: Client, mirror: Mirror) -> None:
    await put(mirror, touched([b"N14228"], 3.0, 12, 1_378_000_000_000))
    async with client.get("/v1/features/tailnum/N14228") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        body = await response.json()
    assert body == {
        "pipeline": "flight-delays",
        "entity": "tailnum",
        "id": "N14228",
        "as_of": "2013-09-01T01:46:40.000+00:00",
        "age_s": 10.5,
        "offset": 12,
        "definition": pipeline().definition,
        "degraded": False,
        "features": {"TAILNUM_NB_7D": 3.0, "TAILNUM_AVG_DEP_DELAY_7D": None},
    }


async def test_an_id_may_have_slashes_and_spaces(client: Client, mirror: Mirror) -> None:
    await put(mirror, touched([b"a/b c"], 3.0, 12))
    async with client.get("/v1/features/tailnum/a%2Fb%20c") as response:
        assert (await response.json())["id"] == "a/b c"


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/v1/features/tailnum/none", 404, "no features of tailnum none"),
        ("/v1/features/plane/N1", 404, "it has tailnum, origin, carrier, dest"),
        ("/v1/features/tailnum", 404, "404 Not Found: GET /v1/features/tailnum"),
        ("/", 404, "404 Not Found"),
    ],
)
async def test_what_is_not_there_is_told(client: Client, path: str, status: int, sentence: str) -> None:
    async with client.get(path) as response:
        assert response.status == status
        assert sentence in (await response.json())["error"]


async def test_another_method_is_refused(client: Client) -> None:
    async with client.post("/v1/features/tailnum/N1") as response:
        assert response.status == 405
        assert "error" in await response.json()


async def test_health_readiness_and_metrics(client: Client) -> None:
    async with client.get("/healthz") as response:
        assert response.status == 200
    async with client.get("/readyz") as response:
        assert response.status == 200
    await client.get("/v1/features/tailnum/none")
    async with client.get("/metrics") as response:
        text = await response.text()
    assert 'headrace_lookups_total{status="404"} 1.0' in text
    assert "headrace_lookup_seconds_count 1.0" in text


async def test_without_redis_it_is_alive_and_not_ready(cut_off: Client) -> None:
    async with cut_off.get("/healthz") as response:
        assert response.status == 200
    async with cut_off.get("/readyz") as response:
        assert response.status == 503
        assert "HEADRACE_REDIS_URL" in (await response.json())["error"]
    async with cut_off.get("/v1/features/tailnum/N1") as response:
        assert response.status == 503
        assert "try again" in (await response.json())["error"]
