"""Predictions for whoever uses them, each once: the consumer that drops doubles.

async with Predictions("localhost:9092", "card-fraud.predictions") as predictions:
    async for prediction in predictions:
        ...

with Predictions("localhost:9092", "card-fraud.predictions", group="cases") as predictions:
    for prediction in predictions:  # in code without asyncio
        ...
        predictions.commit()
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaConnectionError, KafkaError
from aiokafka.structs import OffsetAndMetadata
from msgspec.json import Decoder

from app import kafka
from models.errors import HeadraceError
from models.predictions import Place, Prediction

POLL_MS = 1000  # how long one poll waits; it ends with the first record
FETCH_WAIT_MS = 50  # how long the broker may hold a fetch back when there is nothing
POLL_RECORDS = 1000  # of decoded work between two looks at the network

T = TypeVar("T")
Positions = Mapping[int, Sequence[int]] | Mapping[str, Sequence[int]]


class PositionGone(HeadraceError):
    """The log does not hold the position from which to read on."""

    def __init__(self, topic: str, partition: int, position: int, first: int, end: int) -> None:
        super().__init__(
            f"The reader of {topic} stands at offset {position} of partition {partition}, which holds {first} to "
            f"{end}: predictions are gone, or the topic was made anew. Begin without positions, or in a new group."
        )


class Received(Prediction):
    """A prediction, and where its record stood. timestamp: when it was sent, ms."""

    partition: int = -1
    offset: int = -1
    timestamp: int = -1


class Predictions:
    """The predictions of a topic as they come, each once, in the order of their partition.

    Without a group it reads all partitions. `positions` tells how far it is, what was given out last
    included: keep it with what you made of it, in one step, and give it back to go on exactly there.

    With a group the partitions are shared among its members, and `commit` keeps the same with Kafka.
    What was given out and not committed comes again, here or elsewhere.

    start: "earliest" or "latest", where there is no position. `dropped` counts doubles, `foreign` what
    was no prediction. Raises PositionGone, TopicsWrong, BrokerUnreachable.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        group: str | None = None,
        *,
        positions: Positions | None = None,
        start: Literal["earliest", "latest"] = "earliest",
    ) -> None:
        if group is not None and positions is not None:
            raise HeadraceError("A group keeps the positions itself; give either a group or positions.")
        self._bootstrap, self._topic, self._group = bootstrap, topic, group
        self._start = start
        self._saved = {int(p): Place(*place) for p, place in (positions or {}).items()}
        self._places: dict[int, Place] = {}
        self._ready: deque[Any] = deque()  # records that were fetched and not yet given out
        self._uncommitted = False  # whether something was given out since the last commit
        self._torn = False  # whether that was so when partitions changed hands,
        self._handovers = 0  # which they have so many times
        self._failure: Exception | None = None
        self._decode = Decoder(Received).decode
        self._consumer: Any = None
        self._blocking: Blocking | None = None
        self.dropped = self.foreign = 0

    @property
    def positions(self) -> dict[int, list[int]]:
        """By partition the next offset and the highest origin seen: good for JSON, and for `positions=`."""
        return {p: [place.next, place.highest] for p, place in list(self._places.items())}

    # --- reading -------------------------------------------------------------------------------

    async def __aenter__(self) -> Predictions:
        count = (await kafka.partitions_of(self._bootstrap, [self._topic]))[self._topic]
        if not count:
            raise kafka.TopicsWrong(f"Kafka has no topic {self._topic}; create it, or correct the name.")
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap, group_id=self._group, enable_auto_commit=False,
            auto_offset_reset=self._start, isolation_level="read_committed", fetch_max_wait_ms=FETCH_WAIT_MS,
        )  # fmt: skip
        try:
            await self._consumer.start()
            if self._group is None:
                tps = [TopicPartition(self._topic, p) for p in range(count)]
                self._consumer.assign(tps)
                await self._go_to(tps, self._saved)
            else:
                self._consumer.subscribe([self._topic], listener=_Handover(self))
        except KafkaConnectionError:
            await self._consumer.stop()
            raise kafka.BrokerUnreachable(self._bootstrap) from None
        except BaseException:
            await self._consumer.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    def __aiter__(self) -> Predictions:
        return self

    async def __anext__(self) -> Received:
        while True:
            while self._ready:
                prediction = self._pass(self._ready.popleft())
                if prediction is not None:
                    return prediction
            # Nothing waits between a poll's end and this line, so no partition changes hands there.
            found = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=POLL_RECORDS)
            if self._failure is not None:
                raise self._failure
            for records in found.values():
                self._ready.extend(records)

    def _pass(self, record: Any) -> Received | None:
        """Step over a record. Its prediction, where it is to be given out."""
        place = self._places.get(record.partition)
        if place is None:
            return None  # fetched before it was known where the partition starts: it comes again
        try:
            prediction = self._decode(record.value or b"")
        except ValueError:  # a predictions topic may be written by hand
            self.foreign += record.offset >= place.next
            place.take(record.offset, -1)
            return None
        before = record.offset < place.next
        if not place.take(record.offset, prediction.origin.offset):
            self.dropped += not before
            return None
        prediction.partition, prediction.offset = record.partition, record.offset
        prediction.timestamp = record.timestamp
        self._uncommitted = True
        return prediction

    async def _go_to(self, tps: Iterable[TopicPartition], known: Mapping[int, Place]) -> None:
        """Start each partition at its place; where that lacks, at its end or beginning.

        Where the highest origin is not known, the tail before the start tells it.
        """
        tps, handovers = list(tps), self._handovers
        first, ends = await self._consumer.beginning_offsets(tps), await self._consumer.end_offsets(tps)
        places: dict[int, Place] = {}
        for tp in tps:
            await self._consumer.position(tp)  # else the client's own look-up may come behind our seek
            fallback = first[tp] if self._start == "earliest" else ends[tp]
            place = known.get(tp.partition) or Place(fallback)
            if not first[tp] <= place.next <= ends[tp]:
                raise PositionGone(self._topic, tp.partition, place.next, first[tp], ends[tp])
            places[tp.partition] = Place(place.next, place.highest)
        if handovers != self._handovers:
            return  # others go on there meanwhile; whoever takes over finds the places anew
        for tp in tps:
            place = places[tp.partition]
            tail = kafka.TAIL if place.highest < 0 else 0
            self._consumer.seek(tp, max(first[tp], place.next - tail))
        self._ready.clear()  # what was fetched before the seek
        self._places = places

    # --- in a group ----------------------------------------------------------------------------

    async def commit(self) -> bool:
        """Keep with Kafka that all that was given out is handled.

        False where partitions changed hands meanwhile: then nothing is kept, and all that was given out
        since the last commit comes again, here or elsewhere.
        """
        if self._group is None:
            raise HeadraceError("Without a group there is nothing to commit; keep `positions` yourself.")
        kept = not self._torn and await self._keep()
        self._uncommitted = self._torn = False
        if not kept:
            with contextlib.suppress(IllegalStateError):  # partitions change hands again just now
                await self._go_to_committed(self._consumer.assignment())
        return kept

    async def _keep(self) -> bool:
        offsets = {
            TopicPartition(self._topic, p): OffsetAndMetadata(place.next, _metadata(place))
            for p, place in self._places.items()
        }
        try:
            if offsets:
                await self._consumer.commit(offsets)
        except (IllegalStateError, KafkaError):
            return False
        return True

    def _let_go(self) -> None:
        self._handovers += 1
        self._torn |= self._uncommitted
        self._uncommitted = False
        self._ready.clear()
        self._places = {}

    async def _take_over(self, tps: Iterable[TopicPartition]) -> None:
        self._let_go()  # what was given out since they were revoked, too
        try:
            await self._go_to_committed(tps)
        except Exception as error:  # the client would log it and read on from anywhere
            self._failure = error

    async def _go_to_committed(self, tps: Iterable[TopicPartition]) -> None:
        committed = await self._consumer._coordinator.fetch_committed_offsets(list(tps))
        known = {
            tp.partition: Place(kept.offset, _highest(kept.metadata))
            for tp, kept in committed.items()
            if kept.offset >= 0
        }
        await self._go_to(tps, known)

    # --- without asyncio -----------------------------------------------------------------------

    def __enter__(self) -> Blocking:
        self._blocking = Blocking(self)
        return self._blocking

    def __exit__(self, *_: object) -> None:
        assert self._blocking is not None
        self._blocking.close()


