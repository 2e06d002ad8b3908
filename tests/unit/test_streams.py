"""Several streams into the logs of entities: what is one block, one key and one id, and where records go."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from agents.route import routes
from app.dlq import _Sender
from app.history import key_column
from models.dead_letters import Origin as Place
from models.dead_letters import Original
from models.events import EventDecoder, given_ids, streams_of
from models.fields import Field
from models.filters import Filters
from models.partitions import partitions_of
from models.pipeline import Pipeline, parse
from models.predictions import Origin, Prediction, identities
from models.records import RecordCodec, keys_of, writers
from models.streams import WHICH
from models.windows import EVENT, NULL
from tests.fixtures.logs import Fetched
from tests.fixtures.pipelines import SHOP, edited, shop

NOW = 1_600_000_000_000
BANK = """\
name: bank
streams:
  payments:
    id: ID
    time: AT
    fields:
      ID: int
      AT: {type: timestamp, unit: ms}
      ACCOUNT: int
      PAYEE: {type: string, optional: true}
      AMOUNT: {type: decimal, scale: 2}
  logins:
    id: LOGIN
    time: WHEN
    scored: true
    fields:
      LOGIN: string
      WHEN: {type: timestamp, unit: s}
      ACCOUNT: int
      DEVICE: string
      SECONDS: float
  changes:
    id: ID
    time: AT
    topic: raw.changes
    fields:
      ID: int
      AT: timestamp
      PAYEE: {type: string, optional: true}
      AMOUNT: {type: decimal, scale: 2, optional: true}
labels: {field: FRAUD, known: KNOWN}
entities:
  account:
    key: ACCOUNT
    features:
      EVENTS: {aggregate: count, window: 1d}
      LOGINS: {from: logins, aggregate: count, window: 1d}
      DEVICES: {from: logins, aggregate: distinct, of: DEVICE, window: 30d}
      LARGE: {from: payments, aggregate: count, window: 1d, where: AMOUNT > 100}
      RISK: {aggregate: share, of: FRAUD, window: 7d, delay: 1d}
  pair:
    key: [ACCOUNT, PAYEE]
    features:
      KNOWN_PAYEE: {aggregate: count, window: lifetime}
