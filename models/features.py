"""Compiles the features of an entity: what a file says of them, checked, to aggregates and filters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from models import aggregates, expressions, windows
from models.fields import Field
from models.specs import LONGEST_MS, NAME, FeatureSpec, LabelsSpec, PipelineError
from models.streams import WHICH, Compiler, Stream

MOST_OF_A_LIST = 100
MOST_FILTERS = 48  # each is a bit of a row's state


class Features:
    """Compiles the features of one entity, one after the other."""

    def __init__(
        self,
        compiler: Compiler,
        fields: Mapping[str, Field],
        streams: Sequence[Stream],
        keys: Sequence[str],
        labels: LabelsSpec | None,
        hop: int,
    ) -> None:
        self._compiler, self._streams, self._labels = compiler, streams, labels
        self._keys, self._hop = keys, hop  # ms, 0 without
        self._all = fields  # of all streams together; an entity sees those of streams that have its key
        self._fields = self._carried([s for s in streams if all(key in s.fields for key in keys)])
        self.names: list[str] = []
        self.values: list[str] = []
        self.filters: dict[str, expressions.Expression] = {}
        self.aggregates: list[aggregates.Aggregate] = []

    def add(self, name: str, feature: FeatureSpec, at: tuple[Any, ...]) -> list[str]:
        """The names of the features that it gives."""
        kind = aggregates.KINDS[feature.aggregate]
        number = self._number(feature, kind, at)
        window = self._window(feature, kind, number, at)
        delay = self._compiler.duration(feature.delay, *at, "delay")
        if self._hop and kind not in aggregates.IN_CELLS:
            known = ", ".join(n for n, k in aggregates.KINDS.items() if k in aggregates.IN_CELLS)
            raise self._fail(
                (*at, "aggregate"),
                f"cells do not tell the {feature.aggregate}; with a hop there are {known}.",
            )
        fields = self._fields_of(feature, at)
        value, divisor = self._value(feature, fields, kind, delay, at)
        names = []
        for suffix, condition in self._conditions(feature, fields, at):
            chosen = None if condition is None else self._filter(condition, fields, at)
            one = aggregates.Aggregate(kind, window, delay, value, divisor, number, chosen)
            self.aggregates.append(one)
            each = f"{name}{suffix}"
            names += [each] if kind not in aggregates.LISTS else [f"{each}_{i + 1}" for i in range(one.width)]
        self.names += names
        return names

    def _carried(self, streams: Sequence[Stream]) -> dict[str, Field]:
        """The fields of these streams, and of which stream an event is."""
        names = {WHICH, *(name for stream in streams for name in stream.fields)}
        return {name: field for name, field in self._all.items() if name in names}

    def _fail(self, at: tuple[Any, ...], problem: str) -> PipelineError:
        return self._compiler.fail(at, problem)

    def _number(self, feature: FeatureSpec, kind: int, at: tuple[Any, ...]) -> int:
        """What the kind takes besides: see Aggregate.number."""
        takes = {
            "k": kind in aggregates.LISTS, "quantile": kind == windows.QUANTILE,
            "half_life": kind in aggregates.DECAYED, "per": kind == windows.RATE,
        }  # fmt: skip
        for parameter, taken in takes.items():
            given = getattr(feature, parameter)
            if given is not None and not taken:
                raise self._fail((*at, parameter), f"{feature.aggregate} takes no {parameter}; drop it.")
            if given is None and taken and parameter != "per":
                example = {"k": "k: 3", "quantile": "quantile: 0.5", "half_life": "half_life: 1h"}[parameter]
                raise self._fail(at, f"{feature.aggregate} needs {parameter}; write for instance {example}.")
        if kind in aggregates.LISTS:
            if not 1 <= (feature.k or 0) <= MOST_OF_A_LIST:
                raise self._fail((*at, "k"), f"k is between 1 and {MOST_OF_A_LIST}.")
            return feature.k or 0
        if kind == windows.QUANTILE:
            if not 0 < (feature.quantile or 0) <= 1:
                raise self._fail((*at, "quantile"), "a quantile is above 0 and at most 1; 0.5 is the median.")
            return round((feature.quantile or 0) * 1_000_000)
        parameter = "half_life" if kind in aggregates.DECAYED else "per"
        given = getattr(feature, parameter) or "1s"
        duration = self._compiler.duration(given, *at, parameter)
        if duration <= 0:
            raise self._fail((*at, parameter), f"{parameter} is longer than 0; write 1s, 1h or the like.")
        if kind in aggregates.DECAYED and duration * windows.HALVINGS > LONGEST_MS:
            raise self._fail(
                (*at, parameter), f"{windows.HALVINGS} of them are longer than 4000 days; write less."
            )
        return duration

    def _window(self, feature: FeatureSpec, kind: int, number: int, at: tuple[Any, ...]) -> int | None:
        if kind in aggregates.DECAYED:
            if feature.window is not None:
                raise self._fail(
                    (*at, "window"), "a decayed aggregate ends after 24 half-lives; drop the window."
                )
            return number * windows.HALVINGS
        if feature.window is None:
            raise self._fail(
                at, f"{feature.aggregate} needs a window; write window: 7d, or window: lifetime."
            )
        if feature.window == "lifetime":
            if kind not in aggregates.FOR_LIFE:
                known = ", ".join(n for n, k in aggregates.KINDS.items() if k in aggregates.FOR_LIFE)
                raise self._fail(
                    (*at, "window"), f"{feature.aggregate} has an end; for life there are {known}."
                )
            return None
        window = self._compiler.duration(feature.window, *at, "window")
        if window <= 0:
            raise self._fail((*at, "window"), "a window is longer than 0; write 1h, 7d or the like.")
        if window < self._hop:
            raise self._fail((*at, "window"), "it is shorter than the entity's hop; make the hop shorter.")
        return window

    def _fields_of(self, feature: FeatureSpec, at: tuple[Any, ...]) -> Mapping[str, Field]:
        """The fields of the events that a feature is of."""
        if feature.from_ is None:
            return self._fields
        streams = {stream.name: stream for stream in self._streams}
        if feature.from_ not in streams:
            near = difflib.get_close_matches(feature.from_, streams, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(streams)}."
            raise self._fail((*at, "from"), f"there is no stream {feature.from_!r}; {hint}")
        lacking = [key for key in self._keys if key not in streams[feature.from_].fields]
        if lacking:
            raise self._fail(
                (*at, "from"), f"{feature.from_} has no {lacking[0]}, the key; take a stream that has it."
            )
        return self._carried([streams[feature.from_]])

    def _value(
        self, feature: FeatureSpec, fields: Mapping[str, Field], kind: int, delay: int, at: tuple[Any, ...]
    ) -> tuple[int, int]:
        """The value column and its unit."""
        if kind in aggregates.OF_LABELS:
            self._of_labels(feature, at, delay)
            return 0, 1
        if kind in aggregates.OF_ROWS:
            if feature.of is not None:
                raise self._fail(
                    (*at, "of"), f"{feature.aggregate} is of events and takes no field; drop 'of'."
                )
            return 0, 1
        if feature.of is None:
            raise self._fail(at, f"{feature.aggregate} needs a field; write of: FIELD.")
        self._compiler.known_field(feature.of, fields, (*at, "of"))
        field = fields[feature.of]
        if field.type not in ("int", "decimal") and not (kind in aggregates.OF_TEXTS and field.textual):
            raise self._fail(
                (*at, "of"),
                f"{feature.of} is a {field.type}; aggregates are exact on integers only: declare it as int, or as "
                "{type: decimal, scale: 2}.",
            )
        self._compiler.compares([feature.of], fields)
        if feature.of not in self.values:
            self.values.append(feature.of)
        return self.values.index(feature.of), field.divisor

    def _of_labels(self, feature: FeatureSpec, at: tuple[Any, ...], delay: int) -> None:
        labels, what = self._labels, feature.aggregate
        if labels is None:
            raise self._fail(
                at,
                f"a {what} needs labels; add 'labels:' with field and known, of a first stream with this key.",
            )
        if feature.from_ not in (None, self._streams[0].name):
            raise self._fail(
                (*at, "from"),
                f"labels are of events of {self._streams[0].name}; drop from, or name it there.",
            )
        if feature.of != labels.field:
            raise self._fail((*at, "of"), f"a {what} is of the label; write of: {labels.field}.")
        if delay <= 0:
            raise self._fail(
                (*at, "delay"), "no label is known at its event; write the delay by which it is, delay: 7d."
            )

    def _conditions(
        self, feature: FeatureSpec, fields: Mapping[str, Field], at: tuple[Any, ...]
    ) -> list[tuple[str, str | None]]:
        """For each feature what its name ends in, and which events it is of."""
        where = self._where(feature)
        if feature.by is None:
            return [("", where)]
        if len(feature.by) != 1:
            raise self._fail(
                (*at, "by"), "it names one field, with a list of its values; write by: {FIELD: [1, 2]}."
            )
        ((field, values),) = feature.by.items()
        self._compiler.known_field(field, fields, (*at, "by"))
        if not values or len(set(values)) < len(values):
            raise self._fail((*at, "by", field), "name at least one value, and each once.")
        both = "" if where is None else f"({where}) and "
        found: list[tuple[str, str | None]] = [
            (f"_{value}", f"{both}{field} == {value!r}") for value in values
        ]
        for suffix, _ in found:
            if not NAME.fullmatch(suffix):
                raise self._fail(
                    (*at, "by", field),
                    f"{suffix[1:]!r} does not go into a name; write a feature with where: for it.",
                )
        return found

    def _where(self, feature: FeatureSpec) -> str | None:
        """The condition, with the stream's as one of it."""
        if feature.from_ is None or len(self._streams) == 1:
            return feature.where
        of_stream = f"{WHICH} == {feature.from_!r}"
        return of_stream if feature.where is None else f"{of_stream} and ({feature.where})"

    def _filter(self, text: str, fields: Mapping[str, Field], at: tuple[Any, ...]) -> int:
        """The number of the filter: those that say the same are one."""
        try:
            found = expressions.parse(text, fields)
        except expressions.ExpressionError as error:
            raise self._fail((*at, "where"), sentence(error)) from None
        self._compiler.compares(found.uses, fields)
        self.filters.setdefault(found.text, found)
        if len(self.filters) > MOST_FILTERS:
            raise self._fail((*at, "where"), f"an entity has {MOST_FILTERS} filters at most; share some.")
        return list(self.filters).index(found.text)


def sentence(error: Exception) -> str:
    text = str(error)
    return text if text.endswith("?") else f"{text}."
