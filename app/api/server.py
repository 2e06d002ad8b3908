"""The query API, for its own process and for each worker: its routes, and what each request passes.

A request is admitted (app.api.security), checked against its schemas, answered by a handler within a time, counted
and logged; whatever ends it otherwise becomes a problem document. `routes` is the list of all there is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.api import openapi, schemas
from app.api.about import About
from app.api.events import Intake
from app.api.features import Held, Lookups
from app.api.live import Live
from app.api.openapi import Route
from app.api.pages import Pages, Ready, Remark
from app.api.predictions import Ledgers, Streams
from app.api.problems import Fault, ProblemError, fault_of
from app.api.security import HEADERS, Caller, Guard
from app.explain import Explanation
from app.model_life import ModelLife
from models.errors import HeadraceError
from models.pipeline import Pipeline
from tables.mirror import MirrorReader, RedisError

DRAIN_S = 10.0  # for requests under way when the process is to end
IDLE_S = 75.0  # a connection without a whole request is closed after that; longer than proxies keep theirs
LONGEST_LINE = 2**16  # of the longest query that the schemas allow, all of it percent-encoded
DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"

log = logging.getLogger(__name__)
access = logging.getLogger("headrace.access")


@dataclass(frozen=True)
class Backends:
    """What answers are made of. Where one is None, requests that need it say so.

    held: profiles of this worker. kafka: address. ledger_url: of PostgreSQL. explains: whether values are explained
    here, which takes a processor for seconds.
    """

    pipeline: Pipeline
    mirror: MirrorReader
    held: Held | None = None
    kafka: str | None = None
    ledger_url: str | None = None
    life: ModelLife | None = None
    explains: bool = True


@dataclass(frozen=True)
class Limits:
    """tokens: the file of app.api.security. rate: requests a second of a token, 0 for no bound. batch: entities or
    events of one request. body: its bytes. timeout_s: for an answer. origins: of web pages that may ask (CORS)."""

    tokens: Path | None = None
    rate: float = 0.0
    batch: int = 500
    body: int = 2**20
    timeout_s: float = 10.0
    origins: frozenset[str] = frozenset()


def create_api(
    backends: Backends, registry: CollectorRegistry, ready: Ready, limits: Limits | None = None,
    clock: Callable[[], float] = time.time, remark: Remark = lambda: None,
) -> web.Application:  # fmt: skip
    """An aiohttp application. clock: seconds since the epoch; remark: what else to say when ready.

    Raises SettingsError where tokens cannot be read.
    """
    return _Api(backends, Pages(registry, ready, remark), registry, limits or Limits(), clock).application


class _Api:
    def __init__(
        self, backends: Backends, pages: Pages, registry: CollectorRegistry, limits: Limits,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._pages, self._limits = pages, limits
        pipeline = backends.pipeline
        self._guard = Guard(limits.tokens, limits.rate)
        self._live = Live(pipeline, backends.kafka) if backends.kafka else None
        self._lookups = Lookups(pipeline, backends.mirror, backends.held, limits.batch, clock)
        self._ledgers = Ledgers(pipeline, backends.ledger_url)
        self._streams = Streams(pipeline, self._live)
        self._intake = Intake(pipeline, backends.kafka, self._live, limits.batch, clock)
        self._about = About(pipeline, backends.life, backends.kafka if backends.explains else None)
        self._draining = False
        self._requests = Counter(
            "headrace_api_requests", "Requests, by route and status", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "headrace_api_request_seconds", "Time of an answer", ["route"], registry=registry,
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0),
        )  # fmt: skip
        gauge = Gauge("headrace_api_streams", "Open streams of predictions", registry=registry)
        gauge.set_function(lambda: self._streams.open)
        listed = self.routes()
        described = openapi.document(pipeline, listed)
        self._openapi = msgspec.json.encode(described)
        self._docs = openapi.page(described)
        self.application = web.Application(
            middlewares=[_unrouted],
            client_max_size=limits.body,
            handler_args={"keepalive_timeout": IDLE_S, "max_line_size": LONGEST_LINE},
        )
        for route in listed:
            self.application.router.add_route(route.method, route.path, self._passing(route))
        if limits.origins:
            self.application.router.add_route("OPTIONS", "/{path:.*}", self._preflight)
        self.application.on_shutdown.append(self._drain)
        self.application.cleanup_ctx.append(self._closing)

    def routes(self) -> list[Route]:
        """All there is."""
        return [
            Route(
                "GET", "/v1/features/{entity}/{id:.+}", self._lookups.one, "An entity's features at a time.",
                query=schemas.FeaturesQuery, answer=schemas.Features, kinds=("not-found",), tag="Features",
            ),
            Route(
                "POST", "/v1/features", self._lookups.many, "Features of many entities at once.",
                query=schemas.Nothing, body=schemas.FeaturesRequest, answer=schemas.ManyFeatures,
                kinds=("not-json", "too-large", "media-type"), tag="Features",
            ),
            Route(
                "GET", "/v1/explain/{entity}/{id:.+}/{feature}", self._about.explain,
                "Which events made a value, as `headrace explain` tells it.",
                query=schemas.ExplainQuery, answer=Explanation, kinds=("not-found",), tag="Features", bounded=False,
            ),
            Route(
                "GET", "/v1/predictions", self._ledgers.of_entity, "Predictions about an entity, in pages.",
                query=schemas.PageQuery, answer=schemas.Page, tag="Predictions",
            ),
            Route(
                "GET", "/v1/predictions/{event_id:.+}", self._ledgers.of_event, "Predictions of an event.",
                query=schemas.EventQuery, answer=schemas.EventPredictions, kinds=("not-found",), tag="Predictions",
            ),
            Route(
                "GET", "/v1/stream/predictions", self._streams.stream,
                "Predictions as they come, as server-sent events.",
                query=schemas.StreamQuery, media="text/event-stream", tag="Predictions", bounded=False,
            ),
            Route(
                "POST", "/v1/events/{stream}", self._intake.publish, "Publish events.",
                scope="publish", query=schemas.PublishQuery, body=bytes, answer=schemas.Published, status=202,
                also=(200,), kinds=("not-json", "not-found", "too-large", "media-type"), tag="Events", bounded=False,
            ),
            Route(
                "GET", "/v1/pipelines", self._about.pipelines, "The pipeline that runs.",
                query=schemas.Nothing, answer=schemas.Pipelines,
            ),
            Route(
                "GET", "/v1/models", self._about.models, "The versions of its model.",
                query=schemas.Nothing, answer=schemas.Models,
            ),
            Route(
                "GET", "/healthz", self._pages.healthz, "200 while the process runs.", scope=None, media="text/plain"
            ),
            Route(
                "GET", "/readyz", self._readyz, "200 when it can do its work, else 503 and why.",
                scope=None, media="text/plain", kinds=("unavailable",),
            ),
            Route("GET", "/metrics", self._pages.metrics, "Metrics in Prometheus' text format.", media="text/plain"),
            Route("GET", "/openapi.json", self._described, "This description."),
            Route("GET", "/docs", self._page, "This description as a page.", media="text/html"),
        ]  # fmt: skip

    # --- the way of a request --------------------------------------------------------------------

    def _passing(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The handler of a route, with all that a request passes before and behind it."""
        admit, seconds = self._guard.admit, self._seconds.labels(route.plain_path)
        counters: dict[int, Any] = {}
        timeout = self._limits.timeout_s

        async def answer(request: web.Request) -> web.StreamResponse:
            began = time.perf_counter()
            caller: Caller | None = None
            try:
                if route.scope is not None:
                    caller = admit(request.headers.get("Authorization"), route.scope)
                async with asyncio.timeout(timeout) as bound:
                    query = _query(request, route.query) if route.query is not None else None
                    body = await _body(request, route.body) if route.body is not None else None
                    if not route.bounded:
                        bound.reschedule(None)
                    found = await route.handle(request, query, body)
                if isinstance(found, msgspec.Struct):
                    response: web.StreamResponse = web.Response(
                        body=schemas.encode(found), status=route.status, content_type="application/json"
                    )
                else:
                    response = found
            except ProblemError as problem:
                response = problem.response()
            except web.HTTPRequestEntityTooLarge:
                response = ProblemError(
                    "too-large", f"The body has more than {self._limits.body:,} bytes; send it in parts."
                ).response()
            except TimeoutError:
                response = ProblemError(
                    "unavailable", f"There was no answer in {timeout} s; try again."
                ).response()
            except (asyncio.CancelledError, ConnectionError):
                raise  # the client has gone
            except (
                Exception
            ):  # the edge: a defect in one answer ends no process, and is told, logged and counted as 500
                log.exception("%s %s failed", route.method, route.plain_path)
                response = ProblemError(
                    "internal", "The server failed, which is its own fault and stands in its log."
                ).response()
            if not response.prepared:
                self._finish(request, response)
            took = time.perf_counter() - began
            seconds.observe(took)
            counted = counters.get(response.status)
            if counted is None:
                counted = counters[response.status] = self._requests.labels(route.plain_path, response.status)
            counted.inc()
            if access.isEnabledFor(logging.INFO):
                _log(request, route, response.status, took, caller)
            return response

        return answer

    def _finish(self, request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        origin = request.headers.get("Origin")
        if origin is not None and origin in self._limits.origins:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Vary"] = "Origin"

    async def _preflight(self, request: web.Request) -> web.Response:
        response = web.Response(status=204)
        self._finish(request, response)
        if "Access-Control-Allow-Origin" in response.headers:
            response.headers["Access-Control-Allow-Methods"] = "GET, POST"
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
            response.headers["Access-Control-Max-Age"] = "600"
        return response

    # --- pages of the process --------------------------------------------------------------------

    async def _readyz(self, *_: Any) -> web.Response:
        if self._draining:
            raise ProblemError("unavailable", "It is ending.")
        return await self._pages.readyz()

    async def _described(self, *_: Any) -> web.Response:
        return web.Response(body=self._openapi, content_type="application/json")

    async def _page(self, *_: Any) -> web.Response:
        return web.Response(
            text=self._docs, content_type="text/html", headers={"Content-Security-Policy": DOCS_POLICY}
        )

    async def _drain(self, _: web.Application) -> None:
        """Streams end, so that nobody waits for them; what else is under way is answered."""
        self._draining = True
        if self._live is not None:
            await self._live.close()

    async def _closing(self, _: web.Application) -> AsyncIterator[None]:
        yield
        await self._intake.close()
        await self._ledgers.close()


def mirror_ready(mirror: MirrorReader) -> Ready:
    """Ready when Redis answers."""

    async def ready() -> str | None:
        try:
            await mirror.ping()
        except (RedisError, OSError) as error:
            return f"Redis does not answer ({error}); start it, or set HEADRACE_REDIS_URL."
        return None

    return ready


async def serve(application: web.Application, host: str, port: int) -> web.AppRunner:
    """Listen. Raises HeadraceError where the port is taken."""
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=DRAIN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise HeadraceError(
            f"Nothing can listen on {host}:{port} ({error.strerror}); give another --port."
        ) from None
    return runner


def open_to_all(limits: Limits, host: str) -> str | None:
    """What to tell who starts an API that asks for no tokens where others may reach it."""
    if limits.tokens is not None or host in ("127.0.0.1", "::1", "localhost"):
        return None
    return (
        f"WARNING: the API on {host} asks for no token, so whoever reaches it reads all and publishes events. Set "
        "HEADRACE_API_TOKENS (`headrace token new`), or HEADRACE_API_HOST=127.0.0.1."
    )


def _query(request: web.Request, to: Any) -> Any:
    text = request.rel_url.raw_query_string
    given: dict[str, str] = {}
    if text:
        for name, value in request.query.items():
            if name in given:
                raise ProblemError("invalid", f"{name} stands twice.", Fault(name, "it stands twice"))
            given[name] = value
    elif not to.__struct_fields__:
        return None
    try:
        return msgspec.convert(given, to, strict=False)
    except msgspec.ValidationError as error:
        fault = fault_of(error)
        raise ProblemError("invalid", f"{fault.field}: {fault.detail}.", fault) from None


async def _body(request: web.Request, to: Any) -> Any:
    # A page of another origin can send no JSON without asking first, so that no browser publishes unknowingly.
    if request.content_type != "application/json":
        raise ProblemError("media-type", "Send JSON, with `Content-Type: application/json`.")
    body = await request.read()
    if to is bytes:
        return body
    try:
        return schemas.decoded(body, to)
    except msgspec.ValidationError as error:
        fault = fault_of(error)
        raise ProblemError("invalid", f"{fault.field}: {fault.detail}.", fault) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProblemError("not-json", f"The body is no JSON ({error}).") from None


@web.middleware
async def _unrouted(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What no route takes is a problem document, too."""
    if request.match_info.http_exception is None:
        return await handler(request)
    error = request.match_info.http_exception
    if error.status == 405:
        allowed = error.headers.get("Allow", "")
        found = ProblemError(
            "method", f"{request.method} is not for this path; it has {allowed}.", headers={"Allow": allowed}
        )
    else:
        found = ProblemError("not-found", "There is no such path; /docs shows all.")
    response = found.response()
    response.headers.update(HEADERS)
    return response


def _log(request: web.Request, route: Route, status: int, took: float, caller: Caller | None) -> None:
    """No header, query or body: there may be secrets in them."""
    access.info(
        '{"method":"%s","path":%s,"route":"%s","status":%d,"ms":%.2f,"caller":%s,"peer":"%s"}',
        route.method, msgspec.json.encode(request.rel_url.raw_path).decode(), route.plain_path, status, took * 1000,
        msgspec.json.encode(caller.name if caller else None).decode(), request.remote,
    )  # fmt: skip
