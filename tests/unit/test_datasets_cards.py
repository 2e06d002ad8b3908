"""The card simulation: its rules on every row, its statistics against what the rules imply."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from app.datasets import DatasetNotWritten, cards

DAYS = 60
WITHIN_DAY = math.erf(cards.NOON_S / cards.SPREAD_S / math.sqrt(2))  # the share of times that stay: 0.969
SMALL: dict[str, Any] = {"customers": 300, "terminals": 600, "days": 6}


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """A city of the standard size, 60 days long, with the day of each transaction."""
    path = tmp_path_factory.mktemp("data") / "cards.parquet"
    rows = cards.write_cards(path, days=DAYS, seed=1)
    table = pq.read_table(path)
    assert table.schema.equals(cards.SCHEMA)
    assert all(column.null_count == 0 for column in table.columns)
    assert table.num_rows == rows
    frame: pd.DataFrame = table.to_pandas()
    frame["day"] = (frame["TX_DATETIME"] - datetime(2018, 4, 1, tzinfo=UTC)).dt.days
    return frame


def test_rows_are_numbered_in_order_of_time(city: pd.DataFrame) -> None:
    assert city["TRANSACTION_ID"].tolist() == list(range(len(city)))
    assert city["TX_DATETIME"].is_monotonic_increasing
    assert city["TX_DATETIME"].eq(city["TX_DATETIME"].dt.floor("s")).all()
    assert sorted(city["day"].unique()) == list(range(DAYS))


def test_numbers_of_transactions_are_those_of_the_rates(city: pd.DataFrame) -> None:
    per_day = city.groupby("day").size()
    # Five deviations, first of the sum of 5,000 rates, then of a day's Poisson number.
    expected = 5000 * 2 * WITHIN_DAY
    assert per_day.mean() == pytest.approx(expected, abs=5 * math.sqrt(5000 * 16 / 12))
    assert per_day.std() == pytest.approx(math.sqrt(expected), rel=0.5)
    per_customer = city.groupby("CUSTOMER_ID").size() / DAYS
    assert per_customer.max() < 4 * WITHIN_DAY + 5 * math.sqrt(4 / DAYS)
    assert per_customer.quantile(0.25) == pytest.approx(1, abs=0.15)
    assert per_customer.quantile(0.75) == pytest.approx(3, abs=0.2)
    second = (city["TX_DATETIME"] - city["TX_DATETIME"].dt.floor("D")).dt.total_seconds()
    assert second.mean() == pytest.approx(cards.NOON_S, abs=200)
    assert second.between(cards.NOON_S - 20_000, cards.NOON_S + 20_000).mean() == pytest.approx(
        0.6827 / WITHIN_DAY, abs=0.005
    )


def test_amounts_are_whole_cents_about_the_customer_s_mean(city: pd.DataFrame) -> None:
    amount = city["TX_AMOUNT"]
    assert all(a == float(f"{a:.2f}") for a in amount.unique())
    assert amount.min() >= 0
    honest = city[city["TX_FRAUD"] == 0].groupby("CUSTOMER_ID")["TX_AMOUNT"].agg(["mean", "std", "size"])
    honest = honest[honest["size"] >= 100]
    # The redrawn negative ones (2.3 %) narrow the deviation by a little, and lift the mean.
    assert (honest["std"] / honest["mean"]).mean() == pytest.approx(0.47, abs=0.03)
    assert honest["mean"].between(4, 103 + 5 * 48 / math.sqrt(100)).all()
    assert honest["mean"].mean() == pytest.approx(52.5 * 1.03, abs=3)


def test_each_scenario_keeps_its_rule(city: pd.DataFrame) -> None:
    scenario, amount = city["TX_FRAUD_SCENARIO"], city["TX_AMOUNT"]
    assert city["TX_FRAUD"].eq(scenario > 0).all()
    assert amount[scenario == 0].max() <= 220
    assert amount[scenario == 1].min() > 220
    # A compromised terminal's transactions of a day are frauds, all of them.
    terminal_day = city.groupby(["TERMINAL_ID", "day"])["TX_FRAUD_SCENARIO"].agg(["min", "max"])
    hit = city[scenario == 2].groupby(["TERMINAL_ID", "day"]).size()
    assert terminal_day.loc[hit.index, "min"].ge(2).all()
    # What a thief takes is five times an amount in cents.
    stolen = (amount[scenario == 3] * 100).round().astype(int)
    assert stolen.mod(5).eq(0).all()
    assert stolen.mean() / 100 == pytest.approx(5 * 53.6, rel=0.15)


@pytest.mark.parametrize(
    ("scenario", "entity", "a_day", "for_days"),
    [(2, "TERMINAL_ID", 2, 28), (3, "CUSTOMER_ID", 3, 14)],
)
def test_new_victims_each_day_stay_so_for_their_time(
    city: pd.DataFrame, scenario: int, entity: str, a_day: int, for_days: int
) -> None:
    frauds = city[city["TX_FRAUD_SCENARIO"] == scenario]
    victims = frauds.groupby("day")[entity].nunique().reindex(range(DAYS), fill_value=0)
    most = pd.Series([a_day * min(day + 1, for_days) for day in range(DAYS)])
    assert (victims <= most).all()
    per_victim_and_day = {2: 1, 3: 2 / 3}[scenario] * WITHIN_DAY
    steady = frauds["day"].between(for_days, DAYS).sum()
    expected = a_day * for_days * per_victim_and_day * (DAYS - for_days)
    assert steady == pytest.approx(expected, rel=0.2)


def test_labels_become_known_within_five_days(city: pd.DataFrame) -> None:
    delay = (city["LABEL_TS"] - city["TX_DATETIME"]).dt.total_seconds()
    hour, five_days = 3600, 5 * 86_400
    assert delay.between(hour, five_days).all()
    assert delay.min() < hour + 60
    assert delay.max() > five_days - 60
    assert delay.mean() == pytest.approx((hour + five_days) / 2, rel=0.01)


def test_customers_use_the_terminals_near_their_home() -> None:
    rng = np.random.default_rng(3)
    homes, places = rng.uniform(0, 20, (30, 2)), rng.uniform(0, 20, (50, 2))
    homes[7] = (90, 90)  # has none
    near, reach = cards.neighbours(homes, places)
    expected = [[i for i, place in enumerate(places) if math.dist(home, place) < 5] for home in homes]
    assert expected[7] == []
    assert reach.tolist() == [len(mine) for mine in expected]
    assert near.tolist() == [i for mine in expected for i in mine]


def test_neighbours_do_not_depend_on_how_many_pairs_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    homes, places = rng.uniform(0, 100, (100, 2)), rng.uniform(0, 100, (300, 2))
    near, reach = cards.neighbours(homes, places)
    monkeypatch.setattr(cards, "PAIRS_AT_ONCE", 7)
    again, reach_again = cards.neighbours(homes, places)
    assert (near.tolist(), reach.tolist()) == (again.tolist(), reach_again.tolist())


def test_a_customer_keeps_to_few_terminals(city: pd.DataFrame) -> None:
    used = city.groupby("CUSTOMER_ID")["TERMINAL_ID"].nunique()
    # 78.5 terminals lie in a whole circle of radius 5, on average; a Poisson number.
    assert used.max() < 78.5 + 6 * math.sqrt(78.5)
    assert city["TERMINAL_ID"].between(0, 9_999).all()
    assert city["CUSTOMER_ID"].between(0, 4_999).all()


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    cards.write_cards(one, seed=5, **SMALL)
    cards.write_cards(two, seed=5, **SMALL)
    cards.write_cards(other, seed=6, **SMALL)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()


def test_more_days_only_append(tmp_path: Path) -> None:
    short = cards.write_cards(tmp_path / "short", **SMALL)
    cards.write_cards(tmp_path / "long", **{**SMALL, "days": 9})
    assert pq.read_table(tmp_path / "short").equals(pq.read_table(tmp_path / "long").slice(0, short))


def test_start_and_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cards.write_cards(
        tmp_path / "c", start="2024-02-29", progress=lambda done, total: seen.append((done, total)), **SMALL
    )
    assert seen == [(day, 6) for day in range(1, 7)]
    times = pq.read_table(tmp_path / "c")["TX_DATETIME"].to_pylist()
    assert [str(time)[:10] for time in (times[0], times[-1])] == ["2024-02-29", "2024-03-05"]


def test_a_city_where_no_terminal_is_near_makes_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "cards.parquet"
    assert cards.write_cards(path, customers=3, terminals=2, days=2) == 0
    assert pq.read_table(path).schema.equals(cards.SCHEMA)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"customers": 2}, "customers is 2, but must be at least 3"),
        ({"terminals": 1}, "terminals is 1, but must be at least 2"),
        ({"days": 0}, "days is 0, but must be at least 1"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"start": "April"}, "start is 'April', but must be a date"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(cards.CardsRefused, match=sentence):
        cards.write_cards(tmp_path / "cards.parquet", **asked)


def test_a_run_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "cards.parquet"
    cards.write_cards(path, **SMALL)
    before = path.read_bytes()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cards.write_cards(path, seed=9, progress=stop, **SMALL)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetNotWritten, match=r"cards\.parquet could not be written"):
        cards.write_cards(tmp_path / "file" / "cards.parquet", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
