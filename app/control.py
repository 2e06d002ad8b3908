"""What the workers of an instance tell each other, on a small compacted topic.

    lows/<topic>/<partition>                how far the worker is whose first partition this is (agents.in_step)
    missing/<log>/<partition>/<source>      behind which offset a record of this source did not come

Nothing here decides a value. A worker that hears nothing of how far others are goes on after a bound;
one that lacks a record leaves its successors out, and asks until it has come.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from agents.in_step import IDLE_S, InStep, Place
from agents.outbox import Outbox
from app import kafka
from tables.profiles import Profiles

TELL_S = 0.005  # between looks at our own progress: two workers take turns at about this pace
REPEAT_S = 5.0  # well within IDLE_S


class Word(msgspec.Struct):
    """Behind which offset a record is missing; null: no more."""

    worker: str
    value: int | None


class Lows(msgspec.Struct):
    """By `topic/partition` the lowest time that it has yet to pass, ms; null: it is at its log's end."""

    worker: str
    lows: dict[str, int | None]


_decode = msgspec.json.Decoder(Word).decode
_decode_lows = msgspec.json.Decoder(Lows).decode


def missing(record: Any) -> tuple[tuple[str, int, int], int | None] | None:
    """Of a record that says that something is missing: log, partition and source, and behind which offset.

    None in place of the offset: it has come. None: the record says something else.
    """
    kind, *rest = (record.key or b"").decode().split("/")
    if kind != "missing":
        return None
    return (rest[0], int(rest[1]), int(rest[2])), _decode(record.value).value


class Control:
    """writers: by log, the topics that its writers read. replay: told such a topic, its partition and the offset
    behind which what is made of it is missing somewhere.
    """

    def __init__(
        self, address: str, topic: str, in_step: InStep, stages: Sequence[Profiles], outbox: Outbox,
        writers: Mapping[str, Sequence[str]], replay: Callable[[str, int, int], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._address, self._topic = address, topic
        self._writers = writers
        self._in_step, self._stages, self._outbox = in_step, stages, outbox
        self._replay = replay
        self._worker = uuid.uuid4().hex

    async def listen(self) -> None:
        """Hear what is said, for ever."""
        began = time.time() * 1000
        async for record in kafka.follow(self._address, self._topic):
            if (record.key or b"").startswith(b"lows/"):
                if record.timestamp < began - IDLE_S * 1000:
                    continue  # of a worker of old
                word = _decode_lows(record.value)
                for name, low in word.lows.items() if word.worker != self._worker else ():
                    topic, _, partition = name.rpartition("/")
                    self._in_step.hear((topic, int(partition)), low, time.monotonic())
            elif (said := missing(record)) is not None and record.timestamp > began:
                (log, _, source), highest = said
                writers = self._writers[log]
                writers_partition, writer = divmod(source, len(writers))
                if highest is not None:
                    await self._replay(writers[writer], writers_partition, highest)

    async def tell_lows(self) -> None:
        """Tell the others how far we are, for ever."""
        told: dict[Place, int | None] = {}
        starts, repeated = 0, 0.0
        while True:
            await asyncio.sleep(TELL_S)
            if not self._in_step.shared:
                continue
            now = time.monotonic()
            lows = self._in_step.lows(now)
            again = now - repeated > REPEAT_S and any(low is not None for low in lows.values())
            if self._in_step.starts == starts and not again and not self._in_step.differ(told, lows):
                continue
            starts = self._in_step.starts
            await self._outbox.acknowledged()  # what these times say has been handed on has arrived
            if self._in_step.starts == starts:
                topic, partition = min(lows)
                words = Lows(self._worker, {f"{t}/{p}": low for (t, p), low in lows.items()})
                self._say(f"lows/{topic}/{partition}", words)
                told, repeated = lows, now
            else:
                starts = 0  # other partitions are ours now

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
                self._say(key, Word(self._worker, None))
            for key, highest in now.items():
                self._say(key, Word(self._worker, highest))
            asked = set(now)
            await asyncio.sleep(REPEAT_S)

    def _say(self, key: str, said: Word | Lows) -> None:
        self._outbox.put(self._topic, 0, key.encode(), msgspec.json.encode(said))