vector: [AMOUNT, SECONDS, stream, EVENTS, LOGINS, DEVICES, LARGE, RISK, KNOWN_PAYEE]
model: {decisions: {ask: 0.1}}
"""


@pytest.fixture(scope="module")
def bank() -> Pipeline:
    return parse(BANK)


def payment(id: int = 7, **changes: Any) -> bytes:
    return json.dumps({"ID": id, "AT": NOW, "ACCOUNT": 1, "PAYEE": "a|b", "AMOUNT": 12.5} | changes).encode()


def login(id: str = "x", **changes: Any) -> bytes:
    body = {"LOGIN": id, "WHEN": NOW // 1000, "ACCOUNT": 1, "DEVICE": "d", "SECONDS": 0.5}
    return json.dumps(body | changes).encode()


def test_the_router_writes_the_first_log_where_the_stream_cannot_be_it(bank: Pipeline) -> None:
    assert bank.routed and bank.entities[0].log == "bank.account.log"
    assert bank.inputs == ("bank.payments", "bank.logins", "raw.changes", "bank.labels")
    share = "CUSTOMER_NB: {aggregate: share, of: RETURNED, window: 1d, delay: 1d}"
    one = [
        shop("CUSTOMER_NB: {aggregate: count, window: 1d}", share),
        shop("key: CUSTOMER", "key: [CUSTOMER, SHOP]"),
        shop("lateness: 1h", "reversals: {known: GONE}\nlateness: 1h"),
    ]
    assert all(p.routed and p.entities[0].log == "shop.customer.log" for p in one)
    assert one[2].inputs == ("shop.orders", "shop.labels", "shop.reversals")
    assert not shop().routed


def test_who_writes_a_log(bank: Pipeline) -> None:
    assert writers(bank, 0) == bank.inputs
    assert writers(bank, 1) == ("bank.account.log", "bank.labels")


def test_the_first_stream_is_scored_and_others_that_say_so(bank: Pipeline) -> None:
    assert [s.scored for s in bank.streams] == [True, True, False]


def test_the_block_has_the_fields_of_all_streams(bank: Pipeline) -> None:
    names = [f.name for f in bank.columns]
    assert names == [WHICH, "ID", "AT", "ACCOUNT", "AMOUNT", "WHEN", "DEVICE", "SECONDS"]
    assert bank.fields[WHICH] == Field(WHICH, "category", values=("payments", "logins", "changes"))
    assert bank.fields["ACCOUNT"].optional and not bank.streams[0].fields["ACCOUNT"].optional
    (paid, _, _), (logged, _, _) = (
        EventDecoder(bank, stream).decode([value], np.array([NOW]))
        for stream, value in zip(bank.streams, (payment(), login()), strict=False)
    )
    device = bank.fields["DEVICE"].code("d")
    assert paid.fields[0, :7].tolist() == [0, 7, NOW, 1, 1250, NULL, NULL]
    assert np.isnan(paid.fields[0, 7:].view(np.float64)).all()
    assert logged.fields[0, :7].tolist() == [1, NULL, NULL, 1, NULL, NOW, device]
    assert logged.fields[0, 7:].view(np.float64).tolist() == [0.5]
    assert (logged.times.tolist(), logged.keys) == ([NOW], [1])
    assert streams_of(bank, paid).tolist() == [0] and streams_of(bank, logged).tolist() == [1]


def test_a_feature_is_of_its_stream_s_events(bank: Pipeline) -> None:
    account = bank.entities[0]
    assert [f.text for f in account.filters] != []
    batches = [
        EventDecoder(bank, stream).decode([value], np.array([NOW]))[0]
        for stream, value in ((bank.streams[0], payment(AMOUNT=200)), (bank.streams[1], login()))
    ]
    flags = [int(Filters(account, bank.columns).of(b.fields)[0]) for b in batches]
    chosen = {n: a.filter for n, a in zip(account.features, account.aggregates, strict=True)}
    assert chosen["EVENTS"] is None
    for name, expected in (("LOGINS", [0, 1]), ("DEVICES", [0, 1]), ("LARGE", [1, 0])):
        assert [flag >> chosen[name] & 1 for flag in flags] == expected, name


def test_ids_of_two_streams_differ_and_are_given_back(bank: Pipeline) -> None:
    decoders = [EventDecoder(bank, stream) for stream in bank.streams]
    change = json.dumps({"ID": 7, "AT": NOW, "PAYEE": None, "AMOUNT": 1}).encode()
    batches = [
        d.decode([value], np.array([NOW]))[0]
        for d, value in zip(decoders, (payment(7), login("7"), change), strict=True)
    ]
    assert len({int(b.ids[0]) for b in batches}) == 3
    assert int(batches[0].ids[0]) == 7  # the first stream's are as they are
    assert [given_ids(bank)(b)[0] for b in batches] == [7, "7", 7]
    predictions = [
        Prediction(id, 0, 0.0, "", "", "", "", False, Origin(0, 0), stream=stream.name)
        for id, stream in zip((7, "7", 7), bank.streams, strict=True)
    ]
    assert identities(bank, predictions).tolist() == [int(b.ids[0]) for b in batches]


def test_a_key_of_two_fields(bank: Pipeline) -> None:
    codec = RecordCodec(bank, 0)
    values = [payment(PAYEE="a|b"), payment(PAYEE=None), payment(ACCOUNT=-3, PAYEE="a\\")]
    paid, _, _ = EventDecoder(bank, bank.streams[0]).decode(values, np.full(3, NOW))
    zeros = np.zeros(3, np.int64)
    read, _, _ = codec.decode(codec.encode(paid, paid.features, zeros, zeros, zeros, zeros > 0), [b""] * 3)
    assert keys_of(bank, 1)(read) == [b"1|a\\|b", None, b"-3|a\\\\"]
    # a login that has a PAYEE in its JSON, which its stream does not name, has none
    logged, _, _ = EventDecoder(bank, bank.streams[1]).decode([login(PAYEE=5)], np.array([NOW]))
    assert keys_of(bank, 1)(logged) == [None]


class Outbox:
    def __init__(self) -> None:
        self.sent: list[tuple[str, int, bytes | None, bytes]] = []

    def put_many(self, topic: str, targets: Any, keys: Any, values: Any) -> None:
        self.sent += [(topic, *each) for each in zip(targets, keys, values, strict=True)]


def test_what_is_routed_where(bank: Pipeline) -> None:
    """Events into the first entity's log, whatever their own key; labels into those that look at them."""
    outbox: Any = Outbox()
    rejected: list[Any] = []
    counts = dict.fromkeys((*bank.inputs, "bank.account.log", "bank.pair.log"), 4)
    found = {
        r.topic: r
        for r in routes(
            bank, outbox, lambda *bad: rejected.append(bad), counts, None, 0, lambda: 0, lambda: False
        )
    }
    assert set(found) == set(bank.inputs)
    label = {"ID": 7, "AT": NOW, "ACCOUNT": 1, "FRAUD": 1, "KNOWN": NOW}
    sent = {
        "bank.payments": [payment(7), b"no"], "bank.logins": [login()],
        "raw.changes": [json.dumps({"ID": 1, "AT": NOW}).encode()], "bank.labels": [json.dumps(label).encode()],
    }  # fmt: skip
    for topic, values in sent.items():
        found[topic].start_at({2: 10})
        found[topic].handle([(2, [Fetched(10 + i, v, None, NOW) for i, v in enumerate(values)])])
        assert found[topic].positions == {2: 10 + len(values)}
    assert [(topic, partition, record.offset) for topic, partition, record, _ in rejected] == [
        ("bank.payments", 2, 11)
    ]
    assert {topic for topic, *_ in outbox.sent} == {"bank.account.log"}
    home = int(partitions_of([b"1"], np.zeros(1, np.int64), 4)[0])
    keys = [(key, target) for _, target, key, _ in outbox.sent]
    assert keys[:2] == [(b"1", home)] * 2 and keys[2][0] is None and keys[3] == (b"1", home)
    batch, _, _ = RecordCodec(bank, 0).decode([v for *_, v in outbox.sent], [k for _, _, k, _ in outbox.sent])
    assert batch.sources is not None and batch.offsets is not None
    assert batch.sources.tolist() == [2 * 4 + writer for writer in range(4)]
    assert batch.offsets.tolist() == [10] * 4
    assert (batch.kinds == EVENT).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    scored: true\n", ""),
        ("      DEVICE: string\n", "      DEVICE: string\n      PAYEE: {type: string, optional: true}\n"),
        ("  logins:\n", "  sessions:\n"),
        ("LOGINS: {from: logins, ", "LOGINS: {from: payments, "),
        ("key: [ACCOUNT, PAYEE]", "key: [PAYEE, ACCOUNT]"),
        ("labels:", "reversals: {known: GONE}\nlabels:"),
    ],
)
def test_what_changes_the_definition(bank: Pipeline, old: str, new: str) -> None:
    text = edited(BANK, old, new).replace(
        "from: logins", f"from: {'sessions' if 'sessions' in new else 'logins'}"
    )
    assert parse(text).definition != bank.definition


