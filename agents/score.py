"""The agent of the last entity: fold its log, score every event inline, send the predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from agents.outbox import Outbox
from models.events import given_ids, streams_of
from models.pipeline import Pipeline
from models.predictions import PredictionEncoder, unscored
from models.scoring import Model
from models.shadows import Predicted
from models.vectors import Vectors
from models.windows import DUPLICATE, EVENT, LATE, TOO_LATE
from tables.model_folder import CHAMPION
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
        outbox: Outbox,
        reject: Reject,
        shadow: Callable[[Predicted], None],
        without: Without = "wait",
    ) -> None:
        """models: by alias; they may be exchanged between two micro-batches. shadow: gets what was predicted."""
        self._log = pipeline.entities[-1].log
        self._topic = pipeline.predictions
        self._profiles, self._models, self._outbox, self._reject = profiles, models, outbox, reject
        self._shadow, self._without = shadow, without
        self._vectors = Vectors(pipeline)
        self._encoder = PredictionEncoder(pipeline)
        self._ids = given_ids(pipeline)
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
        scores = unscored(len(events)) if model is None else model.score_many(vectors)
        values = self._encoder.encode(
            ids, streams, events.times, vectors, scores, (outcomes == LATE) | (outcomes == TOO_LATE),
            applied.degraded[on], model, logs, offsets,
        )  # fmt: skip
        # 3. predictions go to the partition of the log's number, so one number drops all doubles
        keys = [str(i).encode() for i in ids]
        self._outbox.put_many(self._topic, logs.tolist(), keys, values)
        self.predicted += len(events)
        # 4. and challengers may score them, too
        if model is not None:
            self._shadow(
                Predicted(ids, streams, events.times, vectors, logs, offsets, model.card.version, scores)
            )
