"""What runs: the pipeline and its models; and what made a feature's value."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiohttp import web

from app.api import schemas
from app.api.problems import Fault, ProblemError, invalid
from app.api.schemas import (
    EntityInfo,
    ExplainQuery,
    ModelInfo,
    Models,
    Nothing,
    PipelineInfo,
    Pipelines,
    StreamInfo,
    instant,
)
from app.errors import RegistryError
from app.explain import Explanation, NotInLog, explained
from app.kafka import BrokerUnreachable, TopicsWrong
from app.model_life import ModelLife
from models.explain import UnknownFeature
from models.pipeline import Pipeline

EXPLAIN_S = 60.0
KNOWN_S = 5.0  # for how long an answer of the registry is given again

T = TypeVar("T")


class About:
    """life: None where the process has no registry. address: of Kafka, None where it explains nothing."""

    def __init__(self, pipeline: Pipeline, life: ModelLife | None, address: str | None) -> None:
        self._pipeline, self._life, self._address = pipeline, life, address
        self._models: Models | None = None
        self._models_at = 0.0
        self._one = asyncio.Lock()
        self._explaining = asyncio.Semaphore(1)  # it reads a whole partition of a log

    async def pipelines(self, _: web.Request, __: Nothing, ___: Any) -> Pipelines:
        """GET /v1/pipelines"""
        return Pipelines([_described(self._pipeline)])

    async def models(self, _: web.Request, __: Nothing, ___: Any) -> Models:
        """GET /v1/models"""
        async with self._one:
            if self._models is None or time.monotonic() - self._models_at > KNOWN_S:
                try:
                    self._models = await asyncio.to_thread(self._look)
                except (RegistryError, OSError) as error:
                    raise ProblemError("unavailable", str(error)) from None
                self._models_at = time.monotonic()
            return self._models

    def _look(self) -> Models:
        if self._life is None:
            raise ProblemError("unavailable", "This process knows no models; ask `headrace api`.", retry_s=60)
        name, registry = self._pipeline.name, self._life.registry
        aliases = registry.aliases(name)
        versions = [
            ModelInfo(
                v.version, instant(v.created), v.definition, v.definition == self._pipeline.definition, v.archived,
                sorted(alias for alias, named in aliases.items() if named == v.version), v.metrics,
            )
            for v in registry.versions(name)
        ]  # fmt: skip
        return Models(name, aliases, versions)

    async def explain(self, request: web.Request, query: ExplainQuery, _: Any) -> Explanation:
        """GET /v1/explain/{entity}/{id}/{feature}"""
        if self._address is None:
            raise ProblemError(
                "unavailable",
                "A worker explains nothing, for it scores meanwhile; ask `headrace api`.",
                retry_s=60,
            )
        asked = request.match_info
        if asked["entity"] not in (names := [e.name for e in self._pipeline.entities]):
            known = ", ".join(names)
            sentence = (
                f"The pipeline {self._pipeline.name} has no entity {asked['entity']!r}; it has {known}."
            )
            raise ProblemError("not-found", sentence, Fault("entity", sentence))
        at = None
        if query.at is not None:
            if query.event is not None:
                raise invalid("at", "give either a time or an event.")
            at = schemas.parsed_time(query.at)
            if at is None:
                raise invalid("at", f"{query.at!r} is no time like 2018-07-25T12:00:00Z, nor its ms.")
        if self._explaining.locked():
            raise ProblemError("unavailable", "Another value is being explained; try again.", retry_s=5)
        async with self._explaining:
            try:
                async with asyncio.timeout(EXPLAIN_S):
                    return await _in_thread(
                        explained(
                            self._pipeline, self._address, asked["entity"], asked["id"], (asked["feature"],),
                            query.event, at,
                        )
                    )  # fmt: skip
            except TimeoutError:
                raise ProblemError(
                    "unavailable",
                    f"The log was not read in {EXPLAIN_S:.0f} s; use `headrace explain`.",
                    retry_s=60,
                ) from None
            except (NotInLog, UnknownFeature) as error:
                raise ProblemError("not-found", str(error)) from None
            except (BrokerUnreachable, TopicsWrong) as error:
                raise ProblemError("unavailable", str(error)) from None


async def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run it on a loop of its own, so that look-ups go on. Cancelled where nobody waits for it any more."""
    loop, running = asyncio.get_running_loop(), asyncio.new_event_loop()
    result: asyncio.Future[T] = loop.create_future()
    task = running.create_task(work)

    def finish(error: BaseException | None, value: Any) -> None:
        if not result.done():
            result.set_exception(error) if error is not None else result.set_result(value)

    def run() -> None:
        try:
            value = running.run_until_complete(task)
        except BaseException as error:  # to whoever waits
            told = RuntimeError("cancelled") if isinstance(error, asyncio.CancelledError) else error
            loop.call_soon_threadsafe(finish, told, None)
        else:
            loop.call_soon_threadsafe(finish, None, value)
        finally:
            running.close()

    threading.Thread(target=run, name="explain", daemon=True).start()
    try:
        return await result
    except asyncio.CancelledError:
        running.call_soon_threadsafe(task.cancel)
        raise


def _described(pipeline: Pipeline) -> PipelineInfo:
    return PipelineInfo(
        pipeline.name, pipeline.instance, pipeline.definition,
        [
            StreamInfo(s.name, s.topic, s.id, s.time, s.scored, {f.name: f.type for f in s.fields.values()})
            for s in pipeline.streams
        ],
        pipeline.labels.topic if pipeline.labels else None,
        pipeline.reversals.topic if pipeline.reversals else None,
        [
            EntityInfo(e.name, list(e.keys), e.log, e.retention / 1000, list(e.features))
            for e in pipeline.entities
        ],
        list(pipeline.vector), pipeline.predictions,
    )  # fmt: skip
