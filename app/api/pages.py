"""The pages that every process has: health, readiness and metrics, for probes and Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from app.api.problems import ProblemError

Ready = Callable[[], Awaitable[str | None]]  # None, or why not
Remark = Callable[[], str | None]


class Pages:
    """remark: what else to say when ready."""

    def __init__(self, registry: CollectorRegistry, ready: Ready, remark: Remark = lambda: None) -> None:
        self._registry, self._ready, self._remark = registry, ready, remark

    async def healthz(self, *_: object) -> web.Response:
        """200 while the process runs."""
        return web.Response(text="ok\n")

    async def readyz(self, *_: object) -> web.Response:
        """200 when it can do its work. Raises ProblemError, which says why not."""
        reason = await self._ready()
        if reason is not None:
            raise ProblemError("unavailable", reason)
        said = self._remark()
        return web.Response(text="ready\n" if said is None else f"ready. {said}\n")

    async def metrics(self, *_: object) -> web.Response:
        """Prometheus' text format."""
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


def pages(registry: CollectorRegistry, ready: Ready, remark: Remark = lambda: None) -> list[web.RouteDef]:
    """Routes of a process that serves nothing else."""
    made = Pages(registry, ready, remark)

    async def readyz(request: web.Request) -> web.Response:
        try:
            return await made.readyz(request)
        except ProblemError as problem:
            return problem.response()

    return [web.get("/healthz", made.healthz), web.get("/readyz", readyz), web.get("/metrics", made.metrics)]
