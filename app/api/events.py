"""Events in over HTTP: checked as a worker checks them, published, and answered when Kafka has them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from aiohttp import web
from aiokafka.errors import KafkaError

from app import kafka
from app.api import schemas
from app.api.live import Live, as_answer
from app.api.problems import Fault, ProblemError, fault_in, invalid
from app.api.schemas import Placed, Published, PublishQuery
from app.client import Received
from models import predictions
from models.errors import HeadraceError
from models.events import EventDecoder, LabelDecoder, Reject, key_bytes
from models.partitions import partitions_of
from models.pipeline import Pipeline
from models.streams import Stream
from models.windows import Ints

START_S = 5.0
ACKNOWLEDGE_S = 10.0

log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """Good records: their keys, and their 64-bit ids (n,)."""

    keys: list[bytes | None]
    ids: Ints


Check = Callable[[Sequence[bytes], Ints], tuple[Checked, list[Reject]]]


class Intake:
    """Publishes to the topics of one pipeline. most: events of one request. clock: seconds since the epoch."""

    def __init__(
        self, pipeline: Pipeline, address: str | None, live: Live | None, most: int, clock: Callable[[], float]
    ) -> None:  # fmt: skip
        self._pipeline, self._address, self._live = pipeline, address, live
        self._most, self._clock = most, clock
        self._targets = targets(pipeline)
        self._producer: Any = None
        self._counts: dict[str, int] = {}
        self._starting = asyncio.Lock()

    async def publish(self, request: web.Request, query: PublishQuery, body: bytes) -> web.Response:
        """POST /v1/events/{stream}"""
        name = request.match_info["stream"]
        if name not in self._targets:
            sentence = f"There is no stream {name!r}; there are {', '.join(self._targets)}."
            raise ProblemError("not-found", sentence, Fault("stream", sentence))
        topic, stream, check = self._targets[name]
        waits = query.wait == "prediction"
        if waits and (stream is None or not stream.scored):
            raise invalid("wait", f"what is said on {name} is not predicted; wait for ack.")
        values, single = _values(body, self._most)
        sent = np.full(len(values), int(self._clock() * 1000), np.int64)
        checked, rejects = check(values, sent)
        if rejects:
            raise _rejected(rejects, single)
        producer = await self._started()
        if not waits:
            places = await self._send(producer, topic, values, checked)
            return _answer(Published(topic, places), 202)
        return await self._predicted(producer, topic, values, checked, query.wait_s)

    async def close(self) -> None:
        if self._producer is not None:
            with contextlib.suppress(KafkaError, TimeoutError):
                await asyncio.wait_for(self._producer.stop(), START_S)

    async def _predicted(
        self, producer: Any, topic: str, values: list[bytes], checked: Checked, wait_s: float
    ) -> web.Response:
        assert self._live is not None
        found: dict[int, Received] = {}
        wanted = set(checked.ids.tolist())
        all_there = asyncio.Event()

        def take(prediction: Received | None) -> None:
            if prediction is None:
                all_there.set()
                return
            id_ = predictions.identity(self._pipeline, prediction)
            if id_ in wanted:
                found.setdefault(id_, prediction)
                if len(found) == len(wanted):
                    all_there.set()

        async with self._live.listening(take):
            places = await self._send(producer, topic, values, checked)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(all_there.wait(), wait_s)
        told = [as_answer(self._pipeline, found[i]) if i in found else None for i in checked.ids.tolist()]
        return _answer(Published(topic, places, told), 200 if None not in told else 202)

    async def _send(self, producer: Any, topic: str, values: list[bytes], checked: Checked) -> list[Placed]:
        targets = partitions_of(checked.keys, checked.ids, self._counts[topic]).tolist()
        try:
            acknowledged = [
                await producer.send(topic, value, key=key, partition=partition)
                for value, key, partition in zip(values, checked.keys, targets, strict=True)
            ]
            async with asyncio.timeout(ACKNOWLEDGE_S):
                records = await asyncio.gather(*acknowledged)
        except (KafkaError, OSError) as error:
            self._producer = None  # an idempotent producer that failed may not go on
            with contextlib.suppress(Exception):
                await asyncio.wait_for(producer.stop(), START_S)
            raise ProblemError(
                "unavailable",
                f"Kafka did not acknowledge ({type(error).__name__}); send again: what comes twice counts once.",
            ) from None
        return [Placed(r.partition, r.offset) for r in records]

    async def _started(self) -> Any:
        if self._address is None:
            raise ProblemError("unavailable", "This process has no Kafka; set HEADRACE_KAFKA.", retry_s=60)
        async with self._starting:
            if self._producer is not None:
                return self._producer
            try:
                async with asyncio.timeout(START_S):
                    self._counts = await kafka.partitions_of(
                        self._address, [topic for topic, _, _ in self._targets.values()]
                    )
                    producer = kafka.producer(self._address)
                    await producer.start()
            except (KafkaError, OSError, TimeoutError, HeadraceError) as error:
                raise ProblemError("unavailable", f"Kafka does not answer ({error}); try again.") from None
            missing = [topic for topic, count in self._counts.items() if not count]
            if missing:
                await producer.stop()
                raise ProblemError(
                    "unavailable",
                    f"Kafka has no topic {missing[0]}; run `headrace topics create`.",
                    retry_s=60,
                )
            self._producer = producer
            return producer


def targets(pipeline: Pipeline) -> dict[str, tuple[str, Stream | None, Check]]:
    """By name in the path: topic, the stream where it is one, and how records are checked."""
    found: dict[str, tuple[str, Stream | None, Check]] = {
        stream.name: (stream.topic, stream, _events(pipeline, stream)) for stream in pipeline.streams
    }
    for name, said in (("labels", pipeline.labels), ("reversals", pipeline.reversals)):
        if said is not None and name not in found:
            found[name] = (said.topic, None, _said(pipeline, said))
    return found


def _events(pipeline: Pipeline, stream: Stream) -> Check:
    decoder = EventDecoder(pipeline, stream)

    def check(values: Sequence[bytes], sent: Ints) -> tuple[Checked, list[Reject]]:
        batch, _, rejects = decoder.decode(values, sent)
        return Checked([None if k is None else key_bytes(k) for k in batch.keys], batch.ids), rejects

    return check


def _said(pipeline: Pipeline, said: Any) -> Check:
    """Labels and reversals are keyed by the event's id."""
    decoder = LabelDecoder(pipeline, said)
    id_of = msgspec.json.Decoder(dict[str, Any]).decode

    def check(values: Sequence[bytes], _: Ints) -> tuple[Checked, list[Reject]]:
        batch, kept, rejects = decoder.decode(values)
        keys = [key_bytes(id_of(values[i])[pipeline.stream.id]) for i in kept.tolist()]
        return Checked(list(keys), batch.ids), rejects

    return check


