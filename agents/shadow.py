"""Challengers score what was predicted, behind the champion: nothing that happens here may hold a prediction up.

Events wait here until their predictions have arrived, so none of them is predicted again, and each has one
record at most. Whoever dies with events in hand leaves them without; so does a queue that is full.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

from agents.outbox import Outbox, SendFailed
from models.pipeline import Pipeline
from models.scoring import Model, Scores
from models.shadows import Predicted, ShadowEncoder
from tables.model_folder import CHAMPION

MOST_WAITING = 100_000  # events with their vectors: some tens of MB


class Shadow:
    """sent: records that have arrived. missed: events without one, for the queue was full or Kafka refused."""

    def __init__(
        self, pipeline: Pipeline, models: Mapping[str, Model], outbox: Outbox, own: Callable[[], Outbox],
        drop: Callable[[str, str, Exception], None],
    ) -> None:  # fmt: skip
        """models: by alias; all but the champion's score here. outbox: of the predictions; own: makes one for the
        records, anew where one has failed. drop: told alias, version and error of one that failed to score."""
        self._topic = pipeline.shadow
        self._models, self._outbox, self._make, self._drop = models, outbox, own, drop
        self._own = own()
        self._encoder = ShadowEncoder(pipeline)
        self._queue: deque[Predicted] = deque()
        self._waiting = 0
        self._some = asyncio.Event()
        self._lock = asyncio.Lock()
        self.sent = self.missed = 0

    def take(self, events: Predicted) -> None:
        """Have these scored by the challengers, if there are any and there is room."""
        if len(self._models) < 2:
            return
        if self._waiting + len(events) > MOST_WAITING:
            self.missed += len(events)
            return
        self._queue.append(events)
        self._waiting += len(events)
        self._some.set()

    async def run(self) -> None:
        """Work for ever."""
        while True:
            await self._some.wait()
            self._some.clear()
            await self.once()

    async def once(self) -> None:
        """All that was taken before this call."""
        async with self._lock:
            left, count = len(self._queue), 0
            await self._outbox.acknowledged()
            for _ in range(left):
                count += await self._next()
            try:
                await self._own.acknowledged()
                self.sent += count
            except SendFailed:
                self._own = self._make()
                self.missed += count

    async def _next(self) -> int:
        """Score and send the first of the queue. How many records."""
        events, found = self._queue[0], {}
        for alias, model in [(a, m) for a, m in self._models.items() if a != CHAMPION]:
            try:
                found[alias] = model.card.version, await asyncio.to_thread(_scores, model, events)
            except Exception as error:  # whatever a graph may raise, the champion goes on
                self._drop(alias, model.card.version, error)
        self._queue.popleft()  # no earlier: who is cancelled while they score leaves them to the next call
        self._waiting -= len(events)
        if not found:
            return 0
        keys = [str(id_).encode() for id_ in events.ids]
        self._own.put_many(self._topic, events.partitions.tolist(), keys, self._encoder.encode(events, found))
        return len(events)


def _scores(model: Model, events: Predicted) -> Scores:
    scores = model.score_many(events.vectors)
    if scores.shape != (len(events),):
        raise ValueError(f"it gives scores of shape {scores.shape} for {len(events)} events")
    return scores
