"""Routes of the query API, for its own process and for each worker.

GET /v1/features/{entity}/{id}   an entity's features as the mirror has them
GET /healthz                     200 while the process runs
GET /readyz                      200 when it can do its work, else 503 and why
GET /metrics                     Prometheus text format
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from models.errors import HeadraceError
from models.pipeline import Pipeline
from tables.mirror import MirrorReader, RedisError

Ready = Callable[[], Awaitable[str | None]]  # None, or why not


class Features(msgspec.Struct):
    """An entity's features. `as_of`: event time of the newest event in them; age_s: since then.

    degraded: they lack what retention had cut from the log before it was folded.
    """

    pipeline: str
    entity: str
    id: str
    as_of: str
    age_s: float
    offset: int
    definition: str
    degraded: bool
    features: dict[str, float | None]


class Problem(msgspec.Struct):
    """What went wrong, in one sentence."""

    error: str


def create_api(
    pipeline: Pipeline, mirror: MirrorReader, registry: CollectorRegistry, ready: Ready,
    clock: Callable[[], float] = time.time, remark: Callable[[], str | None] = lambda: None,
) -> web.Application:  # fmt: skip
    """An aiohttp application. clock: seconds since the epoch; remark: what else to say when ready."""
    lookups = Counter("headrace_lookups", "Look-ups of features, by status", ["status"], registry=registry)
    seconds = Histogram(
        "headrace_lookup_seconds", "Time of a look-up", registry=registry,
        buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0),
    )  # fmt: skip

    async def features(request: web.Request) -> web.Response:
        with seconds.time():
            response = await _features(request, pipeline, mirror, clock())
        lookups.labels(response.status).inc()
        return response

    application = web.Application(middlewares=[_problems])
    application.add_routes(
        [
            web.get("/v1/features/{entity}/{id:.+}", features),
            *pages(registry, ready, remark),
        ]
    )
    return application


def pages(
    registry: CollectorRegistry, ready: Ready, remark: Callable[[], str | None] = lambda: None
) -> list[web.RouteDef]:
    """What every process has: health, readiness and metrics. remark: what else to say when ready."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reason = await ready()
        if reason is not None:
            return _json(Problem(reason), 503)
        said = remark()
        return web.Response(text="ready\n" if said is None else f"ready. {said}\n")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)]


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
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        await runner.cleanup()
        raise HeadraceError(
            f"Nothing can listen on {host}:{port} ({error.strerror}); give another --port."
        ) from None
    return runner


async def _features(
    request: web.Request, pipeline: Pipeline, mirror: MirrorReader, now: float
) -> web.Response:
    try:
        entity = pipeline.entity(request.match_info["entity"])
        (found,) = await mirror.read(entity, [request.match_info["id"]])
    except HeadraceError as error:
        return _json(Problem(str(error)), 404)
    except (RedisError, OSError) as error:
        return _json(Problem(f"The mirror does not answer ({error}); try again."), 503)
    id_ = request.match_info["id"]
    if found is None:
        return _json(
            Problem(f"There are no features of {entity.name} {id_}: no event of it within its windows."), 404
        )
    as_of = dt.datetime.fromtimestamp(found.time / 1000, dt.UTC)
    return _json(
        Features(
            pipeline.name, entity.name, id_, as_of.isoformat(timespec="milliseconds"),
            round(now - found.time / 1000, 3),
            found.offset, found.definition, found.degraded, found.features,
        )
    )  # fmt: skip


@web.middleware
async def _problems(
    request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]
) -> web.StreamResponse:
    """Errors of routing as JSON too."""
    try:
        response: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        return _json(Problem(f"{error.status} {error.reason}: {request.method} {request.path}"), error.status)
    return response


def _json(body: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
