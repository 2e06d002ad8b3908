"""The mirror's twin in memory, with the same contract: for tests of what reads or writes a mirror."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from models.compact import CompactReader
from models.pipeline import Entity, Pipeline
from tables.mirror import Mark, Mirrored, lives, runs
from tables.profiles import Touched


@dataclass
class _Kept:
    mirrored: Mirrored
    until: int | None  # when it expires, ms


class MemoryMirror:
    """clock: ms, by which entries expire and epochs grow. `failure` is raised by all calls while it is set."""

    def __init__(self, pipeline: Pipeline, clock: Callable[[], int]) -> None:
        self.failure: OSError | None = None
        self._definition, self._clock = pipeline.definition, clock
        self._readers = {e.name: CompactReader(e.plan) for e in pipeline.entities}
        self._marks: dict[tuple[str, int], Mark] = {}
        self._kept: dict[tuple[str, str], _Kept] = {}

    async def claim(self, entity: Entity, partitions: Sequence[int], count: int) -> dict[int, Mark]:
        await self.ping()
        taken = {}
        for partition in partitions:
            old = self._marks.get((entity.name, partition), Mark("", 0, 0, 0))
            position = old.position if old.definition == self._definition else 0
            taken[partition] = Mark(self._definition, max(old.epoch + 1, self._clock()), position, old.writes)
            self._marks[entity.name, partition] = taken[partition]
        return taken

    async def store(
        self,
        entity: Entity,
        touched: Touched,
        marks: Mapping[int, Mark],
        reached: Mapping[int, int],
        now: int,
    ) -> dict[int, Mark | None]:
        await self.ping()
        found = await self.marks(entity, sorted({*touched.partitions.tolist(), *reached}))
        refused = {p: mark for p, mark in found.items() if mark != marks[p]}
        life = lives(entity, touched, now)
        for partition, begin, end in runs(touched):
            if partition in refused:
                continue
            for i in range(begin, end):
                row = touched.features[i].tolist()
                mirrored = Mirrored(
                    int(touched.times[i]), int(touched.offsets[i]), self._definition,
                    int(touched.degraded_until[i]),
                    {n: None if v != v else v for n, v in zip(entity.features, row, strict=True)},  # noqa: PLR0124
                    touched.profiles[i], self._readers[entity.name],
                )  # fmt: skip
                until = self._clock() + int(life[i]) if life[i] else None
                self._kept[entity.name, touched.keys[i].decode()] = _Kept(mirrored, until)
        for partition in found.keys() - refused.keys():
            self._marks[entity.name, partition] = marks[partition].moved(reached.get(partition))
        return refused

    async def tell(self, entity: Entity, count: int) -> None:
        await self.ping()

    async def marks(self, entity: Entity, partitions: Sequence[int]) -> dict[int, Mark | None]:
        """The marks of these partitions."""
        await self.ping()
        return {p: self._marks.get((entity.name, p)) for p in partitions}

    async def forget(self, entity: Entity, partitions: Sequence[int]) -> None:
        """Remove marks, as a rebuild does."""
        await self.ping()
        for partition in partitions:
            self._marks.pop((entity.name, partition), None)

    async def clear(self) -> None:
        """Lose everything."""
        await self.ping()
        self._marks.clear()
        self._kept.clear()

    async def read(self, entity: Entity, ids: Sequence[str]) -> list[Mirrored | None]:
        await self.ping()
        found = [self._kept.get((entity.name, id_)) for id_ in ids]
        return [
            k.mirrored if k is not None and (k.until is None or k.until > self._clock()) else None
            for k in found
        ]

    async def ping(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def close(self) -> None: ...
