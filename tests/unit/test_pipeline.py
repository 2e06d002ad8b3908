"""Pipeline files: what compiles, what is refused with which sentence, and what the definition hash holds."""

# ruff: noqa: E501 - the tables below have a row a line

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from models import pipeline
from models.errors import HeadraceError
from models.specs import PipelineError
from tests.fixtures.pipelines import FOLDER, SHIPPED, SHOP, edited, shop

DAY = 86_400_000


# --- what is shipped ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_compile(path: Path) -> None:
    compiled = pipeline.load(path)
    assert compiled.name == path.stem
    assert len(compiled.sources) == len(compiled.vector) > 0
    assert compiled.definition == pipeline.find(path.stem, FOLDER).definition


def test_there_are_three_shipped_files() -> None:
    assert [p.stem for p in SHIPPED] == ["card-fraud", "flight-delays", "flight-network"]


def test_what_is_compiled() -> None:
    p = shop()
    customer, shops = p.entities
    assert (customer.log, shops.log) == ("shop.orders", "shop.shop.log")
    assert (p.predictions, p.shadow, p.dead_letters) == (
        "shop.predictions", "shop.shadow", "shop.dead-letters",
    )  # fmt: skip
    assert p.labels == pipeline.Labels("shop.labels", "RETURNED", "KNOWN")
    assert (customer.labelled, shops.labelled) == (False, True)
    assert (customer.values, shops.values) == (("AMOUNT",), ("ITEMS",))
    assert [a.divisor for a in customer.aggregates] == [1, 100]  # cents
    assert customer.retention == 7 * DAY + 3_600_000
    assert shops.plan.bounds.tolist() == [0, 3_600_000, DAY, 3 * DAY]
    assert shops.retention == 3 * DAY + 3_600_000
    assert p.sources == (
        ("field", "AMOUNT"), ("field", "ITEMS"), ("field", "WEIGHT"), ("transform", "NIGHT"),
        ("shop", "SHOP_RISK"), ("customer", "CUSTOMER_NB"), ("customer", "CUSTOMER_SPENT"), ("shop", "SHOP_ITEMS"),
    )  # fmt: skip
    assert [f.name for f in p.columns] == ["ID", "AT", "CUSTOMER", "AMOUNT", "ITEMS", "WEIGHT"]
    assert {f.name: f.integral for f in p.stream.fields.values()} == {
        "ID": True, "AT": True, "CUSTOMER": True, "SHOP": False, "AMOUNT": True, "ITEMS": True, "WEIGHT": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "topic"),
    [("id: ID\n", "id: ID\n    topic: raw.orders\n", "raw.orders"), ("id: ID\n", "id: ID\n", "shop.orders")],
)
def test_a_stream_s_topic_is_the_first_entity_s_log(old: str, new: str, topic: str) -> None:
    p = shop(old, new)
    assert p.stream.topic == p.entities[0].log == topic


CHANNEL = (
    "      WEIGHT: {type: float, optional: true}\n",
    (
        "      WEIGHT: {type: float, optional: true}\n      CHANNEL: {type: category, values: [web, shop]}\n"
        "      NOTE: string\n      TEXT: string\n"
    ),
)


def test_what_has_a_column_of_the_block() -> None:
    """Categories, and those strings that something needed compares, in the stream's order."""
    plain = ["ID", "AT", "CUSTOMER", "AMOUNT", "ITEMS", "WEIGHT", "CHANNEL"]
    assert [f.name for f in shop(*CHANNEL).columns] == plain
    p = shop(*CHANNEL, "hour(AT) <= 6", "NOTE == 'a' or SHOP in ('b', 'c')\n  UNUSED: TEXT == 'd'")
    assert [f.name for f in p.columns] == [*plain[:3], "SHOP", *plain[3:], "NOTE"]
    fields = p.stream.fields
    assert (fields["NOTE"].hashed, fields["TEXT"].hashed, fields["CHANNEL"].hashed) == (True, False, False)
    assert (fields["NOTE"].integral, fields["TEXT"].integral, fields["CHANNEL"].integral) == (
        True,
        False,
        True,
    )
    assert fields["CHANNEL"].values == ("web", "shop")


def test_transforms_are_those_that_the_vector_needs_in_their_order() -> None:
    p = shop(
        "hour(AT) <= 6",
        "hour(AT)\n  MEAN: CUSTOMER_SPENT / CUSTOMER_NB\n  UNUSED: MEAN + 1\n  NEAR: AMOUNT / MEAN\n  Z: NEAR - NIGHT",
        "NIGHT, SHOP_RISK", "Z, SHOP_RISK",
    )  # fmt: skip
    assert list(p.transforms) == ["NIGHT", "MEAN", "NEAR", "Z"]
    assert p.transforms["MEAN"].uses == ("CUSTOMER_NB", "CUSTOMER_SPENT")
    assert p.sources[3] == ("transform", "Z")


def test_a_category_may_have_a_thousand_values() -> None:
    values = [f"v{i}" for i in range(1000)]
    p = shop("WEIGHT: {type: float", f"WEIGHT: {{type: category, values: {values}")
    assert p.stream.fields["WEIGHT"].values == tuple(values)


def test_an_entity_is_found_by_name() -> None:
    assert shop().entity("shop") is not None
    with pytest.raises(
        HeadraceError, match=r"The pipeline shop has no entity 'shops'; it has customer, shop\."
    ):
        shop().entity("shops")


@pytest.mark.parametrize(
    ("text", "ms"),
    [("250ms", 250), ("90s", 90_000), ("5m", 300_000), ("36h", 129_600_000), ("4000d", 4000 * DAY)],
)
def test_durations(text: str, ms: int) -> None:
    assert shop("lateness: 1h", f"lateness: {text}").lateness == ms


