"""Events and labels as columns: every type, every unit, and every way in which input is bad."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import pipeline
from models.events import (
    AHEAD_MS,
    LARGEST_VALUE,
    LATEST_MS,
    Batch,
    EventDecoder,
    LabelDecoder,
    key_bytes,
    scaled,
    texts,
)  # fmt: skip
from models.fields import Field, as_float, event_id
from models.pipeline import Pipeline
from models.windows import EVENT, NEGATIVE, NULL, POSITIVE, UNKNOWN
from tests.fixtures.pipelines import shop

NOW = 1_600_000_000_000
KINDS = pipeline.parse("""\
name: kinds
streams:
  s:
    id: ID
    time: AT
    fields:
      ID: string
      AT: {type: timestamp, unit: iso}
      SECONDS: {type: timestamp, unit: s, optional: true}
      MICROS: {type: timestamp, unit: us, optional: true}
      ISO: {type: timestamp, unit: iso, optional: true}
      INT: {type: int, optional: true}
      SUMMED: {type: int, optional: true}
      FLOAT: {type: float, optional: true}
      CENTS: {type: decimal, scale: 2, optional: true}
      NANO: {type: decimal, scale: 9, optional: true}
      TEXT: {type: string, optional: true}
labels: {field: GOOD, known: SINCE}
entities:
  text:
    key: TEXT
    features: {N: {aggregate: count, window: 1h}, SUM: {aggregate: sum, of: SUMMED, window: 1h}}
  int: {key: INT, features: {RISK: {aggregate: share, of: GOOD, window: 1h, delay: 1h}}}
