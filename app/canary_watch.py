"""What a worker sees of its canary: how long it takes, and how often it decides what, beside the champion."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np

from models.guard_rails import EVENTS, ROWS, Bounds, Breach, of_latency, of_scores
from models.scoring import Model, Scores
from models.windows import Floats

NO_NUMBER = "no number"

# A call costs something whatever its size, up to ten times what a row costs among many: of a call of fewer rows only
# their part of its time counts. Else a canary that passed the gate would be slow where traffic is low.
CALL = 10


class Watched(Model):
    """A model whose time counts. It scores as the model does, in any thread."""

    def __init__(self, model: Model) -> None:
        vars(self).update(vars(model))  # it is loaded and checked
        self._lock = threading.Lock()
        self._rows, self._seconds = 0, 0.0

    def score_many(self, vectors: Floats) -> Scores:
        # Of this thread's processor alone: others use the machine too, and the model runs in one thread.
        began = time.thread_time()
        scores = super().score_many(vectors)
        took = (time.thread_time() - began) * min(1.0, len(vectors) / CALL)
        with self._lock:
            self._rows, self._seconds = self._rows + len(vectors), self._seconds + took
        return scores

    def time(self) -> tuple[int, float] | None:
        """Events and seconds since this was asked last, where they are enough to judge by."""
        with self._lock:
            if self._rows < ROWS:
                return None
            found = self._rows, self._seconds
            self._rows, self._seconds = 0, 0.0
        return found


class Watch:
    """One canary's evidence, judged by as many events at a time as it takes, and then forgotten.

    So what happened before does not thin what happens now.
    """

    def __init__(self, model: Model, bounds: Bounds) -> None:
        self.model, self._bounds = Watched(model), bounds
        self._its, self._champions = Counter[str](), Counter[str]()

    def both(self, scores: Scores, champion: Model, champions: Scores) -> None:
        """scores, champions: (n,) of the same events."""
        self._its.update(_decisions(self.model, scores))
        self._champions.update(_decisions(champion, champions))

    def breach(self) -> Breach | None:
        """What has passed its bound, if anything has."""
        version, found = self.model.card.version, None
        if (time_ := self.model.time()) is not None:
            found = of_latency(version, *time_, self._bounds)
        if found is None and self._its.total() >= EVENTS:
            found = of_scores(version, self._its, self._champions, self._bounds)
            self._its, self._champions = Counter(), Counter()
        return found


def _decisions(model: Model, scores: Scores) -> list[str]:
    numbers = ~np.isnan(scores)
    return [d if n else NO_NUMBER for d, n in zip(model.decide(scores), numbers.tolist(), strict=True)]
