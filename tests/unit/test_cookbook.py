"""The cookbook's pipeline is one, and its examples give what it says."""

from __future__ import annotations

import re

import numpy as np
import pytest

from models.aggregates import KINDS
from models.history import History, fold_history
from models.pipeline import parse
from models.windows import NEGATIVE, POSITIVE, UNKNOWN
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "cookbook.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\| `(\{.*\})` \| (.*) \|$", PAGE, re.MULTILINE)

SMALL = """
name: small
streams:
  payments: {{id: ID, time: AT, fields: {{ID: int, AT: timestamp, CARD: int, AMOUNT: {{type: decimal, scale: 2}}}}}}
labels: {{field: FRAUD, known: KNOWN_AT}}
entities:
  before: {{key: CARD, features: {{NB: {{aggregate: count, window: 1s}}}}}}
  card: {{key: CARD, features: {{F: {feature}}}}}
vector: [NB]
model: {{decisions: {{review: 0.1}}}}
"""


def test_the_pipeline_of_the_page_compiles() -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    pipeline = parse(text, "cookbook.yaml")
    assert len(pipeline.vector) == 13
    assert "NB_7D_web" in pipeline.entities[0].features


def test_every_aggregate_has_an_example() -> None:
    assert set(re.findall(r"aggregate: (\w+)", " ".join(spec for spec, _ in EXAMPLES))) == set(KINDS)


@pytest.mark.parametrize(("feature", "value"), EXAMPLES, ids=[spec for spec, _ in EXAMPLES])
def test_the_examples_of_the_page(feature: str, value: str) -> None:
    pipeline = parse(SMALL.format(feature=feature))
    begin, n = 1_600_000_000_000, 4
    times = begin + np.array([0, 1000, 2000, 4000])
    fields = np.array([np.arange(n), times, np.ones(n, np.int64), [100, 300, 300, 500]], np.int64).T
    states = np.array([POSITIVE, NEGATIVE, UNKNOWN, UNKNOWN], np.int8)
    keys = {"before": np.zeros(n, np.int64), "card": np.zeros(n, np.int64)}
    found = fold_history(
        pipeline,
        History(times, np.arange(n), np.ascontiguousarray(fields), keys, states, np.zeros(n, np.int64)),
    )
    assert found[-1, 1:].tolist() == [float(part) for part in value.split(", ")]
