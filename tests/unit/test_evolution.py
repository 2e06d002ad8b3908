"""What a changed pipeline file does to what runs, and the page that says so."""

from __future__ import annotations

import re

import pytest

from models import pipeline
from models.evolution import compare
from models.pipeline import Pipeline
from tests.conftest import REPOSITORY
from tests.fixtures.pipelines import SHOP, edited, shop
from tests.unit.test_pipeline import CHANGES, SAME

LEVELS = ("none", "safe", "rebuild", "breaks")
RISK = "      SHOP_RISK: {aggregate: share, of: RETURNED, window: 2d, delay: 1d}\n"
ITEMS = "      SHOP_ITEMS: {aggregate: mean, of: ITEMS, window: 1h}\n"
UNLABELLED = ("labels:\n  field: RETURNED\n  known: KNOWN\n", "", RISK, "", " SHOP_RISK,", "")
WEIGHED = "      WEIGHT: {type: float, optional: true}\n"
BOX = "  box:\n    key: ITEMS\n    features: {BOX_NB: {aggregate: count, window: 1h}}\n"
ONE = ("  shop:\n    key: SHOP\n    features:\n" + ITEMS + RISK, "", " SHOP_RISK,", "", ", SHOP_ITEMS]", "]")
KEY, ID = "CUSTOMER: int", "      ID: int\n"
MORE = "labels:\n"  # behind the fields
REVERSALS = "reversals:\n  known: GONE\n"
LOGINS = (
    MORE,
    f"  logins:\n    id: ID\n    time: AT\n    fields: {{ID: int, AT: timestamp, CUSTOMER: int}}\n{MORE}",
)


def field(text: str) -> tuple[str, str]:
    return MORE, f"      {text}\n{MORE}"


