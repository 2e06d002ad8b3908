"""Compiles the streams of a pipeline: what each carries, and the columns that all have together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from models.fields import Field, event_id
from models.specs import NAME, FieldSpec, PipelineError, StreamSpec

WHICH = "stream"  # the column, in a pipeline of several streams, that says of which an event is
_MOST_VALUES = 1000  # of a category: more of them are a key or an id
_T = TypeVar("_T")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """A topic of events. number: its place in the file. scored: whether its events are predicted."""

    name: str
    number: int
    topic: str
    id: str
    time: str
    fields: dict[str, Field]
    scored: bool

    def identity(self, given: int | str) -> int:
        """The 64-bit id of an event, which tells events of two streams apart that have the same id."""
        return event_id(given) ^ self.salt

    def identities(self, given: Sequence[int | str] | Ints) -> Ints:
        """Likewise of n events, (n,)."""
        hashed = [event_id(i) for i in given] if len(given) and isinstance(given[0], str) else given
        return np.array(hashed, np.int64) ^ self.salt

    @property
    def salt(self) -> int:
        """What the ids of this stream are changed by; nothing for those of the first."""
        return event_id(self.name) if self.number else 0


class Compiler(Protocol):
    """Who knows the file: models.pipeline."""

    def fail(self, path: tuple[Any, ...], problem: str) -> PipelineError:
        """The error, with the line of what it speaks of."""

    def convert(self, data: Any, to: type[_T], *path: Any) -> _T:
        """Data of the file as what it should be. Raises PipelineError."""

    def known_field(self, name: str, fields: Mapping[str, Field], at: tuple[Any, ...]) -> None:
        """Raises PipelineError where there is none of this name."""

    def duration(self, text: str, *at: Any) -> int:
        """Milliseconds. Raises PipelineError."""

    def compares(self, names: Iterable[str], fields: Mapping[str, Field]) -> None:
        """Give the strings among these names a column of the block."""

    def topic(self, given: str | None, name: str, at: tuple[Any, ...]) -> str:
        """The topic of a stream. Raises PipelineError."""


class Streams:
    """Compiles the streams of one file: `all` of them, and the `fields` that they have together."""

    def __init__(self, compiler: Compiler, given: Mapping[str, Any]) -> None:
        self._compiler = compiler
        if not given:
            raise self._fail(("streams",), "there is none; name at least one, with id, time and fields.")
        self.all = [self._stream(n, name, data) for n, (name, data) in enumerate(given.items())]
        self.fields = self._together()

    def _fail(self, at: tuple[Any, ...], problem: str) -> PipelineError:
        return self._compiler.fail(at, problem)

    def _stream(self, number: int, name: str, data: Any) -> Stream:
        at = ("streams", name)
        if not NAME.fullmatch(name):
            raise self._fail(at, "a stream's name has letters, digits and '_'.")
        given = self._compiler.convert(data, StreamSpec, *at)
        fields = {}
        for field_name, value in given.fields.items():
            where = (*at, "fields", field_name)
            if not NAME.fullmatch(field_name):
                raise self._fail(where, "a field's name has letters, digits and '_'.")
            spec = {"type": value} if isinstance(value, str) else value
            fields[field_name] = self._field(
                self._compiler.convert(spec, FieldSpec, *where), field_name, where
            )
        for role, field in (("id", given.id), ("time", given.time)):
            self._compiler.known_field(field, fields, (*at, role))
            if fields[field].optional:
                raise self._fail((*at, "fields", field), f"the event's {role} cannot be optional.")
        if fields[given.id].type not in ("int", "string"):
            raise self._fail((*at, "id"), f"{given.id} is a {fields[given.id].type}; an id is int or string.")
        if fields[given.time].type != "timestamp":
            raise self._fail(
                (*at, "time"), f"{given.time} is no timestamp; declare it as one, with its unit."
            )
        if number == 0 and given.scored is False:
            raise self._fail(
                (*at, "scored"), "the first stream is the one that is scored; put another one first."
            )
        topic = self._compiler.topic(given.topic, name, at)
        return Stream(name, number, topic, given.id, given.time, fields, number == 0 or bool(given.scored))

    def _field(self, given: FieldSpec, name: str, at: tuple[Any, ...]) -> Field:
        if given.scale and given.type != "decimal":
            raise self._fail((*at, "scale"), f"a {given.type} has no scale; use type: decimal, or drop it.")
        if not 0 <= given.scale <= 9:
            raise self._fail((*at, "scale"), f"{given.scale} is not between 0 and 9 decimals.")
        self._values(given, (*at, "values"))
        return Field(name, given.type, 10**given.scale, given.unit, given.optional, tuple(given.values))

    def _values(self, given: FieldSpec, at: tuple[Any, ...]) -> None:
        if given.type != "category":
            if given.values:
                raise self._fail(at, f"a {given.type} has no list of values; use type: category, or drop it.")
            return
        if not given.values:
            raise self._fail(at, "a category needs its values; write values: [web, shop].")
        if len(given.values) > _MOST_VALUES:
            raise self._fail(
                at, f"{len(given.values)} are more than {_MOST_VALUES} values; declare it as a string."
            )
        for i, value in enumerate(given.values):
            if value in given.values[:i]:
                raise self._fail((*at, i), f"{value!r} stands twice; each value has one code.")

    def _together(self) -> dict[str, Field]:
        """The fields of all streams. Those that one of them lacks are absent from its events."""
        if len(self.all) == 1:
            return self.all[0].fields
        names = [stream.name for stream in self.all]
        fields = {WHICH: Field(WHICH, "category", values=tuple(names))}
        for stream in self.all:
            for name, field in stream.fields.items():
                where = ("streams", stream.name, "fields", name)
                if name == WHICH:
                    raise self._fail(
                        where, "with several streams this name tells them apart; rename the field."
                    )
                known = fields.setdefault(name, field)
                if replace(known, optional=False) != replace(field, optional=False):
                    raise self._fail(
                        where,
                        f"another stream has a {name} of another type; declare both alike, or rename one.",
                    )
                if field.optional or any(name not in other.fields for other in self.all):
                    fields[name] = replace(field, optional=True)
        return fields
