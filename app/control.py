"""What the workers of an instance tell each other, on a small compacted topic.

    low/<topic>/<partition>                 how far a partition is that catches up (agents.in_step)
    missing/<log>/<partition>/<source>      behind which offset a record of this source did not come

Nothing here decides a value. A worker that hears nothing of how far others are goes on after a bound;
one that lacks a record leaves its successors out, and asks until it has come.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from agents.in_step import IDLE_S, InStep, Place
from agents.outbox import Outbox
from app import kafka
from models.records import FROM_LABELS
from tables.profiles import Profiles

TELL_S = 0.005  # between looks at our own progress: two workers take turns at about this pace
REPEAT_S = 5.0  # well within IDLE_S


class Word(msgspec.Struct):
    """offset or time, by the kind of message; null: no more of it."""

    worker: str
    value: int | None


_decode = msgspec.json.Decoder(Word).decode


def missing(record: Any) -> tuple[tuple[str, int, int], int | None] | None:
    """Of a record that says that something is missing: log, partition and source, and behind which offset.

    None in place of the offset: it has come. None: the record says something else.
    """
    kind, *rest = (record.key or b"").decode().split("/")
    if kind != "missing":
        return None
    return (rest[0], int(rest[1]), int(rest[2])), _decode(record.value).value


class Control:
    """places: how many partitions all workers together keep in step; who has them all tells nobody.

    replay: told the stage number (-1 the router), the partition and the offset behind which its outputs
    are missing somewhere.
    """

    def __init__(
        self, address: str, topic: str, in_step: InStep, stages: Sequence[Profiles], outbox: Outbox, places: int,
        replay: Callable[[int, int, int], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._address, self._topic = address, topic
        self._in_step, self._stages, self._outbox, self._places = in_step, stages, outbox, places
        self._replay = replay
        self._worker = uuid.uuid4().hex
        self._others: dict[Place, tuple[int, float]] = {}

    def others(self) -> dict[Place, int]:
        """By partition, the lowest time that it has yet to pass at another worker, ms."""
        now = time.monotonic()
        return {place: low for place, (low, at) in self._others.items() if now - at < IDLE_S}

    async def listen(self) -> None:
        """Hear what is said, for ever."""
        began = time.time() * 1000
        async for record in kafka.follow(self._address, self._topic):
            kind, *rest = (record.key or b"").decode().split("/")
            word = _decode(record.value)
            if kind == "low" and word.worker != self._worker:
                place = (rest[0], int(rest[1]))
                if word.value is None:
                    self._others.pop(place, None)
                else:
                    self._others[place] = (word.value, time.monotonic())
            elif (said := missing(record)) is not None and record.timestamp > began:
                (log, _, source), highest = said
                partition, writer = divmod(source, 2)
                stage = -1 if writer == FROM_LABELS else self._number(log) - 1
                if highest is not None:
                    await self._replay(stage, partition, highest)

    async def tell_lows(self) -> None:
        """Tell the others how far we are, for ever."""
        told: dict[Place, int] = {}
        repeated = 0.0
        while True:
            await asyncio.sleep(TELL_S)
            if self._in_step.size in (0, self._places):
                continue
            now = time.monotonic()
            if now - repeated > REPEAT_S:
                told, repeated = {}, now
            lows = self._in_step.lows(now)
            news: dict[Place, int | None] = {p: low for p, low in lows.items() if told.get(p) != low}
            news |= {p: None for p in told if p not in lows}
            if news:
                await self._outbox.acknowledged()  # what these times say has been handed on has arrived
                for (topic, partition), low in news.items():
                    self._say(f"low/{topic}/{partition}", low)
            told = lows

    async def tell_missing(self) -> None:
        """Ask for what is missing, for ever."""
        asked: set[str] = set()
        while True:
            now = {
                f"missing/{stage.entity.log}/{partition}/{source}": highest
                for stage in self._stages
                for (partition, source), highest in stage.gaps.items()
            }
            for key in asked - now.keys():
                self._say(key, None)
            for key, highest in now.items():
                self._say(key, highest)
            asked = set(now)
            await asyncio.sleep(REPEAT_S)

    def _number(self, log: str) -> int:
        return [stage.entity.log for stage in self._stages].index(log)

    def _say(self, key: str, value: int | None) -> None:
        self._outbox.put(self._topic, 0, key.encode(), msgspec.json.encode(Word(self._worker, value)))
