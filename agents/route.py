"""The agents of what others write: into the logs of entities, where the order is the only order there is.

Events of a stream that cannot itself be the first entity's log go into that log. A label or a reversal
goes into the log of every entity that it concerns, among whose events it takes its place. The router
keeps no state: what it sends again after a crash, the stages have seen and drop.

Labels that say no more than of which event they are wait until the ledger has said the rest, and with them
those behind them in their partition, for a stage takes a writer's records in their order only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np

from agents.outbox import Outbox
from models.errors import HeadraceError
from models.events import (
    KEYS_UNKNOWN,
    EventDecoder,
    Found,
    Key,
    Known,
    LabelBatch,
    LabelDecoder,
    Lack,
    Reason,
    Reject,
    key_bytes,
)
from models.partitions import partitions_of
from models.pipeline import Labels, Pipeline, Reversals
from models.records import NEVER, RecordCodec, chain, in_step
from models.streams import Stream
from models.windows import Ints
from tables.profiles import Polled, Record

MOST_WAITING = 20_000  # records of a topic that wait for the ledger; above it the topic is not read
AT_ONCE = 5000  # of them in one query
PAUSES_S = (0.1, 5.0)  # between two queries that move nothing: the first, and the longest

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
        self, values: list[bytes], sent: Ints, partitions: Ints, known: Sequence[Known | None] | None
    ) -> tuple[list[_Routed], Ints, list[Reject]]:
        """Records by log, which of these values are good, and the rest.

        sent: (n,) ms; partitions: (n,) in runs; known: (n,) of the event of each that does not say all.
        """


class Route:
    """The router of one topic. `positions` holds the next offset of each of its partitions.

    partitions: by topic. `waiting`: how many records it has and has not sent on.
    """

    waiting = 0

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
        self._send_on([(p, records) for p, records in polled if records and p in self.positions])

    def _send_on(
        self, held: Sequence[tuple[int, Sequence[Record]]], known: Sequence[Known | None] | None = None
    ) -> None:
        origins = np.array([partition for partition, records in held for _ in records], np.int64)
        records = [record for _, found in held for record in found]
        offsets = np.array([r.offset for r in records], np.int64)
        routed, kept, rejects = self._taken.take(
            [r.value or b"" for r in records],
            np.array([r.timestamp for r in records], np.int64),
            origins,
            known,
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


class KnowsEvents(Protocol):
    """Who is asked about events: tables.ledger.reading.Events. `failing`: why nobody can say, while that is so."""

    failing: str | None

    async def find(self, ids: Sequence[int]) -> Found | None:
        """What is known of them; None while nobody can say."""


@dataclass
class _Waiting:
    """A record, what it lacks, when it came (ms), and what is known of its event by now."""

    record: Record
    lack: Lack | None
    came: int
    known: Known | None = None


class Asking(Route):
    """The router of a topic whose records may lack what the ledger knows.

    `handle` only queues, and `run` sends on: nobody waits for it but who is behind in the same partition. What
    the ledger does not know is asked for again, until it holds all that was predicted up to `wait_ms` after the
    record came; then it is a dead letter. Time in which nothing is predicted does not count. clock: ms.
    """

    def __init__(
        self, topic: str, taken: Said, outbox: Outbox, reject: RejectRecord, partitions: dict[str, int],
        ledger: KnowsEvents, wait_ms: int, clock: Callable[[], int], idle: Callable[[], bool],
    ) -> None:  # fmt: skip
        """idle: whether nothing is predicted now."""
        super().__init__(topic, taken, outbox, reject, partitions)
        self._decoder, self._ledger, self._wait_ms, self._clock = taken.decoder, ledger, wait_ms, clock
        self._idle, self._predicted_since = idle, 0  # ms
        self._queues: dict[int, list[_Waiting]] = {}
        self._news = asyncio.Event()
        self.unknown = 0

    @property
    def waiting(self) -> int:  # type: ignore[override]
        """How many records wait."""
        return sum(map(len, self._queues.values()))

    @property
    def full(self) -> bool:
        """Whether so many wait that no more should be read."""
        return self.waiting >= MOST_WAITING

    def start_at(self, positions: dict[int, int]) -> None:
        super().start_at(positions)
        self._queues = {partition: [] for partition in positions}  # another object: what is under way sees it

    def handle(self, polled: Polled) -> None:
        """Take what was read into the queues."""
        now = self._clock()
        for partition, records in polled:
            queue = self._queues.get(partition)
            if queue is None or not records:
                continue
            if not queue:
                self._news.set()
            lacks = self._decoder.lacks([r.value or b"" for r in records])
            queue.extend(_Waiting(record, lack, now) for record, lack in zip(records, lacks, strict=True))

    async def run(self) -> None:
        """Send on what can be, for ever."""
        pause, longest = PAUSES_S
        while True:
            self._news.clear()
            if await self.once():
                pause = PAUSES_S[0]
                await asyncio.sleep(0)  # events have their turn
                continue
            with contextlib.suppress(TimeoutError):
                # what comes behind others waits with them; into an empty queue it need not
                await asyncio.wait_for(self._news.wait(), pause if self.waiting else None)
            pause = min(pause * 2, longest)

    async def once(self) -> bool:
        """Ask once, and send on what may go. Whether anything did."""
        queues = self._queues
        first = {p: queue[: AT_ONCE // len(queues)] for p, queue in queues.items() if queue}
        if not first:
            return False
        if self._idle():
            self._predicted_since = self._clock()
        # 1. what is known of all that lacks something, in one query
        whole_at = await self._ask(
            [w for waiting in first.values() for w in waiting if w.lack and not w.known]
        )
        await self._outbox.room()
        if queues is not self._queues:
            return False  # partitions changed hands: whoever has them begins at their positions
        # 2. of each partition, all up to the first that has to wait
        go = {
            p: list(takewhile(lambda w: self._may_go(w, whole_at), waiting)) for p, waiting in first.items()
        }
        # 3. a letter arrives before what is behind it is sent: sent again later, the record would be dropped as seen
        hopeless = [(p, w.record) for p, waiting in go.items() for w in waiting if w.lack and not w.known]
        for partition, record in hopeless:
            self._reject(self.topic, partition, record, KEYS_UNKNOWN)
        if hopeless:
            await self._outbox.acknowledged()
            if queues is not self._queues:
                return False
            self.unknown += len(hopeless)
        # 4. the rest in its order, and the positions with it
        good = {p: [w for w in waiting if w.known or not w.lack] for p, waiting in go.items()}
        if any(good.values()):
            held = [(p, [w.record for w in waiting]) for p, waiting in good.items() if waiting]
            self._send_on(held, [w.known for waiting in good.values() for w in waiting])
        for partition, waiting in go.items():
            if waiting:
                self.positions[partition] = waiting[-1].record.offset + 1
                del queues[partition][: len(waiting)]
        return any(go.values())

    async def _ask(self, asking: Sequence[_Waiting]) -> int | None:
        """Take down what the ledger knows of these. Up to when it has all predictions, ms."""
        if not asking:
            return None
        found = await self._ledger.find(list({w.lack.event for w in asking if w.lack}))
        if found is None:
            return None
        for waiting in asking:
            assert waiting.lack is not None
            waiting.known = self._decoder.pick(waiting.lack, found.events.get(waiting.lack.event, ()))
        return found.whole_at

    def _may_go(self, waiting: _Waiting, whole_at: int | None) -> bool:
        """Whether it lacks nothing, or what it lacks will not be found any more."""
        if waiting.lack is None or waiting.known is not None:
            return True
        since = max(waiting.came, self._predicted_since)
        return whole_at is not None and whole_at >= since + self._wait_ms


class Events:
    """The events of a stream, into the first entity's log."""

    def __init__(self, pipeline: Pipeline, stream: Stream) -> None:
        self.logs = [pipeline.entities[0].log]
        self._decode = EventDecoder(pipeline, stream).decode
        self._codec = RecordCodec(pipeline, 0)
        self._writer = self._codec.writers.index(stream.topic)

    def take(
        self, values: list[bytes], sent: Ints, partitions: Ints, known: Sequence[Known | None] | None
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
        self.decoder = LabelDecoder(pipeline, said)
        self._to = [(e, RecordCodec(pipeline, pipeline.entities.index(e))) for e in self.decoder.entities]
        self.logs = [entity.log for entity, _ in self._to]
        self._topic = said.topic

    def take(
        self, values: list[bytes], sent: Ints, partitions: Ints, known: Sequence[Known | None] | None
    ) -> tuple[list[_Routed], Ints, list[Reject]]:
        labels, kept, rejects = self.decoder.decode(values, known)
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
    pipeline: Pipeline, outbox: Outbox, reject: RejectRecord, partitions: dict[str, int],
    ledger: KnowsEvents | None, wait_ms: int, clock: Callable[[], int], idle: Callable[[], bool],
) -> list[Route]:  # fmt: skip
    """The routers that a pipeline needs, one for each topic.

    ledger: asked, again and again for up to `wait_ms`, where the pipeline says so. clock: ms. idle: whether
    nothing is predicted now.
    """
    found = [
        Route(stream.topic, Events(pipeline, stream), outbox, reject, partitions)
        for stream in (pipeline.streams if pipeline.routed else ())
    ]
    for said in pipeline.said:
        if said.topic not in pipeline.inputs:
            continue
        taken = Said(pipeline, said)
        if said.looked_up:
            assert ledger is not None
            found.append(Asking(said.topic, taken, outbox, reject, partitions, ledger, wait_ms, clock, idle))
        else:
            found.append(Route(said.topic, taken, outbox, reject, partitions))
    return found


def asks(pipeline: Pipeline) -> bool:
    """Whether a router of this pipeline asks the ledger."""
    return any(said.looked_up and said.topic in pipeline.inputs for said in pipeline.said)
