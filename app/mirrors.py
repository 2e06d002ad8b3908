"""What `headrace mirror` does: have a mirror written anew, look an entity up in it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from app import kafka
from app.local.services import Addresses
from app.terminal import utc
from models.errors import HeadraceError
from models.pipeline import Pipeline
from tables.mirror import Mirror, RedisError, connect

LOOK_S = 0.2
Advance = Callable[[int, int], None]  # so many of so many


class NotRebuilt(HeadraceError):
    def __init__(self, left: list[str], within: float) -> None:
        super().__init__(
            f"After {within:g} s the mirror of {', '.join(left)} is not complete: see that workers run which hold "
            "these partitions (`headrace doctor`); they go on with it by themselves."
        )


class RedisAway(HeadraceError):
    def __init__(self, error: Exception) -> None:
        super().__init__(f"Redis does not answer ({error}); start it, or set HEADRACE_REDIS_URL.")


async def rebuild(
    pipeline: Pipeline, addresses: Addresses, empty: bool, within: float, advance: Advance
) -> dict[str, Any]:
    """Take the marks away, so that workers write all profiles anew; wait until each partition is marked again.

    empty: take all profiles away, too. Raises NotRebuilt, RedisAway.
    """
    counts = await kafka.checked_partitions(addresses.kafka, pipeline)
    mirror = Mirror(connect(addresses.redis_url), pipeline)
    logs = {entity.log: counts[entity.log] for entity in pipeline.entities}
    ends = {(span.topic, span.partition): span.end for span in await kafka.offsets_of(addresses.kafka, logs)}
    began, left = time.monotonic(), set(ends)
    try:
        if empty:
            await mirror.clear()
        for entity in pipeline.entities:
            await mirror.forget(entity, range(logs[entity.log]))
        while left:
            await asyncio.sleep(LOOK_S)
            for entity in pipeline.entities:
                marks = await mirror.marks(entity, range(logs[entity.log]))
                # Who writes anew says so at its end; of an empty log there is nothing to say but that it is held.
                left -= {
                    (entity.log, p)
                    for p, mark in marks.items()
                    if mark is not None and (mark.position > 0 or not ends[entity.log, p])
                }
            advance(len(ends) - len(left), len(ends))
            if left and time.monotonic() - began > within:
                raise NotRebuilt([f"{log}/{partition}" for log, partition in sorted(left)], within)
    except (RedisError, OSError) as error:
        raise RedisAway(error) from None
    finally:
        await mirror.close()
    return {"partitions": len(ends), "seconds": round(time.monotonic() - began, 1)}


async def show(pipeline: Pipeline, redis_url: str, name: str, id_: str) -> dict[str, Any]:
    """An entity as Redis has it, and its features as of now. Raises HeadraceError where there is nothing."""
    mirror = Mirror(connect(redis_url), pipeline)
    try:
        entity = pipeline.entity(name)
        (found,) = await mirror.read(entity, [id_])
        key = await mirror.key_of(entity, id_)
    except (RedisError, OSError) as error:
        raise RedisAway(error) from None
    finally:
        await mirror.close()
    if found is None or key is None:
        raise HeadraceError(
            f"The mirror has nothing of {name} {id_}: no event of it came within its windows, or no worker runs."
        )
    now = time.time_ns() // 1_000_000
    return {
        "key": key.decode(),
        "as_of": utc(found.time),
        "offset": found.offset,
        "definition": found.definition,
        "degraded": found.degraded,
        "compact_bytes": len(found.profile),
        "features": found.features,
        "now": found.at(max(now, found.since)),
    }
