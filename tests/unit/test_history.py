"""A history in a file: read, folded at once, and read again for training."""

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import history
from models.events import EventDecoder
from models.history import vectors_of
from models.pipeline import Pipeline, find
from models.windows import NEGATIVE, NULL, POSITIVE, UNKNOWN
from tests.conftest import PIPELINES
from tests.fixtures.pipelines import shop

DAY_MS = 86_400_000
START = dt.datetime(2018, 4, 1, 12)  # a Sunday


@pytest.fixture(scope="module")
def cards() -> Pipeline:
    return find("card-fraud", PIPELINES)


def payments(rows: list[tuple[float, int, int, float, int | None]], **changes: Any) -> pa.Table:
    """Rows of (days after START, customer, terminal, amount, fraud)."""
    columns: dict[str, Any] = {
        "TRANSACTION_ID": list(range(len(rows))),
        "TX_DATETIME": pa.array([START + dt.timedelta(days=r[0]) for r in rows], pa.timestamp("ns")),
        "CUSTOMER_ID": [r[1] for r in rows],
        "TERMINAL_ID": [r[2] for r in rows],
        "TX_AMOUNT": [r[3] for r in rows],
        "TX_FRAUD": [r[4] for r in rows],
    }
    return pa.table({k: v for k, v in (columns | changes).items() if v is not None})


def written(folder: Path, table: pa.Table) -> Path:
    path = folder / "events.parquet"
    pq.write_table(table, path)
    return path


def test_a_label_counts_from_exactly_its_delay_on(cards: Pipeline, tmp_path: Path) -> None:
    ms = 1 / DAY_MS
    table = payments(
        [
            (0, 1, 5, 10.0, 1),
            (7 - ms, 1, 5, 20.0, 0),
            (7, 2, 5, 30.0, 0),
            (8 - ms, 2, 5, 1.0, 0),
            (8, 2, 5, 1.0, 0),
        ]
    )
    vectors = vectors_of(cards, history.read(written(tmp_path, table), cards).history)
    column = {name: vectors[:, i].tolist() for i, name in enumerate(cards.vector)}
    # (t - 8 d, t - 7 d]: the fraud of day 0 is seen by the events of [7, 8), and by no other.
    assert column["TERMINAL_ID_NB_TX_1DAY_WINDOW"] == [0, 0, 1, 1, 0]
    assert column["TERMINAL_ID_RISK_1DAY_WINDOW"] == [0, 0, 1, 1, 0]
    assert column["CUSTOMER_ID_AVG_AMOUNT_30DAY_WINDOW"] == [10, 15, 30, 15.5, 32 / 3]
    assert column["TX_DURING_WEEKEND"] == [1, 1, 1, 0, 0]
    assert column["TX_AMOUNT"] == [10, 20, 30, 1, 1]


def test_rows_are_folded_in_order_of_time_whatever_the_order_of_the_file(
    cards: Pipeline, tmp_path: Path
) -> None:
    rows = [(float(day), day % 3, 0, 1.0 + day, day % 2) for day in range(20)]
    straight = history.read(written(tmp_path, payments(rows)), cards)
    table = payments(rows)
    turned = history.read(written(tmp_path, table.take(list(reversed(range(20))))), cards)
    assert turned.history.ids.tolist() == straight.history.ids.tolist() == list(range(20))
    assert (vectors_of(cards, turned.history) == vectors_of(cards, straight.history)).all()


def test_labels_have_three_states(cards: Pipeline, tmp_path: Path) -> None:
    file = history.read(
        written(tmp_path, payments([(0, 1, 1, 1.0, 1), (1, 1, 1, 1.0, None), (2, 1, 1, 1.0, 0)])), cards
    )
    assert file.history.labels is not None
    assert file.history.labels.tolist() == [POSITIVE, UNKNOWN, NEGATIVE]
    without = history.read(written(tmp_path, payments([(0, 1, 1, 1.0, 1)], TX_FRAUD=None)), cards)
    assert without.history.labels is None
    assert vectors_of(cards, without.history).shape == (1, 16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"TX_AMOUNT": None}, "has no column TX_AMOUNT"),
        ({"TX_AMOUNT": ["1.0", "2.0"]}, None),  # text that is a number is taken for one
        ({"TX_AMOUNT": ["1.0", "x"]}, "TX_AMOUNT is no decimal"),
        ({"TX_AMOUNT": [1.0, 1.005]}, "TX_AMOUNT of row 1, 1.005, has more decimals"),
        ({"TX_AMOUNT": pa.array([1.0, None])}, "TX_AMOUNT has 1 nulls"),
        ({"CUSTOMER_ID": [1.5, 2.0]}, "CUSTOMER_ID is no int"),
    ],
)
def test_what_does_not_fit_the_stream_is_told(
    cards: Pipeline, tmp_path: Path, changes: dict[str, Any], sentence: str | None
) -> None:
    path = written(tmp_path, payments([(0, 1, 1, 1.0, 1), (1, 1, 1, 2.0, 0)], **changes))
    if sentence is None:
        assert len(history.read(path, cards).tables[0]) == 2
        return
    with pytest.raises(history.FileWrong, match=sentence):
        history.read(path, cards)


