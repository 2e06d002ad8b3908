"""The query API over HTTP, with a real mirror behind it, and with none."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from app.api.security import new_token
from app.api.server import Backends, Limits, create_api, mirror_ready, open_to_all
from app.errors import SettingsError
from tables.mirror import Mirror, connect
from tests.integration.test_mirror import mirror, pipeline, put, touched

pytestmark = pytest.mark.integration
__all__ = ["mirror"]  # a fixture

NOW_S = 1_378_000_010.5
EVENT_MS = 1_378_000_000_000
Client = TestClient  # type: ignore[type-arg]


async def serving(mirror: Mirror, **limits: Any) -> Client:
    backends = Backends(pipeline(), mirror)
    api = create_api(backends, CollectorRegistry(), mirror_ready(mirror), Limits(**limits), lambda: NOW_S)
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


async def problem(client: Client, method: str, path: str, **how: Any) -> tuple[int, Any]:
    """Status and document of what must be a problem."""
    async with client.request(method, path, **how) as response:
        assert response.content_type == "application/problem+json", await response.text()
        body = await response.json()
        assert body["status"] == response.status
        assert body["title"] and body["detail"] and body["type"].startswith("/docs#")
        return response.status, body


async def test_features_with_their_age(client: Client, mirror: Mirror) -> None:
    await put(mirror, touched([b"N14228"], 3.0, 12, EVENT_MS))
    async with client.get("/v1/features/tailnum/N14228?at=newest") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        body = await response.json()
    assert body == {
        "pipeline": "flight-delays",
        "entity": "tailnum",
        "id": "N14228",
        "as_of": "2013-09-01T01:46:40Z",
        "newest": "2013-09-01T01:46:40Z",
        "age_s": 10.5,
        "offset": 12,
        "definition": pipeline().definition,
        "degraded": False,
        "reason": None,
        "source": "mirror",
        "features": {"TAILNUM_NB_7D": 3.0, "TAILNUM_AVG_DEP_DELAY_7D": None},
    }


async def test_values_are_exact_at_any_time(client: Client, mirror: Mirror) -> None:
    await put(mirror, touched([b"N1"], 3.0, 12, EVENT_MS))

    async def values(at: str) -> tuple[Any, Any]:
        async with client.get("/v1/features/tailnum/N1", params={"at": at}) as response:
            body = await response.json()
            return body["features"]["TAILNUM_NB_7D"], body["reason"]

    week = 7 * 86_400_000
    assert await values("now") == (1.0, None)
    assert await values("newest") == (3.0, None)  # what was written beside the profile
    assert await values(str(EVENT_MS + week - 1)) == (1.0, None)
    assert await values(str(EVENT_MS + week)) == (0.0, None)
    assert await values("2013-09-08T03:46:40+02:00") == (0.0, None)
    assert (await values("2013-01-01"))[1] == "too-far-back"


async def test_an_id_may_have_slashes_and_spaces(client: Client, mirror: Mirror) -> None:
    await put(mirror, touched([b"a/b c"], 3.0, 12))
    async with client.get("/v1/features/tailnum/a%2Fb%20c") as response:
        assert (await response.json())["id"] == "a/b c"


async def test_some_features_of_many_entities(client: Client, mirror: Mirror) -> None:
    await put(mirror, touched([b"N1", b"N2"], 3.0, 12))
    keys = ("N2", "none", "N1")
    asked = {
        "entities": [{"entity": "tailnum", "id": i} for i in keys],
        "features": ["TAILNUM_NB_7D"],
        "at": "newest",
    }
    async with client.post("/v1/features", json=asked) as response:
        assert response.status == 200
        results = (await response.json())["results"]
    assert [r and (r["id"], r["features"]) for r in results] == [
        ("N2", {"TAILNUM_NB_7D": 3.0}), None, ("N1", {"TAILNUM_NB_7D": 3.0}),
    ]  # fmt: skip
    async with client.get("/v1/features/tailnum/N1?at=newest&features=TAILNUM_NB_7D") as response:
        assert (await response.json())["features"] == {"TAILNUM_NB_7D": 3.0}


@pytest.mark.parametrize(
    ("path", "status", "field", "sentence"),
    [
        ("/v1/features/tailnum/none", 404, None, "no features of tailnum none"),
        ("/v1/features/plane/N1", 404, "entity", "it has tailnum, origin, carrier, dest"),
        ("/v1/features/tailnum", 404, None, "/docs"),
        ("/", 404, None, "/docs"),
        ("/v1/features/tailnum/N1?at=yesterday", 422, "at", "neither now, newest"),
        ("/v1/features/tailnum/N1?at=99999999999999999999", 422, "at", "neither now, newest"),
        ("/v1/features/tailnum/N1?features=TAILNUM_NB_7", 422, "features", "did you mean TAILNUM_NB_7D?"),
        ("/v1/features/tailnum/N1?at=now&at=newest", 422, "at", "twice"),
        ("/v1/features/tailnum/N1?when=now", 422, "when", "unknown field"),
        ("/v1/predictions?entity=tailnum", 422, "id", "required"),
        ("/v1/predictions?entity=tailnum&id=N1&limit=0", 422, "limit", ">= 1"),
        ("/v1/predictions?entity=tailnum&id=N1", 503, None, "HEADRACE_POSTGRES_URL"),
        ("/v1/predictions/x", 422, "event_id", "no integer"),
        ("/v1/models", 503, None, "headrace api"),
        ("/v1/explain/tailnum/N1/TAILNUM_NB_7D", 503, None, "headrace api"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_told_by_its_field(
    client: Client, path: str, status: int, field: str | None, sentence: str
) -> None:
    found, body = await problem(client, "GET", path)
    assert found == status, body
    assert sentence in body["detail"]
    assert [fault["field"] for fault in body.get("errors", [])] == ([field] if field else [])


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"entities": [{"entity": "tailnum", "id": "1"}, {"entity": "tailnum"}]}', 422, "entities[1].id"),
        (b'{"entities": [{"entity": "plane", "id": "1"}]}', 422, "entities[0].entity"),
        (b'{"entities": []}', 422, "entities"),
        (b'{"entities": [{"entity": "tailnum", "id": 7}]}', 422, "entities[0].id"),
        (b'{"entities": [{"entity": "tailnum", "id": "1"}], "until": 1}', 422, "until"),
        (b'{"entities"', 400, None),
        (b'\xff', 400, None),
        (b'[' * 100_000, 422, "body"),
        (b'{"entities": [' + b",".join([b'{"entity": "tailnum", "id": "1"}'] * 4) + b"]}", 422, "entities"),
        (b" " * 200_000, 413, None),
    ],
    ids=range(10),
)  # fmt: skip
async def test_a_wrong_body_is_told_by_its_field(
    mirror: Mirror, body: bytes, status: int, field: str | None
) -> None:
    client = await serving(mirror, batch=3, body=150_000)
    headers = {"Content-Type": "application/json"}
    found, told = await problem(client, "POST", "/v1/features", data=body, headers=headers)
    assert found == status, told
    assert [fault["field"] for fault in told.get("errors", [])] == ([field] if field else [])
    await client.close()


async def test_json_only(client: Client) -> None:
    assert (await problem(client, "POST", "/v1/features", data="{}"))[0] == 415


async def test_another_method_is_refused(client: Client) -> None:
    async with client.post("/v1/features/tailnum/N1") as response:
        assert response.status == 405
        assert "GET" in response.headers["Allow"]
        assert response.content_type == "application/problem+json"


async def test_health_readiness_and_metrics(client: Client) -> None:
    async with client.get("/healthz") as response:
        assert response.status == 200
    async with client.get("/readyz") as response:
        assert response.status == 200
    await client.get("/v1/features/tailnum/none")
    async with client.get("/metrics") as response:
        text = await response.text()
    route = 'route="/v1/features/{entity}/{id}"'
    assert f'headrace_api_requests_total{{{route},status="404"}} 1.0' in text
    assert f"headrace_api_request_seconds_count{{{route}}} 1.0" in text


async def test_without_redis_it_is_alive_and_not_ready(cut_off: Client) -> None:
    async with cut_off.get("/healthz") as response:
        assert response.status == 200
    status, body = await problem(cut_off, "GET", "/readyz")
    assert status == 503
    assert "HEADRACE_REDIS_URL" in body["detail"]
    for _ in range(2):  # the second answers at once
        async with cut_off.get("/v1/features/tailnum/N1") as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert "try again" in (await response.json())["detail"]


async def test_the_page_and_the_description_need_nobody_else(client: Client) -> None:
    async with client.get("/openapi.json") as response:
        described = await response.json()
    assert described["openapi"].startswith("3.1")
    assert "/v1/events/flights" in described["paths"]
    async with client.get("/docs") as response:
        page = await response.text()
        assert "<script" not in page
        assert "http://" not in page and "https://" not in page
    for path in described["paths"]:
        assert path in page


# --- security ----------------------------------------------------------------------------------

PATHS = [
    "/v1/features/tailnum/N1", "/v1/predictions?entity=tailnum&id=N1", "/v1/predictions/1", "/v1/pipelines",
    "/v1/models", "/v1/explain/tailnum/N1/TAILNUM_NB_7D", "/v1/stream/predictions", "/metrics",
    "/openapi.json", "/docs",
]  # fmt: skip


def tokens(path: Path, *scopes: str, rate: float | None = None) -> list[str]:
    made = [new_token(f"of-{scope}", [scope], rate) for scope in scopes]
    path.write_text("# ours\n\n" + "\n".join(line for _, line in made))
    return [token for token, _ in made]


async def test_without_or_with_a_wrong_token_nothing_is_readable(mirror: Mirror, tmp_path: Path) -> None:
    (read,) = tokens(tmp_path / "tokens", "read")
    await put(mirror, touched([b"N1"], 3.0, 12))
    client = await serving(mirror, tokens=tmp_path / "tokens")
    wrong: list[dict[str, str]] = [
        {}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {read}x"}, {"Authorization": read},
        {"Authorization": "Basic !!"}, {"Authorization": "Bearer " + (tmp_path / "tokens").read_text().split()[-1]},
    ]  # fmt: skip
    for path in PATHS:
        for headers in wrong:
            async with client.get(path, headers=headers) as response:
                assert response.status == 401, path
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                assert "N1" not in await response.text()
    for path in ("/v1/features", "/v1/events/flights"):
        assert (await problem(client, "POST", path, json={}))[0] == 401
    for path in ("/healthz", "/readyz"):
        async with client.get(path) as response:
            assert response.status == 200
    async with client.get(PATHS[0], headers={"Authorization": f"Bearer {read}"}) as response:
        assert response.status == 200
    basic = "Basic " + __import__("base64").b64encode(f"me:{read}".encode()).decode()
    async with client.get("/docs", headers={"Authorization": basic}) as response:  # a browser
        assert response.status == 200
    await client.close()


async def test_a_token_does_what_its_scopes_say(mirror: Mirror, tmp_path: Path) -> None:
    read, publish, admin = tokens(tmp_path / "tokens", "read", "publish", "admin")
    client = await serving(mirror, tokens=tmp_path / "tokens")

    async def status(token: str, method: str, path: str) -> int:
        async with client.request(
            method, path, headers={"Authorization": f"Bearer {token}"}, json={} if method == "POST" else None
        ) as response:
            return response.status

    assert await status(read, "GET", "/v1/pipelines") == 200
    assert await status(publish, "GET", "/v1/pipelines") == 403
    assert await status(admin, "GET", "/v1/pipelines") == 200
    assert await status(read, "POST", "/v1/events/flights") == 403
    assert await status(publish, "POST", "/v1/events/flights") == 422
    assert await status(admin, "POST", "/v1/events/flights") == 422
    await client.close()


async def test_a_token_that_is_taken_out_is_locked_out(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.security.LOOK_S", 0.0)
    old, _ = tokens(tmp_path / "tokens", "read", "admin")
    client = await serving(mirror, tokens=tmp_path / "tokens")

    async def status(token: str) -> int:
        async with client.get("/v1/pipelines", headers={"Authorization": f"Bearer {token}"}) as response:
            return response.status

    assert await status(old) == 200
    (tmp_path / "tokens").write_text("not what it should be at all")
    assert await status(old) == 200  # a mistake locks nobody out
    (new,) = tokens(tmp_path / "tokens", "read")
    assert [await status(old), await status(new)] == [401, 200]
    await client.close()


async def test_each_token_has_its_rate(mirror: Mirror, tmp_path: Path) -> None:
    busy, calm = tokens(tmp_path / "tokens", "read", "admin", rate=0.01)
    client = await serving(mirror, tokens=tmp_path / "tokens")
    for token in (busy, calm):
        headers = {"Authorization": f"Bearer {token}"}
        async with client.get("/v1/pipelines", headers=headers) as response:
            assert response.status == 200
        async with client.get("/v1/pipelines", headers=headers) as response:
            assert response.status == 429
            assert 90 <= int(response.headers["Retry-After"]) <= 100
    await client.close()


async def test_who_is_slow_is_given_up(client: Client, mirror: Mirror) -> None:
    slow = await serving(mirror, timeout_s=0.2)
    server = slow.server
    assert server is not None
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(
        b"POST /v1/features HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )
    async with asyncio.timeout(10):
        assert (await reader.readline()).split()[1] == b"503"
    writer.close()
    await slow.close()


async def test_headers_keep_browsers_from_mischief(mirror: Mirror) -> None:
    client = await serving(mirror, origins=frozenset({"https://ours.example"}))
    for path in ("/v1/pipelines", "/docs", "/nowhere", "/v1/features/plane/1"):
        async with client.get(path, headers={"Origin": "https://other.example"}) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert "Access-Control-Allow-Origin" not in response.headers
    async with client.get("/v1/pipelines", headers={"Origin": "https://ours.example"}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "https://ours.example"
    async with client.options("/v1/features", headers={"Origin": "https://ours.example"}) as response:
        assert response.status == 204
        assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
    await client.close()


async def test_by_default_no_other_origin_may_ask(client: Client) -> None:
    async with client.options("/v1/features", headers={"Origin": "https://ours.example"}) as response:
        assert response.status == 405
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_the_access_log_has_no_secrets(
    mirror: Mirror, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (read,) = tokens(tmp_path / "tokens", "read")
    client = await serving(mirror, tokens=tmp_path / "tokens")
    caplog.set_level("INFO", "headrace.access")
    async with client.get("/v1/pipelines?secret=x%0ay", headers={"Authorization": f"Bearer {read}"}):
        pass
    (line,) = [r.getMessage() for r in caplog.records if r.name == "headrace.access"]
    assert '"path":"/v1/pipelines"' in line
    assert '"caller":"of-read"' in line
    assert read not in line
    assert "secret" not in line
    await client.close()


@pytest.mark.parametrize(
    "line", ["one", "a read nothex", "a write " + "0" * 64, "a read " + "0" * 64 + " fast"]
)
def test_a_wrong_line_of_tokens_is_told(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# ours\n{line}\n")
    nowhere = Mirror(connect("redis://127.0.0.1:1/0"), pipeline())
    with pytest.raises(SettingsError, match=r"tokens:2: a line is NAME SCOPES SHA256"):
        create_api(Backends(pipeline(), nowhere), CollectorRegistry(), mirror_ready(nowhere), Limits(path))
    with pytest.raises(SettingsError, match="cannot be read"):
        create_api(
            Backends(pipeline(), nowhere), CollectorRegistry(), mirror_ready(nowhere), Limits(tmp_path / "no")
        )


def test_an_open_api_that_others_reach_is_told() -> None:
    assert open_to_all(Limits(), "127.0.0.1") is None
    assert open_to_all(Limits(tokens=Path("x")), "0.0.0.0") is None
    assert "HEADRACE_API_TOKENS" in (open_to_all(Limits(), "0.0.0.0") or "")


async def test_ages_are_of_the_clock(client: Client, mirror: Mirror) -> None:
    await put(mirror, touched([b"N1"], 3.0, 12, EVENT_MS))
    async with client.get("/v1/features/tailnum/N1") as response:
        body = await response.json()
    assert dt.datetime.fromisoformat(body["newest"]).timestamp() * 1000 == EVENT_MS
    assert body["age_s"] == 10.5
