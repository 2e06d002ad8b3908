"""Which events a feature is of: the filters of an entity, as a bit each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.fields import Field, operand
from models.pipeline import Entity
from models.windows import Ints


class Filters:
    """columns: the fields of the numeric block, in its order."""

    def __init__(self, entity: Entity, columns: Sequence[Field]) -> None:
        self._filters = entity.filters
        used = {name for f in self._filters for name in f.uses}
        self._used = [(i, field) for i, field in enumerate(columns) if field.name in used]

    def of(self, fields: Ints) -> Ints:
        """(n,) int64, bit f where filter f holds. fields: (n, f) int64 block. What is absent holds nothing."""
        flags = np.zeros(len(fields), np.int64)
        inputs = {field.name: operand(fields[:, i], field) for i, field in self._used}
        for bit, found in enumerate(self._filters):
            value = found.evaluate(inputs)
            flags |= (np.nan_to_num(value) != 0).astype(np.int64) << bit
        return flags
