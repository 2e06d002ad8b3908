"""What a pipeline will need: memory of profiles, and how far back its logs must reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from models.pipeline import Entity, Pipeline
from models.windows import Arena, Ints

DAY_MS = 86_400_000
_SMALLEST = 4  # rows of the smallest chunk; chunks double, and a quarter is free before one is moved down


@dataclass(frozen=True)
class Estimate:
    """Of one entity. reach: the longest delay + window; retention: reach and lateness, both ms; rows: of a
    profile, in retention; row_bytes, profile_bytes: of memory, without the key and where it is found."""

    entity: str
    reach: int
    retention: int
    rows: float
    row_bytes: int
    profile_bytes: int


def estimate(entity: Entity, rows: float | None = None, per_day: float = 1.0) -> Estimate:
    """rows: of a profile, as measured; else those of `per_day` events a day."""
    if rows is None:
        rows = per_day * entity.retention / DAY_MS
    if entity.plan.hop:
        rows = min(rows, entity.retention / entity.plan.hop)
    row = row_bytes(entity)
    reach = int(entity.plan.bounds.max(initial=0))
    return Estimate(entity.name, reach, entity.retention, rows, row, _room(rows) * row)


def row_bytes(entity: Entity) -> int:
    """Bytes of memory of one row of a profile."""
    return (Arena(entity.plan, 2048).nbytes - Arena(entity.plan, 1024).nbytes) // 1024


def _room(rows: float) -> int:
    """Rows of the chunk of a profile whose old rows are forgotten as new ones come."""
    size = _SMALLEST
    while 3 * size < 4 * (math.ceil(rows) + 2):  # of the closing row and one more
        size *= 2
    return size


def log_retention(pipeline: Pipeline) -> int:
    """How long logs and labels must be kept so that no window lacks anything after a rebuild, ms."""
    return max(entity.retention for entity in pipeline.entities)


def rows_per_key(times: Ints, codes: Ints, retention: int) -> float | None:
    """Mean rows of a profile at the end of these events. None where no event has a key.

    times: (n,) ms, in any order; codes: (n,) which key each event has, -1 for none; retention: ms.
    """
    if not len(times):
        return None
    kept = codes[(times > times.max() - retention) & (codes >= 0)]
    return len(kept) / len(np.unique(kept)) if len(kept) else None
