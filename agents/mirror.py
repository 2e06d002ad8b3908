"""Keeps the mirror up with the profiles: what changed goes to Redis, some moments later and together.

A profile that changes often is written once a round. Redis may be away: the stream goes on, and what
was not written is written when it is back. A mark beside the profiles says up to which position of
each partition they are there; where it is missing or behind, Redis has lost data or an owner died
before it had written all, and the partition is written anew from its store.
"""

from __future__ import annotations

import asyncio
import logging
import time

from tables.mirror import AT_ONCE, Mirror, RedisError
from tables.profiles import Profiles
from tables.store import Store

log = logging.getLogger(__name__)

EVERY_S = 0.05  # how old the mirror may be when there is time for it
SHARE = 0.05  # of the worker's time that mirroring takes at most: under load it gathers instead
RETRY_S = 1.0
LOOK_S = 2.0  # between looks whether the marks are still there when nothing moves
REBUILD_S = 0.02  # of a round that goes into what is written anew


class MirrorAgent:
    """stages: whose profiles to mirror. `failing` is the last error while Redis is away."""

    def __init__(self, stages: list[Profiles], mirror: Mirror) -> None:
        self._stages, self._mirror = stages, mirror
        self._marked: dict[Store, int] = {}
        self._rebuilding: dict[Store, bytes] = {}  # the key behind which to go on
        self._looked = 0.0
        self._lock = asyncio.Lock()
        self.written = 0
        self.failing: str | None = None

    @property
    def rebuilding(self) -> int:
        """How many partitions are being written anew."""
        return len(self._rebuilding)

    async def run(self) -> None:
        """Mirror for ever."""
        while True:
            started = time.monotonic()
            try:
                await self.once()
                self.failing = None
                pause = max(EVERY_S, (time.monotonic() - started) * (1 / SHARE - 1))
            except (RedisError, OSError) as error:
                if self.failing is None:
                    log.warning(
                        "Redis does not take the mirror (%s); the stream goes on, the mirror waits", error
                    )
                self.failing = str(error) or type(error).__name__
                pause = RETRY_S
            await asyncio.sleep(pause)

    async def once(self) -> None:
        """One round: all that had changed when it began, the marks, and a part of what is written anew."""
        async with self._lock:
            await self._once()

    async def _once(self) -> None:
        # 1. partitions that came: how far did their last owner get?
        for stage in self._stages:
            await self._meet(stage)
        # 2. what changed up to these positions
        reached = {
            store: stage.positions[partition]
            for stage in self._stages
            for partition, store in stage.stores.items()
            if partition in stage.positions
        }
        await self._write_changes()
        # 3. say so
        look = time.monotonic() - self._looked > LOOK_S
        for stage in self._stages:
            await self._mark(stage, reached, look)
        if look:
            self._looked = time.monotonic()
        # 4. anew
        await self._rebuild(reached)

    async def _write_changes(self) -> None:
        for stage in self._stages:
            for _ in range(stage.unmirrored // AT_ONCE + 1):
                touched = stage.touched(AT_ONCE)
                if not touched.keys:
                    break
                try:
                    self.written += await self._mirror.store(stage.entity, touched)
                except BaseException:
                    stage.touch(touched)
                    raise

    async def _meet(self, stage: Profiles) -> None:
        held = {store for each in self._stages for store in each.stores.values()}
        for known in (self._marked, self._rebuilding):
            for store in known.keys() - held:
                del known[store]
        came = {
            partition: store
            for partition, store in stage.stores.items()
            if partition in stage.positions and store not in self._marked and store not in self._rebuilding
        }
        if not came:
            return
        for (partition, store), mark in zip(
            came.items(), await self._mirror.marks(stage.entity, list(came)), strict=True
        ):
            if (mark or 0) >= stage.starts[partition]:
                self._marked[store] = mark or 0
            else:
                self._anew(stage, partition, store)

    async def _mark(self, stage: Profiles, reached: dict[Store, int], look: bool) -> None:
        news = {
            partition: (self._marked[store], reached[store])
            for partition, store in stage.stores.items()
            if store in reached and store in self._marked and (look or self._marked[store] != reached[store])
        }
        if not news:
            return
        stores = {partition: stage.stores[partition] for partition in news}
        for partition, before in zip(news, await self._mirror.mark(stage.entity, news), strict=True):
            store = stores[partition]
            expected, reached_now = news[partition]
            if (before or 0) < expected:  # lost, or a copy of some time ago
                self._anew(stage, partition, store)
            elif (before or 0) == expected:  # else another owner has come farther
                self._marked[store] = reached_now

    def _anew(self, stage: Profiles, partition: int, store: Store) -> None:
        log.warning(
            "The mirror lacks profiles of %s partition %d: they are written anew", stage.entity.log, partition
        )
        self._marked.pop(store, None)
        self._rebuilding[store] = b""

    async def _rebuild(self, reached: dict[Store, int]) -> None:
        """Some more of the partitions that are written anew; what is through is marked."""
        until = time.monotonic() + REBUILD_S
        while self._rebuilding and time.monotonic() < until:
            store, after = next(iter(self._rebuilding.items()))
            stage, partition = next(
                ((s, p) for s in self._stages for p, held in s.stores.items() if held is store), (None, 0)
            )
            if stage is None or store not in reached:
                return  # let go meanwhile, or not begun
            last = stage.owe(partition, after, AT_ONCE)
            await self._write_changes()
            if store not in self._rebuilding:
                return
            if last is None:
                (mark,) = await self._mirror.marks(stage.entity, [partition])
                await self._mirror.mark(stage.entity, {partition: (mark or 0, reached[store])})
                del self._rebuilding[store]
                self._marked[store] = reached[store]
            else:
                self._rebuilding[store] = last