def _values(body: bytes, most: int) -> tuple[list[bytes], bool]:
    """The JSON of each event of a body, as it came, and whether the body was one event alone."""
    try:
        found = msgspec.json.decode(body, type=msgspec.Raw)
        if not bytes(found).lstrip().startswith(b"["):
            return [bytes(found)], True
        many = msgspec.json.decode(body, type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        raise ProblemError(
            "not-json", f"The body is no JSON ({error}); send an event, or an array of events."
        ) from None
    if not many:
        raise invalid("body", "the array is empty; send at least one event.")
    if len(many) > most:
        raise invalid("body", f"{len(many)} are more than {most} events of one request; send them in parts.")
    return [bytes(raw) for raw in many], False


def _rejected(rejects: Sequence[Reject], single: bool) -> ProblemError:
    faults = []
    for reject in sorted(rejects, key=lambda r: r.index):
        fault = fault_in(reject.reason.error, "" if single else f"[{reject.index}]")
        if fault.field in ("body", f"[{reject.index}]") and reject.reason.code in (
            "wrong-decimal", "wrong-time", "time-ahead", "wrong-label",
        ):  # fmt: skip
            named = reject.reason.error.partition(" ")[0]  # these sentences begin with the field
            fault = Fault(named if single else f"[{reject.index}].{named}", fault.detail)
        faults.append(fault)
    many = "" if len(rejects) == 1 else f", and {len(rejects) - 1} more"
    return ProblemError(
        "invalid", f"{faults[0].field}: {faults[0].detail}{many}; nothing was published.", *faults[:100]
    )


def _answer(body: Published, status: int) -> web.Response:
    return web.Response(body=schemas.encode(body), status=status, content_type="application/json")
