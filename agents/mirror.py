"""Keeps the mirror up with the profiles: what changed goes to Redis, some moments later and together.

A profile that changes often is written once a round. Redis may be away: the stream goes on, and what
was not written is written when it is back. The mark of a partition says up to which position its profiles
are there; where it is missing or behind, Redis has lost data or an owner died before it had written all, and
the partition is written anew from memory and its store. Where it is ahead, this owner folds again what
its predecessor had mirrored: it writes nothing until it is as far, so that readers never go back in time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from tables.mirror import AT_ONCE, Mark, MirrorWriter, RedisError
from tables.profiles import Profiles, Touched
from tables.store import Store

log = logging.getLogger(__name__)

EVERY_S = 0.05  # how old the mirror may be when there is time for it
SHARE = 0.05  # of the worker's time that mirroring takes at most: under load it gathers instead
# What one profile takes of it (`headrace bench mirror`). A round's length would tell how long it waited for others.
PROFILE_S = 6e-6
RETRY_S = 1.0
LOOK_S = 2.0  # between looks whether the marks are still there when nothing moves
REBUILD_S = 0.02  # of a round that goes into what is written anew
# Who is refused waits so long before it claims again: an owner that is none any more has let go by then.
REFUSED_S = 10.0
STILL_S = 10.0  # a partition that stands still behind its mark for so long is of another log than the mark


@dataclass
class _Held:
    """A partition of this worker, and what is known of its mark."""

    stage: Profiles
    partition: int
    mark: Mark | None = None  # to be claimed, where None
    # Up to which position, and by how many writes, the mirror has to be, or it has lost something.
    known: int = 0
    writes: int = 0
    anew: bool = False  # all of it is written again
    behind: bytes | None = None  # the key behind which to go on with that
    refused: float | None = None  # since when another one's mark is there
    foreign: str | None = None  # the definition of that mark, where it is another
    stood: tuple[int, float] = field(default=(-1, 0.0))  # behind its mark: the position, since when

    @property
    def position(self) -> int:
        return self.stage.positions.get(self.partition, 0)  # it may be let go during a round

    @property
    def ahead(self) -> bool:
        """Whether the mirror is ahead of what is folded here."""
        return self.mark is not None and not self.anew and self.mark.position > self.position

    @property
    def writable(self) -> bool:
        return self.mark is not None and not self.ahead


class MirrorAgent:
    """stages: whose profiles to mirror; counts: of each log's partitions; every_s: between two rounds at least.

    `failing` is the last error while Redis is away.
    now_ms: the time, for expiry; it does not return in a worker that may have lost its partitions meanwhile.
    """

    def __init__(
        self, stages: list[Profiles], mirror: MirrorWriter, counts: Mapping[str, int], now_ms: Callable[[], int],
        every_s: float = EVERY_S,
    ) -> None:  # fmt: skip
        self._stages, self._mirror, self._counts, self._now_ms = stages, mirror, counts, now_ms
        self._every_s = every_s
        self._held: dict[Store, _Held] = {}
        self._looked = 0.0
        self._upto = time.monotonic()  # all that had changed by then is mirrored
        self._lock = asyncio.Lock()
        self.written = 0
        self.failing: str | None = None

    @property
    def rebuilding(self) -> int:
        """How many partitions are being written anew."""
        return sum(held.anew for held in self._held.values())

    @property
    def refused(self) -> list[str]:
        """Partitions that another one writes, in words: a newer owner, or workers of another definition."""
        return [
            f"{held.stage.entity.log}/{held.partition}"
            + (f" (definition {held.foreign})" if held.foreign else "")
            for held in self._held.values()
            if held.refused is not None
        ]

    @property
    def waiting(self) -> int:
        """How many profiles have changed since they were mirrored."""
        return sum(stage.unmirrored for stage in self._stages)

    @property
    def lag_s(self) -> float:
        """For how long what the mirror lacks has been waiting, at most, in seconds; 0 where it lacks nothing."""
        return time.monotonic() - self._upto if self.waiting or self.rebuilding else 0.0

    async def run(self) -> None:
        """Mirror for ever."""
        while True:
            written = self.written
            try:
                await self.once()
                self.failing = None
                pause = max(self._every_s, (self.written - written) * PROFILE_S * (1 / SHARE - 1))
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
            try:
                await self._once()
            except BaseException:
                # What is still on its way is of an epoch that ends with the next claim, and what was done though
                # no answer came is not taken for the next call.
                for held in self._held.values():
                    held.mark = None
                raise

    async def _once(self) -> None:
        started = time.monotonic()
        look = started - self._looked > LOOK_S
        # 1. partitions that came, and those of which nobody knows what has become: claim them
        self._meet()
        for stage in self._stages:
            await self._claim(stage)
        # 2. what changed up to these positions, and then say so
        complete = True
        for stage in self._stages:
            complete &= await self._write(stage, look)
        if look:
            self._looked = started
        if complete and not self.rebuilding:
            self._upto = started
        # 3. anew
        await self._rebuild()

    # --- whose partitions they are -------------------------------------------------------------------

    def _meet(self) -> None:
        stores = {
            store: (stage, partition)
            for stage in self._stages
            for partition, store in stage.stores.items()
            if partition in stage.positions
        }
        for store in self._held.keys() - stores.keys():
            del self._held[store]
        for store in stores.keys() - self._held.keys():
            stage, partition = stores[store]
            self._held[store] = _Held(stage, partition, known=stage.starts[partition])

    def _of(self, stage: Profiles) -> dict[int, _Held]:
        return {held.partition: held for held in self._held.values() if held.stage is stage}

    async def _claim(self, stage: Profiles) -> None:
        now = time.monotonic()
        to_claim = {
            p: held
            for p, held in self._of(stage).items()
            if held.mark is None
            and (held.refused is None or (held.foreign is None and now - held.refused > REFUSED_S))
        }
        if not to_claim:
            return
        self._now_ms()  # one that stood still for long does not come back from here
        taken = await self._mirror.claim(stage.entity, list(to_claim), self._counts[stage.entity.log])
        for partition, held in to_claim.items():
            held.mark = mark = taken[partition]
            held.refused, held.foreign = None, None
            if mark.position < held.known or mark.writes < held.writes:
                self._begin(held)
            held.known, held.writes = max(held.known, mark.position), mark.writes

    def _begin(self, held: _Held) -> None:
        """Write a partition anew, from the first profile on."""
        if not held.anew:
            log.warning(
                "The mirror lacks profiles of %s partition %d: they are written anew",
                held.stage.entity.log, held.partition,
            )  # fmt: skip
        held.anew, held.behind = True, None

    def _lost(self, held: _Held, found: Mark | None) -> None:
        """The mark is not as it was left: by whom, and what follows. What is ours is claimed again."""
        mark, held.mark = held.mark, None
        assert mark is not None
        if found is None or (found.definition == mark.definition and found.epoch <= mark.epoch):
            return  # gone, a copy of some time ago, or moved by a call that came late: the claim will tell
        held.refused = time.monotonic()
        held.foreign = None if found.definition == mark.definition else found.definition
        log.warning(
            "The mirror of %s partition %d is written by another since: %s",
            held.stage.entity.log, held.partition, found,
        )  # fmt: skip

    # --- what changed --------------------------------------------------------------------------------

    async def _write(self, stage: Profiles, look: bool) -> bool:
        """Write what has changed by now, then move the marks. Whether all of the stage is mirrored up to here."""
        held = self._of(stage)
        out = {p for p in stage.partitions if p not in held or not held[p].writable}
        moves = {
            p: h.position
            for p, h in held.items()
            if h.writable and not h.anew and h.mark is not None and (look or h.mark.position != h.position)
        }
        recalled = stage.recalled
        batch = await self._write_all_but_the_last(stage, held, out)
        if stage.recalled != recalled:
            moves = {}  # what came back into memory meanwhile may not have been written: say so next time
        if batch is not None or moves:
            await self._store(stage, held, batch or stage.nothing, moves)
        if look:
            await self._mirror.tell(stage.entity, self._counts[stage.entity.log])
            self._find_still(held)
        return not out and stage.recalled == recalled

    async def _write_all_but_the_last(
        self, stage: Profiles, held: Mapping[int, _Held], out: Container[int]
    ) -> Touched | None:
        """What has changed by now. Redis has one call to do while the next one is put together."""
        ready: deque[Touched] = deque()
        flight: asyncio.Task[None] | None = None
        try:
            for batch in stage.touched(AT_ONCE, out):
                ready.append(batch)
                if len(ready) > 1:
                    if flight is not None:
                        await flight
                    flight = asyncio.create_task(self._store(stage, held, ready.popleft(), {}))
                    await asyncio.sleep(0)
            if flight is not None:
                await flight
        except BaseException:
            if flight is not None:
                flight.cancel()
                await asyncio.gather(flight, return_exceptions=True)
            for batch in ready:
                stage.touch(batch)
            raise
        return ready.popleft() if ready else None

    async def _store(
        self, stage: Profiles, held: Mapping[int, _Held], batch: Touched, moves: Mapping[int, int]
    ) -> None:
        """Write profiles and move marks, of partitions that are ours still; what is refused is given out again."""
        marks = {
            p: mark
            for p in {*batch.partitions.tolist(), *moves}
            if p in held and (mark := held[p].mark) is not None
        }
        ours = batch.of(marks)
        moves = {p: to for p, to in moves.items() if p in marks}
        stage.touch(batch.without(marks))  # refused a moment ago
        if not marks:
            return
        try:
            refused = await self._mirror.store(stage.entity, ours, marks, moves, self._now_ms())
        except BaseException:
            stage.touch(ours)
            raise
        for partition, mark in marks.items():
            if partition in refused:
                self._lost(held[partition], refused[partition])
            else:
                each = held[partition]
                each.mark = mark.moved(moves.get(partition))
                each.known, each.writes = max(each.known, each.mark.position), each.mark.writes
        stage.touch(ours.of(refused))
        self.written += len(ours.without(refused).keys)

    def _find_still(self, held: Mapping[int, _Held]) -> None:
        """A partition that is behind its mark and does not move: its log ends there, so it is another log."""
        now = time.monotonic()
        for each in held.values():
            if not each.ahead:
                each.stood = (-1, now)
            elif each.stood[0] != each.position:
                each.stood = (each.position, now)
            elif now - each.stood[1] > STILL_S:
                self._begin(each)

    # --- anew ----------------------------------------------------------------------------------------

    async def _rebuild(self) -> None:
        """Some more of the partitions that are written anew; what is through is marked."""
        until = time.monotonic() + REBUILD_S
        while True:
            held = next((h for h in self._held.values() if h.anew and h.writable), None)
            if held is None or held.partition not in held.stage.stores:
                return  # done, or let go meanwhile
            stage, reached, recalled = held.stage, held.position, held.stage.recalled
            behind = stage.owe(held.partition, held.behind, AT_ONCE)
            await self._write(stage, False)
            if held.mark is None or not held.anew:
                return
            if behind is not None:
                held.behind = behind
            elif stage.recalled == recalled:
                held.known = 0  # another log's mark moves down, too
                await self._store(stage, {held.partition: held}, stage.nothing, {held.partition: reached})
                held.anew = held.mark is None
            if time.monotonic() >= until:
                return
