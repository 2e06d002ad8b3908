"""The feature vector: fields, transforms and the entities' features in the order that the model takes."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.fields import as_float, operand
from models.pipeline import Pipeline
from models.windows import Floats, Ints


class Vectors:
    """Compiled once from a pipeline; `of` is called for every micro-batch."""

    def __init__(self, pipeline: Pipeline) -> None:
        fields = pipeline.fields
        columns = {f.name: i for i, f in enumerate(pipeline.columns)}
        carried = {name: i for i, name in enumerate(n for e in pipeline.entities for n in e.features)}
        places = list(enumerate(pipeline.sources))
        self.width = len(places)
        self._fields = [(i, columns[n], fields[n]) for i, (kind, n) in places if kind == "field"]
        self._made = [(i, n) for i, (kind, n) in places if kind == "transform"]
        owned = [(i, carried[n]) for i, (kind, n) in places if kind not in ("field", "transform")]
        self._to = np.array([i for i, _ in owned], np.int64)
        self._from = np.array([j for _, j in owned], np.int64)
        self._transforms = pipeline.transforms
        used = sorted({name for t in self._transforms.values() for name in t.uses})
        self._used_fields = [(fields[n], columns[n]) for n in used if n in columns]
        self._used_features = [(n, carried[n]) for n in used if n in carried]

    def of(self, fields: Ints, features: Floats) -> Floats:
        """Vectors (n, width) float64. fields: (n, f) int64 block; features: (n, k) of all entities."""
        vectors = np.empty((len(fields), self.width))
        for at, column, field in self._fields:
            vectors[:, at] = as_float(np.ascontiguousarray(fields[:, column]), field)
        vectors[:, self._to] = features[:, self._from]
        values: dict[str, Any] = {f.name: operand(fields[:, at], f) for f, at in self._used_fields}
        values |= {name: np.ascontiguousarray(features[:, at]) for name, at in self._used_features}
        for name, transform in self._transforms.items():
            values[name] = transform.evaluate(values)
        for at, name in self._made:
            vectors[:, at] = values[name]
        return vectors
