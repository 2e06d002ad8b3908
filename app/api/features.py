"""Look-ups of features: from the profiles of this worker where it holds the partition, else from the mirror."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from aiohttp import web

from app.api import schemas
from app.api.problems import Fault, ProblemError, invalid
from app.api.schemas import FeaturesQuery, FeaturesRequest, ManyFeatures, Nothing, instant
from models.partitions import partitions_of
from models.pipeline import Entity, Pipeline
from tables.mirror import Mirrored, MirrorReader, RedisError
from tables.profiles import Looked, Profiles

AWAY_S = 1.0  # a mirror that did not answer is asked again after that, so that nobody waits for it meanwhile


class Held:
    """The profiles of a worker's partitions."""

    def __init__(self, stages: Sequence[Profiles], partitions: Mapping[str, int]) -> None:
        """partitions: by topic."""
        self._stages = {stage.entity.name: (stage, partitions[stage.entity.log]) for stage in stages}

    def read(self, entity: Entity, ids: Sequence[str], at: int | None) -> list[Looked | bool | None]:
        """By id the values, None where it has none, and False where its partition is not held here."""
        stage, count = self._stages[entity.name]
        keys = [id_.encode() for id_ in ids]
        partitions = partitions_of(keys, np.zeros(len(keys), np.int64), count).tolist()
        here = [i for i, partition in enumerate(partitions) if stage.holds(partition)]
        result: list[Looked | bool | None] = [False] * len(ids)
        looked = stage.look([keys[i] for i in here], [partitions[i] for i in here], at)
        for i, found in zip(here, looked, strict=True):
            result[i] = found
        return result


