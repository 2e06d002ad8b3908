"""The agent of the last entity: fold its log, score every event inline, send the predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from agents.outbox import Outbox
from models.canary import Side, chosen
from models.events import Batch, given_ids, key_bytes, streams_of
from models.pipeline import Pipeline
from models.predictions import PredictionEncoder, unscored
from models.records import keys_of
from models.scoring import Model, Scores, scores_of
from models.shadows import Predicted
from models.vectors import Vectors
from models.windows import DUPLICATE, EVENT, LATE, TOO_LATE, Floats
from tables.model_folder import CANARY, CHAMPION
from tables.profiles import Applied, Polled, Profiles

Reject = Callable[[str, Applied], None]
Without = Literal["wait", "fold", "features"]
"""What becomes of events while there is no model: nobody hands them over; they are folded, and never scored; they go
out with features alone."""


class Score:
    """`emitted` holds, by partition, the log offset up to which predictions were sent before.

    predicted: events sent; unscored: those that were folded without a model.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        profiles: Profiles,
        models: Mapping[str, Model],
        shares: Mapping[str, float],
        outbox: Outbox,
        reject: Reject,
        shadow: Callable[[Predicted], None],
        drop: Callable[[str, str, Exception], None],
        without: Without = "wait",
    ) -> None:
        """models, shares: by alias, of the canary the percent of the first entity's keys for which it decides; they may
        be exchanged between two micro-batches. shadow: gets what was predicted. drop: told alias, version and error of
        a canary that failed."""
        self._log = pipeline.entities[-1].log
        self._topic = pipeline.predictions
        self._profiles, self._models, self._outbox, self._reject = profiles, models, outbox, reject
        self._shares, self._shadow, self._drop = shares, shadow, drop
        self._without = without
        self._vectors = Vectors(pipeline)
        self._encoder = PredictionEncoder(pipeline)
        self._ids = given_ids(pipeline)
        self._keys = [keys_of(pipeline, number) for number in range(len(pipeline.entities) - 1)]
        self._pipeline = pipeline
        self._scored = np.array([stream.scored for stream in pipeline.streams])
        self.emitted: dict[int, int] = {}
        self.predicted = self.unscored = 0

    def handle(self, polled: Polled) -> None:
        """Take one micro-batch all the way."""
        # 1. fold
        applied = self._profiles.apply(polled)
        if applied.rejects:
            self._reject(self._log, applied)
        # 2. score events, no event twice, and none whose prediction is out already
        on = (applied.batch.kinds == EVENT) & (applied.outcomes != DUPLICATE)
        if not self._scored.all():
            on &= self._scored[streams_of(self._pipeline, applied.batch)]
        if self.emitted:
            reached = np.array([self.emitted.get(p, -1) for p in applied.logs.tolist()], np.int64)
            on &= applied.offsets > reached
        if not on.any():
            return
        # whoever waits for a model is handed nothing before there is one
        model = self._models[CHAMPION] if self._without == "wait" else self._models.get(CHAMPION)
        if model is None:
            self.unscored += int(on.sum())
            if self._without == "fold":
                return
        events = applied.batch.where(on)
        logs, outcomes = applied.logs[on], applied.outcomes[on]
        features = np.hstack([events.features, applied.features[on]])
        vectors = self._vectors.of(events.fields, features)
        ids, streams, offsets = self._ids(events), streams_of(self._pipeline, events), applied.offsets[on]
        by_entity = self._keys_of(events)
        scores, canary = self._scores(model, by_entity[0], vectors)
        keyed = [[None if key is None else key.decode() for key in keys] for keys in by_entity]
        values = self._encoder.encode(
            ids, streams, events.times, vectors, scores, (outcomes == LATE) | (outcomes == TOO_LATE),
            applied.degraded[on], model, logs, offsets, keyed, canary,
        )  # fmt: skip
        # 3. predictions go to the partition of the log's number, so one number drops all doubles
        keys = [str(i).encode() for i in ids]
        self._outbox.put_many(self._topic, logs.tolist(), keys, values)
        self.predicted += len(events)
        # 4. and challengers may score them, too
        if model is not None:
            self._shadow(Predicted(ids, streams, events.times, vectors, logs, offsets, model, scores, canary))

    def _scores(
        self, champion: Model | None, keys: list[bytes | None], vectors: Floats
    ) -> tuple[Scores, Side | None]:
        """Of each event the score of who decides for its entity: one call of each model, over its rows alone."""
        if champion is None:
            return unscored(len(vectors)), None
        canary = self._models.get(CANARY)
        if canary is not None:
            its = chosen(keys, canary.card.version, self._shares[CANARY])
            given = self._tried(canary, vectors[its]) if its.any() else None
            if given is not None:
                scores = np.empty(len(vectors), np.float32)
                scores[its] = given
                if not its.all():
                    scores[~its] = champion.score_many(vectors[~its])
                return scores, Side(canary, its)
        return champion.score_many(vectors), None

    def _tried(self, canary: Model, vectors: Floats) -> Scores | None:
        """A canary's scores; None where it fails, which the champion's then replace."""
        try:
            return scores_of(canary, vectors)
        except Exception as error:  # whatever a graph may raise, the worker goes on
            self._drop(CANARY, canary.card.version, error)
            return None

    def _keys_of(self, events: Batch) -> list[list[bytes | None]]:
        """The key of each event, by entity. Those of the last one are the records' own."""
        last = [None if key is None else key_bytes(key) for key in events.keys]
        return [*(keys(events) for keys in self._keys), last]
