"""The reference of pipeline files, docs/reference.md: made of the schema, the aggregates and the functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from models import aggregates
from models.aggregates import AGGREGATES, KINDS
from models.functions import FUNCTIONS, SAMPLE
from models.history import History, fold_history
from models.pipeline import parse, schema
from models.specs import FIELD_TYPES
from models.windows import NEGATIVE, POSITIVE, UNKNOWN

# The parts of the schema in their order: the heading of each, and where its meaning is explained.
_PARTS = {
    "PipelineSpec": ("File", "pipelines.md"),
    "StreamSpec": ("Stream", "pipelines.md#streams"),
    "FieldSpec": ("Field", "pipelines.md#streams"),
    "LabelsSpec": ("Labels", "pipelines.md#labels"),
    "ReversalsSpec": ("Reversals", "pipelines.md#reversals"),
    "EntitySpec": ("Entity", "pipelines.md#entities-and-their-features"),
    "FeatureSpec": ("Feature", "pipelines.md#entities-and-their-features"),
    "FunctionSpec": ("Function", "pipelines.md#functions-of-your-own"),
    "ModelSpec": ("Model", "pipelines.md#model"),
}
_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}

_BEGINNING = """\
# Reference
All that a pipeline file may hold, made from the code by `headrace schema --markdown`. What it is for is explained in
[pipelines](pipelines.md), and whole files are in the [cookbook](cookbook.md) and `configs/pipelines/`.

A duration is a whole number and `ms`, `s`, `m`, `h` or `d`, at most 4000 days: `90s`, `7d`."""

_AGGREGATES = """\
## Aggregates
n is how many events are in the window and pass the filter, v are the values of those that have one, and m how many
these are. `unit` is 1 for an int and 10^scale for a decimal; a number is a field of one of these two. All up to the
last division is exact in integers, so neither order nor restarts change a bit; what float64 does at the end is one
formula. The examples are of [four payments](#the-examples)."""

_NOTES = """\
- `quantile` is taken to a millionth.
- The weight w of a decayed aggregate is floor(round(2^(24 - s / 4096)) / 2^h) / 2^24, where h is how many whole
  half-lives the event is before t - delay, and s how many whole 4096ths of one lie in the rest.
- With `window: lifetime` there are {for_life}.
- With a `hop` there are {in_cells}."""

_EXAMPLE_FILE = """\
name: example
streams:
  payments: {id: ID, time: AT, fields: {ID: int, AT: timestamp, CARD: int, AMOUNT: {type: decimal, scale: 2}}}
labels: {field: FRAUD, known: KNOWN_AT}
entities:
  card: {key: CARD, features: {F: FEATURE}}
vector: [AMOUNT]
model: {decisions: {review: 0.1}}
"""

_EXAMPLES = f"""\
### The examples
Four payments of one card: 1.00 at 0 s, 3.00 at 1 s, 3.00 at 2 s and 5.00 at 4 s, and a feature as of the last one. The
first is fraud, the second is none, and of the others nothing is known yet. In this file an example stands in place of
`FEATURE`:
```yaml
{_EXAMPLE_FILE}```
In Python any other feature is tried so:
```python
from models.reference import value_of

value_of("{{aggregate: count, window: 10s, where: AMOUNT > 2}}")  # [3.0]
```
What else the keys of a feature do:"""

# The keys of a feature that no example of an aggregate shows.
KEYS_BY_EXAMPLE: dict[str, tuple[float, ...]] = {
    "{aggregate: count, window: 3s}": (2,),
    "{aggregate: count, window: 10s, delay: 2s}": (3,),
    "{aggregate: count, window: 10s, where: AMOUNT > 2}": (3,),
    "{aggregate: count, window: 10s, by: {AMOUNT: [3, 5]}}": (2, 1),
    "{aggregate: sum, of: AMOUNT, window: lifetime}": (12,),
    "{aggregate: rate, window: 10s}": (0.4,),
}

_FUNCTIONS = """\
## Functions
What an [expression](pipelines.md#transforms) may call. In the examples x is {x:g}, y is {y:g}, z is absent and t is
2020-09-13 12:26:40 UTC, a Sunday. Times are taken in UTC."""


def value_of(feature: str) -> list[float]:
    """What a feature, written as in a pipeline file, is as of the last payment of the examples. Raises PipelineError.

    >>> value_of("{aggregate: count, window: 10s, where: AMOUNT > 2}")
    [3.0]
    """
    pipeline = parse(_EXAMPLE_FILE.replace("FEATURE", feature))
    times, n = 1_600_000_000_000 + np.array([0, 1000, 2000, 4000]), 4
    fields = np.array([np.arange(n), times, np.ones(n, np.int64), [100, 300, 300, 500]], np.int64).T
    labels = np.array([POSITIVE, NEGATIVE, UNKNOWN, UNKNOWN], np.int8)
    none = np.zeros(n, np.int64)
    history = History(times, np.arange(n), np.ascontiguousarray(fields), {"card": none}, labels, none)
    found: list[float] = fold_history(pipeline, history)[-1].tolist()
    return found


def markdown() -> str:
    """The page."""
    parts = schema()["$defs"]
    sections = [_BEGINNING]
    for name, (heading, explained) in _PARTS.items():
        more = f"More in [pipelines]({explained})."
        sections += [f"## {heading}\n{parts[name]['description']} {more}", _keys(parts[name])]
        if name == "FieldSpec":
            sections += ["### Types", _types()]
    sections += [_AGGREGATES, _aggregates(), _notes(), _EXAMPLES, _keys_by_example()]
    sections += [_FUNCTIONS.format(**SAMPLE), _functions()]
    return "\n\n".join(sections) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines).replace("|  |", "| |")