class Blocking:
    """The same for code without asyncio: each call waits, while a loop in a thread keeps the group's place."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="predictions", daemon=True)
        self._thread.start()
        try:
            self._run(predictions.__aenter__())
        except BaseException:
            self._end()
            raise

    @property
    def positions(self) -> dict[int, list[int]]:
        """See Predictions."""
        return self._predictions.positions

    @property
    def dropped(self) -> int:
        """How many doubles were dropped."""
        return self._predictions.dropped

    def commit(self) -> bool:
        """See Predictions."""
        return self._run(self._predictions.commit())

    def __iter__(self) -> Iterator[Received]:
        while True:
            yield self._run(self._predictions.__anext__())

    def close(self) -> None:
        try:
            self._run(self._predictions.__aexit__())
        finally:
            self._end()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nothing may be taken that nobody gets
            future.cancel()
            raise

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Handover(ConsumerRebalanceListener):  # type: ignore[misc]
    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._predictions._let_go()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._predictions._take_over(assigned)


def _metadata(place: Place) -> str:
    return f"highest origin {place.highest}"


def _highest(metadata: str) -> int:
    """The highest origin, -1 where another wrote the metadata."""
    found = re.fullmatch(r"highest origin (-?\d+)", metadata)
    return int(found[1]) if found else -1


__all__ = ["PositionGone", "Predictions", "Received"]