def test_a_file_that_is_none_is_told(cards: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    for path in (tmp_path / "text.parquet", tmp_path / "absent.parquet"):
        for read in (history.read, history.read_training):
            with pytest.raises(history.FileWrong, match="cannot be read as Parquet"):
                read(path, cards)


def test_training_reads_what_was_computed_under_the_same_definition(cards: Pipeline, tmp_path: Path) -> None:
    rows = [(float(day), 7 + day % 3 % 2, 1, 1.0, [0, 1, None][day % 3]) for day in range(9)]
    target = tmp_path / "features.parquet"
    assert history.compute(written(tmp_path, payments(rows)), target, cards) == 9
    assert pq.read_table(target).column_names == [
        "TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", *cards.vector, "TX_FRAUD",
    ]  # fmt: skip
    training = history.read_training(target, cards)
    assert training.labels.tolist() == [0, 1, 0, 1, 0, 1]  # those without a label are left out
    assert training.vectors.shape == (6, 16)
    assert {name: codes.tolist() for name, codes in training.keys.items()} == {
        "customer": [0, 1] * 3,
        "terminal": [0] * 6,
    }
    early = history.read_training(target, cards, history.instant("2018-04-05"))
    assert (early.times < history.instant("2018-04-05")).all()
    assert early.labels.tolist() == [0, 1, 0]
    with pytest.raises(history.FileWrong, match="features compute --pipeline flight-delays"):
        history.read_training(target, find("flight-delays", PIPELINES))
    unlabelled = written(tmp_path, payments(rows, TX_FRAUD=None))
    history.compute(unlabelled, target, cards)
    with pytest.raises(history.FileWrong, match="has no label TX_FRAUD"):
        history.read_training(target, cards)


def test_days_and_times() -> None:
    assert history.instant("1970-01-02") == DAY_MS
    assert history.instant("1970-01-01T01:00:00+01:00") == 0
    with pytest.raises(history.FileWrong, match="write it like 2013-09-01"):
        history.instant("yesterday")


TEXTS = shop(
    "ITEMS: {type: int, optional: true}", "ITEMS: {type: category, values: [web, phone], optional: true}",
    "{aggregate: mean, of: ITEMS, window: 1h}", "{aggregate: mean, of: AMOUNT, window: 1h}",
    "hour(AT) <= 6", "SHOP == 'north'",
)  # fmt: skip


def orders(kinds: Any, shops: Any) -> pa.Table:
    n = len(kinds)
    at = int(START.replace(tzinfo=dt.UTC).timestamp() * 1000)
    return pa.table({
        "ID": list(range(n)), "AT": [at + i for i in range(n)], "CUSTOMER": [1] * n, "SHOP": shops,
        "AMOUNT": [1.5] * n, "ITEMS": kinds, "WEIGHT": [0.5] * n,
    })  # fmt: skip


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_texts_stand_in_the_block_as_the_stream_decodes_them(kind: pa.DataType, tmp_path: Path) -> None:
    kinds, shops = ["web", None, "by post", "phone", "web"], ["north", "", None, "é", "north"]
    table = orders(pa.array(kinds).cast(kind), pa.array(shops).cast(kind))
    path = tmp_path / "events.parquet"
    pq.write_table(table, path, row_group_size=2)  # so a dictionary a group
    fields = history.read(path, TEXTS).history.fields
    values = [json.dumps(row).encode() for row in table.to_pylist()]
    batch, _, rejects = EventDecoder(TEXTS, TEXTS.stream).decode(values, np.full(5, 2**62))
    assert not rejects
    np.testing.assert_array_equal(fields, batch.fields)
    assert fields[:, 5].tolist() == [0, NULL, -1, 1, 0]
    assert history.read(written(tmp_path, table.slice(0, 0)), TEXTS).history.fields.shape == (0, 7)


def test_a_column_of_texts_holds_texts(tmp_path: Path) -> None:
    path = written(tmp_path, orders([1, 2], ["a", "b"]))
    with pytest.raises(
        history.FileWrong, match=r"ITEMS is no category \(int64 is no text; write a column of"
    ):
        history.read(path, TEXTS)


def test_nulls_of_a_key_and_of_a_value(tmp_path: Path) -> None:
    flights = find("flight-delays", PIPELINES)
    at = pa.array([START, START + dt.timedelta(minutes=1)], pa.timestamp("ms", tz="UTC"))
    table = pa.table(
        {
            "EVENT_ID": [1, 2], "EVENT_TS": at, "CARRIER": ["AA", "AA"], "TAILNUM": pa.array([None, "N1"]),
            "ORIGIN": ["JFK", "JFK"], "DEST": ["LAX", "LAX"], "DISTANCE": [10, 10],
            "DEP_DELAY": pa.array([None, 7], pa.int64()),
        }
    )  # fmt: skip
    vectors = vectors_of(flights, history.read(written(tmp_path, table), flights).history)
    column = {name: vectors[:, i] for i, name in enumerate(flights.vector)}
    assert np.isnan(
        [column["TAILNUM_NB_7D"][0], column["DEP_DELAY"][0], column["ORIGIN_AVG_DEP_DELAY_1H"][0]]
    ).all()
    assert column["ORIGIN_NB_1H"].tolist() == [1, 2]
    assert column["ORIGIN_AVG_DEP_DELAY_1H"][1] == column["TAILNUM_AVG_DEP_DELAY_7D"][1] == 7
