"""The agent of the labels: write each label into the log of every entity that has features over labels.

There it takes its place among the entity's events, and that order is the only order there is. The
router keeps no state: what it sends again after a crash, the stages have seen and drop.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agents.outbox import Outbox
from models.events import Key, LabelBatch, LabelDecoder, Reason, key_bytes
from models.partitions import partitions_of
from models.pipeline import Pipeline
from models.records import NEVER, RecordCodec, chain
from models.windows import Ints
from tables.profiles import Polled, Record

RejectRecord = Callable[[str, int, Record, Reason], None]  # topic, partition, record, reason


class Route:
    """partitions: by topic. `positions` holds the next offset of each label partition."""

    def __init__(
        self, pipeline: Pipeline, outbox: Outbox, reject: RejectRecord, partitions: dict[str, int]
    ) -> None:
        assert pipeline.labels is not None
        self._topic = pipeline.labels.topic
        self._decode = LabelDecoder(pipeline).decode
        self._to = [
            (entity, RecordCodec(pipeline, number))
            for number, entity in enumerate(pipeline.entities)
            if entity.labelled
        ]
        self._outbox, self._reject, self._partitions = outbox, reject, partitions
        self.positions: dict[int, int] = {}
        # Not stored: what the router sends first after a start has no known predecessor.
        self._sent: dict[str, Ints] = {}
        self.routed = 0

    def start_at(self, positions: dict[int, int]) -> None:
        """Route these label partitions from these offsets on."""
        self.positions = positions
        self._sent = {
            entity.log: np.full(
                (self._partitions[self._topic], self._partitions[entity.log]), NEVER, np.int64
            )
            for entity, _ in self._to
        }

    def handle(self, polled: Polled) -> None:
        """Take one micro-batch all the way."""
        held = [
            (partition, records) for partition, records in polled if records and partition in self.positions
        ]
        origins = np.array([partition for partition, records in held for _ in records], np.int64)
        records = [record for _, found in held for record in found]
        labels, kept, rejects = self._decode([r.value or b"" for r in records])
        for bad in rejects:
            self._reject(self._topic, int(origins[bad.index]), records[bad.index], bad.reason)
        offsets = np.array([r.offset for r in records], np.int64)
        for entity, codec in self._to:
            self._send(entity.log, codec, labels, labels.keys[entity.key], origins[kept], offsets[kept])
        self.routed += len(kept)
        for partition, found in held:
            self.positions[partition] = found[-1].offset + 1

    def _send(
        self, log: str, codec: RecordCodec, labels: LabelBatch, entity_keys: list[Key], origins: Ints, offsets: Ints
    ) -> None:  # fmt: skip
        """A label whose event has no such key has no profile to go to."""
        keyed = np.array([i for i, key in enumerate(entity_keys) if key is not None], np.int64)
        labels, origins, offsets = labels.take(keyed), origins[keyed], offsets[keyed]
        keys = [key_bytes(entity_keys[i]) for i in keyed.tolist()]
        targets = partitions_of(keys, labels.ids, self._partitions[log])
        values = codec.encode_labels(
            labels, origins, offsets, chain(origins, targets, offsets, self._sent[log])
        )
        self._outbox.put_many(log, targets.tolist(), keys, values)
