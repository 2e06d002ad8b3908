"""The producer of a worker: idempotent, and fenced for each predictions partition that it has claimed.

A process that was stopped with a batch in hand may send it when it wakes, after another owner has read
the predictions' tail. So an owner first takes over the partition's own producer id: Kafka refuses every
older owner's batches from then on, at no cost per batch.

It extends internals of aiokafka 0.14.0, so that version is pinned, and `tests/integration/test_fence.py`
holds them to what is used here.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.errors import (
    ConcurrentTransactions,
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    KafkaConnectionError,
    NodeNotReadyError,
    NotCoordinatorError,
    ProducerFenced,
    RequestTimedOutError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.producer.transaction_manager import PidAndEpoch, TransactionManager
from aiokafka.protocol.transaction import AddPartitionsToTxnRequest, EndTxnRequest, InitProducerIdRequest

from app import kafka
from app.settings import Delivery
from models.errors import HeadraceError

RENEW_S = 86_400.0  # the coordinator forgets an id that has opened no transaction for a week
CLAIM_S = 30.0  # for a partition; a broker that restarts answers again within it
TRANSACTION_MS = 60_000  # an owner that dies in one is rid of by its successor long before
RETRY_S = 0.02

_PASSING = (
    ConcurrentTransactions, CoordinatorLoadInProgressError, CoordinatorNotAvailableError, KafkaConnectionError,
    NodeNotReadyError, NotCoordinatorError, RequestTimedOutError, UnknownTopicOrPartitionError,
)  # fmt: skip


class Fenced(HeadraceError):
    """Another worker has taken over a partition that this one still wrote to."""

    def __init__(self, topic: str, partition: int) -> None:
        super().__init__(
            f"Another worker owns {topic} partition {partition} now and Kafka refuses this one's batches; "
            "start it again to take part."
        )


class Producer:
    """An idempotent producer of batches. `fence_id` names a partition's producer id, for all its owners."""

    def __init__(self, address: str, fence_id: str = "", delivery: Delivery = "fenced") -> None:
        self._address, self._fence_id, self._delivery = address, fence_id, delivery
        self._plain = kafka.producer(address)
        self._identities = _Identities()
        for part in (self._plain, self._plain._sender, self._plain._message_accumulator):
            part._txn_manager = self._identities
        self._transactional: dict[tuple[str, int], AIOKafkaProducer] = {}
        self._fenced_at: dict[tuple[str, int], float] = {}

    async def start(self, topics: Iterable[str]) -> None:
        """topics: where to send, which learnt later costs the first record of each some 0.3 s."""
        await self._plain.start()
        for topic in topics:
            await self._plain.partitions_for(topic)

    async def stop(self) -> None:
        await self.release()
        await self._plain.stop()

    async def claim(self, topic: str, partitions: Iterable[int]) -> None:
        """Be the only one who can write to these partitions. Nothing of ours is on its way to them."""
        take = self._fence if self._delivery == "fenced" else self._open
        await asyncio.gather(*(take(topic, partition) for partition in partitions))

    async def release(self) -> None:
        """Let go of all that was claimed."""
        self._identities.fenced.clear()
        self._fenced_at.clear()
        producers = list(self._transactional.values())
        self._transactional.clear()
        await asyncio.gather(*(p.stop() for p in producers))

    def create_batch(self, topic: str, partition: int) -> Any:
        """An empty batch that `send_batch` takes."""
        return self._transactional.get((topic, partition), self._plain).create_batch()

    async def send_batch(self, batch: Any, topic: str, partition: int) -> None:
        """Send and wait until it has arrived; of a partition, one at a time. Raises Fenced, or a KafkaError."""
        if time.monotonic() - self._fenced_at.get((topic, partition), math.inf) > RENEW_S:
            await self._fence(topic, partition)
        try:
            transactional = self._transactional.get((topic, partition))
            if transactional is None:
                await (await self._plain.send_batch(batch, topic, partition=partition))
                return
            async with transactional.transaction():
                await (await transactional.send_batch(batch, topic, partition=partition))
        except ProducerFenced:
            raise Fenced(topic, partition) from None

    async def _open(self, topic: str, partition: int) -> None:
        """A producer of its own, whose start ends what another owner has begun."""
        producer = kafka.producer(
            self._address,
            transactional_id=self._transaction_id(topic, partition),
            transaction_timeout_ms=TRANSACTION_MS,
        )
        await asyncio.wait_for(producer.start(), CLAIM_S)
        self._transactional[topic, partition] = producer

    async def _fence(self, topic: str, partition: int) -> None:
        """Take the partition's producer id at a higher epoch, and let the partition's leader know.

        The coordinator alone knows a new epoch until something of it is written. So an empty
        transaction is aborted, whose marker is; the second InitProducerId waits for it, and gives the
        epoch of the plain batches to come.
        """
        coordinator = _Coordinator(self._plain.client, self._transaction_id(topic, partition))
        async with asyncio.timeout(CLAIM_S):
            first = await coordinator.identity()
            await coordinator.begin(first, topic, partition)
            await coordinator.abort(first)
            self._identities.fence(TopicPartition(topic, partition), await coordinator.identity())
        self._fenced_at[topic, partition] = time.monotonic()

    def _transaction_id(self, topic: str, partition: int) -> str:
        return f"{self._fence_id}-{topic}-{partition}"


