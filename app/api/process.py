"""The query API as its own process."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop
from prometheus_client import CollectorRegistry

from app.api.server import create_api, mirror_ready, serve
from models.pipeline import Pipeline
from tables.mirror import Mirror, connect


def run(pipeline: Pipeline, redis_url: str, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    uvloop.run(_serve(pipeline, redis_url, host, port))


async def _serve(pipeline: Pipeline, redis_url: str, host: str, port: int) -> None:
    mirror = Mirror(connect(redis_url), pipeline)
    runner = await serve(create_api(pipeline, mirror, CollectorRegistry(), mirror_ready(mirror)), host, port)
    print(f"headrace api: http://{host}:{port}/v1/features/ENTITY/ID", file=sys.stderr, flush=True)  # noqa: T201
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()
    await mirror.close()