class Lookups:
    """clock: seconds since the epoch. most: entities of one request."""

    def __init__(
        self,
        pipeline: Pipeline,
        mirror: MirrorReader,
        held: Held | None,
        most: int,
        clock: Callable[[], float],
    ) -> None:
        self._pipeline, self._mirror, self._held = pipeline, mirror, held
        self._most, self._clock = most, clock
        self._entities = {entity.name: entity for entity in pipeline.entities}
        self._away_until = 0.0
        self._away = ""

    async def one(self, request: web.Request, query: FeaturesQuery, _: Any) -> schemas.Features:
        """GET /v1/features/{entity}/{id}"""
        entity = self.entity(request.match_info["entity"])
        id_ = request.match_info["id"]
        if len(id_) > schemas.LONGEST_ID:
            raise invalid("id", f"it has more than {schemas.LONGEST_ID} characters.")
        names = query.features.split(",") if query.features is not None else None
        (found,) = await self._read([(entity, id_)], self._time(query.at), names)
        if found is None:
            raise ProblemError(
                "not-found",
                f"There are no features of {entity.name} {id_}: no event of it within its windows.",
            )
        return found

    async def many(self, _: web.Request, __: Nothing, asked: FeaturesRequest) -> ManyFeatures:
        """POST /v1/features"""
        if len(asked.entities) > self._most:
            raise invalid(
                "entities", f"{len(asked.entities)} are more than {self._most} of one request; ask in parts."
            )
        wanted = [
            (self.entity(each.entity, f"entities[{i}].entity"), each.id)
            for i, each in enumerate(asked.entities)
        ]
        return ManyFeatures(await self._read(wanted, self._time(asked.at), asked.features))

    def entity(self, name: str, field: str | None = None) -> Entity:
        """The entity of this name. field: of a body, whose value it is; else it is of the path."""
        found = self._entities.get(name)
        if found is not None:
            return found
        sentence = (
            f"The pipeline {self._pipeline.name} has no entity {name!r}; it has {', '.join(self._entities)}."
        )
        if field is None:
            raise ProblemError("not-found", sentence, Fault("entity", sentence))
        raise invalid(field, sentence)

    def _time(self, at: str) -> int | None:
        """None: as of the newest event of each."""
        if at == "now":
            return int(self._clock() * 1000)
        if at == "newest":
            return None
        found = schemas.parsed_time(at)
        if found is None:
            raise invalid(
                "at", f"{at!r} is neither now, newest, a time like 2018-07-25T12:00:00Z, nor its ms."
            )
        return found

    async def _read(
        self, wanted: Sequence[tuple[Entity, str]], at: int | None, names: Sequence[str] | None
    ) -> list[schemas.Features | None]:
        if names is not None:
            self._check(names, {entity.name: entity for entity, _ in wanted}.values())
        result: list[schemas.Features | None] = [None] * len(wanted)
        now = self._clock()
        # 1. what is here
        missing = list(range(len(wanted)))
        if self._held is not None:
            missing = []
            for entity in self._entities.values():
                ours = [i for i, (of, _) in enumerate(wanted) if of is entity]
                if not ours:
                    continue
                looked = self._held.read(entity, [wanted[i][1] for i in ours], at)
                for i, found in zip(ours, looked, strict=True):
                    if found is False:
                        missing.append(i)
                    elif isinstance(found, Looked):
                        result[i] = self._of_worker(entity, wanted[i][1], found, names, now)
        # 2. the rest is in the mirror
        for entity in self._entities.values() if missing else ():
            ours = [i for i in missing if wanted[i][0] is entity]
            if ours:
                ids = [wanted[i][1] for i in ours]
                answers = self._of_mirror(entity, ids, await self._fetch(entity, ids), at, names, now)
                for i, one in zip(ours, answers, strict=True):
                    result[i] = one
        return result

    async def _fetch(self, entity: Entity, ids: Sequence[str]) -> Sequence[Mirrored | None]:
        if time.monotonic() < self._away_until:
            raise self._unavailable()
        try:
            return await self._mirror.read(entity, ids)
        except (RedisError, OSError) as error:
            self._away, self._away_until = str(error) or type(error).__name__, time.monotonic() + AWAY_S
            raise self._unavailable() from None
        except ValueError as error:  # an entry that somebody has damaged
            self._away = str(error)
            raise self._unavailable() from None

    def _unavailable(self) -> ProblemError:
        return ProblemError("unavailable", f"The mirror does not answer ({self._away}); try again.")

    def _check(self, names: Sequence[str], entities: Any) -> None:
        known = [name for entity in entities for name in entity.features]
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}."
                raise invalid("features", f"there is no {name!r}; {hint}")

    def _of_worker(
        self, entity: Entity, id_: str, found: Looked, names: Sequence[str] | None, now: float
    ) -> schemas.Features:
        values = dict(zip(entity.features, found.features, strict=True))
        reason: schemas.Degraded | None = "retention-cut" if found.degraded else None
        if reason is None and found.time < _since(entity, found.newest):
            reason = "too-far-back"
        return schemas.Features(
            self._pipeline.name, entity.name, id_, instant(found.time), instant(found.newest),
            round(now - found.newest / 1000, 3), found.offset, self._pipeline.definition, reason is not None, reason,
            "worker",
            {k: None if math.isnan(v) else v for k, v in values.items() if names is None or k in names},
        )  # fmt: skip

    def _of_mirror(
        self, entity: Entity, ids: Sequence[str], found: Sequence[Mirrored | None], at: int | None,
        names: Sequence[str] | None, now: float,
    ) -> list[schemas.Features | None]:  # fmt: skip
        readable = (
            [one for one in found if one is not None and one.reader is not None] if at is not None else []
        )
        exact: Mapping[int, list[float]] = {}
        if at is not None and readable and readable[0].reader is not None:
            # all profiles in one call, by the kernel of the stage
            times = np.full(len(readable), at, np.int64)
            rows = readable[0].reader.read_at([one.profile for one in readable], times).tolist()
            exact = {id(one): row for one, row in zip(readable, rows, strict=True)}
        return [
            None if one is None else self._mirrored(entity, id_, one, at, exact.get(id(one)), names, now)
            for id_, one in zip(ids, found, strict=True)
        ]

    def _mirrored(
        self, entity: Entity, id_: str, found: Mirrored, at: int | None, exact: list[float] | None,
        names: Sequence[str] | None, now: float,
    ) -> schemas.Features:  # fmt: skip
        as_of = found.time if at is None or exact is None else at
        values: Mapping[str, float | None] = found.features
        if exact is not None:
            values = {k: None if math.isnan(v) else v for k, v in zip(values, exact, strict=True)}
        reason: schemas.Degraded | None = None
        if found.definition != self._pipeline.definition:
            reason = "other-definition"
        elif as_of < found.since:
            reason = "too-far-back"
        elif found.degraded_at(as_of):
            reason = "retention-cut"
        return schemas.Features(
            self._pipeline.name, entity.name, id_, instant(as_of), instant(found.time),
            round(now - found.time / 1000, 3), found.offset, found.definition, reason is not None, reason,
            "mirror", dict(values) if names is None else {k: v for k, v in values.items() if k in names},
        )  # fmt: skip


def _since(entity: Entity, newest: int) -> int:
    """From which time on, ms, a profile whose newest event is of this time has all rows that a read needs."""
    reach = int(entity.plan.bounds.max(initial=0)) + entity.plan.hop
    return newest - max(entity.plan.retention - reach, 0)
