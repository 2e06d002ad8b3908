"""The query API as its own process."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from dataclasses import dataclass

import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector

from app.api.server import Backends, Limits, create_api, mirror_ready, open_to_all, serve
from app.model_life import ModelLife
from models.pipeline import Pipeline
from tables.mirror import Mirror, connect


@dataclass(frozen=True)
class Services:
    """Where things are. kafka, ledger_url: None where there is none."""

    redis_url: str
    kafka: str | None
    ledger_url: str | None
    life: ModelLife


def run(pipeline: Pipeline, services: Services, limits: Limits, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    uvloop.run(_serve(pipeline, services, limits, host, port))


async def _serve(pipeline: Pipeline, services: Services, limits: Limits, host: str, port: int) -> None:
    mirror = Mirror(connect(services.redis_url), pipeline)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    backends = Backends(
        pipeline, mirror, kafka=services.kafka, ledger_url=services.ledger_url, life=services.life
    )
    runner = await serve(create_api(backends, registry, mirror_ready(mirror), limits), host, port)
    _say(f"http://{host}:{port}/docs")
    if (warning := open_to_all(limits, host)) is not None:
        _say(warning)
    # What exists now lives as long as the process: no collection need look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()
    await mirror.close()


def _say(text: str) -> None:
    print(f"headrace api: {text}", file=sys.stderr, flush=True)  # noqa: T201
