"""The query API in front of a worker and a process of the ledger: events in, predictions and features out."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from app import session
from app.api.client import Api, ApiProblem, BlockingApi
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import Pipeline, find

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280, func_only=True)]

START = 1_530_000_000_000
CASES = int(os.environ.get("HEADRACE_API_CASES", "300"))  # of schemathesis, about


@dataclass
class Work:
    """The processes of an instance."""

    pipeline: Pipeline
    worker: session.Process
    api: session.Process
    ledger: session.Process


@pytest.fixture(scope="module")
def work(trained: Settings, addresses: Addresses, postgres_url: str) -> Iterator[Work]:
    pipeline = find("card-fraud", trained.pipelines, "card-fraud-api")
    asyncio.run(session.fresh(trained, pipeline, addresses))
    made = Work(pipeline, *(session.Process(trained, pipeline, c) for c in ("worker", "api", "ledger run")))
    processes = (made.worker, made.api, made.ledger)
    try:
        for process in processes:
            process.start()
        for process in processes:
            asyncio.run(process.ready())
        yield made
    finally:
        for process in processes:
            process.stop()


def event(number: int, **other: Any) -> dict[str, Any]:
    return {
        "TRANSACTION_ID": number, "TX_DATETIME": START + number * 60_000, "CUSTOMER_ID": number % 10,
        "TERMINAL_ID": number % 5, "TX_AMOUNT": 10.5 + number % 90,
    } | other  # fmt: skip


async def ask(url: str, status: int = 200, method: str = "GET", **how: Any) -> Any:
    async with aiohttp.ClientSession() as http, http.request(method, url, **how) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def until(url: str, wanted: Any, **how: Any) -> Any:
    """Ask until an answer is as wanted; that."""
    async with asyncio.timeout(60), aiohttp.ClientSession() as http:
        while True:
            async with http.get(url, **how) as response:
                body = await response.json()
                if response.status == 200 and wanted(body):
                    return body
            await asyncio.sleep(0.1)


async def test_an_event_comes_back_as_its_prediction_and_stays_in_the_ledger(work: Work) -> None:
    url = work.api.url
    found = await ask(
        f"{url}/v1/events/transactions",
        method="POST",
        json=event(1),
        params={"wait": "prediction", "wait_s": "20"},
    )
    assert found["topic"] == work.pipeline.stream.topic
    (prediction,) = found["predictions"]
    assert prediction["id"] == 1
    assert prediction["keys"] == {"customer": "1", "terminal": "1"}
    assert set(prediction["features"]) == set(work.pipeline.vector)
    # the same from the ledger
    kept = await until(f"{url}/v1/predictions/1", lambda body: True)
    (looked_up,) = kept["predictions"]
    assert looked_up == prediction | {"label": None}
    # twice changes nothing, and is not predicted again
    again = await ask(
        f"{url}/v1/events/transactions",
        202,
        "POST",
        json=event(1),
        params={"wait": "prediction", "wait_s": "0.5"},
    )
    assert again["predictions"] == [None]
    # a label comes to it
    labels = work.pipeline.labels
    assert labels is not None
    label = {
        "TRANSACTION_ID": 1, "TX_DATETIME": event(1)["TX_DATETIME"], "TERMINAL_ID": 1, "TX_FRAUD": 1,
        labels.known: START + 86_400_000,
    }  # fmt: skip
    await ask(f"{url}/v1/events/labels", 202, "POST", json=label)
    labelled = await until(f"{url}/v1/predictions/1", lambda body: body["predictions"][0]["label"])
    assert labelled["predictions"][0]["label"]["value"] == 1


async def test_pages_of_an_entity(work: Work) -> None:
    url = work.api.url
    events = [event(100 + 10 * n) for n in range(25)]  # all of customer 0
    published = await ask(f"{url}/v1/events/transactions", 202, "POST", json=events)
    assert len(published["places"]) == 25
    asked = {"entity": "customer", "id": "0", "from": "2018-06-26", "limit": "10"}
    await until(f"{url}/v1/predictions/340", lambda body: True)
    found: list[Any] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await ask(f"{url}/v1/predictions", params=asked | ({"cursor": cursor} if cursor else {}))
        assert len(page["predictions"]) <= 10
        found += page["predictions"]
        cursor = page["next"]
    assert [p["id"] for p in found] == [100 + 10 * n for n in reversed(range(25))]
    high = await ask(f"{url}/v1/predictions", params=asked | {"min_score": "1.0"})
    assert high == {"predictions": [], "next": None}
    before = await ask(f"{url}/v1/predictions", params=asked | {"to": str(START + 110 * 60_000)})
    assert [p["id"] for p in before["predictions"]] == [100]
    await ask(f"{url}/v1/predictions", 422, params=asked | {"cursor": "x"})
    await ask(f"{url}/v1/predictions/99999999", 404)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"TX_AMOUNT": "much"}, "TX_AMOUNT"),
        ({"TX_AMOUNT": 1.005}, "TX_AMOUNT"),
        ({"TX_DATETIME": 10**15}, "TX_DATETIME"),
        ({"TX_DATETIME": -5}, "TX_DATETIME"),
        ({"CUSTOMER_ID": None}, "CUSTOMER_ID"),
    ],
)
async def test_a_bad_event_is_told_by_its_field(work: Work, wrong: dict[str, Any], field: str) -> None:
    url = f"{work.api.url}/v1/events/transactions"
    body = await ask(url, 422, "POST", json=event(7, **wrong))
    assert [fault["field"] for fault in body["errors"]] == [field]
    body = await ask(url, 422, "POST", json=[event(8), event(9, **wrong)])
    assert [fault["field"] for fault in body["errors"]] == [f"[1].{field}"]
    await ask(f"{work.api.url}/v1/predictions/8", 404)  # nothing was published
    short = event(7)
    del short["TERMINAL_ID"]
    assert (await ask(url, 422, "POST", json=short))["errors"][0]["field"] == "TERMINAL_ID"


async def test_predictions_as_they_come(work: Work) -> None:
    url, got = work.api.url, []

    async def listen(started: asyncio.Event) -> None:
        asked = {"entity": "customer", "id": "3"}
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{url}/v1/stream/predictions", params=asked) as response,
        ):
            assert response.content_type == "text/event-stream"
            async for line in response.content:
                started.set()
                if line.startswith(b"data: "):
                    got.append(line)
                    if len(got) == 2:
                        return

    started = asyncio.Event()
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        tasks.create_task(listen(started))
        await started.wait()
        await ask(f"{url}/v1/events/transactions", 202, "POST", json=[event(n) for n in range(500, 520)])
    ids = [int(re.findall(rb'"id":(\d+)', line)[0]) for line in got]
    assert ids == [503, 513]
    # one that ends by itself
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{url}/v1/stream/predictions?for_s=0.2") as response,
    ):
        assert (await response.text()).startswith(":")


async def test_worker_and_mirror_say_the_same(work: Work) -> None:
    await ask(f"{work.api.url}/v1/events/transactions", 202, "POST", json=[event(n) for n in range(600, 640)])
    for entity, key in (("customer", "9"), ("terminal", "4")):
        for at in ("newest", str(START + 700 * 60_000), "2018-07-03"):
            path = f"/v1/features/{entity}/{key}?at={at}"
            here = await until(f"{work.worker.url}{path}", lambda b: b["newest"] == "2018-06-26T18:39:00Z")
            there = await until(f"{work.api.url}{path}", lambda b, h=here: b["offset"] == h["offset"])
            assert (here.pop("source"), there.pop("source")) == ("worker", "mirror")
            del here["age_s"], there["age_s"]
            assert here == there
            assert here["definition"] == work.pipeline.definition
    many = {"entities": [{"entity": "customer", "id": "9"}, {"entity": "terminal", "id": "none"}]}
    for url in (work.api.url, work.worker.url):
        found = await ask(f"{url}/v1/features", method="POST", json=many)
        assert [r and r["id"] for r in found["results"]] == ["9", None]


async def test_what_runs_is_told_and_a_value_explained(work: Work) -> None:
    url = work.api.url
    (pipeline,) = (await ask(f"{url}/v1/pipelines"))["pipelines"]
    assert pipeline["definition"] == work.pipeline.definition
    models = await ask(f"{url}/v1/models")
    assert models["aliases"]["champion"] in [v["version"] for v in models["versions"]]
    await ask(f"{url}/v1/events/transactions", 202, "POST", json=event(2000))
    name = work.pipeline.entities[0].features[0]
    found = await ask(f"{url}/v1/explain/customer/0/{name}")
    assert found["features"][0]["feature"] == name
    await ask(f"{url}/v1/explain/customer/nobody/{name}", 404)
    await ask(f"{url}/v1/explain/customer/0/NO", 404)
    assert "headrace api" in (await ask(f"{work.worker.url}/v1/explain/customer/0/{name}", 503))["detail"]


async def test_the_client_asks_it_all(work: Work) -> None:
    events = [event(n) for n in range(4000, 4003)]
    async with Api(work.api.url) as api:
        listening = api.stream(entity="customer", id="1")
        first = asyncio.ensure_future(anext(listening))
        await asyncio.sleep(1)  # the stream says nothing of when it begins
        published = await api.publish("transactions", events, wait="prediction", wait_s=20)
        assert published.predictions is not None
        assert [p and p.id for p in published.predictions] == [4000, 4001, 4002]
        assert (await asyncio.wait_for(first, 20)).id == 4001
        shown = f"{work.api.url}/v1/features/customer/1?at=newest"
        await until(shown, lambda body: body["newest"] == "2018-06-29T02:41:00Z")
        found = await api.features("customer", "1", at="newest", features=["CUSTOMER_ID_NB_TX_1DAY_WINDOW"])
        assert list(found.features) == ["CUSTOMER_ID_NB_TX_1DAY_WINDOW"]
        assert [f and f.id for f in await api.features_many([("customer", "1"), ("customer", "x")])] == [
            "1",
            None,
        ]
        assert (await api.pipelines())[0].definition == work.pipeline.definition
        assert (await api.models()).pipeline == "card-fraud"
        with pytest.raises(ApiProblem) as problem:
            await api.features("plane", "1")
        assert (problem.value.status, problem.value.errors[0].field) == (404, "entity")
    await until(f"{work.api.url}/v1/predictions/4002", lambda body: True)

    def block() -> None:
        with BlockingApi(work.api.url) as api:
            assert [p.id for p in api.prediction(4002)] == [4002]
            page = api.predictions("customer", "2", limit=1)
            assert [p.id for p in page.predictions] == [4002]
            assert api.features("customer", "2", at="newest").source == "mirror"
            assert api.publish("transactions", events[:1]).predictions is None
            assert api.features_many([("customer", "2")])[0] is not None
            assert api.models().pipeline == api.pipelines()[0].name
            with pytest.raises(ApiProblem, match="TX_AMOUNT"):
                api.publish("transactions", [event(1, TX_AMOUNT="much")])

    await asyncio.to_thread(block)


def test_both_clients_take_the_same() -> None:
    ours = {n: f for n, f in inspect.getmembers(Api, inspect.isfunction) if not n.startswith("_")}
    theirs = {n: f for n, f in inspect.getmembers(BlockingApi, inspect.isfunction) if not n.startswith("_")}
    assert {n: str(inspect.signature(f)) for n, f in ours.items() if n != "stream"} == {
        n: str(inspect.signature(f)) for n, f in theirs.items()
    }


async def test_without_redis_a_worker_answers_of_what_it_holds(
    trained: Settings, addresses: Addresses, work: Work
) -> None:
    pipeline = find("card-fraud", trained.pipelines, "card-fraud-no-redis")
    await session.fresh(trained, pipeline, addresses)
    away = "redis://127.0.0.1:1/0"
    worker = session.Process(trained, pipeline, "worker", HEADRACE_REDIS_URL=away)
    api = session.Process(trained, pipeline, "api", HEADRACE_REDIS_URL=away)
    try:
        worker.start()
        api.start()
        await alive(worker)
        await alive(api)
        await ask(f"{api.url}/v1/events/transactions", 202, "POST", json=event(1))
        found = await until(f"{worker.url}/v1/features/customer/1?at=newest", lambda body: True)
        assert found["source"] == "worker"
        async with aiohttp.ClientSession() as http, http.get(f"{api.url}/v1/features/customer/1") as response:
            assert response.status == 503
            assert int(response.headers["Retry-After"]) >= 1
    finally:
        worker.stop()
        api.stop()


async def alive(process: session.Process) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession() as http:
        while True:
            process.check()
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(f"{process.url}/healthz"):
                    return
            await asyncio.sleep(0.2)


CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


def test_schemathesis_finds_nothing(work: Work, tmp_path: Path) -> None:
    """Requests by the description, good and bad: no 5xx, and every answer as described."""
    asyncio.run(
        ask(f"{work.api.url}/v1/events/transactions", 202, "POST", json=[event(n) for n in range(3000, 3010)])
    )
    config = tmp_path / "schemathesis.toml"
    config.write_text('[parameters]\n"query.wait_s" = 0.05\n')  # many of its events are never predicted
    run = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(config),
            "run", f"{work.api.url}/openapi.json",
            "--checks", ",".join(CHECKS),
            "--exclude-path", "/v1/stream/predictions", "--phases", "examples,coverage,fuzzing",
            "--max-examples", str(max(1, CASES // 14)), "--request-timeout", "40", "--seed", "7", "--no-color",
        ],
        capture_output=True, text=True, timeout=None, check=False,
    )  # fmt: skip
    print(run.stdout[-6000:])
    assert run.returncode == 0, run.stdout[-6000:]


async def test_any_bytes_on_the_port_neither_crash_nor_leak(work: Work) -> None:
    rng = random.Random(7)
    url = work.api.url
    host, port = url.removeprefix("http://").split(":")
    starts = [
        b"", b"GET / HTTP/1.1\r\n", b"GET /v1/features/customer/1 HTTP/1.1\r\nHost: x\r\n",
        b"POST /v1/features HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/events/transactions HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n", b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]  # fmt: skip

    async def throw() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            rng.choice(starts) + rng.randbytes(rng.choice((1, 50, 5000))) + rng.choice((b"", b"\r\n\r\n"))
        )
        try:
            if rng.random() < 0.5:
                writer.write_eof()
                answer = await asyncio.wait_for(reader.read(200), 0.3)
                assert not answer.startswith(b"HTTP/1.1 5"), answer
        except (TimeoutError, ConnectionError):
            pass
        writer.close()

    async def memory() -> float:
        return (await work.api.metrics())["process_resident_memory_bytes"]

    for _ in range(300):
        await throw()
    before = await memory()
    for _ in range(1500):
        await throw()
    work.api.check()
    assert await memory() - before < 16 * 2**20
    async with aiohttp.ClientSession() as http, http.get(f"{url}/healthz") as response:
        assert response.status == 200


async def test_it_drains_when_it_is_to_end(trained: Settings, work: Work) -> None:
    api = session.Process(trained, work.pipeline, "api", number=2)
    api.start()
    try:
        await api.ready()
        async with aiohttp.ClientSession() as http, http.get(f"{api.url}/v1/stream/predictions") as response:
            await response.content.readline()
            assert api._process is not None
            api._process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(15):
                assert b"event: end" in await response.content.read()
        async with asyncio.timeout(15):
            assert await asyncio.to_thread(api._process.wait) == 0
    finally:
        api.stop()
