"""What a pipeline file may hold, as it is written; models.pipeline compiles it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from models.errors import HeadraceError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # of a field, feature or transform

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
LONGEST_MS = 4000 * _UNITS_MS["d"]


def _is(description: str) -> msgspec.Meta:
    """What a key means, for editors (the JSON Schema) and the reference."""
    return msgspec.Meta(description=description)


class PipelineError(HeadraceError):
    """`file:line: field: what is wrong; what to write instead`."""

    exit_code = 2


class FieldType(NamedTuple):
    """What a field is in JSON, and what is kept of it."""

    json: str
    kept: str


FIELD_TYPES = {
    "int": FieldType("a whole number", "int64; between -2^46 and 2^46 where it is summed"),
    "decimal": FieldType(
        "a number with at most `scale` decimals", "int64 of its smallest unit (cents), between -2^46 and 2^46"
    ),
    "float": FieldType("a number", "float64; cannot be summed, for the order would change bits"),
    "category": FieldType(
        "one of `values`, or another text", "int64: 0, 1, 2 in the order of `values`, -1 for any other text"
    ),
    "string": FieldType(
        "text", "text: a key, an id, or compared with texts in an expression; never a number"
    ),
    "timestamp": FieldType(
        "a whole number of `unit` since 1970 UTC, or with `iso` a text in ISO 8601 (UTC where it names no zone)",
        "int64 ms",
    ),
}


class FieldSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A field of a stream."""

    type: Annotated[
        Literal["int", "float", "decimal", "string", "timestamp", "category"], _is("what stands in the JSON")
    ]
    scale: Annotated[int, _is("of a `decimal`: how many decimals it has at most, 0 to 9")] = 0
    values: Annotated[list[str], _is("of a `category`: its 1 to 1,000 texts, each once")] = []
    unit: Annotated[
        Literal["s", "ms", "us", "iso"],
        _is("of a `timestamp`: what its number counts, or `iso`"),
    ] = "ms"
    optional: Annotated[
        bool,
        _is(
            "whether it may be null or absent: a null key gives no update and NaN features, a null value counts as "
            "an event and not in the mean"
        ),
    ] = False


class StreamSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A topic of JSON events."""

    id: Annotated[str, _is("the field that identifies an event, an int or string that is not optional")]
    time: Annotated[str, _is("the field with the event time, a timestamp that is not optional")]
    fields: Annotated[
        dict[str, Any],
        _is(
            "its fields, each a type or a mapping; what is not named is ignored, and travels on in the original JSON"
        ),
    ]
    topic: Annotated[str | None, _is("the topic, `<pipeline>.<stream>` by default")] = None
    scored: Annotated[
        bool | None,
        _is("whether its events are scored: those of the first stream are, others not by default"),
    ] = None


Keys = Annotated[
    Literal["carried", "ledger"],
    _is(
        "where the event's time and entity keys come from: `carried` by each record, or from the `ledger` by the "
        "event's id where a record lacks any of them"
    ),
]


class LabelsSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The stream of labels. A label carries the event's id, time and entity keys under the first stream's names."""

    field: Annotated[str, _is("the field that holds 0, 1, or null: unknown again")]
    known: Annotated[
        str, _is("the field with the time at which it became known, in the unit of the event time")
    ]
    topic: Annotated[str | None, _is("the topic, `<pipeline>.labels` by default")] = None
    keys: Keys = "carried"


class ReversalsSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The stream of reversals, which carry the event's id, time and entity keys under the first stream's names."""

    known: Annotated[
        str, _is("the field with the time at which it was reversed, in the unit of the event time")
    ]
    topic: Annotated[str | None, _is("the topic, `<pipeline>.reversals` by default")] = None
    keys: Keys = "carried"


class FeatureSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True, rename={"from_": "from"}):
    """An aggregate over the entity's events with time in (t - delay - window, t - delay]."""

    aggregate: Annotated[
        Literal[
            "count", "sum", "mean", "variance", "stddev", "rate", "share", "positives", "coverage", "first", "last",
            "last_k", "min", "max", "since_last", "distinct", "quantile", "most_frequent", "decayed_count",
            "decayed_sum",
        ],
        _is("what is made of them"),
    ]  # fmt: skip
    from_: Annotated[
        str | None, _is("the stream whose events it is of; all that have the entity's key by default")
    ] = None
    window: Annotated[
        str | None, _is("a duration, or `lifetime`: since the entity's first event; none where it is decayed")
    ] = None
    of: Annotated[
        str | None,
        _is("the field; of aggregates over labels the label's field; none where events are counted"),
    ] = None
    delay: Annotated[
        str,
        _is(
            "how long before t the window ends; of aggregates over labels above 0: the time by which those are known"
        ),
    ] = "0s"
    where: Annotated[
        str | None, _is("an expression over the event's fields: only events of which it holds count")
    ] = None
    by: Annotated[
        dict[str, list[int | str]] | None,
        _is("a field and some of its values, `{MCC: [5411, 5812]}`: a feature for each, named `NAME_5411`"),
    ] = None
    k: Annotated[
        int | None,
        _is("how many, of `last_k` and `most_frequent`, 1 to 100: features `NAME_1` to `NAME_k`"),
    ] = None
    quantile: Annotated[float | None, _is("of `quantile`, above 0 to 1; 0.5 is the median")] = None
    half_life: Annotated[
        str | None, _is("of the decayed ones, a duration: the window is 24 of it, at most 4000 days")
    ] = None
    per: Annotated[str | None, _is("of `rate`, a duration: what it is per, `1s` by default")] = None


class EntitySpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What features are about: a stage of the chain."""

    key: Annotated[
        str | list[str], _is("the field that names it, an int or string, or several that do together")
    ]
    features: Annotated[dict[str, Any], _is("its features")]
    hop: Annotated[
        str | None,
        _is(
            "for hot keys: events of a cell of this length are kept as one row, and windows begin and end with cells; "
            "not of the first entity"
        ),
    ] = None


class FunctionSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A transform by a Python function."""

    function: Annotated[str, _is("`package.module:name` of a function that the worker can import")]
    inputs: Annotated[
        list[str],
        _is(
            "its arguments in their order: numeric fields, times, categories (by code), features and transforms "
            "written before"
        ),
    ]


class ModelSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The decisions by score, and the model file to train by."""

    decisions: Annotated[
        dict[str, float],
        _is(
            "each with the share of training events that score at or above its threshold; an event takes the rarest "
            "whose threshold its score reaches"
        ),
    ]
    otherwise: Annotated[str, _is("the decision of all other events")] = "pass"
    train: Annotated[
        str, _is("the file of `configs/models` that `headrace train` takes unless told another")
    ] = "gradient_boosting"


class PipelineSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One pipeline file."""

    name: Annotated[
        str,
        _is("the pipeline's name, which is the file's without `.yaml`; it begins the names of its topics"),
    ]
    streams: Annotated[
        dict[str, Any],
        _is("the streams of events; of the first one labels and reversals are, and it is scored"),
    ]
    entities: Annotated[dict[str, Any], _is("what features are about, in the order of the stages")]
    vector: Annotated[
        list[str],
        _is(
            "the inputs of the model in their order, each at most once: numeric fields, categories, transforms and "
            "features by name"
        ),
    ]
    model: Annotated[ModelSpec, _is("the decisions by score, and which model to train")]
    labels: Annotated[LabelsSpec | None, _is("the stream of labels, where there is one")] = None
    reversals: Annotated[ReversalsSpec | None, _is("the stream of reversals, where there is one")] = None
    transforms: Annotated[
        dict[str, Any],
        _is("numbers made of one event's fields and features: expressions, or Python functions"),
    ] = {}
    lateness: Annotated[str, _is("how late an event may be and still repair its profile, a duration")] = "1h"
    predictions_carry_features: Annotated[bool, _is("whether predictions hold the vector")] = True


def milliseconds(text: str) -> int | None:
    """Milliseconds of '90s', '1h', '7d'; None for what is no duration."""
    match = re.fullmatch(r"(\d+)(ms|s|m|h|d)", text)
    return int(match[1]) * _UNITS_MS[match[2]] if match else None
