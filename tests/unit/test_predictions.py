"""Predictions: what a consumer reads is, bit for bit, what was computed."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from models.predictions import Place, PredictionEncoder, decode, unscored
from tests.fixtures.histories import bits
from tests.fixtures.pipelines import shop

SHOP = shop()
ENCODER = PredictionEncoder(SHOP)
WIDTH = len(SHOP.vector)


class Model:
    """Scores what it is told to."""

    card = SimpleNamespace(pipeline="shop", version="5f0c")

    def __init__(self, scores: list[float]) -> None:
        self.scores = np.array(scores, np.float32)

    def score_many(self, vectors: Any) -> Any:
        assert len(vectors) == len(self.scores)
        return self.scores

    def decide(self, scores: Any) -> list[str]:
        return ["block" if s > 0.5 else "pass" for s in scores]


def encode(
    scores: list[float], vectors: Any, ids: Any = None, encoder: PredictionEncoder = ENCODER
) -> list[bytes]:
    n = len(scores)
    model: Any = Model(scores)
    return encoder.encode(
        ids or list(range(n)), np.zeros(n, np.int64), np.arange(n) + 1000, np.array(vectors).reshape(n, WIDTH),
        model.score_many(range(n)), np.arange(n) % 2 == 1, np.arange(n) % 3 == 1, model, np.arange(n) + 3,
        np.arange(n) + 2**40, [[str(i) for i in range(n)], [None] * n],
    )  # fmt: skip


def test_a_prediction_says_what_it_is_of_and_who_made_it() -> None:
    first, second = encode([0.25, 0.75], np.arange(2 * WIDTH) / 4, ids=[7, -8])
    assert json.loads(first) == {
        "id": 7, "event_time": 1000, "score": 0.25, "decision": "pass", "model": "shop", "version": "5f0c",
        "definition": SHOP.definition, "late": False, "degraded": False,
        "origin": {"partition": 3, "offset": 2**40}, "keys": {"customer": "0", "shop": None},
        "features": dict(zip(SHOP.vector, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75], strict=True)),
    }  # fmt: skip
    read = decode(second)
    assert (read.id, read.score, read.decision, read.event_time) == (-8, 0.75, "block", 1001)
    assert (read.late, read.degraded) == (True, True)
    assert (read.origin.partition, read.origin.offset) == (4, 2**40 + 1)
    assert list(read.features) == list(SHOP.vector)


@given(npst.arrays(np.float64, (2, WIDTH)))
def test_features_go_through_json_bit_for_bit(vectors: Any) -> None:
    """All but what JSON has no word for, which becomes null."""
    for value, row in zip(encode([0.5, 0.5], vectors), vectors, strict=True):
        read = list(decode(value).features.values())
        assert [f is None for f in read] == (~np.isfinite(row)).tolist()
        finite = np.isfinite(row)
        assert bits([f for f in read if f is not None]) == bits(row[finite])
        assert json.loads(value)["features"] == decode(value).features  # any JSON library reads the same


@given(st.floats(0, 1, width=32))
def test_a_score_is_the_model_s_float32(score: float) -> None:
    assert decode(encode([score], np.zeros(WIDTH))[0]).score == score


def test_nan_is_null() -> None:
    value = encode([0.5], [math.nan] * WIDTH)[0]
    assert value.count(b"null") == WIDTH + 1  # and a key
    assert b"NaN" not in value


def test_without_a_model_a_prediction_is_its_features() -> None:
    zero = np.zeros(1, np.int64)
    vectors, late = np.arange(WIDTH, dtype=np.float64).reshape(1, WIDTH), np.zeros(1, np.bool_)
    keys = [["1"], [None]]
    (value,) = ENCODER.encode(
        [7], zero, zero + 1000, vectors, unscored(1), late, late, None, zero, zero + 5, keys
    )
    assert json.loads(value) == {
        "id": 7, "event_time": 1000, "score": None, "decision": None, "model": None, "version": None,
        "definition": SHOP.definition, "late": False, "degraded": False, "origin": {"partition": 0, "offset": 5},
        "keys": {"customer": "1", "shop": None},
        "features": dict(zip(SHOP.vector, range(WIDTH), strict=True)),
    }  # fmt: skip
    read = decode(value)
    assert (read.score, read.decision, read.version, read.origin.offset) == (None, None, None, 5)


def test_a_score_that_is_no_number_is_read_as_none() -> None:
    read = decode(encode([math.nan], np.zeros(WIDTH))[0])
    assert (read.score, read.decision, read.version) == (None, "pass", "5f0c")


def test_ids_may_be_text() -> None:
    value = encode([0.5], np.zeros(WIDTH), ids=['a "b" é'])[0]
    assert decode(value).id == 'a "b" é'


def test_features_are_left_out_where_the_pipeline_says_so() -> None:
    short = PredictionEncoder(shop("lateness: 1h", "predictions_carry_features: false"))
    value = encode([0.5], np.zeros(WIDTH), encoder=short)[0]
    assert "features" not in json.loads(value)
    assert decode(value).features == {}


def test_no_events_have_no_predictions() -> None:
    assert encode([], np.zeros((0, WIDTH))) == []


def test_a_consumer_is_told_what_is_no_prediction() -> None:
    with pytest.raises(msgspec.ValidationError, match="missing required field"):
        decode(b'{"id": 7}')


@given(st.data())
def test_whatever_owners_send_again_each_prediction_is_given_out_once(data: st.DataObject) -> None:
    """An owner goes on from any point that was reached, in order; readers stop anywhere, and lose or keep the place."""
    log, reached = [], -1
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, reached + 1))
        end = data.draw(st.integers(start, reached + 6))
        log += range(start, end + 1)
        reached = max(reached, end)
    place, given_out = Place(0), []
    for offset, origin in enumerate(log):
        if data.draw(st.booleans()):
            place = Place(place.next, place.highest)  # a restart from what was kept
        if data.draw(st.booleans()):
            # a restart that kept the next offset alone, and reads what stands before it first
            again = Place(place.next)
            assert not any(again.take(o, log[o]) for o in range(place.next))
            assert again == place
        if place.take(offset, origin):
            given_out.append(origin)
    assert given_out == list(range(reached + 1))