def _keys(part: dict[str, Any]) -> str:
    """The keys of a part of the schema, in the order in which they are declared."""
    rows = [
        (f"`{key}`", _takes(said), _default(said, key in part["required"]), said["description"])
        for key, said in part["properties"].items()
    ]
    return _table(("key", "takes", "default", "meaning"), rows)


def _takes(said: dict[str, Any]) -> str:
    """What a piece of JSON Schema takes, in words."""
    if "$ref" in said:
        heading = _PARTS[said["$ref"].rpartition("/")[2]][0]
        return f"[{heading.lower()}](#{heading.lower()})"
    if "anyOf" in said:
        return " or ".join(_takes(one) for one in said["anyOf"] if one != {"type": "null"})
    if "enum" in said:
        return _one_of(said["enum"])
    if said["type"] == "array":
        return f"list of {_takes(said['items'])}"
    return _WORDS.get(said["type"]) or f"by name: {_takes(said['additionalProperties'])}"


def _one_of(values: list[str]) -> str:
    if set(values) == set(KINDS):
        return "[aggregate](#aggregates)"
    if set(values) == set(FIELD_TYPES):
        return "[type](#types)"
    return ", ".join(f"`{value}`" for value in values)


def _default(said: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    default = said["default"]
    if default is None or default in ([], {}):
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _types() -> str:
    rows = [(f"`{name}`", one.json, one.kept) for name, one in FIELD_TYPES.items()]
    return _table(("type", "JSON", "kept as"), rows)


def _aggregates() -> str:
    rows = [
        (f"`{name}`", _of(one.kind), one.value, _nothing(one.kind), _example(*one.example))
        for name, one in AGGREGATES.items()
    ]
    return _table(("aggregate", "`of`", "value", "with nothing", "example"), rows)


def _of(kind: int) -> str:
    if kind in aggregates.OF_LABELS:
        return "label"
    if kind in aggregates.OF_ROWS:
        return ""
    return "number, category or string" if kind in aggregates.OF_TEXTS else "number"


def _nothing(kind: int) -> str:
    if kind in aggregates.LISTS:
        return "NaN where there are fewer"
    return "0" if kind in aggregates.ZERO_OF_NOTHING else "NaN"


def _example(text: str, values: Iterable[float]) -> str:
    return f"`{text}` is {_numbers(values)}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(repr(value) for value in values)


def _notes() -> str:
    for_life, in_cells = (
        ", ".join(f"`{name}`" for name, kind in KINDS.items() if kind in kinds)
        for kinds in (aggregates.FOR_LIFE, aggregates.IN_CELLS)
    )
    return _NOTES.format(for_life=for_life, in_cells=in_cells)


def _keys_by_example() -> str:
    rows = [(f"`{text}`", _numbers(values)) for text, values in KEYS_BY_EXAMPLE.items()]
    return _table(("feature", "value"), rows)


def _functions() -> str:
    rows = [(f"`{f.form}`", f.value, _example(f.example[0], f.example[1:])) for f in FUNCTIONS.values()]
    return _table(("function", "value", "example"), rows)