# By row of the page: the edits of the file before, and those that are made to it.
CASES: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "a feature is added, removed or renamed": [
        ((), (ITEMS, f"{ITEMS}      SHOP_NB: {{aggregate: count, window: 1h}}\n")),
        ((", SHOP_ITEMS]", "]"), (ITEMS, "")),
        ((", SHOP_ITEMS]", "]"), ("SHOP_ITEMS:", "N:")),
    ],
    "another aggregate, `of`, `window` or `delay` of a feature": [
        ((), ("aggregate: mean", "aggregate: sum")),
        ((), ("of: ITEMS", "of: AMOUNT")),
        ((), ("window: 1h", "window: 2h")),
        ((), ("delay: 1d", "delay: 2d")),
    ],
    "another `where`, `by`, or any other key of a feature": [
        ((), ("of: ITEMS, window: 1h", "of: ITEMS, window: 1h, where: AMOUNT > 5")),
        (("of: ITEMS, window: 1h", "of: ITEMS, window: 1h, where: AMOUNT > 5"), ("AMOUNT > 5", "AMOUNT > 6")),
        (("window: 1d}", "window: 1d, per: 1m}", "aggregate: count", "aggregate: rate"), ("per: 1m", "per: 1h")),
    ],
    "another `hop` of an entity": [(UNLABELLED, ("    key: SHOP\n", "    key: SHOP\n    hop: 1m\n"))],
    "another order of an entity's features": [((), (ITEMS + RISK, RISK + ITEMS))],
    "an entity before the last is added, removed or renamed": [
        ((), ("  shop:\n", f"{BOX}  shop:\n")),
        (("  shop:\n", f"{BOX}  shop:\n"), (BOX, "")),
        ((), ("  customer:\n", "  buyer:\n")),
    ],
    "the last entity is added, removed or renamed: another log is scored": [
        ((), ("vector:", f"{BOX}vector:")),
        (("vector:", f"{BOX}vector:"), (BOX, "")),
        ((), ("  shop:\n", "  shops:\n")),
    ],
    "another `key` of an entity behind the first": [(UNLABELLED, ("key: SHOP", "key: ITEMS"))],
    "another `key` of an entity with features over labels": [((), ("key: SHOP", "key: ITEMS"))],
    "another `key` of the first entity": [((), ("key: CUSTOMER", "key: ITEMS"))],
    "another `lateness`": [((), ("lateness: 1h", "lateness: 2h"))],
    "a transform that the vector needs is added, removed or changed": [
        ((), ("  NIGHT:", "  DARK: hour(AT) <= 6\n  NIGHT:", " NIGHT,", " NIGHT, DARK,")),
        ((), ("transforms:\n  NIGHT: hour(AT) <= 6\n", "", " NIGHT,", "")),
        ((), ("hour(AT) <= 6", "hour(AT) <= 5")),
    ],
    "another `vector`, or another order of it": [
        ((), (", SHOP_ITEMS]", "]")),
        ((), ("[AMOUNT, ITEMS,", "[ITEMS, AMOUNT,")),
    ],
    "an optional numeric field is added": [((), field("WIDTH: {type: float, optional: true}"))],
    "an optional string field is added": [((), field("NOTE: {type: string, optional: true}"))],
    "a required numeric field is added": [((), field("WIDTH: float"))],
    "a required string field is added": [((), field("NOTE: string"))],
    "a string field that nothing uses is removed": [(field("NOTE: string"), ("      NOTE: string\n", ""))],
    "a numeric field that nothing uses is removed": [((" WEIGHT,", ""), (WEIGHED, ""))],
    "another order of numeric fields": [((), (ID, "", WEIGHED, WEIGHED + ID))],
    "a field that is used takes more: `int` becomes `decimal`, a larger `scale`": [
        ((), ("ITEMS: {type: int,", "ITEMS: {type: decimal, scale: 1,")),
        ((), ("scale: 2", "scale: 3")),
    ],
    "a numeric field that nothing uses takes more: `int` becomes `float`": [
        (field("WIDTH: int"), ("WIDTH: int", "WIDTH: float")),
    ],
    "a field that is used gets another type, or a smaller `scale`": [
        ((), ("WEIGHT: {type: float", "WEIGHT: {type: int")),
        ((), (KEY, "CUSTOMER: string")),
        ((), ("scale: 2", "scale: 1")),
    ],
    "a string field that nothing uses becomes a number": [(field("NOTE: string"), ("NOTE: string", "NOTE: int"))],
    "another `unit` of a timestamp": [((), ("unit: ms", "unit: s")), ((), ("unit: ms", "unit: iso"))],
    "a field that is used becomes optional": [
        ((), (KEY, "CUSTOMER: {type: int, optional: true}")),
        ((*field("SIZE: int"), "hour(AT) <= 6", "SIZE <= 6"), ("SIZE: int", "SIZE: {type: int, optional: true}")),
    ],
    "a field that is used becomes required": [((), ("SHOP: {type: string, optional: true}", "SHOP: string"))],
    "another field is the `id` or the `time`, without labels": [
        (UNLABELLED, ("id: ID", "id: CUSTOMER")),
        ((*UNLABELLED, WEIGHED, f"{WEIGHED}      TOO: timestamp\n"), ("time: AT", "time: TOO")),
    ],
    "another field is the `id` or the `time`, with labels": [
        ((), ("id: ID", "id: CUSTOMER")),
        (field("TOO: timestamp"), ("time: AT", "time: TOO")),
    ],
    "`labels` are added or removed": [
        (UNLABELLED, ("lateness:", "labels: {field: GONE, known: KNOWN}\nlateness:")),
        ((RISK, "", " SHOP_RISK,", ""), UNLABELLED[:2]),
    ],
    "a stream is added, removed, or renamed among several": [
        ((), LOGINS),
        (LOGINS, ("  logins:\n", "  sessions:\n")),
        ((*LOGINS, MORE, f"{REVERSALS}{MORE}"), (LOGINS[1].removesuffix(MORE), "")),
    ],
    "another stream is scored": [(LOGINS, ("    fields: {ID: int", "    scored: true\n    fields: {ID: int"))],
    "`reversals` are added or removed": [
        ((), (MORE, f"{REVERSALS}{MORE}")),
        ((*LOGINS, MORE, f"{REVERSALS}{MORE}"), (REVERSALS, "")),
    ],
    "streams, `reversals` or fields of a key go, and the first entity is not routed any more": [
        (LOGINS, (LOGINS[1].removesuffix(MORE), "")),
        ((MORE, f"{REVERSALS}{MORE}"), (REVERSALS, "")),
        (("key: CUSTOMER", "key: [CUSTOMER, ITEMS]"), ("key: [CUSTOMER, ITEMS]", "key: CUSTOMER")),
    ],
    "the only entity is routed from now on: another log is scored": [
        (ONE, (MORE, f"{REVERSALS}{MORE}")),
    ],
    "another `known` of the reversals": [((MORE, f"{REVERSALS}{MORE}"), ("known: GONE", "known: AWAY"))],
    "another `topic` of the reversals": [
        ((MORE, f"{REVERSALS}{MORE}"), ("known: GONE", "known: GONE\n  topic: raw"))
    ],
    "the first entity gets features over labels, which labels must carry its key for": [
        ((), ("{aggregate: count, window: 1d}", "{aggregate: share, of: RETURNED, window: 1d, delay: 1d}"))
    ],
    "another `field` of the labels": [((), ("field: RETURNED", "field: GONE", "of: RETURNED", "of: GONE"))],
    "another `known` of the labels": [((), ("known: KNOWN", "known: SEEN"))],
    "labels or reversals may leave out what the ledger knows (`keys: ledger`)": [
        ((), ("known: KNOWN", "known: KNOWN\n  keys: ledger")),
        ((MORE, f"{REVERSALS}{MORE}"), ("known: GONE", "known: GONE\n  keys: ledger")),
    ],
    "labels or reversals may no longer leave it out": [
        (("known: KNOWN", "known: KNOWN\n  keys: ledger"), ("  keys: ledger\n", "")),
        ((MORE, f"{REVERSALS}  keys: ledger\n{MORE}"), ("  keys: ledger\n", "")),
    ],
    "another `topic` of the stream, or another name of it": [
        ((), ("    id: ID\n", "    id: ID\n    topic: raw\n")),
        ((), ("  orders:", "  purchases:")),
    ],
    "another `topic` of the labels": [((), ("known: KNOWN", "known: KNOWN\n  topic: raw"))],
    "another `name` of the pipeline, and so of its topics": [((), ("name: shop", "name: store"))],
    "another `model`": [((), ("review: 0.1", "look: 0.2")), ((), ("model:\n", "model:\n  train: xgboost\n"))],
    "another `predictions_carry_features`": [((), ("model:", "predictions_carry_features: false\nmodel:"))],
    "comments, order of keys, spaces in a transform or a `where`, `60m` for `1h`, a default written out": [
        ((), ("lateness: 1h", "lateness: 1h # a comment")),
        ((), ("{aggregate: count, window: 1d}", "{window: 1d, aggregate: count}")),
        ((), ("hour(AT) <= 6", "hour( AT )<=6")),
        ((), ("window: 1h", "window: 60m", "lateness: 1h", "lateness: 60m")),
        ((), ("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, delay: 0s}")),
    ],
}  # fmt: skip


