"""What those say of an event that did not decide: one JSON record per event.

    {"id": 7, "event_time": 1378000000000, "origin": {"partition": 3, "offset": 1201},
     "definition": "7cb3...", "champion": {"version": "5f0c...", "score": 0.41},
     "challengers": {"challenger-deep": {"version": "0d5a...", "score": 0.44}}}

A pipeline of several streams says in `stream`, behind the id, of which the event is. Of the canary's entities the
prediction is the canary's, and the champion's score is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from models.canary import Side
from models.pipeline import Pipeline
from models.predictions import Origin
from models.scoring import Model, Scores
from models.windows import Floats, Ints


class Scored(msgspec.Struct, gc=False):
    """score: None where it was no number."""

    version: str
    score: float | None


class Shadow(msgspec.Struct, omit_defaults=True, gc=False):
    """challengers: by alias, the canary among them."""

    id: int | str
    event_time: int  # ms
    origin: Origin  # of its prediction, too
    definition: str
    champion: Scored
    challengers: dict[str, Scored]
    stream: str | None = None


decode = msgspec.json.Decoder(Shadow).decode


@dataclass(frozen=True)
class Predicted:
    """n events as they were predicted: what challengers are to score, too.

    streams: (n,) numbers; vectors: (n, width); partitions, offsets: (n,), of the last entity's log; champion: as it was
    then; scores: (n,) as predicted; canary: whose some of these are.
    """

    ids: list[int | str]
    streams: Ints
    times: Ints
    vectors: Floats
    partitions: Ints
    offsets: Ints
    champion: Model
    scores: Scores
    canary: Side | None = None

    def __len__(self) -> int:
        return len(self.ids)


class ShadowEncoder:
    def __init__(self, pipeline: Pipeline) -> None:
        names = [stream.name for stream in pipeline.streams]
        self._streams: list[str | None] = [*names] if len(names) > 1 else [None]
        self._definition = pipeline.definition
        self._encode = msgspec.json.Encoder().encode

    def encode(
        self, events: Predicted, champion: Scores, challengers: Mapping[str, tuple[str, Scores]]
    ) -> list[bytes]:
        """champion: its scores (n,); challengers: by alias the version, and its scores (n,)."""
        aliases = list(challengers)
        columns = [_scored(version, scores) for version, scores in challengers.values()]
        rows = zip(
            events.ids, events.times.tolist(), events.partitions.tolist(), events.offsets.tolist(),
            _scored(events.champion.card.version, champion), zip(*columns, strict=True), events.streams.tolist(),
            strict=True,
        )  # fmt: skip
        return [
            self._encode(
                Shadow(
                    id_, time, Origin(partition, offset), self._definition, first,
                    dict(zip(aliases, theirs, strict=True)), self._streams[stream],
                )
            )
            for id_, time, partition, offset, first, theirs, stream in rows
        ]  # fmt: skip


def _scored(version: str, scores: Scores) -> list[Scored]:
    return [Scored(version, score) for score in scores.astype(np.float64).tolist()]
