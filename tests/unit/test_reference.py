"""The reference says what the code does: each example is compiled and folded, each key described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from models.aggregates import AGGREGATES, KINDS
from models.pipeline import schema
from models.reference import KEYS_BY_EXAMPLE, value_of
from models.specs import FIELD_TYPES

PARTS = schema()["$defs"]
EXAMPLES = [*(a.example for a in AGGREGATES.values()), *KEYS_BY_EXAMPLE.items()]


@pytest.mark.parametrize(("feature", "values"), EXAMPLES, ids=[feature for feature, _ in EXAMPLES])
def test_the_examples(feature: str, values: tuple[float, ...]) -> None:
    assert value_of(feature) == list(values)


@pytest.mark.parametrize("name", AGGREGATES)
def test_the_example_of_an_aggregate_is_of_it(name: str) -> None:
    assert AGGREGATES[name].example[0].startswith(f"{{aggregate: {name}, ")


def test_what_a_file_may_name_is_what_is_described() -> None:
    assert set(PARTS["FeatureSpec"]["properties"]["aggregate"]["enum"]) == set(KINDS)
    assert set(PARTS["FieldSpec"]["properties"]["type"]["enum"]) == set(FIELD_TYPES)


def keys() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in PARTS.items():
        yield from ((f"{name}.{key}", said) for key, said in part["properties"].items())


def test_every_key_is_described() -> None:
    assert [key for key, said in keys() if not said.get("description")] == []


def test_every_key_of_a_feature_is_shown_by_an_example() -> None:
    shown = " ".join(feature for feature, _ in EXAMPLES)
    with_several_streams = {"from"}
    lacking = [key for key in PARTS["FeatureSpec"]["properties"] if f"{key}: " not in shown]
    assert set(lacking) == with_several_streams
