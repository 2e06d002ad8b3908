"""Reads packed profiles, as stores and the mirror hold them, at any time: the same kernel as the stage's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.windows import NULL, Arena, Floats, Ints, Plan


class CompactReader:
    """Reads what `Arena.pack` wrote. One for an entity; not for several threads at once."""

    def __init__(self, plan: Plan) -> None:
        self._arena = Arena(plan, rows=64)
        # Rows are kept for the retention behind the newest event, and a read looks back by the longest window.
        self._before_newest = plan.retention - int(plan.bounds.max(initial=0)) - plan.hop

    def read_at(self, packed: Sequence[bytes], times: Ints) -> Floats:
        """Features (n, k) float64 of these profiles at these times (n,), ms; NaN where there is no value."""
        slots = np.array([self._arena.unpack(p) for p in packed], np.int64)
        features = self._arena.read_at(slots, times)
        self._arena.free(slots)
        return features

    def since(self, newest: int) -> int:
        """From which time on, ms, a profile whose newest event is of this time can be read."""
        return newest if newest == NULL else newest - max(self._before_newest, 0)
