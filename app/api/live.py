"""Predictions as they come: one reader of their topic, for as long as somebody in this process listens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from app.api import schemas
from app.api.problems import ProblemError
from app.client import Predictions, Received
from models.errors import HeadraceError
from models.pipeline import Pipeline

IDLE_S = 60.0  # the reader stays for so long when nobody listens any more
START_S = 10.0
WAITING = 1000  # predictions that one listener may be behind

Listener = Callable[[Received | None], None]  # None: there is nothing more to come

log = logging.getLogger(__name__)


class Live:
    """Gives out each prediction once, from when `listening` is entered."""

    def __init__(self, pipeline: Pipeline, address: str) -> None:
        self._pipeline, self._address = pipeline, address
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        self._failure = ""
        self._idle: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """How many listen."""
        return len(self._listeners)

    @contextlib.asynccontextmanager
    async def listening(self, listener: Listener) -> AsyncIterator[None]:
        """Call the listener for all that is predicted from now on. Raises ProblemError where Kafka is away."""
        self._listeners.add(listener)
        try:
            await self._start()
            yield
        finally:
            self._listeners.discard(listener)
            if not self._listeners:
                self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._stop)

    async def close(self) -> None:
        """End what listens, and the reader."""
        for listener in list(self._listeners):
            listener(None)
        task = self._task
        self._stop()
        if task is not None:
            await asyncio.gather(task, return_exceptions=True)

    async def _start(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if self._task is None:
            self._started = asyncio.Event()
            self._failure = ""
            self._task = asyncio.create_task(self._run(self._started))
        started = self._started
        try:
            await asyncio.wait_for(started.wait(), START_S)
        except TimeoutError:
            self._failure = "no answer within 10 s"
        if self._failure:
            raise ProblemError(
                "unavailable", f"Predictions cannot be read from Kafka ({self._failure}); try again."
            )

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self, started: asyncio.Event) -> None:
        try:
            async with Predictions(self._address, self._pipeline.predictions, start="latest") as predictions:
                started.set()
                async for prediction in predictions:
                    for listener in list(self._listeners):
                        listener(prediction)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failure = str(error) or type(error).__name__
            if not isinstance(error, HeadraceError):
                log.warning("The reader of predictions has ended", exc_info=error)
            self._task = None
            for listener in list(self._listeners):
                listener(None)
        finally:
            started.set()


def as_answer(pipeline: Pipeline, found: Received) -> schemas.Prediction:
    """A prediction of the topic as the API shows it."""
    return schemas.Prediction(
        pipeline.name, found.id, found.stream or pipeline.stream.name, schemas.instant(found.event_time),
        schemas.instant(found.timestamp), found.score, found.decision, found.model, found.version, found.definition,
        found.late, found.degraded,
        schemas.Origin(pipeline.entities[-1].log, found.origin.partition, found.origin.offset), found.keys,
        found.features or None,
    )  # fmt: skip
