"""Vectors: each place of the model's input is what its name says."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models import pipeline
from models.fields import event_id
from models.vectors import Vectors
from models.windows import NULL
from tests.fixtures import own
from tests.fixtures.histories import bits
from tests.fixtures.pipelines import SHIPPED, SHOP, edited, shop

NIGHT, NOON = 1_600_045_200_000, 1_600_088_400_000  # 2020-09-14, 01:00 and 13:00


def block(*rows: tuple[int, int, int, int, int, float]) -> np.ndarray:
    """ID, AT, CUSTOMER, AMOUNT, ITEMS, WEIGHT as the numeric block holds them."""
    fields = np.array([(*r[:5], 0) for r in rows], np.int64)
    fields[:, 5] = np.array([r[5] for r in rows]).view(np.int64)
    return fields


def test_fields_transforms_and_features_stand_in_their_places() -> None:
    fields = block((1, NIGHT, 3, 5716, 2, 0.1), (2, NOON, 4, -1, NULL, math.nan))
    features = np.array([[11.0, 12.0, 13.0, 14.0], [21.0, 22.0, math.nan, 24.0]])  # NB, SPENT, ITEMS, RISK
    vectors = Vectors(shop())
    assert vectors.width == 8
    # AMOUNT, ITEMS, WEIGHT, NIGHT, SHOP_RISK, CUSTOMER_NB, CUSTOMER_SPENT, SHOP_ITEMS
    expected = [
        [57.16, 2.0, 0.1, 1.0, 14.0, 11.0, 12.0, 13.0],
        [-0.01, math.nan, math.nan, 0.0, 24.0, 21.0, 22.0, math.nan],
    ]
    assert bits(vectors.of(fields, features)) == bits(expected)


def test_transforms_of_fields_features_and_each_other() -> None:
    """In their order, each behind what it names; a function, a category and a string among them."""
    p = shop(
        "ITEMS: {type: int, optional: true}", "ITEMS: {type: category, values: [web, phone], optional: true}",
        "{aggregate: mean, of: ITEMS, window: 1h}", "{aggregate: mean, of: AMOUNT, window: 1h}",
        "  NIGHT: hour(AT) <= 6\n",
        "  MEAN: CUSTOMER_SPENT / CUSTOMER_NB\n  NEAR: AMOUNT / MEAN\n  NIGHT: NEAR + MEAN\n"
        "  PHONE: ITEMS == 'phone'\n  NORTH: SHOP in ('north', 'south') or isnan(SHOP)\n"
        "  OWN: {function: 'tests.fixtures.own:risk', inputs: [NIGHT, ITEMS]}\n",
        "NIGHT, SHOP_RISK", "NIGHT, PHONE, NORTH, OWN, SHOP_RISK",
    )  # fmt: skip
    events = [(5000, 1, "north"), (100, 0, "west"), (100, -1, "south"), (100, NULL, None)]
    # ID, AT, CUSTOMER, SHOP, AMOUNT, ITEMS, WEIGHT
    fields = np.array(
        [(1, NOON, 3, NULL if s is None else event_id(s), a, k, 0) for a, k, s in events], np.int64
    )
    features = np.tile([2.0, 20.0, 0.0, 0.5], (4, 1))  # NB, SPENT, ITEMS, RISK
    nan = math.nan
    expected = [  # AMOUNT, ITEMS, WEIGHT, NIGHT, PHONE, NORTH, OWN, SHOP_RISK, CUSTOMER_NB, ...
        [50.0, 1.0, 0.0, 15.0, 1.0, 1.0, 30.0, 0.5, 2.0, 20.0, 0.0],
        [1.0, 0.0, 0.0, 10.1, 0.0, 0.0, 20.2, 0.5, 2.0, 20.0, 0.0],
        [1.0, -1.0, 0.0, 10.1, 0.0, 1.0, 20.2, 0.5, 2.0, 20.0, 0.0],
        [1.0, nan, 0.0, 10.1, 0.0, 1.0, 10.1, 0.5, 2.0, 20.0, 0.0],
    ]
    assert bits(Vectors(p).of(fields, features)) == bits(expected)
    assert Vectors(p).of(fields[:0], features[:0]).shape == (0, 11)


def test_each_transform_is_computed_once_and_only_if_it_is_needed() -> None:
    p = shop(
        "  NIGHT: hour(AT) <= 6\n",
        "  ONE: {function: 'tests.fixtures.own:counted', inputs: [AMOUNT]}\n"
        "  NONE: {function: 'tests.fixtures.own:counted', inputs: [CUSTOMER]}\n"
        "  NIGHT: ONE + ONE\n  TWO: ONE * NIGHT\n",
        "NIGHT, SHOP_RISK", "NIGHT, TWO, ONE, SHOP_RISK",
    )  # fmt: skip
    own.COUNTED.clear()
    vectors = Vectors(p).of(block((1, NOON, 3, 200, 1, 0.0)), np.zeros((1, 4)))
    assert vectors[0, 3:6].tolist() == [4.0, 8.0, 2.0]
    assert own.COUNTED == [1]


def test_no_events_have_no_vectors() -> None:
    assert Vectors(shop()).of(np.empty((0, 6), np.int64), np.empty((0, 4))).shape == (0, 8)


def test_what_is_absent_is_nan_in_a_transform_too() -> None:
    """Of a decimal, an int, a float and a time alike: the int64 that stands for absent is never a number."""
    text = edited(
        SHOP, "CUSTOMER: int", "CUSTOMER: int\n      PAID: {type: timestamp, unit: s, optional: true}"
    )
    text = edited(
        text,
        "  NIGHT: hour(AT) <= 6\n",
        "  NIGHT: hour(PAID)\n  B: ITEMS + 1\n  C: AMOUNT * 2\n  D: WEIGHT\n",
    )
    text = edited(text, "NIGHT, SHOP_RISK", "NIGHT, B, C, D, SHOP_RISK")
    fields = np.full((1, 7), NULL, np.int64)
    fields[0, 6] = np.array([math.nan]).view(np.int64)[0]
    vectors = Vectors(pipeline.parse(text)).of(fields, np.zeros((1, 4)))
    assert np.isnan(vectors[0, :7]).all()
    assert vectors[0, 7:].tolist() == [0.0] * 4


@given(st.lists(st.tuples(st.integers(0, 2**46), st.integers(-(2**46), 2**46), st.floats()), max_size=6))
def test_a_vector_does_not_depend_on_what_is_beside_it(rows: list[tuple[int, int, float]]) -> None:
    fields = (
        block(*[(i, at, 0, amount, i, weight) for i, (at, amount, weight) in enumerate(rows)])
        if rows
        else block((0,) * 6)
    )
    features = np.arange(len(fields) * 4, dtype=np.float64).reshape(-1, 4) / 7
    vectors = Vectors(shop())
    together = vectors.of(fields, features)
    alone = [vectors.of(fields[i : i + 1], features[i : i + 1])[0] for i in range(len(fields))]
    assert bits(together) == bits(np.array(alone))
    assert bits(together[:, 2]) == fields[:, 5].tolist()  # a float is its bits


def test_shipped_pipelines_give_vectors() -> None:
    for path in SHIPPED:
        p = pipeline.load(path)
        fields = np.ones((3, len(p.columns)), np.int64)
        features = np.ones((3, sum(len(e.features) for e in p.entities)))
        vectors = Vectors(p).of(fields, features)
        assert vectors.shape == (3, len(p.vector))
        assert np.isfinite(vectors).all()
