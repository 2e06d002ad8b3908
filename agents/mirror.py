"""Keeps the mirror up with the profiles: what changed goes to Redis, some moments later and together.

A profile that changes often is written once a round. Redis may be away: the stream goes on, and what
was not written is written when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import time

from tables.mirror import AT_ONCE, Mirror, RedisError
from tables.profiles import Profiles

log = logging.getLogger(__name__)

EVERY_S = 0.05  # how old the mirror may be when there is time for it
SHARE = 0.05  # of the worker's time that mirroring takes at most: under load it gathers instead
RETRY_S = 1.0


class MirrorAgent:
    """stages: whose profiles to mirror. `failing` is the last error while Redis is away."""

    def __init__(self, stages: list[Profiles], mirror: Mirror) -> None:
        self._stages, self._mirror = stages, mirror
        self.written = 0
        self.failing: str | None = None

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
        """One round: all that had changed when it began."""
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
