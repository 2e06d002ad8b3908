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


class Flush:
    """Writes what all stages of a worker have folded. `committed` is told each safe position."""

    def __init__(
        self, stages: list[Profiles], route: Route | None, outbox: Outbox,
        committed: Callable[[str, int, int], None], label_topic: str | None,
    ) -> None:  # fmt: skip
        self._stages, self._route, self._outbox = stages, route, outbox
        self._committed, self._label_topic = committed, label_topic
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

    async def once(self) -> None:
        """One flush. On return all that was folded before the call is written."""
        async with self._lock:
            # 1. the state between two micro-batches
            self._taken.extend((stage, taken) for stage in self._stages for taken in stage.snapshots())
            routed = dict(self._route.positions) if self._route else {}
            # 2. everything that was sent on the way to it has arrived
            await self._outbox.acknowledged()
            # 3. profiles and position in one step, a partition at a time
            while self._taken:
                stage, snapshot = self._taken.popleft()
                stage.write(snapshot)
                self._committed(stage.entity.log, snapshot.partition, snapshot.progress.position)
                await asyncio.sleep(0)
            # 4. the router's place, which is all the state that it has
            for partition, position in routed.items():
                assert self._label_topic is not None
                self._committed(self._label_topic, partition, position)

    async def durable(self) -> None:
        """Put what was written on disk. No store is closed meanwhile."""
        async with self._lock:
            for stage in self._stages:
                await asyncio.to_thread(stage.flush)
