"""The agents of what others write: into the logs of entities, where the order is the only order there is.

Events of a stream that cannot itself be the first entity's log go into that log. A label or a reversal
goes into the log of every entity that it concerns, among whose events it takes its place. The router
keeps no state: what it sends again after a crash, the stages have seen and drop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from agents.outbox import Outbox
from models.errors import HeadraceError
from models.events import EventDecoder, Key, LabelBatch, LabelDecoder, Reason, Reject, key_bytes
from models.partitions import partitions_of
from models.pipeline import Labels, Pipeline, Reversals
from models.records import NEVER, RecordCodec, chain, in_step
from models.streams import Stream
from models.windows import Ints
from tables.profiles import Polled, Record

RejectRecord = Callable[[str, int, Record, Reason], None]  # topic, partition, record, reason


@dataclass
class _Routed:
    """Records for a log: their keys and ids (n,), where they stood in the batch (n,), and how each is written.

    encode: of origins (partitions and offsets) and of the offsets before these, (n,) each.
    """

    log: str
    keys: Sequence[Key]
    ids: Ints
    places: Ints
    encode: Callable[[Ints, Ints, Ints], list[bytes]]


class _Taker(Protocol):
    """What a topic's records become. logs: where they go."""

    logs: list[str]

    def take(
        self, values: list[bytes], sent: Ints, partitions: Ints
    ) -> tuple[list[_Routed], Ints, list[Reject]]:
        """Records by log, which of these values are good, and the rest. sent: (n,) ms; partitions: (n,) in runs."""


class Route:
    """The router of one topic. `positions` holds the next offset of each of its partitions.

    partitions: by topic.
    """

    def __init__(
        self, topic: str, taken: _Taker, outbox: Outbox, reject: RejectRecord, partitions: dict[str, int]
    ) -> None:
        self.topic = topic
        self._taken, self._outbox, self._reject, self._partitions = taken, outbox, reject, partitions
        self.positions: dict[int, int] = {}
        # Not stored: what the router sends first after a start has no known predecessor.
        self._sent: dict[str, Ints] = {}
        self.routed = 0

    def start_at(self, positions: dict[int, int]) -> None:
        """Route these partitions from these offsets on. Raises HeadraceError."""
        if max(positions, default=0) >= self._partitions[self.topic]:
            raise HeadraceError(
                f"{self.topic} has more partitions than the {self._partitions[self.topic]} that it had when this "
                "worker started; restart the workers."
            )
        self.positions = positions
        self._sent = {
            log: np.full((self._partitions[self.topic], self._partitions[log]), NEVER, np.int64)
            for log in self._taken.logs
        }

    def handle(self, polled: Polled) -> None:
        """Take one micro-batch all the way."""
        held = [
            (partition, records) for partition, records in polled if records and partition in self.positions
        ]
        origins = np.array([partition for partition, records in held for _ in records], np.int64)
        records = [record for _, found in held for record in found]
        offsets = np.array([r.offset for r in records], np.int64)
        routed, kept, rejects = self._taken.take(
            [r.value or b"" for r in records], np.array([r.timestamp for r in records], np.int64), origins
        )
        for bad in rejects:
            self._reject(self.topic, int(origins[bad.index]), records[bad.index], bad.reason)
        for each in routed:
            self._send(each, origins[kept], offsets[kept])
        self.routed += len(kept)
        for partition, found in held:
            self.positions[partition] = found[-1].offset + 1

    def _send(self, routed: _Routed, origins: Ints, offsets: Ints) -> None:
        log, origins, offsets = routed.log, origins[routed.places], offsets[routed.places]
        keys = [None if key is None else key_bytes(key) for key in routed.keys]
        targets = partitions_of(keys, routed.ids, self._partitions[log])
        values = routed.encode(origins, offsets, chain(origins, targets, offsets, self._sent[log]))
        self._outbox.put_many(log, targets.tolist(), keys, values)


class Events:
    """The events of a stream, into the first entity's log."""

    def __init__(self, pipeline: Pipeline, stream: Stream) -> None:
        self.logs = [pipeline.entities[0].log]
        self._decode = EventDecoder(pipeline, stream).decode
        self._codec = RecordCodec(pipeline, 0)
        self._writer = self._codec.writers.index(stream.topic)

    def take(
        self, values: list[bytes], sent: Ints, partitions: Ints
    ) -> tuple[list[_Routed], Ints, list[Reject]]:
        found, kept, rejects = self._decode(values, sent)
        order = in_step(partitions[kept], found.clocks)
        batch, kept = (found, kept) if order is None else (found.take(order), kept[order])

        def encode(origins: Ints, offsets: Ints, previous: Ints) -> list[bytes]:
            intact = np.zeros(len(batch), np.bool_)
            return self._codec.encode(batch, batch.features, origins, offsets, previous, intact, self._writer)

        routed = _Routed(self.logs[0], batch.keys, batch.ids, np.arange(len(batch)), encode)
        return [routed], kept, rejects


class Said:
    """Labels or reversals, into the log of each entity that they concern."""

    def __init__(self, pipeline: Pipeline, said: Labels | Reversals) -> None:
        decoder = LabelDecoder(pipeline, said)
        self._decode = decoder.decode
        self._to = [(e, RecordCodec(pipeline, pipeline.entities.index(e))) for e in decoder.entities]
        self.logs = [entity.log for entity, _ in self._to]
        self._topic = said.topic

    def take(
        self, values: list[bytes], sent: Ints, partitions: Ints
    ) -> tuple[list[_Routed], Ints, list[Reject]]:
        labels, kept, rejects = self._decode(values)
        routed = [self._routed(entity.name, entity.log, codec, labels) for entity, codec in self._to]
        return routed, kept, rejects

    def _routed(self, entity: str, log: str, codec: RecordCodec, labels: LabelBatch) -> _Routed:
        """A label whose event has no such key has no profile to go to."""
        keyed = np.array([i for i, key in enumerate(labels.keys[entity]) if key is not None], np.int64)
        there, writer = labels.take(keyed), codec.writers.index(self._topic)

        def encode(origins: Ints, offsets: Ints, previous: Ints) -> list[bytes]:
            return codec.encode_labels(there, origins, offsets, previous, writer)

        return _Routed(log, there.keys[entity], there.ids, keyed, encode)


def routes(
    pipeline: Pipeline, outbox: Outbox, reject: RejectRecord, partitions: dict[str, int]
) -> list[Route]:
    """The routers that a pipeline needs, one for each topic."""
    taken: dict[str, _Taker] = {}
    if pipeline.routed:
        taken |= {stream.topic: Events(pipeline, stream) for stream in pipeline.streams}
    for said in pipeline.said:
        if said.topic in pipeline.inputs:
            taken[said.topic] = Said(pipeline, said)
    return [Route(topic, each, outbox, reject, partitions) for topic, each in taken.items()]
