"""Which events a model is trained on and which it is tested on: in order of time, with a gap in which labels become
known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.aggregates import OF_LABELS
from models.evaluation import DAY_MS, Mask, already_known
from models.model_files import ModelFile
from models.pipeline import Pipeline
from models.scoring import ModelError
from models.windows import Bytes, Floats, Ints

MIN_TRAINING_ROWS = 100  # a leaf holds at least 20 rows: below this there is hardly a split to make


@dataclass(frozen=True)
class Examples:
    """Events of known label, in any order. vectors: (n, width) float64, NaN where there is no value; labels: (n,) 0 or
    1; times: (n,) event times, ms; keys: by entity, (n,) codes from 0, -1 for null."""

    vectors: Floats
    labels: Bytes
    times: Ints
    keys: Mapping[str, Ints]

    def keys_of(self, model: ModelFile) -> Ints | None:
        """Of the entity that the model file names, None where it names none."""
        return None if model.entity is None else self.keys[model.entity]


@dataclass(frozen=True)
class Split:
    """at: when the test begins, ms. early: the rows to train on; late: of the test; counted: those of the test that
    the evaluation counts."""

    at: int
    early: Mask
    late: Mask
    counted: Mask


def label_delay(pipeline: Pipeline) -> int:
    """By when labels are known, ms after the event: the longest delay of a feature over labels, else 0."""
    delays = [a.delay for entity in pipeline.entities for a in entity.aggregates if a.kind in OF_LABELS]
    return max(delays, default=0)


def split_at(pipeline: Pipeline, model: ModelFile, examples: Examples, fold: int = 0) -> Split:
    """The split of a fold, 0 the newest. The test is whole days (UTC), the last of which may be incomplete."""
    labels, times = examples.labels, examples.times
    days, delay = model.test_days * DAY_MS, label_delay(pipeline)
    if not len(times):
        raise ModelError(
            f"There are no events with labels to train {pipeline.name} on; send its labels, or train on an "
            "older stretch of events."
        )
    at = (int(times.max()) // DAY_MS + 1) * DAY_MS - (fold + 1) * days
    since = at - delay - model.train_days * DAY_MS if model.train_days else int(times.min())
    early, late = (times >= since) & (times < at - delay), (times >= at) & (times < at + days)
    counted = late
    if model.skip_known and (keys := examples.keys_of(model)) is not None:
        counted = late & ~already_known(labels, times, keys, since, delay)
    _enough(model, examples, early, counted, delay)
    return Split(at, early, late, counted)


def _enough(model: ModelFile, examples: Examples, early: Mask, late: Mask, delay: int) -> None:
    """Refuse a split that there is nothing to learn from, or nothing to test on."""
    labels, times = examples.labels, examples.times
    if early.sum() < MIN_TRAINING_ROWS:
        raise ModelError(
            f"Of {len(times):,} events with labels, from {date(int(times.min()))} to "
            f"{date(int(times.max()))}, {early.sum():,} lie before the {model.test_days} days of the test and the "
            f"{delay / DAY_MS:g} days in which labels become known, and training takes at least "
            f"{MIN_TRAINING_ROWS}; take in more days, or lower test_days in the model file, or take fewer folds."
        )
    for mask, which, change in ((early, "training", "lower"), (late, "test", "raise")):
        if not mask.any():
            raise ModelError("There are no events in the test; take in more days, or take fewer folds.")
        if len(found := np.unique(labels[mask])) == 1:
            raise ModelError(
                f"All {mask.sum():,} {which} events, from {date(int(times[mask].min()))} to "
                f"{date(int(times[mask].max()))}, have the label {found[0]}, and a model takes both; take "
                f"in more days, or {change} test_days in the model file."
            )


def date(time: int) -> str:
    """The day of a time in ms, UTC."""
    return str(np.datetime64(time, "ms").astype("datetime64[D]"))