# --- what is refused ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A file with one piece replaced; where the error must point, and what it must say.

    schema: whether an editor sees it too, by the JSON Schema.
    """

    old: str
    new: str
    line: int
    field: str
    says: str
    schema: bool = False
    more: tuple[str, str] | None = None

    @property
    def text(self) -> str:
        text = edited(SHOP, self.old, self.new)
        return edited(text, *self.more) if self.more else text


ID = "    id: ID\n    time: AT\n"
LOGINS = (
    "  logins:\n    id: ID\n    time: AT\n"
    "    fields: {ID: int, AT: timestamp, CUSTOMER: int, DEVICE: string, OK: int}\nlabels:\n"
)
MALFORMED = {
    # the file as a whole
    "no name": Bad("name: shop\n", "", 1, "$", "missing required field `name`", True),
    "unknown part": Bad("lateness: 1h", "latness: 1h", 17, "latness", "did you mean lateness?", True),
    "nothing like it": Bad("lateness: 1h", "xyz: 1h", 17, "xyz", "there are: name, streams, entities", True),
    "name is a date": Bad("name: shop", "name: 2020-01-01", 1, "name", "Expected `str`, got `date`", True),
    "no stream": Bad(SHOP[SHOP.index("  orders:") : SHOP.index("labels:")], "  {}\n", 2, "streams", "there is none; name at least one"),
    "second stream of nothing": Bad("labels:\n", "  more: {}\nlabels:\n", 14, "streams.more", "missing required field `id`", True),
    "stream's name": Bad("  orders:", "  new orders:", 3, "streams.new orders", "letters, digits and '_'"),
    "first stream not scored": Bad(ID, ID + "    scored: false\n", 6, "streams.orders.scored", "put another one first"),
    "two of a field": Bad("labels:\n", LOGINS.replace("CUSTOMER: int", "CUSTOMER: string"), 17, "streams.logins.fields.CUSTOMER", "declare both alike, or rename one"),
    "a field that tells streams apart": Bad("labels:\n", LOGINS.replace("OK: int", "stream: int"), 17, "streams.logins.fields.stream", "rename the field"),
    "two streams of a topic": Bad("labels:\n", LOGINS.replace("labels:", "    topic: shop.orders\nlabels:"), 14, "streams.logins", "the topic shop.orders has another use"),
    "from nowhere": Bad("{aggregate: count, window: 1d}", "{aggregate: count, from: order, window: 1d}", 24, "entities.customer.features.CUSTOMER_NB.from", "did you mean orders?"),
    "from a stream without the field": Bad("labels:\n", LOGINS, 33, "entities.shop.features.SHOP_ITEMS.from", "logins has no SHOP, the key", more=("{aggregate: mean,", "{aggregate: mean, from: logins,")),
    "of a field of who has no such key": Bad("labels:\n", LOGINS, 33, "entities.shop.features.SHOP_ITEMS.of", "has no field 'OK'", more=("of: ITEMS, window: 1h", "of: OK, window: 1h")),
    "where of who has no such key": Bad("labels:\n", LOGINS, 33, "entities.shop.features.SHOP_ITEMS.where", "OK", more=("of: ITEMS, window: 1h", "of: ITEMS, window: 1h, where: OK > 0")),
    "where of another stream than from": Bad("labels:\n", LOGINS, 28, "entities.customer.features.CUSTOMER_NB.where", "OK", more=("{aggregate: count, window: 1d}", "{from: orders, aggregate: count, window: 1d, where: OK > 0}")),
    "by of who has no such key": Bad("labels:\n", LOGINS, 33, "entities.shop.features.SHOP_ITEMS.by", "has no field 'OK'", more=("of: ITEMS, window: 1h", "of: ITEMS, window: 1h, by: {OK: [1]}")),
    "labels from a stream that has none": Bad("labels:\n", LOGINS, 28, "entities.customer.features.CUSTOMER_NB.from", "labels are of events of orders", more=("{aggregate: count, window: 1d}", "{from: logins, aggregate: share, of: RETURNED, window: 1d, delay: 1d}")),
    "hop of events that come twice": Bad("labels:\n", LOGINS, 30, "entities.device.hop", "events of logins that come twice", more=("  customer:\n    key: CUSTOMER\n    features:\n", "  shops:\n    key: SHOP\n    features: {N: {aggregate: count, window: 1d}}\n  device:\n    key: DEVICE\n    hop: 1s\n    features: {D: {aggregate: count, window: 1d}}\n  customer:\n    key: CUSTOMER\n    features:\n")),
    "key of two streams": Bad("labels:\n", LOGINS, 31, "entities.shop.key", "no stream has SHOP and DEVICE", more=("key: SHOP", "key: [SHOP, DEVICE]")),
    "key of nothing": Bad("key: SHOP", "key: []", 27, "entities.shop.key", "name at least one field, and each once"),
    "key twice the same": Bad("key: SHOP", "key: [SHOP, SHOP]", 27, "entities.shop.key", "name at least one field, and each once"),
    "key of a float among others": Bad("key: SHOP", "key: [SHOP, WEIGHT]", 27, "entities.shop.key", "WEIGHT is no int or string"),
    "share of who has no label": Bad("labels:\n", LOGINS, 38, "entities.device.features.RISK", "of a first stream with this key", more=("vector: [", "  device:\n    key: DEVICE\n    features:\n      RISK: {aggregate: share, of: RETURNED, window: 1d, delay: 1d}\nvector: [")),
    "reversal known as a field": Bad("lateness: 1h", "reversals: {known: AT}\nlateness: 1h", 17, "reversals.known", "AT is a field of a stream"),
    "reversals without a time": Bad("lateness: 1h", "reversals: {}\nlateness: 1h", 17, "reversals", "missing required field `known`", True),
    "unknown in reversals": Bad("lateness: 1h", "reversals: {known: X, tpic: a}\nlateness: 1h", 17, "reversals.tpic", "did you mean topic?", True),
    "hop under reversals": Bad("lateness: 1h", "reversals: {known: X}\nlateness: 1h", 29, "entities.shop.hop", "drop the hop, or reversals", more=("    key: SHOP\n", "    key: SHOP\n    hop: 1s\n")),
    "lateness": Bad("lateness: 1h", "lateness: 1 hour", 17, "lateness", "write a whole number and ms, s, m, h or d"),
    "lateness is a number": Bad("lateness: 1h", "lateness: 5", 17, "lateness", "Expected `str`, got `int`", True),
    "4001 days": Bad("lateness: 1h", "lateness: 4001d", 17, "lateness", "longer than 4000 days"),
    # the stream
    "stream is nothing": Bad("    id: ID\n", "    ? []\n    : 5\n    id: ID\n", 4, "", "a key is a name"),
    "unknown in stream": Bad(ID, ID + "    tpic: x\n", 6, "streams.orders.tpic", "did you mean topic?", True),
    "stream without time": Bad("    time: AT\n", "", 3, "streams.orders", "missing required field `time`", True),
    "topic": Bad(ID, ID + "    topic: a/b\n", 6, "streams.orders.topic", "'a/b' is no topic name"),
    "id is no field": Bad("id: ID", "id: IDD", 4, "streams.orders.id", "has no field 'IDD'; did you mean ID?"),
    "time is no field": Bad("time: AT", "time: WHEN", 5, "streams.orders.time", "there are: ID, AT, CUSTOMER, SHOP"),
    "time is no timestamp": Bad("time: AT", "time: ID", 5, "streams.orders.time", "ID is no timestamp; declare"),
    "id is a decimal": Bad("id: ID", "id: AMOUNT", 4, "streams.orders.id", "AMOUNT is a decimal; an id is int or string"),
    "id is optional": Bad("      ID: int", "      ID: {type: int, optional: true}", 7, "streams.orders.fields.ID", "id cannot"),
    "time is optional": Bad("unit: ms}", "optional: true}", 8, "streams.orders.fields.AT", "time cannot be optional"),
    "field's name": Bad("WEIGHT: {", "WEIGHT-KG: {", 13, "streams.orders.fields.WEIGHT-KG", "letters, digits and '_'"),
    "field's name is true": Bad("      ID: int\n", "      on: int\n", 6, "streams.orders.fields", "Expected `str`, got `bool`"),
    "field's type": Bad("      CUSTOMER: int", "      CUSTOMER: number", 9, "streams.orders.fields.CUSTOMER.type", "Invalid enum value 'number'", True),
    "field is nothing": Bad("      CUSTOMER: int", "      CUSTOMER:", 9, "streams.orders.fields.CUSTOMER", "Expected `object`, got `null`", True),
    "field's key": Bad("unit: ms}", "units: ms}", 8, "streams.orders.fields.AT.units", "did you mean unit?", True),
    "field's unit": Bad("unit: ms}", "unit: ns}", 8, "streams.orders.fields.AT.unit", "Invalid enum value 'ns'", True),
    "scale of an int": Bad("ITEMS: {type: int,", "ITEMS: {type: int, scale: 2,", 12, "streams.orders.fields.ITEMS.scale", "a int has no scale; use type: decimal"),
    "scale of ten": Bad("scale: 2", "scale: 10", 11, "streams.orders.fields.AMOUNT.scale", "10 is not between 0 and 9"),
    "scale below zero": Bad("scale: 2", "scale: -1", 11, "streams.orders.fields.AMOUNT.scale", "-1 is not between 0 and 9"),
    "scale is a text": Bad("scale: 2", "scale: two", 11, "streams.orders.fields.AMOUNT.scale", "Expected `int`, got `str`", True),
    "category without values": Bad("      CUSTOMER: int", "      CUSTOMER: category", 9, "streams.orders.fields.CUSTOMER.values", "a category needs its values; write values: [web, shop]"),
    "category of no value": Bad("      CUSTOMER: int", "      CUSTOMER: {type: category, values: []}", 9, "streams.orders.fields.CUSTOMER.values", "a category needs its values"),
    "category of a value twice": Bad("      CUSTOMER: int", "      CUSTOMER: {type: category, values: [a,\n        b, a]}", 10, "streams.orders.fields.CUSTOMER.values.2", "'a' stands twice; each value has one code"),
    "category of numbers": Bad("      CUSTOMER: int", "      CUSTOMER: {type: category, values: [1, 2]}", 9, "streams.orders.fields.CUSTOMER.values.0", "Expected `str`, got `int`", True),
    "category of too many": Bad("      CUSTOMER: int", f"      CUSTOMER: {{type: category, values: [{', '.join(f'v{i}' for i in range(1001))}]}}", 9, "streams.orders.fields.CUSTOMER.values", "1001 are more than 1000 values; declare it as a string"),
    "values of a string": Bad("{type: string,", "{type: string, values: [a],", 10, "streams.orders.fields.SHOP.values", "a string has no list of values; use type: category, or drop it"),
    "scale of a category": Bad("      CUSTOMER: int", "      CUSTOMER: {type: category, values: [a], scale: 1}", 9, "streams.orders.fields.CUSTOMER.scale", "a category has no scale"),
    "key is a category": Bad("      CUSTOMER: int", "      CUSTOMER: {type: category, values: [a]}", 22, "entities.customer.key", "CUSTOMER is no int or string"),
    "sum of a category": Bad("AMOUNT: {type: decimal, scale: 2}", "AMOUNT: {type: category, values: [a]}", 25, "entities.customer.features.CUSTOMER_SPENT.of", "AMOUNT is a category; aggregates are exact"),
    "stream named as predictions": Bad("  orders:", "  predictions:", 3, "streams.predictions", "the topic shop.predictions has another use"),
    "stream in the dead letters": Bad(ID, ID + "    topic: shop.dead-letters\n", 3, "streams.orders", "the topic shop.dead-letters has another use"),
    # labels
    "labels in the stream": Bad("  known: KNOWN", "  known: KNOWN\n  topic: shop.orders", 14, "labels", "the topic shop.orders has another use"),
    "stream named as labels": Bad("  orders:", "  labels:", 14, "labels", "the topic shop.labels has another use; write topic:"),
    "label is a field": Bad("field: RETURNED", "field: ITEMS", 15, "labels.field", "ITEMS is a field of a stream; an event"),
    "known is a field": Bad("known: KNOWN", "known: AT", 16, "labels.known", "AT is a field of a stream; an event"),
    "label's name": Bad("field: RETURNED", "field: is returned", 15, "labels.field", "letters, digits and '_'"),
    "known is the label": Bad("known: KNOWN", "known: RETURNED", 16, "labels.known", "RETURNED is the label itself; name"),
    "unknown in labels": Bad("  known: KNOWN", "  known: KNOWN\n  topics: x", 17, "labels.topics", "did you mean topic?", True),
    "labels' topic": Bad("  known: KNOWN", "  known: KNOWN\n  topic: 'a b'", 17, "labels.topic", "'a b' is no topic name"),
    # transforms
    "transform's name": Bad("  NIGHT:", "  NIGHT-TIME:", 19, "transforms.NIGHT-TIME", "letters, digits and '_'"),
    "transform is a field": Bad("  NIGHT:", "  ITEMS:", 19, "transforms.ITEMS", "a field of the stream has this name; rename"),
    "transform does not parse": Bad("hour(AT) <= 6", "hour(AT", 19, "transforms.NIGHT", "write it like 'hour(AT) <= 6'."),
    "transform of what is not": Bad("hour(AT)", "hour(ATT)", 19, "transforms.NIGHT", "there is no 'ATT'; did you mean AT?"),
    "transform is a number": Bad("hour(AT) <= 6", "6", 19, "transforms.NIGHT", "6 is no transform; write an expression, or {function:", True),
    "transform of a text": Bad("hour(AT) <= 6", "SHOP + 1", 19, "transforms.NIGHT", "SHOP is a string, no number; compare it"),
    "transform of a value that is not": Bad("WEIGHT: {type: float", "WEIGHT: {type: category, values: [a, b]", 19, "transforms.NIGHT", "WEIGHT has no value 'c'; its values are a, b.", more=("hour(AT) <= 6", "WEIGHT == 'c'")),
    "transform of a later one": Bad("hour(AT) <= 6", "LATER + 1\n  LATER: ITEMS + 1", 19, "transforms.NIGHT", "LATER is written further down; move it above NIGHT."),
    "transform of itself": Bad("hour(AT) <= 6", "NIGHT + 1", 19, "transforms.NIGHT", "it needs itself (NIGHT -> NIGHT); write one of them"),
    "transforms in a ring": Bad("hour(AT) <= 6", "ITEMS + B\n  B: C * 2 + D\n  D: ITEMS\n  C: {function: x:y, inputs: [D, NIGHT]}", 19, "transforms.NIGHT", "it needs itself (NIGHT -> B -> C -> NIGHT); write"),
    "transform of a transform in no order": Bad("hour(AT) <= 6", "hour(AT)\n  B: NIGHT + C\n  C: AMOUNT", 20, "transforms.B", "C is written further down; move it above B."),
    "function without inputs": Bad("hour(AT) <= 6", "{function: 'a:b'}", 19, "transforms.NIGHT", "missing required field `inputs`", True),
    "unknown in function": Bad("hour(AT) <= 6", "{function: 'a:b', input: [AT], inputs: []}", 19, "transforms.NIGHT.input", "did you mean inputs?", True),
    "function of what is not": Bad("hour(AT) <= 6", "{function: 'tests.fixtures.own:large', inputs: [AMOUNTS]}", 19, "transforms.NIGHT", "there is no 'AMOUNTS'; did you mean AMOUNT?"),
    "function of itself": Bad("hour(AT) <= 6", "{function: 'tests.fixtures.own:large', inputs: [NIGHT]}", 19, "transforms.NIGHT", "it needs itself (NIGHT -> NIGHT)"),
    "function that is not": Bad("hour(AT) <= 6", "{function: 'tests.fixtures.own:lage', inputs: [AMOUNT]}", 19, "transforms.NIGHT", "has no function 'lage'; define it there with def."),
    "function over the batch": Bad("hour(AT) <= 6", "{function: 'tests.fixtures.own:ranks', inputs: [AMOUNT]}", 19, "transforms.NIGHT", "leave out sums, means and ranks over the array."),
    # entities and features
    "no entity": Bad(SHOP[SHOP.index("  customer:") : SHOP.index("vector:")], "  {}\n", 20, "entities", "name at least one"),
    "entity's name": Bad("  customer:", "  my customer:", 21, "entities.my customer", "an entity's name has letters"),
    "unknown in entity": Bad("    key: CUSTOMER", "    keys: CUSTOMER", 22, "entities.customer.keys", "did you mean key?", True),
    "key is no field": Bad("key: SHOP", "key: SHOPS", 27, "entities.shop.key", "did you mean SHOP?"),
    "key is a decimal": Bad("key: SHOP", "key: AMOUNT", 27, "entities.shop.key", "AMOUNT is no int or string"),
    "feature is a field": Bad("      SHOP_ITEMS:", "      WEIGHT:", 29, "entities.shop.features.WEIGHT", "rename the feature"),
    "feature is a transform": Bad("      SHOP_ITEMS:", "      NIGHT:", 29, "entities.shop.features.NIGHT", "there is another NIGHT: a field, feature or transform"),
    "feature twice": Bad("      SHOP_ITEMS:", "      CUSTOMER_NB:", 29, "entities.shop.features.CUSTOMER_NB", "rename one"),
    "key twice in YAML": Bad("      SHOP_ITEMS:", "      SHOP_RISK:", 30, "", "'SHOP_RISK' stands twice"),
    "aggregate": Bad("aggregate: count", "aggregate: counts", 24, "entities.customer.features.CUSTOMER_NB.aggregate", "Invalid enum value 'counts'", True),
    "no window": Bad("{aggregate: count, window: 1d}", "{aggregate: count}", 24, "entities.customer.features.CUSTOMER_NB", "count needs a window; write window: 7d, or window: lifetime"),
    "window of zero": Bad("window: 1d}", "window: 0d}", 24, "entities.customer.features.CUSTOMER_NB.window", "longer than 0; write 1h"),
    "window below zero": Bad("window: 1d}", "window: -1d}", 24, "entities.customer.features.CUSTOMER_NB.window", "'-1d' is no duration"),
    "delay": Bad("delay: 1d", "delay: tomorrow", 30, "entities.shop.features.SHOP_RISK.delay", "'tomorrow' is no duration"),
    "count of": Bad("{aggregate: count,", "{aggregate: count, of: ITEMS,", 24, "entities.customer.features.CUSTOMER_NB.of", "drop 'of'"),
    "sum of nothing": Bad("{aggregate: sum, of: AMOUNT,", "{aggregate: sum,", 25, "entities.customer.features.CUSTOMER_SPENT", "sum needs a field; write of: FIELD"),
    "sum of what is not": Bad("of: AMOUNT", "of: AMUONT", 25, "entities.customer.features.CUSTOMER_SPENT.of", "did you mean AMOUNT?"),
    "sum of floats": Bad("of: AMOUNT", "of: WEIGHT", 25, "entities.customer.features.CUSTOMER_SPENT.of", "declare it as int, or as {type: decimal"),
    "mean of a text": Bad("of: ITEMS", "of: SHOP", 29, "entities.shop.features.SHOP_ITEMS.of", "SHOP is a string; aggregates are exact"),
    "share without labels": Bad("labels:\n  field: RETURNED\n  known: KNOWN\n", "\n\n\n", 30, "entities.shop.features.SHOP_RISK", "add 'labels:' with field and known"),
    "share of a field": Bad("of: RETURNED", "of: ITEMS", 30, "entities.shop.features.SHOP_RISK.of", "write of: RETURNED"),
    "share at the event": Bad(", delay: 1d", "", 30, "entities.shop.features.SHOP_RISK.delay", "write the delay by which it is"),
    "no k": Bad("{aggregate: count, window: 1d}", "{aggregate: last_k, of: AMOUNT, window: 1d}", 24, "entities.customer.features.CUSTOMER_NB", "last_k needs k; write for instance k: 3"),
    "k of zero": Bad("{aggregate: count, window: 1d}", "{aggregate: last_k, of: AMOUNT, window: 1d, k: 0}", 24, "entities.customer.features.CUSTOMER_NB.k", "k is between 1 and 100"),
    "k of a count": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, k: 3}", 24, "entities.customer.features.CUSTOMER_NB.k", "count takes no k; drop it"),
    "k of too much": Bad("{aggregate: count, window: 1d}", "{aggregate: most_frequent, of: AMOUNT, window: 1d, k: 101}", 24, "entities.customer.features.CUSTOMER_NB.k", "k is between 1 and 100"),
    "no quantile": Bad("{aggregate: count, window: 1d}", "{aggregate: quantile, of: AMOUNT, window: 1d}", 24, "entities.customer.features.CUSTOMER_NB", "quantile needs quantile; write for instance quantile: 0.5"),
    "quantile of two": Bad("{aggregate: count, window: 1d}", "{aggregate: quantile, of: AMOUNT, window: 1d, quantile: 2}", 24, "entities.customer.features.CUSTOMER_NB.quantile", "0.5 is the median"),
    "quantile of nothing": Bad("{aggregate: count, window: 1d}", "{aggregate: quantile, of: AMOUNT, window: 1d, quantile: 0}", 24, "entities.customer.features.CUSTOMER_NB.quantile", "above 0 and at most 1"),
    "no half-life": Bad("{aggregate: count, window: 1d}", "{aggregate: decayed_count}", 24, "entities.customer.features.CUSTOMER_NB", "needs half_life; write for instance half_life: 1h"),
    "half-life of zero": Bad("{aggregate: count, window: 1d}", "{aggregate: decayed_count, half_life: 0s}", 24, "entities.customer.features.CUSTOMER_NB.half_life", "half_life is longer than 0"),
    "half-life of ages": Bad("{aggregate: count, window: 1d}", "{aggregate: decayed_count, half_life: 400d}", 24, "entities.customer.features.CUSTOMER_NB.half_life", "24 of them are longer than 4000 days"),
    "window of a decay": Bad("{aggregate: count, window: 1d}", "{aggregate: decayed_count, half_life: 1h, window: 1d}", 24, "entities.customer.features.CUSTOMER_NB.window", "drop the window"),
    "rate per nothing": Bad("{aggregate: count, window: 1d}", "{aggregate: rate, window: 1d, per: 0s}", 24, "entities.customer.features.CUSTOMER_NB.per", "per is longer than 0"),
    "lifetime of a rate": Bad("{aggregate: count, window: 1d}", "{aggregate: rate, window: lifetime}", 24, "entities.customer.features.CUSTOMER_NB.window", "for life there are count, sum, mean"),
    "rate of a field": Bad("{aggregate: count, window: 1d}", "{aggregate: rate, window: 1d, of: AMOUNT}", 24, "entities.customer.features.CUSTOMER_NB.of", "is of events and takes no field; drop 'of'"),
    "least of floats": Bad("{aggregate: count, window: 1d}", "{aggregate: min, window: 1d, of: WEIGHT}", 24, "entities.customer.features.CUSTOMER_NB.of", "declare it as int"),
    "least of nothing": Bad("{aggregate: count, window: 1d}", "{aggregate: min, window: 1d}", 24, "entities.customer.features.CUSTOMER_NB", "min needs a field; write of: FIELD"),
    "where does not parse": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, where: AMOUNT >}", 24, "entities.customer.features.CUSTOMER_NB.where", "write it like"),
    "where of what is not": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, where: AMUONT > 5}", 24, "entities.customer.features.CUSTOMER_NB.where", "there is no 'AMUONT'; did you mean AMOUNT?"),
    "by two fields": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, by: {ITEMS: [1], AMOUNT: [2]}}", 24, "entities.customer.features.CUSTOMER_NB.by", "it names one field"),
    "by what is not": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, by: {ITEM: [1]}}", 24, "entities.customer.features.CUSTOMER_NB.by", "did you mean ITEMS?"),
    "by no value": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, by: {ITEMS: []}}", 24, "entities.customer.features.CUSTOMER_NB.by.ITEMS", "name at least one value"),
    "by a value twice": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, by: {ITEMS: [1, 1]}}", 24, "entities.customer.features.CUSTOMER_NB.by.ITEMS", "each once"),
    "by a value below zero": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, by: {ITEMS: [-1]}}", 24, "entities.customer.features.CUSTOMER_NB.by.ITEMS", "does not go into a name"),
    "window is a number": Bad("{aggregate: count, window: 1d}", "{aggregate: count, window: 5}", 24, "entities.customer.features.CUSTOMER_NB.window", "Expected `str | null`, got `int`", True),
    "hop of the first entity": Bad("    key: CUSTOMER\n", "    key: CUSTOMER\n    hop: 1s\n", 23, "entities.customer.hop", "put an entity without a hop before it"),
    "hop that looks farther back than who drops": Bad("{aggregate: mean, of: ITEMS, window: 1h}\n      SHOP_RISK: {aggregate: share, of: RETURNED, window: 2d, delay: 1d}", "{aggregate: mean, of: ITEMS, window: 8d}\n      SHOP_RISK: {aggregate: count, window: 1h}", 28, "entities.shop.hop", "looks back as far", more=("    key: SHOP\n", "    key: SHOP\n    hop: 1s\n")),
    "hop of zero": Bad("    key: SHOP\n", "    key: SHOP\n    hop: 0s\n", 28, "entities.shop.hop", "a hop is longer than 0"),
    "hop under labels": Bad("    key: SHOP\n", "    key: SHOP\n    hop: 1s\n", 31, "entities.shop.features.SHOP_RISK.aggregate", "cells do not tell the share"),
    "hop above a window": Bad("    key: SHOP\n", "    key: SHOP\n    hop: 2h\n", 30, "entities.shop.features.SHOP_ITEMS.window", "shorter than the entity's hop"),
    # vector and model
    "vector of what is not": Bad("[AMOUNT, ", "[AMUONT, ", 31, "vector.0", "there is no 'AMUONT'; did you mean AMOUNT?"),
    "vector of nothing like it": Bad("[AMOUNT, ", "[XYZ, ", 31, "vector.0", "name a field, a transform or a feature"),
    "vector of a text": Bad("[AMOUNT, ", "[SHOP, ", 31, "vector.0", "SHOP is a string, not a number"),
    "vector of a time": Bad("[AMOUNT, ", "[AT, ", 31, "vector.0", "AT is a timestamp, not a number"),
    "vector names one twice": Bad("NIGHT, SHOP_RISK", "NIGHT, AMOUNT", 31, "vector.4", "AMOUNT stands twice"),
    "vector of a number": Bad("[AMOUNT, ", "[5, ", 31, "vector.0", "Expected `str`, got `int`", True),
    "vector is empty": Bad(SHOP[SHOP.index("vector:") : SHOP.index("model:")], "vector: []\n", 31, "vector", "name what the model sees"),
    "no model": Bad(SHOP[SHOP.index("model:") :], "", 1, "$", "missing required field `model`", True),
    "no decisions": Bad("{review: 0.1, block: 0.01}", "{}", 33, "model.decisions", "write for instance alert: 0.01"),
    "decision by more than all": Bad("review: 0.1", "review: 1.5", 33, "model.decisions.review", "1.5 is no share between 0 and 1"),
    "decision by nothing": Bad("review: 0.1", "review: .nan", 33, "model.decisions.review", "nan is no share"),
    "unknown in model": Bad("model:\n", "model:\n  trian: forest\n", 33, "model.trian", "did you mean train?", True),
    "trees in model": Bad("model:\n", "model:\n  trees: 5\n", 33, "model.trees", "there are: decisions, otherwise, train", True),
    # YAML itself
    "a tab": Bad("lateness: 1h", "\tlateness: 1h", 17, "", "mend the YAML"),
    "an open bracket": Bad("WEIGHT]".replace("WEIGHT", "SHOP_ITEMS"), "SHOP_ITEMS", 32, "", "mend the YAML"),
    "an object": Bad("lateness: 1h", "lateness: !!python/name:os.system x", 17, "", "could not determine a constructor"),
    "a control character": Bad("lateness: 1h", "lateness: \x07", 17, "", "special characters are not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused_with_line_field_and_remedy(bad: Bad) -> None:
    with pytest.raises(PipelineError) as refused:
        pipeline.parse(bad.text, "folder/shop.yaml")
    said = str(refused.value)
    assert said.startswith(f"folder/shop.yaml:{bad.line}: {bad.field + ': ' if bad.field else ''}")
    assert bad.says in said
    assert said.endswith((".", "?"))
    assert "\n" not in said
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "5"])
def test_what_is_no_mapping_is_no_pipeline(text: str) -> None:
    with pytest.raises(
        PipelineError, match=r"^x\.yaml:1: a pipeline is a mapping that begins with 'name:'\.$"
    ):
        pipeline.parse(text, "x.yaml")


def test_a_name_is_a_topic_s() -> None:
    with pytest.raises(
        PipelineError, match=r"<pipeline>:1: name: a name has letters, digits, '\.', '_' and '-'"
    ):
        shop("name: shop", "name: my shop")


def test_under_another_name_a_pipeline_has_topics_of_its_own_and_the_same_meaning() -> None:
    copy = pipeline.parse(SHOP, "folder/shop.yaml", alias="copy")
    assert (copy.name, copy.instance, copy.predictions) == ("shop", "copy", "copy.predictions")
    assert copy.definition == shop().definition
    assert [e.log for e in copy.entities] == ["copy.orders", "copy.shop.log"]
    with pytest.raises(PipelineError, match=r"shop\.yaml:1: name: a name has letters"):
        pipeline.parse(SHOP, "folder/shop.yaml", alias="a copy")


def test_the_name_is_the_file_s(tmp_path: Path) -> None:
    (tmp_path / "store.yaml").write_text("# a comment\n" + SHOP)
    with pytest.raises(
        PipelineError, match=r"store\.yaml:2: name: the file is store\.yaml; name the pipeline store"
    ):
        pipeline.load(tmp_path / "store.yaml")
    (tmp_path / "shop.yaml").write_text(SHOP)
    assert pipeline.load(tmp_path / "shop.yaml").definition == shop().definition


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        PipelineError, match=r"none\.yaml: cannot be read \(No such file or directory\); check"
    ):
        pipeline.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: latin\n# caf\xe9\n")
    with pytest.raises(PipelineError, match=r"latin\.yaml:2: this is not UTF-8; save the file as UTF-8\.$"):
        pipeline.load(tmp_path / "latin.yaml")


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        PipelineError, match=r"There is no pipeline 'card-frad' in .*; did you mean card-fraud\?"
    ):
        pipeline.find("card-frad", FOLDER)
    with pytest.raises(PipelineError, match=r"there are: card-fraud, flight-delays, flight-network\."):
        pipeline.find("xyz", FOLDER)
    with pytest.raises(PipelineError, match=r"there are: none\."):
        pipeline.find("xyz", tmp_path)


# --- the JSON Schema ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(pipeline.schema())
    return jsonschema.Draft202012Validator(pipeline.schema())


@pytest.mark.parametrize(
    "text", [*(p.read_text() for p in SHIPPED), SHOP], ids=[*(p.stem for p in SHIPPED), "shop"]
)
def test_the_schema_accepts_what_compiles(validator: jsonschema.Draft202012Validator, text: str) -> None:
    validator.validate(yaml.safe_load(text))


SEEN_BY_EDITORS = {name: bad for name, bad in MALFORMED.items() if bad.schema}


@pytest.mark.parametrize("bad", SEEN_BY_EDITORS.values(), ids=SEEN_BY_EDITORS.keys())
def test_the_schema_refuses_what_an_editor_can_see(
    validator: jsonschema.Draft202012Validator, bad: Bad
) -> None:
    data: Any = yaml.safe_load(bad.text)
    if bad.field == "name":
        data["name"] = 2020  # JSON has no dates
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(data)


# --- the definition hash -----------------------------------------------------------------------

CHANGES = {
    "a window": ("window: 1h", "window: 2h"),
    "a delay": ("delay: 1d", "delay: 2d"),
    "an aggregate": ("aggregate: mean", "aggregate: sum"),
    "an aggregate's field": ("of: ITEMS", "of: AMOUNT"),
    "an aggregate's field of one kind": ("of: ITEMS", "of: CUSTOMER"),
    "a feature's name": ("CUSTOMER_NB", "N"),
    "the name of one outside the vector": (", SHOP_ITEMS]", "]", "SHOP_ITEMS:", "N:"),
    "the order of features": (
        "      SHOP_ITEMS: {aggregate: mean, of: ITEMS, window: 1h}\n      SHOP_RISK: {aggregate: share, of: RETURNED, window: 2d, delay: 1d}\n",
        "      SHOP_RISK: {aggregate: share, of: RETURNED, window: 2d, delay: 1d}\n      SHOP_ITEMS: {aggregate: mean, of: ITEMS, window: 1h}\n",
    ),
    "an entity's name": ("  shop:\n", "  shops:\n"),
    "an entity's key": ("key: CUSTOMER", "key: ITEMS"),
    "which entity has which key": ("key: SHOP", "key: ONE", "key: CUSTOMER", "key: SHOP", "key: ONE", "key: CUSTOMER"),
    "the lateness": ("lateness: 1h", "lateness: 2h"),
    "a transform": ("hour(AT) <= 6", "hour(AT) <= 5"),
    "a transform's name": ("NIGHT", "DARK"),
    "a transform of another's": ("hour(AT) <= 6\n", "hour(AT) + HALF\n  HALF: ITEMS / 2\n", "  NIGHT: hour(AT) + HALF\n  HALF: ITEMS / 2\n", "  HALF: ITEMS / 2\n  NIGHT: hour(AT) + HALF\n"),
    "and the other": ("hour(AT) <= 6\n", "hour(AT) + HALF\n  HALF: ITEMS / 3\n", "  NIGHT: hour(AT) + HALF\n  HALF: ITEMS / 3\n", "  HALF: ITEMS / 3\n  NIGHT: hour(AT) + HALF\n"),
    "a function": ("hour(AT) <= 6", "{function: 'tests.fixtures.own:large', inputs: [AMOUNT]}"),
    "a function's input": ("hour(AT) <= 6", "{function: 'tests.fixtures.own:large', inputs: [ITEMS]}"),
    "another function": ("hour(AT) <= 6", "{function: 'tests.fixtures.own:itself', inputs: [AMOUNT]}"),
    "a string that is compared": ("hour(AT) <= 6", "SHOP == 'a'"),
    "a category": ("WEIGHT: {type: float", "WEIGHT: {type: category, values: [a, b]"),
    "a category's values": ("WEIGHT: {type: float", "WEIGHT: {type: category, values: [a, c]"),
    "the order of a category's values": ("WEIGHT: {type: float", "WEIGHT: {type: category, values: [b, a]"),
    "one more category": ("labels:\n", "      HEIGHT: {type: category, values: [a]}\nlabels:\n"),
    "the label": ("RETURNED", "BROUGHT_BACK"),
    "a field's scale": ("scale: 2", "scale: 3"),
    "a field's unit": ("unit: ms", "unit: s"),
    "a field's type": ("WEIGHT: {type: float", "WEIGHT: {type: int"),
    "whether a field may be absent": ("CUSTOMER: int", "CUSTOMER: {type: int, optional: true}"),
    "the order of the vector": ("[AMOUNT, ITEMS,", "[ITEMS, AMOUNT,"),
    "the vector": (", SHOP_ITEMS]", "]"),
    # The block of records between stages has the fields' order, and they carry the definition.
    "the order of numeric fields": ("      ID: int\n      AT: {type: timestamp, unit: ms}\n", "      AT: {type: timestamp, unit: ms}\n      ID: int\n"),
    "one more numeric field": ("labels:\n", "      WIDTH: float\nlabels:\n"),
    "one more amount": ("labels:\n", "      FEE: {type: decimal, scale: 2}\nlabels:\n", "[AMOUNT,", "[FEE, AMOUNT,"),
    "and its scale": ("labels:\n", "      FEE: {type: decimal, scale: 3}\nlabels:\n", "[AMOUNT,", "[FEE, AMOUNT,"),
}  # fmt: skip
SAME = {
    "a comment": ("lateness: 1h", "lateness: 1h # a comment"),
    "the pipeline's name": ("name: shop", "name: store"),
    "a stream's name": ("  orders:", "  purchases:"),
    "a topic": ("    id: ID\n", "    id: ID\n    topic: raw\n"),
    "the labels' topic": ("  known: KNOWN\n", "  known: KNOWN\n  topic: raw\n"),
    "a decision": ("review: 0.1", "look: 0.2"),
    "the model": ("model:\n", "model:\n  train: xgboost\n"),
    "what predictions carry": ("lateness: 1h", "lateness: 1h\npredictions_carry_features: false"),
    "the same duration": ("lateness: 1h", "lateness: 60m"),
    "a default in words": ("{aggregate: count, window: 1d}", "{aggregate: count, window: 1d, delay: 0s}"),
    "spaces in a transform": ("hour(AT) <= 6", "hour( AT )<=6"),
    "the order of keys": ("lateness: 1h\ntransforms:\n  NIGHT: hour(AT) <= 6\n", "transforms:\n  NIGHT: hour(AT) <= 6\nlateness: 1h\n"),
    "a transform that nothing needs": ("hour(AT) <= 6\n", "hour(AT) <= 6\n  DARK: SHOP == 'a'\n  DARKER: DARK + 1\n"),
    "a text that nothing uses": ("labels:\n", "      NOTE: {type: string, optional: true}\nlabels:\n"),
}  # fmt: skip


def changed(*pieces: str) -> str:
    """The definition with pieces replaced wherever they stand: old, new, old, new."""
    text = SHOP
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    return pipeline.parse(text).definition


@pytest.mark.parametrize("pieces", CHANGES.values(), ids=CHANGES.keys())
def test_the_definition_changes_with_what_decides_a_value(pieces: tuple[str, ...]) -> None:
    assert changed(*pieces) != shop().definition


@pytest.mark.parametrize(("old", "new"), SAME.values(), ids=SAME.keys())
def test_the_definition_stays_with_what_decides_none(old: str, new: str) -> None:
    assert edited(SHOP, old, new) != SHOP
    assert shop(old, new).definition == shop().definition


def test_the_definition_holds_the_meaning_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shop().definition
    assert len(before) == 16 and int(before, 16) >= 0
    monkeypatch.setattr(pipeline, "MEANING", pipeline.MEANING + 1)
    assert shop().definition != before


def test_all_changes_differ_from_each_other() -> None:
    """No two definitions share a hash by leaving out where a value stands."""
    hashes = [changed(*pieces) for pieces in CHANGES.values()]
    assert len(set(hashes)) == len(hashes)