vector: [N]
model: {decisions: {alert: 0.1}}
""")
SHOP = shop()
DECODERS = {p.name: EventDecoder(p, p.stream) for p in (SHOP, KINDS)}
ORDER = {"ID": 7, "AT": NOW, "CUSTOMER": 3, "SHOP": "north", "AMOUNT": 57.16, "ITEMS": 2, "WEIGHT": 1.25}


def record(**changes: Any) -> bytes:
    return json.dumps({**ORDER, **changes}).encode()


def decode(
    *values: bytes, of: Pipeline | None = None, sent: int = NOW
) -> tuple[Batch, list[int], dict[int, str]]:
    """The batch, where its events stood, and the reasons by place."""
    batch, kept, rejects = DECODERS[(of or SHOP).name].decode(values, np.full(len(values), sent))
    assert len(batch) == len(kept) == len(batch.payloads) == len(batch.keys) == len(batch.times)
    assert len({r.index for r in rejects}) == len(rejects), "a record is told of once"
    assert sorted([*kept.tolist(), *(r.index for r in rejects)]) == list(range(len(values)))
    return batch, kept.tolist(), {r.index: r.reason.error for r in rejects}


def kinds(**fields: Any) -> dict[str, int]:
    """One event of every kind, decoded: the block by field."""
    given = {"ID": "a", "AT": "2020-09-13T12:26:40Z", **fields}
    batch, _, rejects = decode(json.dumps(given).encode(), of=KINDS)
    assert rejects == {}
    return dict(zip([f.name for f in KINDS.columns], batch.fields[0].tolist(), strict=True))


def why(value: bytes, **how: Any) -> str:
    """Why this one record is bad, between two that are good."""
    batch, kept, rejects = decode(record(ID=1), value, record(ID=2), **how)
    assert (kept, batch.ids.tolist()) == ([0, 2], [1, 2])
    return rejects[1]


# --- what is good ------------------------------------------------------------------------------


def test_an_event_becomes_columns() -> None:
    values = [record(), record(ID=8, AT=NOW - 5, CUSTOMER=4, SHOP=None, ITEMS=None, WEIGHT=None, AMOUNT=-1)]
    batch, kept, rejects = decode(*values)
    assert (kept, rejects) == ([0, 1], {})
    assert batch.kinds.tolist() == [EVENT, EVENT]
    assert batch.labels.tolist() == [UNKNOWN, UNKNOWN]
    assert batch.times.tolist() == batch.clocks.tolist() == [NOW, NOW - 5]
    assert batch.ids.tolist() == [7, 8]
    assert batch.keys == [3, 4]
    assert batch.payloads == values
    assert batch.features.shape == (2, 0)
    assert batch.fields[:, :5].tolist() == [[7, NOW, 3, 5716, 2], [8, NOW - 5, 4, -100, NULL]]
    weights = batch.fields[:, 5].copy().view(np.float64).tolist()
    assert weights[0] == 1.25 and math.isnan(weights[1])
    assert (batch.sources, batch.offsets) == (None, None)


def test_texts_with_a_column_are_codes_and_hashes() -> None:
    p = shop(
        "ITEMS: {type: int, optional: true}", "ITEMS: {type: category, values: [web, phone], optional: true}",
        "{aggregate: mean, of: ITEMS, window: 1h}", "{aggregate: mean, of: AMOUNT, window: 1h}",
        "hour(AT) <= 6", "SHOP == 'north'",
    )  # fmt: skip
    decoder = EventDecoder(p, p.stream)
    given = [("web", "north"), ("phone", ""), ("by post", "é"), (None, None)]
    values = [record(ITEMS=kind, SHOP=name) for kind, name in given] + [
        json.dumps({k: v for k, v in ORDER.items() if k not in ("ITEMS", "SHOP")}).encode()
    ]
    batch, kept, rejects = decoder.decode(
        [*values, record(ITEMS=1), record(ITEMS="web", SHOP=1)], np.full(7, NOW)
    )
    assert kept.tolist() == [0, 1, 2, 3, 4]
    assert [r.reason.error for r in rejects] == [
        "Expected `str | null`, got `int` - at `$.ITEMS`", "Expected `str | null`, got `int` - at `$.SHOP`",
    ]  # fmt: skip
    columns = dict(zip([f.name for f in p.columns], batch.fields.T.tolist(), strict=True))
    assert columns["ITEMS"] == [0, 1, -1, NULL, NULL]
    assert columns["SHOP"] == [event_id("north"), event_id(""), event_id("é"), NULL, NULL]
    assert columns["AMOUNT"] == [5716] * 5


def test_nothing_decodes_to_nothing() -> None:
    batch, kept, rejects = decode()
    assert (len(batch), kept, rejects) == (0, [], {})
    assert batch.fields.shape == (0, 6)


def test_what_is_optional_may_be_missing() -> None:
    fields = kinds()
    assert {name for name, value in fields.items() if value == NULL} == {
        "SECONDS", "MICROS", "ISO", "INT", "SUMMED", "CENTS", "NANO",
    }  # fmt: skip
    assert np.isnan(np.array([fields["FLOAT"]]).view(np.float64)[0])
    assert fields == kinds(**dict.fromkeys(fields.keys() - {"AT"}, None))


@pytest.mark.parametrize(
    ("field", "given", "stored"),
    [
        ("SECONDS", 1_600_000_000, NOW),
        ("SECONDS", -(2**53), -(2**53) * 1000),
        ("MICROS", 1_600_000_000_000_999, NOW),
        ("MICROS", -1, -1),  # downwards, as everywhere
        ("ISO", "2020-09-13T12:26:40.1239Z", NOW + 123),
        ("ISO", "2020-09-13T17:26:40+05:00", NOW),
        ("ISO", "2020-09-13T12:26:40", NOW),  # without a zone it is UTC
        ("ISO", "1969-12-31T23:59:59.9999Z", -1),
        ("INT", 2**63 - 1, 2**63 - 1),
        ("INT", -(2**63) + 1, -(2**63) + 1),
        ("SUMMED", LARGEST_VALUE, LARGEST_VALUE),
        ("CENTS", 0.07, 7),
        ("CENTS", 19, 1900),
        ("CENTS", -0.0, 0),
        ("NANO", 123.123456789, 123_123_456_789),
    ],
)
def test_types_and_units(field: str, given: Any, stored: int) -> None:
    assert kinds(**{field: given})[field] == stored


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_keeps_its_bits(number: float) -> None:
    bits = np.array([kinds(FLOAT=number)["FLOAT"]]).view(np.float64)
    assert bits.tobytes() == np.array([number]).tobytes()


AMOUNTS = st.integers(0, 9).flatmap(
    lambda scale: st.tuples(st.just(scale), st.integers(-LARGEST_VALUE, LARGEST_VALUE))
)


@given(AMOUNTS)
def test_an_amount_of_at_most_scale_decimals_is_exact(amount: tuple[int, int]) -> None:
    """As text and through a float64, and back."""
    scale, units = amount
    text = format(Decimal(units).scaleb(-scale), "f")
    column, valid = scaled(np.array([float(text)]), 10**scale)
    assert (column.tolist(), valid.tolist()) == ([units], [True])
    assert as_float(column, Field("A", "decimal", 10**scale)).tolist() == [float(text)]


@pytest.mark.parametrize("scale", range(10))
def test_large_amounts_are_exact_too(scale: int) -> None:
    """Where the product of amount and divisor is off by a bit or two."""
    units = np.random.default_rng(scale).integers(-LARGEST_VALUE, LARGEST_VALUE, 20_000)
    column, valid = scaled(units / 10**scale, 10**scale)
    assert valid.all()
    assert (column == units).all()


@given(AMOUNTS, st.integers(1, 9))
def test_one_decimal_more_is_too_many(amount: tuple[int, int], digit: int) -> None:
    scale, units = amount
    text = format(Decimal(units * 10 + (digit if units >= 0 else -digit)).scaleb(-scale - 1), "f")
    column, valid = scaled(np.array([float(text), 1.0]), 10**scale)
    assert valid.tolist() == [False, True], text
    assert column[1] == 10**scale


def test_what_is_absent_is_valid() -> None:
    column, valid = scaled(np.array([math.nan, math.inf, -math.inf, 1e308]), 10**9)
    assert valid.tolist() == [True, False, False, False]
    assert column[0] == NULL
    assert np.isnan(as_float(column, Field("A", "decimal", 10**9))[0])


def test_ids_are_their_own_or_a_hash_for_ever() -> None:
    """The hash is in stores and logs: it may never change."""
    assert [event_id(i) for i in (0, -5, 2**63 - 1)] == [0, -5, 2**63 - 1]
    assert event_id("a") == 3405396810240292928
    batch, _, _ = decode(
        *[json.dumps({"ID": i, "AT": "2020-01-01T00:00:00Z"}).encode() for i in ("a", "é", "")], of=KINDS
    )
    assert batch.ids.tolist() == [event_id("a"), event_id("é"), event_id("")]
    assert len(set(batch.ids.tolist())) == 3


def test_keys_are_the_text_of_their_field() -> None:
    assert [key_bytes(k) for k in (7, -7, "é", "", b"\x00\xff")] == [
        b"7",
        b"-7",
        b"\xc3\xa9",
        b"",
        b"\x00\xff",
    ]


def test_a_batch_is_taken_in_any_order() -> None:
    batch, _, _ = decode(*[record(ID=i, AT=NOW - i, SHOP=None, CUSTOMER=10 * i) for i in range(5)])
    taken = batch.take(np.array([3, 0, 3]))
    assert len(taken) == 3
    assert taken.ids.tolist() == [3, 0, 3]
    assert taken.times.tolist() == taken.clocks.tolist() == [NOW - 3, NOW, NOW - 3]
    assert taken.keys == [30, 0, 30]
    assert [json.loads(p)["ID"] for p in taken.payloads] == [3, 0, 3]
    assert taken.fields[:, 0].tolist() == [3, 0, 3]
    assert (len(taken.kinds), len(taken.labels), len(taken.features)) == (3, 3, 3)
    assert taken.sources is None and taken.offsets is None


def test_texts_are_read_again_from_what_was_checked() -> None:
    read = texts(SHOP.fields, ["SHOP", "ID"])
    assert (read(record()).SHOP, read(record()).ID) == ("north", 7)
    assert read(b'{"ID": 1}').SHOP is None


# --- what is bad -------------------------------------------------------------------------------

LESS = json.dumps({k: v for k, v in ORDER.items() if k != "AMOUNT"}).encode()
BAD = {
    "nothing": (b"", "the record is empty"),
    "no JSON": (b"hello", "JSON is malformed"),
    "half of it": (record()[:-5], "truncated"),
    "two of them": (record() + record(), "trailing characters"),
    "a list": (b"[1]", "Expected `object`, got `array`"),
    "null": (b"null", "Expected `object`, got `null`"),
    "a field missing": (LESS, "missing required field `AMOUNT`"),
    "a field null": (record(AMOUNT=None), "Expected `float`, got `null` - at `$.AMOUNT`"),
    "an id as text": (record(ID="7"), "Expected `int`, got `str` - at `$.ID`"),
    "an id as float": (record(ID=7.0), "Expected `int`, got `float` - at `$.ID`"),
    "an id as bool": (record(ID=True), "Expected `int`, got `bool` - at `$.ID`"),
    "a huge id": (record(ID=2**63), "$.ID"),
    "a gigantic id": (record(ID=10**400), "$.ID"),
    "the id that means absent": (record(ID=-(2**63)), "$.ID"),
    "an amount as text": (record(AMOUNT="57.16"), "Expected `float`, got `str` - at `$.AMOUNT`"),
    "an amount of three decimals": (record(AMOUNT=57.165), "AMOUNT has more decimals than its scale"),
    "a huge amount": (record(AMOUNT=1e15), "AMOUNT has more decimals than its scale, or is too large"),
    "an infinite amount": (record(AMOUNT=57.16).replace(b"57.16", b"1e999"), "Number out of range"),
    "an amount that is none": (record(AMOUNT=math.nan), "JSON is malformed"),
    "a huge count": (record(ITEMS=LARGEST_VALUE + 1), "$.ITEMS"),
    "a shop as number": (record(SHOP=5), "Expected `str | null`, got `int` - at `$.SHOP`"),
    "text of half a character": (record(SHOP="\ud800"), "JSON is malformed"),
    "text that is not UTF-8": (record().replace(b"north", b"\xff\xfe"), "utf-8"),
    "a time as text": (record(AT="2020-01-01"), "Expected `int`, got `str` - at `$.AT`"),
    "a time before 1970": (record(AT=0), "AT is no time between 1970 and 2100"),
    "a time after 2100": (record(AT=LATEST_MS), "AT is no time between 1970 and 2100"),
    "a time in microseconds": (record(AT=NOW * 1000), "AT is no time between 1970 and 2100"),
    "a time in seconds of a nova": (record(AT=2**60), "$.AT"),
    "a time that is yet to come": (record(AT=NOW + AHEAD_MS + 1), "AT is more than a day ahead of"),
    "a deep hole": (record()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "reason"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_apart_with_its_reason(value: bytes, reason: str) -> None:
    assert reason in why(value)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nothing", "empty"), ("no JSON", "not-json"), ("half of it", "not-json"), ("a list", "wrong-value"),
        ("text that is not UTF-8", "not-json"), ("a deep hole", "not-json"), ("a field missing", "missing-field"),
        ("a field null", "wrong-value"), ("a huge id", "wrong-value"), ("a huge amount", "wrong-decimal"),
        ("a time before 1970", "wrong-time"), ("a time that is yet to come", "time-ahead"),
    ],
)  # fmt: skip
def test_each_reason_has_a_code(name: str, code: str) -> None:
    _, _, (reject,) = DECODERS[SHOP.name].decode([BAD[name][0]], np.array([NOW]))
    assert reject.reason.code == code


def test_the_edges_of_time_are_good() -> None:
    _, kept, rejects = decode(record(AT=1), record(AT=NOW + AHEAD_MS))
    assert (kept, rejects) == ([0, 1], {})
    _, kept, rejects = decode(record(AT=LATEST_MS - 1), record(AT=LATEST_MS), sent=LATEST_MS)
    assert (kept, list(rejects)) == ([0], [1])


@pytest.mark.parametrize("time", ["yesterday", "2020-13-01T00:00:00Z", "2020-01-01", 1_600_000_000_000])
def test_a_time_that_is_not_iso(time: Any) -> None:
    _, kept, rejects = decode(json.dumps({"ID": "a", "AT": time}).encode(), of=KINDS)
    assert kept == [] and "$.AT" in rejects[0]


def test_the_first_reason_is_the_one_that_is_told() -> None:
    _, kept, rejects = decode(record(AMOUNT=0.001, AT=0), record(AT=0), b"", record())
    assert kept == [3]
    assert [rejects[i][:10] for i in range(3)] == ["AMOUNT has", "AT is no t", "the record"]


def test_an_unknown_field_is_no_error() -> None:
    _, kept, rejects = decode(record(COLOUR="green", DEEP={"a": [1, None]}))
    assert (kept, rejects) == ([0], {})


JUNK = st.one_of(
    st.binary(max_size=30),
    st.builds(
        lambda changes: record(**changes),
        st.dictionaries(
            st.sampled_from(sorted(ORDER)),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([]),
            min_size=1,
        ),
    ),
    st.tuples(st.integers(0, 110), st.integers(0, 255)).map(
        lambda at: record()[: at[0]] + bytes([at[1]]) + record()[at[0] + 1 :]
    ),
)  # fmt: skip


@given(st.lists(JUNK, max_size=5))
def test_whatever_comes_is_good_or_has_a_reason(values: list[bytes]) -> None:
    batch, kept, rejects = decode(*values)
    assert all(rejects.values())
    assert batch.payloads == [values[i] for i in kept]
    alone = [decode(v) for v in values]  # and what is beside it does not matter
    assert [i for i, (_, k, _) in enumerate(alone) if k] == kept
    assert {i: r[0] for i, (_, _, r) in enumerate(alone) if r} == rejects
    for i, at in enumerate(kept):
        assert alone[at][0].fields.tolist() == [batch.fields[i].tolist()]


# --- labels ------------------------------------------------------------------------------------

LABEL = {"ID": 7, "AT": NOW, "SHOP": "north", "RETURNED": 1, "KNOWN": NOW + 5}


def test_labels_become_columns() -> None:
    states = [1, 0, None]
    values = [
        json.dumps({**LABEL, "ID": i, "RETURNED": s, "KNOWN": NOW + i}).encode() for i, s in enumerate(states)
    ]
    batch, kept, rejects = LabelDecoder(SHOP, SHOP.said[0]).decode(values)
    assert (kept.tolist(), rejects) == ([0, 1, 2], [])
    assert batch.states.tolist() == [POSITIVE, NEGATIVE, UNKNOWN]
    assert batch.ids.tolist() == [0, 1, 2]
    assert batch.times.tolist() == [NOW] * 3
    assert batch.clocks.tolist() == [NOW, NOW + 1, NOW + 2]
    assert batch.keys == {"shop": ["north"] * 3}


def test_a_label_carries_the_keys_of_labelled_entities_and_the_units_of_the_stream() -> None:
    label = {"ID": "a", "AT": "2020-09-13T12:26:40Z", "GOOD": 0, "SINCE": "2020-09-14T12:26:40Z"}
    with_key = {**label, "INT": 5}
    batch, _, rejects = LabelDecoder(KINDS, KINDS.said[0]).decode(
        [json.dumps(x).encode() for x in (label, with_key)]
    )
    assert rejects == []
    assert batch.keys == {"int": [None, 5]}
    assert batch.ids.tolist() == [event_id("a")] * 2
    assert (batch.times.tolist(), batch.clocks.tolist()) == ([NOW] * 2, [NOW + 86_400_000] * 2)


BAD_LABELS = {
    "nothing": (b"", "the record is empty"),
    "a label of two": ({"RETURNED": 2}, "RETURNED is none of 0, 1 and null"),
    "a label of true": ({"RETURNED": True}, "got `bool` - at `$.RETURNED`"),
    "a label of a half": ({"RETURNED": 0.5}, "got `float` - at `$.RETURNED`"),
    "a time of zero": ({"AT": 0}, "AT is no time between 1970 and 2100"),
    "both": ({"AT": 0, "RETURNED": -1}, "RETURNED is none of 0, 1 and null"),
    "known as text": ({"KNOWN": "now"}, "$.KNOWN"),
    "an id as text": ({"ID": "7"}, "$.ID"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LABELS.values(), ids=BAD_LABELS.keys())
def test_a_bad_label_is_told_apart_with_its_reason(bad: Any, reason: str) -> None:
    good, value = json.dumps(LABEL).encode(), bad if bad == b"" else json.dumps({**LABEL, **bad}).encode()
    batch, kept, rejects = LabelDecoder(SHOP, SHOP.said[0]).decode([good, value, good])
    assert (kept.tolist(), batch.ids.tolist()) == ([0, 2], [7, 7])
    assert [(r.index, reason in r.reason.error) for r in rejects] == [(1, True)]


def test_a_label_must_say_what_it_is() -> None:
    """A missing label is not an unknown one."""
    label = {k: v for k, v in LABEL.items() if k != "RETURNED"}
    _, kept, rejects = LabelDecoder(SHOP, SHOP.said[0]).decode([json.dumps(label).encode()])
    assert kept.tolist() == []
    assert rejects[0].reason == ("missing-field", "Object missing required field `RETURNED`")
