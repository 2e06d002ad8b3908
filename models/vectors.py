"""The feature vector: fields, transforms and the entities' features in the order that the model takes."""

from __future__ import annotations

import numpy as np

from models.events import as_float
from models.pipeline import Pipeline
from models.windows import Floats, Ints


class Vectors:
    """Compiled once from a pipeline; `of` is called for every micro-batch."""

    def __init__(self, pipeline: Pipeline) -> None:
        stream = pipeline.stream
        columns = {f.name: i for i, f in enumerate(stream.numeric)}
        carried = [name for e in pipeline.entities for name in e.features]
        places = list(enumerate(pipeline.sources))
        self.width = len(places)
        self._fields = [(i, columns[n], stream.fields[n]) for i, (kind, n) in places if kind == "field"]
        self._transforms = [(i, pipeline.transforms[n]) for i, (kind, n) in places if kind == "transform"]
        owned = [(i, carried.index(n)) for i, (kind, n) in places if kind not in ("field", "transform")]
        self._to = np.array([i for i, _ in owned], np.int64)
        self._from = np.array([j for _, j in owned], np.int64)
        used = {name for _, t in self._transforms for name in t.uses}
        self._used = [(stream.fields[n], columns[n]) for n in sorted(used)]

    def of(self, fields: Ints, features: Floats) -> Floats:
        """Vectors (n, width) float64. fields: (n, f) int64 block; features: (n, k) of all entities."""
        vectors = np.empty((len(fields), self.width))
        for at, column, field in self._fields:
            vectors[:, at] = as_float(np.ascontiguousarray(fields[:, column]), field)
        inputs = {
            field.name: as_float(np.ascontiguousarray(fields[:, column]), field)
            for field, column in self._used
        }
        for at, transform in self._transforms:
            vectors[:, at] = transform.evaluate(inputs)
        vectors[:, self._to] = features[:, self._from]
        return vectors
