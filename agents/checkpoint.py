"""Takes checkpoints of the stores that a worker holds, in the background and one after the other.

The URL may be away: the stream goes on, and what could not be taken is taken the next time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tables.checkpoints import CheckpointError, Checkpoints, Manifest, Place
from tables.profiles import Profiles
from tables.store import Store, StoreError

log = logging.getLogger(__name__)


class CheckpointAgent:
    """stages: whose stores to copy. `taken` has the last of each that is held; `failures` counts."""

    def __init__(
        self, stages: list[Profiles], checkpoints: Checkpoints, every_s: float, now_ms: Callable[[], int]
    ) -> None:
        self._stages, self._checkpoints = stages, checkpoints
        self._every_s, self._now_ms = every_s, now_ms
        self._failing = False
        self._held: dict[Store, tuple[Place, Manifest | None]] = {}
        self.failures = 0

    @property
    def taken(self) -> list[Manifest]:
        return [manifest for _, manifest in list(self._held.values()) if manifest is not None]

    async def run(self) -> None:
        """Take them for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.once()

    async def once(self) -> None:
        """One round: a checkpoint of each store that moved."""
        self._held = {
            store: self._held.get(store) or (self._checkpoints.place(stage.entity.name, partition), None)
            for stage in self._stages
            for partition, store in stage.stores.items()
        }
        failed: Exception | None = None
        for store, (place, last) in list(self._held.items()):
            if (
                store.position is None
                or store.closed
                or (last is not None and last.position == store.position)
            ):
                continue
            try:
                manifest = await asyncio.to_thread(place.take, store, self._now_ms())
                self._held[store] = place, manifest
            except (CheckpointError, StoreError) as error:
                if not store.closed:  # else its next owner goes on
                    self.failures += 1
                    failed = error
        if failed is not None and not self._failing:
            log.warning("%s The stream goes on, checkpoints are tried again", failed)
        self._failing = failed is not None
