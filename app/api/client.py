"""A client of the query API, typed by its schemas, for code with asyncio and without.

async with Api("http://localhost:8080", token="hr_...") as api:
    found = await api.features("customer", "7")

with BlockingApi("http://localhost:8080") as api:
    found = api.features("customer", "7")
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from app.api.problems import Fault, Problem
from app.api.schemas import (
    EventPredictions,
    Features,
    ManyFeatures,
    Models,
    Page,
    PipelineInfo,
    Pipelines,
    Prediction,
    Published,
    Wanted,
)
from models.errors import HeadraceError

T = TypeVar("T")
Event = Mapping[str, Any]


class ApiProblem(HeadraceError):
    """The API refused. errors: each wrong value with its field; retry_s: when to try again, where it says so."""

    def __init__(self, problem: Problem, retry_s: float | None) -> None:
        super().__init__(problem.detail)
        self.status, self.detail, self.kind = problem.status, problem.detail, problem.type.partition("#")[2]
        self.errors: list[Fault] = problem.errors
        self.retry_s = retry_s


class Api:
    """Asks one process of the API. Raises ApiProblem, and what aiohttp raises where none answers.

    timeout_s: for each request.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 40.0) -> None:
        self._url = url.rstrip("/")
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s = timeout_s
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Api:
        self._http = aiohttp.ClientSession(
            headers=self._headers, timeout=aiohttp.ClientTimeout(total=self._timeout_s)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def features(
        self, entity: str, id: str, *, at: str = "now", features: Sequence[str] | None = None
    ) -> Features:
        """An entity's features. at: now, newest, RFC 3339 or milliseconds."""
        asked = {"at": at} | ({} if features is None else {"features": ",".join(features)})
        return await self._get(f"/v1/features/{_part(entity)}/{_part(id)}", Features, asked)

    async def features_many(
        self, wanted: Sequence[tuple[str, str]], *, at: str = "now", features: Sequence[str] | None = None
    ) -> list[Features | None]:
        """Those of many entities, (entity, id) each, in their order; None where there are none."""
        body = {"entities": [Wanted(entity, id_) for entity, id_ in wanted], "at": at}
        if features is not None:
            body["features"] = list(features)
        return (await self._ask("POST", "/v1/features", ManyFeatures, {}, body)).results

    async def prediction(self, event_id: int | str, *, stream: str | None = None) -> list[Prediction]:
        """Predictions of an event, the newest first."""
        asked = {} if stream is None else {"stream": stream}
        found = await self._get(f"/v1/predictions/{_part(str(event_id))}", EventPredictions, asked)
        return found.predictions

    async def predictions(
        self, entity: str, id: str, *, start: str | None = None, end: str | None = None,
        min_score: float | None = None, limit: int = 100, cursor: str | None = None,
    ) -> Page:  # fmt: skip
        """A page of predictions about an entity; `next` of it is the cursor of the next one."""
        score = None if min_score is None else str(min_score)
        given = {"from": start, "to": end, "cursor": cursor, "min_score": score}
        asked = {"entity": entity, "id": id, "limit": str(limit)}
        return await self._get(
            "/v1/predictions", Page, asked | {k: v for k, v in given.items() if v is not None}
        )

    async def publish(
        self, stream: str, events: Sequence[Event], *, wait: Literal["ack", "prediction"] = "ack", wait_s: float = 2.0
    ) -> Published:  # fmt: skip
        """Publish events, and wait until Kafka has them, or for their predictions, too."""
        asked = {"wait": wait, "wait_s": str(wait_s)}
        return await self._ask("POST", f"/v1/events/{_part(stream)}", Published, asked, list(events))

    async def pipelines(self) -> list[PipelineInfo]:
        """What runs."""
        return (await self._get("/v1/pipelines", Pipelines, {})).pipelines

    async def models(self) -> Models:
        """The versions of the pipeline's model."""
        return await self._get("/v1/models", Models, {})

    async def stream(
        self, *, entity: str | None = None, id: str | None = None, min_score: float | None = None,
        decision: str | None = None,
    ) -> AsyncIterator[Prediction]:  # fmt: skip
        """Predictions as they come, until the server ends or this was too slow for them."""
        score = None if min_score is None else str(min_score)
        given = {"entity": entity, "id": id, "decision": decision, "min_score": score}
        asked = {k: v for k, v in given.items() if v is not None}
        forever = aiohttp.ClientTimeout(total=None, sock_read=60)
        url = f"{self._url}/v1/stream/predictions"
        async with self._http.get(url, params=asked, timeout=forever) as response:
            if response.status != 200:
                raise await _problem(response)
            event = b""
            async for line in response.content:
                if line.startswith(b"event:"):
                    event = line[6:].strip()
                elif line.startswith(b"data:") and event == b"prediction":
                    yield msgspec.json.decode(line[5:], type=Prediction)
                elif event == b"end":
                    return

    async def _get(self, path: str, to: type[T], asked: Mapping[str, str]) -> T:
        return await self._ask("GET", path, to, asked, None)

    async def _ask(self, method: str, path: str, to: type[T], asked: Mapping[str, str], body: Any) -> T:
        sent: dict[str, Any] = {}
        if body is not None:
            sent = {"data": msgspec.json.encode(body), "headers": {"Content-Type": "application/json"}}
        async with self._http.request(method, self._url + path, params=asked, **sent) as response:
            if response.status >= 400:
                raise await _problem(response)
            return msgspec.json.decode(await response.read(), type=to)


class BlockingApi:
    """The same for code without asyncio: each call waits, while a loop in a thread keeps the connections."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 40.0) -> None:
        self._api = Api(url, token, timeout_s)

    def __enter__(self) -> BlockingApi:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api", daemon=True)
        self._thread.start()
        self._run(self._api.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._api.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def features(
        self, entity: str, id: str, *, at: str = "now", features: Sequence[str] | None = None
    ) -> Features:
        """See Api."""
        return self._run(self._api.features(entity, id, at=at, features=features))

    def features_many(
        self, wanted: Sequence[tuple[str, str]], *, at: str = "now", features: Sequence[str] | None = None
    ) -> list[Features | None]:
        """See Api."""
        return self._run(self._api.features_many(wanted, at=at, features=features))

    def prediction(self, event_id: int | str, *, stream: str | None = None) -> list[Prediction]:
        """See Api."""
        return self._run(self._api.prediction(event_id, stream=stream))

    def predictions(
        self, entity: str, id: str, *, start: str | None = None, end: str | None = None,
        min_score: float | None = None, limit: int = 100, cursor: str | None = None,
    ) -> Page:  # fmt: skip
        """See Api."""
        return self._run(
            self._api.predictions(
                entity, id, start=start, end=end, min_score=min_score, limit=limit, cursor=cursor
            )
        )

    def publish(
        self, stream: str, events: Sequence[Event], *, wait: Literal["ack", "prediction"] = "ack", wait_s: float = 2.0
    ) -> Published:  # fmt: skip
        """See Api."""
        return self._run(self._api.publish(stream, events, wait=wait, wait_s=wait_s))

    def pipelines(self) -> list[PipelineInfo]:
        """See Api."""
        return self._run(self._api.pipelines())

    def models(self) -> Models:
        """See Api."""
        return self._run(self._api.models())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C
            future.cancel()
            raise


async def _problem(response: aiohttp.ClientResponse) -> ApiProblem:
    body = await response.read()
    try:
        problem = msgspec.json.decode(body, type=Problem)
    except msgspec.DecodeError:  # of a proxy
        problem = Problem("", response.reason or "", response.status, f"{response.status} {response.reason}")
    retry = response.headers.get("Retry-After", "")
    return ApiProblem(problem, float(retry) if retry.isdigit() else None)


def _part(text: str) -> str:
    return quote(text, safe="")


__all__ = ["Api", "ApiProblem", "BlockingApi"]
