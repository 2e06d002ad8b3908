"""Files of events, as columns of the fold: read, computed, written."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from models.errors import HeadraceError
from models.events import EventDecoder, scaled
from models.fields import Field, joined
from models.history import History, vectors_of
from models.pipeline import Pipeline
from models.splits import Examples
from models.streams import Stream
from models.windows import NEGATIVE, NULL, POSITIVE, UNKNOWN, Bytes, Ints


class FileWrong(HeadraceError):
    """A file that does not hold what the pipeline's stream says."""

    exit_code = 2


def instant(text: str) -> int:
    """Milliseconds of a day or time in ISO form, UTC where it names no zone."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise FileWrong(f"{text!r} is no day or time; write it like 2013-09-01.") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp() * 1000)


@dataclass
class EventFile:
    """The events of one file, or of one for each stream, in event-time order.

    tables: by stream; rows: (n,) where each event stands in its stream's table; known: (n,) when each label
    became known, where the file says so.
    """

    tables: list[pa.Table]
    history: History
    rows: Ints
    known: Ints | None


def files_of(path: Path, pipeline: Pipeline) -> list[tuple[Stream, Path]]:
    """Where the events of each stream are: a file, or a folder with STREAM.parquet for each of several."""
    if len(pipeline.streams) == 1:
        return [(pipeline.stream, path)]
    if not path.is_dir():
        raise FileWrong(
            f"{path} is no folder; {pipeline.name} has several streams: put them into a folder, as "
            f"{', '.join(f'{s.name}.parquet' for s in pipeline.streams)}."
        )
    return [(stream, path / f"{stream.name}.parquet") for stream in pipeline.streams]


def read(path: Path, pipeline: Pipeline) -> EventFile:
    """Read Parquet with a column for each field of a stream, and the first stream's labels if they are there.

    path: a file, or with several streams a folder (see `files_of`). Events of one time are in the order of
    the streams.
    """
    tables = [_table(file, stream, pipeline) for stream, file in files_of(path, pipeline)]
    parts = [
        _history(path, table, stream, pipeline)
        for table, stream in zip(tables, pipeline.streams, strict=True)
    ]
    known = _known(tables[0], pipeline, path)
    if len(parts) == 1:
        return EventFile(tables, parts[0], np.arange(len(tables[0])), known)
    together = History(
        np.concatenate([p.times for p in parts]),
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.fields for p in parts]),
        _keys_together(tables, pipeline),
        _padded(parts[0].labels, parts, UNKNOWN),
        np.concatenate([p.streams for p in parts]),
    )
    order = np.argsort(together.times, kind="stable")
    rows = np.concatenate([np.arange(len(table)) for table in tables])
    known = _padded(known, parts, NULL)
    return EventFile(tables, together.take(order), rows[order], None if known is None else known[order])


def _padded(first: Any, parts: list[History], nothing: int) -> Any:
    """What the first stream's events have, and nothing for those of the others."""
    if first is None:
        return None
    return np.concatenate([first, *(np.full(len(p.times), nothing, first.dtype) for p in parts[1:])])


def _table(path: Path, stream: Stream, pipeline: Pipeline) -> pa.Table:
    """A stream's file, in event-time order."""
    labels = pipeline.labels if stream is pipeline.stream else None
    wanted = [*stream.fields, *([labels.field, labels.known] if labels else [])]
    try:
        schema = pq.read_schema(path)
        missing = [name for name in stream.fields if name not in schema.names]
        if missing:
            raise FileWrong(
                f"{path} has no column {missing[0]}, a field of the stream {stream.topic}; it has "
                f"{', '.join(schema.names)}."
            )
        table = pq.read_table(path, columns=[name for name in wanted if name in schema.names])
    except (OSError, pa.ArrowInvalid) as error:
        raise FileWrong(f"{path} cannot be read as Parquet ({error}).") from None
    times = _integers(table, stream.fields[stream.time], path)
    if bool((times[1:] < times[:-1]).any()):
        table = table.take(pa.array(np.argsort(times, kind="stable")))
    return table


def _history(path: Path, table: pa.Table, stream: Stream, pipeline: Pipeline) -> History:
    fields = np.tile(EventDecoder(pipeline, stream).blank, (len(table), 1))
    for i, field in enumerate(pipeline.columns):
        if field.name in stream.fields:
            fields[:, i] = _integers(table, stream.fields[field.name], path)
    times = _integers(table, stream.fields[stream.time], path)
    labels = pipeline.labels if stream is pipeline.stream else None
    there = labels is not None and labels.field in table.column_names
    return History(
        times,
        _ids(table, stream),
        fields,
        _keys_together([table], pipeline) if len(pipeline.streams) == 1 else {},
        _states(table[labels.field]) if labels is not None and there else None,
        np.full(len(table), stream.number),
    )


