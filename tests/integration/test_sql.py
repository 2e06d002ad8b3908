"""An engine that shares nothing with ours says the same: DuckDB's window queries over 200,000 real flights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

from app import history
from models.history import fold_history
from models.pipeline import parse

EVENTS = 200_000
DAY = 86_400_000

PIPELINE = """
name: flights
streams:
  flights:
    id: EVENT_ID
    time: EVENT_TS
    fields:
      EVENT_ID: int
      EVENT_TS: {type: timestamp, unit: ms}
      CARRIER: string
      TAILNUM: {type: string, optional: true}
      DEST: string
      DISTANCE: int
      DEP_DELAY: {type: int, optional: true}
entities:
"""

# By feature: the aggregate, and what SQL says of the same window {w}; x is the delay, f the filter, n the row.
FEATURES = {
    "NB": ("aggregate: count", "count(*) {w}"),
    "NB_FAR": ("aggregate: count, where: DISTANCE > 1000", "count(*) filter (where far) {w}"),
    "NB_UA": ('aggregate: count, where: CARRIER == "UA"', "count(*) filter (where carrier = 'UA') {w}"),
    "SUM": ("aggregate: sum, of: DEP_DELAY", "coalesce(sum(x) {w}, 0)"),
    "MEAN": ("aggregate: mean, of: DEP_DELAY", "(sum(x) {w})::double / (count(x) {w})"),
    "MEAN_FAR": (
        "aggregate: mean, of: DEP_DELAY, where: DISTANCE > 1000",
        "(sum(x) filter (where far) {w})::double / (count(x) filter (where far) {w})",
    ),
    "VARIANCE": (
        "aggregate: variance, of: DEP_DELAY",
        "((count(x) {w}) * (sum(x * x) {w}) - (sum(x) {w}) ** 2) / ((count(x) {w})::double ** 2)",
    ),
    "RATE": ("aggregate: rate, per: 1h", "(count(*) {w}) * 3600000 / {length}::double"),
    "MIN": ("aggregate: min, of: DEP_DELAY", "min(x) {w}"),
    "MAX": ("aggregate: max, of: DEP_DELAY", "max(x) {w}"),
    "FIRST": ("aggregate: first, of: DISTANCE", "arg_min(d, n) {w}"),
    "LAST": ("aggregate: last, of: DISTANCE", "arg_max(d, n) {w}"),
    "DISTINCT": ("aggregate: distinct, of: DEST", "count(distinct dest) {w}"),
    "MEDIAN": ("aggregate: quantile, quantile: 0.5, of: DEP_DELAY", "quantile_disc(x, 0.5) {w}"),
    "P90": ("aggregate: quantile, quantile: 0.9, of: DEP_DELAY", "quantile_disc(x, 0.9) {w}"),
    "SINCE": ("aggregate: since_last", "(t - {delay} - (max(t) {before})) / 1000"),
    "LIFE": ("aggregate: sum, of: DEP_DELAY", "coalesce(sum(x) {life}, 0)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "window", "delay"), [("TAILNUM", 7 * DAY, 1), ("TAILNUM", 43_200_000, DAY), ("DEST", 2 * DAY, 1)]
)
def test_duckdb_gives_the_same_values(flights: Path, key: str, window: int, delay: int) -> None:
    """To the bit, but the variance, which SQL divides otherwise. Ties are out by a delay of a millisecond."""
    text = f"{PIPELINE}  one:\n    key: {key}\n    features:\n"
    for name, (aggregate, _) in FEATURES.items():
        length = "lifetime" if name == "LIFE" else f"{window}ms"
        text += f"      {name}: {{{aggregate}, window: {length}, delay: {delay}ms}}\n"
    text += "vector: [NB]\nmodel:\n  decisions: {late: 0.1}\n"
    pipeline = parse(text)
    found = history.read(flights, pipeline).history
    some = slice(0, EVENTS)
    for column in ("times", "ids", "fields"):
        setattr(found, column, getattr(found, column)[some])
    found.keys = {name: codes[some] for name, codes in found.keys.items()}
    found.labels = None
    ours = fold_history(pipeline, found)
    theirs = by_sql(pd.read_parquet(flights), found.times, found.ids, found.keys["one"], window, delay)
    keyed = found.keys["one"] >= 0
    assert keyed.sum() > 190_000
    for place, name in enumerate(pipeline.entities[0].features):
        a, b = ours[keyed, place], theirs[name].to_numpy(float, na_value=np.nan)[keyed]
        same = np.isclose(a, b, rtol=1e-12, atol=1e-12) if name == "VARIANCE" else a == b
        assert (same | (np.isnan(a) & np.isnan(b))).all(), name
        assert len(np.unique(a[~np.isnan(a)])) > 1, f"{name} is always the same, which proves nothing"


def by_sql(file: pd.DataFrame, times: Any, ids: Any, codes: Any, window: int, delay: int) -> pd.DataFrame:
    row = file.set_index("EVENT_ID").loc[ids]
    table = pd.DataFrame({
        "n": np.arange(len(ids)), "t": times, "key": codes, "x": row["DEP_DELAY"].astype("Int64").to_numpy(),
        "d": row["DISTANCE"].to_numpy(), "far": (row["DISTANCE"] > 1000).to_numpy(),
        "carrier": row["CARRIER"].to_numpy(), "dest": row["DEST"].to_numpy(),
    })  # fmt: skip
    over = "over (partition by key order by t range between {0} preceding and {1} preceding)"
    frames = {
        "w": over.format(window + delay - 1, delay), "before": over.format(window + delay - 1, delay + 1),
        "life": over.format("unbounded", delay), "length": window, "delay": delay,
    }  # fmt: skip
    columns = ", ".join(f"{sql.format(**frames)} as {name}" for name, (_, sql) in FEATURES.items())
    connection = duckdb.connect()
    connection.register("flights", table)
    return connection.execute(f"select n, {columns} from flights order by n").df()
