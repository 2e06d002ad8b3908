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
from models.records import RecordCodec
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
        self.routed = 0

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
            values = codec.encode_labels(labels, origins[kept], offsets[kept])
            self._send(entity.log, labels.keys[entity.key], labels, values)
        self.routed += len(kept)
        for partition, found in held:
            self.positions[partition] = found[-1].offset + 1

    def _send(self, log: str, entity_keys: list[Key], labels: LabelBatch, values: list[bytes]) -> None:
        """A label whose event has no such key has no profile to go to."""
        keys = [None if k is None else key_bytes(k) for k in entity_keys]
        targets = partitions_of(keys, labels.ids, self._partitions[log]).tolist()
        keyed = [i for i, key in enumerate(keys) if key is not None]
        self._outbox.put_many(
            log, [targets[i] for i in keyed], [keys[i] for i in keyed], [values[i] for i in keyed]
        )