def _known(table: pa.Table, pipeline: Pipeline, path: Path) -> Ints | None:
    stream, labels = pipeline.stream, pipeline.labels
    if labels is None or labels.known not in table.column_names:
        return None
    return _integers(table, Field(labels.known, "timestamp", unit=stream.fields[stream.time].unit), path)


def _keys_together(tables: list[pa.Table], pipeline: Pipeline) -> dict[str, Ints]:
    """By entity, codes of the keys of all tables' rows, one behind the other."""
    found = {}
    for entity in pipeline.entities:
        columns = [
            key_column(table, entity.keys) if entity.is_of(stream) else pa.nulls(len(table))
            for table, stream in zip(tables, pipeline.streams, strict=True)
        ]
        found[entity.name] = _codes(pa.chunked_array(_of_one_type(columns)))
    return found


def key_column(table: pa.Table, keys: Sequence[str]) -> Any:
    """What each row is keyed by: a column, or the text of several."""
    if len(keys) == 1:
        return table[keys[0]].combine_chunks()
    # A file may hold integers as floats, so that some can be absent.
    parts = [pc.cast(c, pa.int64()) if pa.types.is_floating(c.type) else c for c in map(table.column, keys)]
    rows = zip(*(part.to_pylist() for part in parts), strict=True)
    return pa.array([joined(row) for row in rows], pa.string())


def _of_one_type(columns: list[Any]) -> list[Any]:
    kinds = [c.type for c in columns if not pa.types.is_null(c.type)]
    kind = kinds[0] if kinds else pa.null()
    if any(k != kind for k in kinds):  # int32 in one file and int64 in another, say
        kind = pa.int64() if pa.types.is_integer(kind) else pa.string()
    return [pc.cast(column, kind) for column in columns]


def compute(source: Path, target: Path, pipeline: Pipeline) -> int:
    """Fold the events of a file, or of a folder with one for each stream, and write the first stream's vectors: how
    many rows.

    The target has the event id, the event time, the keys of the entities, the vector's columns (float64) and, where
    the source has it, the label.
    """
    file = read(source, pipeline)
    stream, table = pipeline.stream, file.tables[0]
    first = file.history.streams == 0
    vectors = vectors_of(pipeline, file.history)[first]
    columns: dict[str, Any] = {stream.id: table[stream.id], stream.time: table[stream.time]}
    columns |= {key: table[key] for e in pipeline.entities if e.is_of(stream) for key in e.keys}
    for i, name in enumerate(pipeline.vector):
        columns[name] = pa.array(np.ascontiguousarray(vectors[:, i]))
    if pipeline.labels is not None and pipeline.labels.field in table.column_names:
        columns[pipeline.labels.field] = table[pipeline.labels.field]
    table = pa.table(columns).replace_schema_metadata({"definition": pipeline.definition})
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    pq.write_table(table, part, compression="zstd")
    part.replace(target)
    return len(table)


def tables(path: Path, stream: Stream) -> Iterator[pa.Table]:
    """A Parquet or CSV file in pieces, with all that it has, checked against nothing. Raises FileWrong.

    A CSV column of a string field is text whatever it looks like; of the others the first megabyte decides.
    """
    kind = "CSV" if path.suffix == ".csv" else "Parquet"
    try:
        if kind == "CSV":
            texts = {f.name: pa.string() for f in stream.fields.values() if f.type == "string"}
            options = pcsv.ConvertOptions(column_types=texts, strings_can_be_null=True)
            batches = pcsv.open_csv(path, convert_options=options)
        else:
            batches = pq.ParquetFile(path).iter_batches()
        for batch in batches:
            yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowInvalid) as error:
        raise FileWrong(f"{path} cannot be read as {kind} ({error}).") from None


def as_json(table: pa.Table, fields: list[Field]) -> list[bytes]:
    """Rows as the JSON of these fields."""
    struct: Any = msgspec.defstruct("Row", [(f.name, Any) for f in fields], gc=False)
    columns = [_plain(table[f.name], f) for f in fields]
    encode = msgspec.json.Encoder().encode
    return [encode(struct(*row)) for row in zip(*columns, strict=True)]


