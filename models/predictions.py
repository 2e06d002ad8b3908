"""What goes out: one JSON record per scored event.

    {"id": 7, "event_time": 1378000000000, "score": 0.41, "decision": "review", "model": "card-fraud",
     "version": "5f0c...", "definition": "7cb3...", "late": false,
     "degraded": false, "origin": {"partition": 3, "offset": 1201}, "keys": {"customer": "7", "terminal": "12"},
     "features": {"TX_AMOUNT": 57.16, ...}}

A pipeline of several streams says in `stream`, behind the id, of which the event is. What was folded while there was
no model has null for score, decision, model and version, where it goes out at all.

`origin` is the place in the last entity's log: with the definition it is all that is needed to
compute the prediction again, and it is the one number by which a consumer drops doubles.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from models.canary import Side
from models.pipeline import Pipeline
from models.scoring import Model, Scores
from models.windows import Floats, Ints

Mask = npt.NDArray[np.bool_]


class Origin(msgspec.Struct, gc=False):
    partition: int
    offset: int


class PredictionEncoder:
    """Encodes predictions of one pipeline, with its features' names if the pipeline asks for them."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._features: Any = None
        names = [entity.name for entity in pipeline.entities]
        places = [f"e{n}" for n in range(len(names))]  # for a name may be none of Python's
        self._keys: Any = msgspec.defstruct(
            "Keys",
            [(place, str | None) for place in places],
            rename=dict(zip(places, names, strict=True)),
            gc=False,
        )
        # Omitted where there is but one stream.
        streams = [stream.name for stream in pipeline.streams]
        self._streams: list[Any] = streams if len(streams) > 1 else [msgspec.UNSET]
        fields: list[tuple[str, Any]] = [
            ("id", Any), ("stream", str | msgspec.UnsetType), ("event_time", int), ("score", float),
            ("decision", str | None), ("model", str | None), ("version", str | None), ("definition", str),
            ("late", bool), ("degraded", bool), ("origin", Origin), ("keys", self._keys),
        ]  # fmt: skip
        if pipeline.predictions_carry_features:
            self._features = msgspec.defstruct(
                "Features", [(name, float) for name in pipeline.vector], gc=False
            )
            fields.append(("features", self._features))
        self._prediction: Any = msgspec.defstruct("Prediction", fields, gc=False)
        self._encode = msgspec.json.Encoder().encode

    def encode(
        self, ids: list[int | str], streams: Ints, times: Ints, vectors: Floats, scores: Scores, late: Mask,
        degraded: Mask, model: Model | None, partitions: Ints, offsets: Ints, keys: Sequence[Sequence[str | None]],
        canary: Side | None = None,
    ) -> list[bytes]:  # fmt: skip
        """Encode n events with the model's scores. NaN becomes null. Without a model scores are `unscored`.

        streams: (n,) numbers; late, degraded: (n,); keys: of each entity, its n keys; canary: those that another model
        has scored.
        """
        n, name = len(ids), None if model is None else model.card.pipeline
        decisions: list[Any] = [None] * n if model is None else model.decide(scores)
        versions = [None if model is None else model.card.version] * n
        if canary is not None:
            decided = canary.model.decide(scores[canary.mask])
            for i, decision in zip(np.flatnonzero(canary.mask).tolist(), decided, strict=True):
                decisions[i], versions[i] = decision, canary.model.card.version
        definition = self.pipeline.definition
        prediction, features, encode, names = self._prediction, self._features, self._encode, self._streams
        keyed = itertools.starmap(self._keys, zip(*keys, strict=True))
        tails = [(features(*row),) for row in vectors.tolist()] if features else [()] * len(ids)
        return [
            encode(
                prediction(
                    id_, names[stream], time, score, decision, name, version, definition, is_late, is_degraded,
                    Origin(partition, offset), keys_, *tail,
                )
            )
            for (
                id_, stream, time, score, decision, version, is_late, is_degraded, partition, offset, keys_, tail,
            ) in zip(
                ids, streams.tolist(), times.tolist(), scores.astype(np.float64).tolist(), decisions, versions,
                late.tolist(), degraded.tolist(), partitions.tolist(), offsets.tolist(), keyed, tails, strict=True,
            )
        ]  # fmt: skip


def unscored(n: int) -> Scores:
    """What n events without a model have for scores, (n,)."""
    return np.full(n, np.nan, np.float32)


class Prediction(msgspec.Struct):
    """A prediction as a consumer reads it. `features` is absent where the pipeline leaves them out, `stream` where
    it has one stream. A score is None where the model gave no number, and the version too where there was no model.
    keys: by entity, as text; null where the event has none.
    """

    id: int | str
    event_time: int
    score: float | None
    decision: str | None
    model: str | None
    version: str | None
    definition: str
    late: bool
    origin: Origin
    features: dict[str, float | None] = {}
    degraded: bool = False
    stream: str | None = None
    keys: dict[str, str | None] = {}


class OfEvent(Protocol):
    """A prediction, or what else is said of an event."""

    @property
    def id(self) -> int | str: ...
    @property
    def stream(self) -> str | None: ...


def identity(pipeline: Pipeline, prediction: OfEvent) -> int:
    """The 64-bit id of the event that it is of."""
    for stream in pipeline.streams:
        if stream.name == prediction.stream:
            return stream.identity(prediction.id)
    return pipeline.stream.identity(prediction.id)


def identities(pipeline: Pipeline, predictions: Sequence[Prediction]) -> Ints:
    """Likewise of n predictions, (n,)."""
    return np.array([identity(pipeline, p) for p in predictions], np.int64)


decode = msgspec.json.Decoder(Prediction).decode


@dataclass
class Place:
    """Where a reader stands in a partition of predictions: the next offset, and the highest origin seen.

    That one number drops doubles: an owner's predictions are in the order of their log, and one that
    sends again begins at an earlier point of it and keeps the order. Records before `next` only tell what
    was seen before.

    >>> place = Place(next=1)
    >>> [place.take(offset, origin) for offset, origin in enumerate([7, 8, 7, 8, 9])]
    [False, True, False, False, True]
    """

    next: int
    highest: int = -1

    def take(self, offset: int, origin: int) -> bool:
        """Pass a record. Whether its prediction is to be given out: it is new, and was not seen before."""
        new = offset >= self.next and origin > self.highest
        self.next, self.highest = max(self.next, offset + 1), max(self.highest, origin)
        return new