class _Identities(TransactionManager):  # type: ignore[misc]
    """Producer id and epoch by partition. aiokafka asks for a batch's sequence number first, then for those."""

    def __init__(self) -> None:
        super().__init__(None, TRANSACTION_MS)
        self.fenced: dict[TopicPartition, PidAndEpoch] = {}
        self._of_batch: PidAndEpoch | None = None

    def fence(self, tp: TopicPartition, identity: PidAndEpoch) -> None:
        self.fenced[tp] = identity
        self._sequence_numbers[tp] = 0

    def sequence_number(self, tp: TopicPartition) -> int:
        self._of_batch = self.fenced.get(tp)
        number: int = super().sequence_number(tp)
        return number

    @property
    def producer_id(self) -> int:
        return int((self._of_batch or self._pid_and_epoch).pid)

    @property
    def producer_epoch(self) -> int:
        return int((self._of_batch or self._pid_and_epoch).epoch)


class _Coordinator:
    """Kafka's transaction coordinator of one id. What passes is asked again; the caller sets the bound."""

    def __init__(self, client: Any, transaction_id: str) -> None:
        self._client, self._id = client, transaction_id

    async def identity(self) -> PidAndEpoch:
        """Our producer id at an epoch above all before. Waits for a transaction that is being ended."""
        got = await self._ask(InitProducerIdRequest(self._id, TRANSACTION_MS), _code)
        return PidAndEpoch(got.producer_id, got.producer_epoch)

    async def begin(self, who: PidAndEpoch, topic: str, partition: int) -> None:
        request = AddPartitionsToTxnRequest(self._id, who.pid, who.epoch, [(topic, [partition])])
        await self._ask(request, lambda got: int(got.errors[0][1][0][1]))

    async def abort(self, who: PidAndEpoch) -> None:
        await self._ask(EndTxnRequest(self._id, who.pid, who.epoch, False), _code)

    async def _ask(self, request: Any, code_of: Callable[[Any], int]) -> Any:
        while True:
            try:
                node = await self._client.coordinator_lookup(CoordinationType.TRANSACTION, self._id)
                got = await self._client.send(node, request, group=ConnectionGroup.COORDINATION)
                if not (code := code_of(got)):
                    return got
                raise for_code(code)()
            except _PASSING:
                await asyncio.sleep(RETRY_S)


def _code(got: Any) -> int:
    return int(got.error_code)