def read_training(path: Path, pipeline: Pipeline, before: int | None = None) -> Examples:
    """Read a file that `compute` wrote under the same definition. Rows without a label are left out.

    before: only events earlier than this, ms.
    """
    if pipeline.labels is None:
        raise FileWrong(f"The pipeline {pipeline.name} has no labels to train on; add 'labels:' to its file.")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise FileWrong(f"{path} cannot be read as Parquet ({error}).") from None
    made = ((table.schema.metadata or {}).get(b"definition") or b"another").decode()
    if made != pipeline.definition:
        raise FileWrong(
            f"{path} was computed under definition {made}, the pipeline is at {pipeline.definition}; run "
            f"`headrace features compute --pipeline {pipeline.name}` again."
        )
    label = pipeline.labels.field
    if label not in table.column_names:
        raise FileWrong(f"{path} has no label {label}; compute it from a file that has one.")
    table = table.filter(pc.is_valid(table[label]))
    stream = pipeline.stream
    times = _integers(table, stream.fields[stream.time], path)
    if before is not None:
        early = times < before
        times, table = times[early], table.filter(pa.array(early))
    vectors = np.column_stack([table[name].to_numpy() for name in pipeline.vector])
    there = [e for e in pipeline.entities if set(e.keys) <= {*table.column_names}]
    keys = {e.name: _codes(pa.chunked_array([key_column(table, e.keys)])) for e in there}
    return Examples(vectors, table[label].to_numpy().astype(np.int8), times, keys)


def _integers(table: pa.Table, field: Field, path: Path) -> Ints:
    """A column as it stands in the int64 block."""
    column = table[field.name]
    if column.null_count and not field.optional:
        raise FileWrong(f"{path}: {field.name} has {column.null_count} nulls, and the field is not optional.")
    try:
        if field.type == "timestamp":
            return _times(column, field)
        if field.textual:
            return _texts(column, field)
        if field.type == "int":
            whole = pc.cast(column, pa.int64())
            return np.asarray(pc.fill_null(whole, NULL).to_numpy(), np.int64)
        floats = np.asarray(pc.fill_null(pc.cast(column, pa.float64()), np.nan).to_numpy(), np.float64)
    except pa.ArrowInvalid as error:
        raise FileWrong(f"{path}: {field.name} is no {field.type} ({error}).") from None
    if field.type == "float":
        return floats.view(np.int64)
    units, valid = scaled(floats, field.divisor)
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise FileWrong(
            f"{path}: {field.name} of row {row}, {float(floats[row])!r}, has more decimals than its scale."
        )
    return units


def _times(column: Any, field: Field) -> Ints:
    if pa.types.is_timestamp(column.type):
        column = pc.cast(pc.cast(column, pa.timestamp("ms", column.type.tz), safe=False), pa.int64())
        return np.asarray(column.to_numpy(), np.int64)
    whole = np.asarray(pc.cast(column, pa.int64()).to_numpy(), np.int64)
    if field.unit == "iso":
        raise pa.ArrowInvalid("a number is no ISO time; write a timestamp column")
    return {"s": whole * 1000, "ms": whole, "us": whole // 1000}[field.unit]


def _plain(column: Any, field: Field) -> list[Any]:
    if field.type == "timestamp" and pa.types.is_timestamp(column.type):
        if field.unit == "iso":
            return [v.isoformat() for v in column.to_pylist()]
        column = pc.cast(pc.cast(column, pa.timestamp(field.unit, column.type.tz), safe=False), pa.int64())
    values: list[Any] = column.to_pylist()
    return values


def _texts(column: Any, field: Field) -> Ints:
    """What stands for each text, found once for all that are equal."""
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise pa.ArrowInvalid(f"{column.type} is no text; write a column of texts")
    encoded = pc.dictionary_encode(column.combine_chunks())
    codes = np.array([*map(field.code, encoded.dictionary.to_pylist()), NULL], np.int64)
    found: Ints = codes[pc.fill_null(encoded.indices, -1).to_numpy()]
    return found


def _ids(table: pa.Table, stream: Stream) -> Ints:
    if stream.fields[stream.id].type == "int":
        return stream.identities(pc.cast(table[stream.id], pa.int64()).to_numpy())
    return stream.identities(table[stream.id].to_pylist())


def _codes(column: Any) -> Ints:
    encoded = pc.dictionary_encode(column.combine_chunks())
    return np.asarray(pc.fill_null(encoded.indices, -1).to_numpy(), np.int64)


def _states(column: Any) -> Bytes:
    values = np.asarray(pc.fill_null(pc.cast(column, pa.int8()), -1).to_numpy())
    return np.select([values == 1, values == 0], [POSITIVE, NEGATIVE], UNKNOWN).astype(np.int8)
