"""What a pipeline is said to need, against what profiles take."""

import numpy as np
import pytest

from app import kafka
from models.estimates import DAY_MS, estimate, log_retention, row_bytes, rows_per_key
from models.pipeline import find
from models.windows import Arena
from tests.conftest import PIPELINES
from tests.fixtures.pipelines import shop

SHOP = shop()


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 9, 10, 12, 20, 24, 48, 100])
@pytest.mark.parametrize("number", [0, 1])
def test_memory_is_that_of_a_profile_whose_old_rows_went(rows: int, number: int) -> None:
    plan = SHOP.entities[number].plan
    arena, n = Arena(plan), 5 * rows  # five times what retention holds
    slot = arena.new()
    times = 10**12 + np.arange(n) * -(-plan.retention // rows)
    kinds = np.zeros(n, np.int8)
    arena.fold(
        np.full(n, slot),
        kinds,
        times,
        np.arange(n),
        np.ones((n, plan.values), np.int64),
        kinds,
        np.zeros(n, np.int64),
    )
    assert estimate(SHOP.entities[number], rows).profile_bytes == arena.sizes(np.array([slot]))[0]


def test_a_row_costs_what_the_page_says() -> None:
    customer, shop_ = SHOP.entities  # a field; an optional one, who has it, and positive labels
    assert (row_bytes(customer), row_bytes(shop_)) == (24 + 8, 24 + 3 * 8)
    assert row_bytes(find("card-fraud", PIPELINES).entity("terminal")) == 32


def test_rows_come_of_the_rate_where_none_are_measured() -> None:
    customer = SHOP.entities[0]
    found = estimate(customer, per_day=24.0)
    assert (found.reach, found.retention) == (7 * DAY_MS, 7 * DAY_MS + 3_600_000)
    assert found.rows == pytest.approx(7 * 24 + 1)
    assert estimate(customer, rows=5.0, per_day=24.0).rows == 5.0


def test_rows_of_a_key_are_those_within_retention() -> None:
    times, codes = np.array([0, 50, 100, 90, 60]), np.array([0, 0, 1, 1, -1])
    assert rows_per_key(times, codes, 100) == 1.5  # the event at 0 is just forgotten
    assert rows_per_key(times, codes, 101) == 2.0
    assert rows_per_key(times, np.full(5, -1), 100) is None
    assert rows_per_key(times[:0], codes[:0], 100) is None


@pytest.mark.parametrize("name", ["card-fraud", "flight-delays"])
def test_logs_are_created_for_a_week_more_than_they_need(name: str) -> None:
    pipeline = find(name, PIPELINES)
    made = kafka.wanted_topics(pipeline)
    for topic in (pipeline.stream.topic, *(e.log for e in pipeline.entities)):
        assert made[topic] == log_retention(pipeline) + kafka.SPARE_MS
