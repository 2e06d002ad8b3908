"""What a pipeline file may hold, as it is written; models.pipeline compiles it."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from models.errors import HeadraceError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # of a field, feature or transform

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
LONGEST_MS = 4000 * _UNITS_MS["d"]


class PipelineError(HeadraceError):
    """`file:line: field: what is wrong; what to write instead`."""

    exit_code = 2


class FieldSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A field of a stream. `scale`: of a decimal. `unit`: of a timestamp. `values`: of a category."""

    type: Literal["int", "float", "decimal", "string", "timestamp", "category"]
    scale: int = 0
    values: list[str] = []
    unit: Literal["s", "ms", "us", "iso"] = "ms"
    optional: bool = False


class StreamSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A topic of JSON events. `id` and `time` name the fields that identify and date an event."""

    id: str
    time: str
    fields: dict[str, Any]
    topic: str | None = None


class LabelsSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The stream of labels. A label carries the event's id, time and entity keys under the stream's names.

    `field` holds 0, 1 or null (unknown again); `known` is the field with the time at which it became
    known, in the unit of the event time.
    """

    field: str
    known: str
    topic: str | None = None


class FeatureSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An aggregate over (t - delay - window, t - delay].

    `of`: the field. `window`: a duration, or `lifetime`. `where`: only events of which this expression holds.
    `by`: a field and some of its values: a feature for each, named NAME_value. `k`: how many, of last_k and
    most_frequent: features NAME_1 to NAME_k. `quantile`: 0.5 for the median. `half_life`: of a decayed aggregate,
    whose window is 24 of them. `per`: what a rate is per.
    """

    aggregate: Literal[
        "count", "sum", "mean", "variance", "stddev", "rate", "share", "positives", "coverage", "first", "last",
        "last_k", "min", "max", "since_last", "distinct", "quantile", "most_frequent", "decayed_count", "decayed_sum",
    ]  # fmt: skip
    window: str | None = None
    of: str | None = None
    delay: str = "0s"
    where: str | None = None
    by: dict[str, list[int | str]] | None = None
    k: int | None = None
    quantile: float | None = None
    half_life: str | None = None
    per: str | None = None


class EntitySpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What features are about. `key`: the field that names it; null gives no update and NaN features.

    `hop`: for keys with very many events: those of a cell of this length are kept as one row, and windows begin and
    end with cells.
    """

    key: str
    features: dict[str, Any]
    hop: str | None = None


class FunctionSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A transform by a Python function, `package.module:name`, of these inputs (models.own_functions)."""

    function: str
    inputs: list[str]


class ModelSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The decisions by score, and the model file to train by.

    `decisions`: name to the share of training events that score at or above its threshold; the
    decision of an event is the rarest whose threshold it reaches, `otherwise` if none. `train`: a file of
    configs/models, by its name.
    """

    decisions: dict[str, float]
    otherwise: str = "pass"
    train: str = "gradient_boosting"


class PipelineSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One pipeline file."""

    name: str
    streams: dict[str, Any]
    entities: dict[str, Any]
    vector: list[str]
    model: ModelSpec
    labels: LabelsSpec | None = None
    transforms: dict[str, Any] = {}
    lateness: str = "1h"
    predictions_carry_features: bool = True


def milliseconds(text: str) -> int | None:
    """Milliseconds of '90s', '1h', '7d'; None for what is no duration."""
    match = re.fullmatch(r"(\d+)(ms|s|m|h|d)", text)
    return int(match[1]) * _UNITS_MS[match[2]] if match else None