def page_rows() -> dict[str, tuple[str, str]]:
    text = (REPOSITORY / "docs" / "evolution.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (changes|stays) \| `?(\w+)`? \|$", text, re.MULTILINE)
    return {change: (hash_, level) for change, hash_, level in rows}


def made(text: str, pieces: tuple[str, ...]) -> str:
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        text = edited(text, old, new)
    return text


def worst(before: Pipeline, after: Pipeline) -> str:
    return LEVELS[max((LEVELS.index(c.level) for c in compare(before, after)), default=0)]


@pytest.mark.parametrize(
    ("row", "first", "then"), [(row, *case) for row, cases in CASES.items() for case in cases]
)
def test_the_page_tells_what_a_change_does(row: str, first: tuple[str, ...], then: tuple[str, ...]) -> None:
    text = made(SHOP, first)
    before, after = pipeline.parse(text), pipeline.parse(made(text, then))
    hash_ = "stays" if before.definition == after.definition else "changes"
    assert (hash_, worst(before, after)) == page_rows()[row]


def test_each_row_of_the_page_is_tried() -> None:
    assert list(page_rows()) == list(CASES)


@pytest.mark.parametrize("pieces", [*CHANGES.values(), *SAME.values()], ids=[*CHANGES, *SAME])
def test_a_rebuild_is_told_whenever_the_hash_changes_and_only_then(pieces: tuple[str, ...]) -> None:
    text = SHOP
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        text = text.replace(old, new)
    after = pipeline.parse(text)
    told = any("folded again" in change.effect for change in compare(shop(), after))
    assert told == (after.definition != shop().definition)


@pytest.mark.parametrize(
    ("pieces", "what", "change", "effect"),
    [
        (("window: 1h", "window: 2h"), "entities.shop.features.SHOP_ITEMS", "window: 1h > 2h", "train"),
        ((", SHOP_ITEMS]", "]"), "vector", "-SHOP_ITEMS", "train"),
        (field("WIDTH: float"), "streams.fields.WIDTH", "added", "missing-field"),
        (("unit: ms", "unit: s"), "streams.fields.AT", "unit: ms > s", "read in another unit"),
        (("scale: 2", "scale: 1"), "streams.fields.AMOUNT", "scale: 2 > 1", "dead letters"),
        (("key: CUSTOMER", "key: ITEMS"), "entities", "first key: CUSTOMER > ITEMS", "wrong-key"),
        (("key: SHOP", "key: ITEMS"), "labels", "need ITEMS", "labels without ITEMS"),
        (("  shop:\n", "  shops:\n"), "entities.shops", "added", "topics create"),
        (("review: 0.1", "review: 0.2"), "model", "decisions: review: 0.1 > 0.2", "headrace train"),
        (("name: shop", "name: store"), "name", "shop > store", "store.predictions"),
        (("known: KNOWN", "known: KNOWN\n  topic: raw"), "labels.topic", "shop.labels > raw", "not read"),
    ],
)  # fmt: skip
def test_a_change_says_what_happens_and_what_to_do(
    pieces: tuple[str, ...], what: str, change: str, effect: str
) -> None:
    (found,) = [c for c in compare(shop(), pipeline.parse(made(SHOP, pieces))) if c.what == what]
    assert found.change == change
    assert effect in found.effect


def test_the_same_file_has_no_changes() -> None:
    assert compare(shop(), shop()) == []
