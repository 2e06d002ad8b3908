"""The order that makes positions safe: outputs acknowledged first, then profiles and position together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from agents.outbox import Outbox
from agents.route import Route
from tables.profiles import Profiles
from tables.store import Snapshot

FLUSH_EVERY_S = (
    1.0  # a profile that changes often is written once; a partition's batch takes a millisecond or two
)
DURABLE_EVERY_S = 3.0  # bounds the fold after a crash to some seconds of events
# Parts of the bound on memory. A first sweep may find all in use, and what is taken from the system is a little
# above what is in use, so there is room left for another sixteenth, gaps, and what one poll adds.
EVICT_ABOVE, EVICT_TO = 13 / 16, 12 / 16


class Flush:
    """Writes what all stages of a worker have folded. `committed` is told each safe position.

    most_bytes: bounds the memory of all profiles together.
    """

    def __init__(
        self, stages: list[Profiles], routes: list[Route], outbox: Outbox,
        committed: Callable[[str, int, int], None], most_bytes: int,
    ) -> None:  # fmt: skip
        self._stages, self._routes, self._outbox = stages, routes, outbox
        self._committed = committed
        self._most_bytes = most_bytes
        self._above = most_bytes * EVICT_ABOVE
        self._lock = asyncio.Lock()
        # Taken and not yet written. A flush that is cancelled leaves them to the next one: their
        # profiles count as clean, so a later position must not be written without them.
        self._taken: deque[tuple[Profiles, Snapshot]] = deque()

    async def run(self) -> None:
        """Flush for ever, and make it durable now and then."""
        while True:
            for _ in range(round(DURABLE_EVERY_S / FLUSH_EVERY_S)):
                await asyncio.sleep(FLUSH_EVERY_S)
                await self.once()
            await self.durable()

    async def room(self) -> None:
        """Wait while too much waits to be sent, has changed, or lies in memory.

        It waits for one flush at most: what that cannot let go has to stay.
        """
        await self._outbox.room()
        if self._crowded():
            async with self._lock:
                if self._crowded():
                    await self._once()

    def _crowded(self) -> bool:
        return self._used() > self._above or any(stage.crowded() for stage in self._stages)

    def _used(self) -> int:
        return sum(stage.used for stage in self._stages)

    async def once(self) -> None:
        """One flush. On return all that was folded before the call is written."""
        async with self._lock:
            await self._once()

    async def _once(self) -> None:
        # 1. the state between two micro-batches, of each partition its own
        for stage in self._stages:
            for taken in stage.snapshots():
                self._taken.append((stage, taken))
                await asyncio.sleep(0)
        routed = [
            (route.topic, p, position) for route in self._routes for p, position in route.positions.items()
        ]
        # 2. everything that was sent on the way to it has arrived
        await self._outbox.acknowledged()
        # 3. profiles and position in one step, a partition at a time
        while self._taken:
            stage, snapshot = self._taken.popleft()
            stage.write(snapshot)
            self._committed(stage.entity.log, snapshot.partition, snapshot.progress.position)
            await asyncio.sleep(0)
        # 4. the routers' places, which are all the state that they have
        for topic, partition, position in routed:
            self._committed(topic, partition, position)
        # 5. what is stored need not be in memory
        if self._used() > self._above:
            await self._evict()

    async def _evict(self) -> None:
        """Make room; with what was in use lately only above the bound itself."""
        await self._sweep(forced=False)
        if self._used() > self._most_bytes:
            await self._sweep(forced=True)
        # Where that was not enough, the next flush comes after some growth and not at once.
        used = self._used()
        grown = used + self._most_bytes * (EVICT_ABOVE - EVICT_TO)
        self._above = max(
            self._most_bytes * EVICT_ABOVE, grown if used > self._most_bytes else min(grown, self._most_bytes)
        )

    async def _sweep(self, forced: bool) -> None:
        """Through the largest stage first, until there is enough room or no more to be had."""
        sweeps = {stage: stage.sweep(forced) for stage in self._stages}
        while sweeps and self._used() > self._most_bytes * EVICT_TO:
            largest = max(sweeps, key=lambda stage: stage.used)
            if next(sweeps[largest], None) is None:
                del sweeps[largest]
            await asyncio.sleep(0)

    async def durable(self) -> None:
        """Put what was written on disk. No store is closed meanwhile."""
        async with self._lock:
            for stage in self._stages:
                await asyncio.to_thread(stage.flush)
