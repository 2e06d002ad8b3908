"""Two data sets to run the pipelines on: real flights and simulated card transactions.

`flights.write_flights` and `cards.write_cards` each make one Parquet file of events in order of event
time; `data/README.md` says what is in them. Both files carry the time at which each label became known,
so that a replay can deliver the labels as late as they were.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import HeadraceError

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do; the unit is the caller's (rows, days)."""

UTC_MS = pa.timestamp("ms", tz="UTC")
ROW_GROUP_ROWS = 100_000  # a reader's bite: a few MB, and still thousands of values per column chunk


class DatasetNotWritten(HeadraceError):
    """The file could not be written where it was asked for."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"The data set {path} could not be written: {error.strerror or error}. "
            "Free the place or choose another path."
        )


def required(name: str, kind: pa.DataType) -> "pa.Field[Any]":
    """A column that is never null."""
    return pa.field(name, kind, nullable=False)


def write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write tables, one behind the other, to one zstd-compressed Parquet file, and return its rows.

    The file appears whole or not at all: a failure half-way leaves what was at `path` before. Missing
    parent directories are made. Small tables share a row group. Raises DatasetNotWritten.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pq.ParquetWriter(part, schema, compression="zstd") as writer:
                for group in _row_groups(tables):
                    writer.write_table(group)
                    rows += group.num_rows
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DatasetNotWritten(path, error) from error
    return rows


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Join tables until at least ROW_GROUP_ROWS rows are together; the last group may be smaller."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        if rows >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if rows:
        yield pa.concat_tables(waiting)
