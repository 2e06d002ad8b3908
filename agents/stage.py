"""The agent of an entity that is not the last: fold its log, hand each event on with its features.

This is the page to read first. A micro-batch is all that one poll gave of the log, from all
partitions; it goes through the fold as one, and is split again only to be sent.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from agents.outbox import Outbox
from models.events import streams_of
from models.partitions import partitions_of
from models.pipeline import Pipeline
from models.records import RecordCodec, keys_of
from models.windows import DUPLICATE, EVENT, LOST
from tables.profiles import Applied, Mask, Polled, Profiles

Reject = Callable[[str, Applied], None]  # sends an applied batch's bad input of a log to the dead letters


class Stage:
    """number: of this stage, 0 for the first. partitions: of the next entity's log."""

    def __init__(
        self,
        pipeline: Pipeline,
        number: int,
        profiles: Profiles,
        outbox: Outbox,
        reject: Reject,
        partitions: int,
    ) -> None:
        self._log = pipeline.entities[number].log
        self._next = pipeline.entities[number + 1].log
        self._codec = RecordCodec(pipeline, number + 1)
        self._keys = keys_of(pipeline, number + 1)
        # By stream: whether anyone further on has use for its events.
        later = pipeline.entities[number + 1 :]
        self._wanted = np.array([s.scored or any(e.is_of(s) for e in later) for s in pipeline.streams])
        self._pipeline = pipeline
        self._partitions = partitions
        self._profiles, self._outbox, self._reject = profiles, outbox, reject

    def handle(self, polled: Polled) -> None:
        """Take one micro-batch all the way. Nothing in it waits, so nothing comes between its steps."""
        # 1. fold: what the log says of this entity, as of each event
        applied = self._profiles.apply(polled)
        if applied.rejects:
            self._reject(self._log, applied)
        # 2. hand on events, not labels, no event twice, and none that is of no use there
        on = (applied.batch.kinds == EVENT) & (applied.outcomes != DUPLICATE)
        if not self._wanted.all():
            on &= self._wanted[streams_of(self._pipeline, applied.batch)]
        lost = np.flatnonzero(applied.batch.kinds == LOST).tolist()
        if not lost:
            self._hand_on(applied, on)
            return
        # what is gone may have been for any partition: tell each, behind what went before it
        place = np.arange(len(on))
        self._hand_on(applied, on & (place < lost[0]))
        for start, end in pairwise([*lost, len(on)]):
            self._tell_lost(int(applied.logs[start]), int(applied.offsets[start]))
            self._hand_on(applied, on & (start <= place) & (place < end))

    def _tell_lost(self, log: int, offset: int) -> None:
        """It has a predecessor, too: what a broker has lost before it is noticed, and not passed over."""
        targets = np.arange(self._partitions)
        before = self._profiles.chain(np.full_like(targets, log), targets, np.full_like(targets, offset))
        values = [self._codec.encode_lost(0, log, offset, previous) for previous in before.tolist()]
        self._outbox.put_many(self._next, targets.tolist(), [None] * len(values), values)

    def _hand_on(self, applied: Applied, on: Mask) -> None:
        if not on.any():
            return
        events = applied.batch.where(on)
        keys = self._keys(events)
        targets = partitions_of(keys, events.ids, self._partitions)
        logs, offsets = applied.logs[on], applied.offsets[on]
        values = self._codec.encode(
            events, applied.features[on], logs, offsets, self._profiles.chain(logs, targets, offsets),
            applied.degraded[on],
        )  # fmt: skip
        self._outbox.put_many(self._next, targets.tolist(), keys, values)
        # 3. the position follows in the next flush, once these are acknowledged