def test_the_topic_of_a_stream_does_not(bank: Pipeline) -> None:
    assert parse(edited(BANK, "topic: raw.changes", "topic: other")).definition == bank.definition


def test_one_stream_may_be_named_where_there_is_but_one() -> None:
    text = edited(SHOP, "{aggregate: count, window: 1d}", "{aggregate: count, from: orders, window: 1d}")
    assert parse(text).definition == shop().definition


def test_a_letter_of_a_routed_stream_goes_back_to_where_it_came_from(bank: Pipeline) -> None:
    """Producers key these topics as they like; the router finds the place of an event."""
    counts = dict.fromkeys([s.topic for s in bank.streams], 8)
    record = Original(b"any", login(), ())
    for partition in range(8):
        origin = Place(bank.streams[1].topic, partition, 7)
        assert _Sender(bank, counts).target(origin, record) == (partition, b"any")


def test_integers_that_a_file_holds_as_floats_make_the_same_keys() -> None:
    """As a file has them some of whose keys are absent."""
    whole = pa.table({"ACCOUNT": [1, 2], "PAYEE": ["a", "b"]})
    floats = pa.table({"ACCOUNT": [1.0, 2.0], "PAYEE": ["a", "b"]})
    keys = key_column(whole, ["ACCOUNT", "PAYEE"]).to_pylist()
    assert key_column(floats, ["ACCOUNT", "PAYEE"]).to_pylist() == keys
    assert keys == ["1|a", "2|b"]
