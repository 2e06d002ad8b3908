"""Who did not decide scores what was predicted, too, behind it: nothing that happens here may hold a prediction up.

Challengers score all events, a canary those of the champion's entities, and the champion those of the canary's.

Events wait here until their predictions have arrived, so none of them is predicted again, and each has one
record at most. Whoever dies with events in hand leaves them without; so does a queue that is full.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from agents.outbox import Outbox, SendFailed
from models.pipeline import Pipeline
from models.scoring import Model, Scores, scores_of
from models.shadows import Predicted, ShadowEncoder
from tables.model_folder import CANARY, CHAMPION

MOST_WAITING = 100_000  # events with their vectors: some tens of MB


class Shadow:
    """sent: records that have arrived. missed: events without one, for the queue was full or Kafka refused."""

    def __init__(
        self, pipeline: Pipeline, models: Mapping[str, Model], outbox: Outbox, own: Callable[[], Outbox],
        drop: Callable[[str, str, Exception], None], watch: Callable[[str, Scores, Model, Scores], None],
    ) -> None:  # fmt: skip
        """models: by alias. outbox: of the predictions; own: makes one for the records, anew where one has failed.
        drop: told alias, version and error of one that failed to score. watch: told version and scores of a canary, and
        the champion with its scores of the same events."""
        self._topic = pipeline.shadow
        self._models, self._outbox, self._make, self._drop = models, outbox, own, drop
        self._watch = watch
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
        events, found = self._queue[0], dict[str, tuple[str, Scores]]()
        by_version: dict[str, Scores] = {}  # one that has two aliases scores once
        champion = await self._champions(events)
        for alias, model in [(a, m) for a, m in self._models.items() if a != CHAMPION]:
            version = model.card.version
            try:
                if version not in by_version:
                    by_version[version] = await _completed(events, model)
                found[alias] = version, by_version[version]
            except Exception as error:  # whatever a graph may raise, the champion goes on
                self._drop(alias, version, error)
        self._queue.popleft()  # no earlier: who is cancelled while they score leaves them to the next call
        self._waiting -= len(events)
        if not found:
            return 0
        if CANARY in found:
            self._watch(*found[CANARY], events.champion, champion)
        keys = [str(id_).encode() for id_ in events.ids]
        values = self._encoder.encode(events, champion, found)
        self._own.put_many(self._topic, events.partitions.tolist(), keys, values)
        return len(events)

    async def _champions(self, events: Predicted) -> Scores:
        """The champion's scores (n,), also of what the canary has decided."""
        try:
            return await _completed(events, events.champion)
        except Exception:  # it would end the worker where it decides, and does not decide here
            assert events.canary is not None
            return np.where(events.canary.mask, np.float32(np.nan), events.scores)


async def _completed(events: Predicted, model: Model) -> Scores:
    """The model's scores (n,): those that are predictions are there, the others are made in a thread."""
    canary, version = events.canary, model.card.version
    its = np.zeros(len(events), np.bool_) if canary is None else canary.mask
    if canary is not None and canary.model.card.version == version:
        missing = ~its
    elif events.champion.card.version == version:
        missing = its
    else:
        missing = np.ones(len(events), np.bool_)
    scores = events.scores.copy()
    if missing.any():
        scores[missing] = await asyncio.to_thread(scores_of, model, events.vectors[missing])
    return scores
