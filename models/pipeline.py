"""Pipeline files: what a user writes, checked, and compiled once to what the fold walks.

`load` reads `configs/pipelines/NAME.yaml` and returns a `Pipeline`, or raises `PipelineError` with
file, line, field and remedy. Nothing behind this module looks at YAML again.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import yaml

from models import aggregates, expressions, own_functions, windows
from models.errors import HeadraceError
from models.fields import Field

# Raised when the meaning of an aggregate or the layout of a profile changes: every definition hash
# changes with it, so no store, vector or model of another meaning is ever read.
MEANING = 2

MOST_OF_A_LIST = 100
MOST_FILTERS = 48  # each is a bit of a row's state

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
LONGEST_MS = 4000 * _UNITS_MS["d"]
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,200}")
_MOST_VALUES = 1000  # of a category: more of them are a key or an id
_T = TypeVar("_T")


class PipelineError(HeadraceError):
    """`file:line: field: what is wrong; what to write instead`."""

    exit_code = 2


# --- what a file holds -------------------------------------------------------------------------


class FieldSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A field of a stream. `scale`: of a decimal. `unit`: of a timestamp. `values`: of a category."""

    type: Literal["int", "float", "decimal", "string", "timestamp", "category"]
    scale: int = 0
    values: list[str] = []
    unit: Literal["s", "ms", "us", "iso"] = "ms"
    optional: bool = False


class StreamSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A topic of JSON events. `id` and `time` name the fields that identify and date an event."""

    id: str
    time: str
    fields: dict[str, Any]
    topic: str | None = None


class LabelsSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The stream of labels. A label carries the event's id, time and entity keys under the stream's names.

    `field` holds 0, 1 or null (unknown again); `known` is the field with the time at which it became
    known, in the unit of the event time.
    """

    field: str
    known: str
    topic: str | None = None


class FeatureSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """An aggregate over (t - delay - window, t - delay].

    `of`: the field. `window`: a duration, or `lifetime`. `where`: only events of which this expression holds.
    `by`: a field and some of its values: a feature for each, named NAME_value. `k`: how many, of last_k and
    most_frequent: features NAME_1 to NAME_k. `quantile`: 0.5 for the median. `half_life`: of a decayed aggregate,
    whose window is 24 of them. `per`: what a rate is per.
    """

    aggregate: Literal[
        "count", "sum", "mean", "variance", "stddev", "rate", "share", "positives", "coverage", "first", "last",
        "last_k", "min", "max", "since_last", "distinct", "quantile", "most_frequent", "decayed_count", "decayed_sum",
    ]  # fmt: skip
    window: str | None = None
    of: str | None = None
    delay: str = "0s"
    where: str | None = None
    by: dict[str, list[int | str]] | None = None
    k: int | None = None
    quantile: float | None = None
    half_life: str | None = None
    per: str | None = None


class EntitySpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What features are about. `key`: the field that names it; null gives no update and NaN features.

    `hop`: for keys with very many events: those of a cell of this length are kept as one row, and windows begin and
    end with cells.
    """

    key: str
    features: dict[str, Any]
    hop: str | None = None


class FunctionSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A transform by a Python function, `package.module:name`, of these inputs (models.own_functions)."""

    function: str
    inputs: list[str]


class ModelSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Gradient-boosted trees, and the decisions by score.

    `decisions`: name to the share of training events that score at or above its threshold; the
    decision of an event is the rarest whose threshold it reaches, `otherwise` if none.
    """

    decisions: dict[str, float]
    otherwise: str = "pass"
    trees: int = 100
    depth: int = 4
    learning_rate: float = 0.1
    seed: int = 0
    test_days: int = 14


class PipelineSpec(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One pipeline file."""

    name: str
    streams: dict[str, Any]
    entities: dict[str, Any]
    vector: list[str]
    model: ModelSpec
    labels: LabelsSpec | None = None
    transforms: dict[str, Any] = {}
    lateness: str = "1h"
    predictions_carry_features: bool = True


# --- what it is compiled to --------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    topic: str
    id: str
    time: str
    fields: dict[str, Field]

    @property
    def columns(self) -> list[Field]:
        """The fields that have a column of the int64 block, in its order."""
        return [f for f in self.fields.values() if f.in_block]


@dataclass(frozen=True)
class Labels:
    topic: str
    field: str
    known: str


@dataclass(frozen=True)
class Entity:
    """One stage of the chain: whose log it folds, and the features that it reads."""

    name: str
    key: str
    log: str
    features: tuple[str, ...]
    values: tuple[str, ...]  # the fields that become value columns, in their order
    filters: tuple[expressions.Expression, ...]
    aggregates: tuple[aggregates.Aggregate, ...]
    labelled: bool
    plan: windows.Plan

    @property
    def retention(self) -> int:
        """How far back a profile's rows reach, ms: also how long its mirror is worth keeping."""
        return self.plan.retention


@dataclass(frozen=True)
class Pipeline:
    """instance: the name of its topics, stores and mirror, which is the pipeline's unless run as another.

    transforms: those that the vector needs, each behind what it names.
    """

    name: str
    instance: str
    stream: Stream
    labels: Labels | None
    entities: tuple[Entity, ...]
    transforms: dict[str, expressions.Expression]
    vector: tuple[str, ...]
    model: ModelSpec
    lateness: int
    predictions_carry_features: bool
    definition: str  # the definition hash: 16 hex digits
    spec: PipelineSpec  # what it was compiled from, to be compared with another version

    @property
    def predictions(self) -> str:
        return f"{self.instance}.predictions"

    @property
    def control(self) -> str:
        """The topic on which the workers of an instance tell each other how far they are."""
        return f"{self.instance}.control"

    @property
    def dead_letters(self) -> str:
        return f"{self.instance}.dead-letters"

    @cached_property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Where each place of the vector comes from: ("field"|"transform"|entity name, name)."""
        owner = {name: e.name for e in self.entities for name in e.features}
        return tuple(
            (owner.get(name) or ("transform" if name in self.transforms else "field"), name)
            for name in self.vector
        )

    def entity(self, name: str) -> Entity:
        for entity in self.entities:
            if entity.name == name:
                return entity
        known = ", ".join(e.name for e in self.entities)
        raise HeadraceError(f"The pipeline {self.name} has no entity {name!r}; it has {known}.")


def load(path: Path, alias: str | None = None, any_name: bool = False) -> Pipeline:
    """Read, check and compile one pipeline file. Raises PipelineError.

    alias: run under another name, with topics and stores of its own.
    any_name: the file need not be named like the pipeline: it holds another version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PipelineError(f"{path}:{line}: this is not UTF-8; save the file as UTF-8.") from None
    return parse(text, f"<{path}>" if any_name else str(path), alias)


def find(name: str, folder: Path, alias: str | None = None) -> Pipeline:
    """The pipeline of this name in a folder of pipeline files."""
    path = folder / f"{name}.yaml"
    if path.is_file():
        return load(path, alias)
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}."
    raise PipelineError(f"There is no pipeline {name!r} in {folder}; {hint}")


def parse(text: str, file: str = "<pipeline>", alias: str | None = None) -> Pipeline:
    """Check and compile the text of a pipeline file. Raises PipelineError.

    >>> parse("name: x", "x.yaml")
    Traceback (most recent call last):
    models.pipeline.PipelineError: x.yaml:1: $: Object missing required field `streams`; ...
    """
    return _Compiler(text, file).compile(alias)


def schema() -> dict[str, Any]:
    """The JSON Schema of a pipeline file, for editors."""
    specs: list[Any] = [PipelineSpec, StreamSpec, EntitySpec, FeatureSpec, FieldSpec, FunctionSpec]
    (root, *_), parts = msgspec.json.schema_components(specs, ref_template="#/$defs/{name}")
    for owner, field, part in (
        ("PipelineSpec", "streams", "StreamSpec"),
        ("PipelineSpec", "entities", "EntitySpec"),
        ("EntitySpec", "features", "FeatureSpec"),
        ("StreamSpec", "fields", "FieldSpec"),
        ("PipelineSpec", "transforms", "FunctionSpec"),
    ):
        # These are checked one by one when a file is read, so that an error can name its line.
        entry: dict[str, Any] = {"$ref": f"#/$defs/{part}"}
        if part == "FieldSpec":
            entry = {"anyOf": [entry, parts["FieldSpec"]["properties"]["type"]]}
        if part == "FunctionSpec":
            entry = {"anyOf": [entry, {"type": "string"}]}
        parts[owner]["properties"][field]["additionalProperties"] = entry
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": parts}


class _Compiler:
    """Reads one file. Errors know the line of the node that they speak of."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.hashed: set[str] = set()  # the strings that something compares, so they need a column
        try:
            self.root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.data = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader underneath
        except yaml.MarkedYAMLError as error:
            line = (error.problem_mark.line + 1) if error.problem_mark else 1
            raise PipelineError(f"{file}:{line}: {error.problem}; mend the YAML.") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise PipelineError(f"{file}:{line}: {error.reason}; mend the YAML.") from None
        if not isinstance(self.data, dict):
            raise PipelineError(f"{file}:1: a pipeline is a mapping that begins with 'name:'.")

    def fail(self, path: tuple[Any, ...], problem: str) -> PipelineError:
        field = ".".join(map(str, path)) or "$"
        return PipelineError(f"{self.file}:{self.line(path)}: {field}: {problem}")

    def line(self, path: tuple[Any, ...]) -> int:
        """The line of the deepest node of this path that the file has."""
        node, line = self.root, 1
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = [(k, v) for k, v in node.value if k.value == str(part)]
                if not found:
                    break
                key, node = found[-1]
                line = key.start_mark.line + 1
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line

    def convert(self, data: Any, to: type[_T], *path: Any) -> _T:
        try:
            return msgspec.convert(data, to, strict=True)
        except msgspec.ValidationError as error:
            message, _, where = str(error).partition(" - at `")
            where = where.removeprefix("key` in `")
            inner = [int(p) if p.isdigit() else p for p in re.findall(r"[^$.\[\]`]+", where)]
            unknown = re.search(r"unknown field `(.+?)`", message)
            if unknown:
                owner: Any = {"labels": LabelsSpec, "model": ModelSpec}[str(inner[0])] if inner else to
                inner.append(unknown[1])
                known = [f.encode_name for f in msgspec.structs.fields(owner)]
                near = difflib.get_close_matches(unknown[1], known, 1)
                message += f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}."
            else:
                message += "; see configs/pipelines/schema.json."
            raise self.fail((*path, *inner), message) from None

    def compile(self, alias: str | None) -> Pipeline:
        spec = self.convert(self.data, PipelineSpec)
        self.file_matches(spec.name)
        self.instance = alias or spec.name
        if not _TOPIC.fullmatch(self.instance):
            raise self.fail(("name",), "a name has letters, digits, '.', '_' and '-', for it names topics.")
        stream = self.stream(spec)
        labels = self.labels(spec, stream)
        lateness = self.duration(spec.lateness, "lateness")
        entities = self.entities(spec, stream, lateness)
        transforms = self.transforms(spec, stream, entities)
        self.vector(spec, stream, transforms, entities)
        transforms = _needed(transforms, spec.vector)
        self.compares(stream, (name for t in transforms.values() for name in t.uses))
        stream = replace(
            stream, fields={n: replace(f, hashed=n in self.hashed) for n, f in stream.fields.items()}
        )
        self.model(spec)
        pipeline = Pipeline(
            name=spec.name,
            instance=self.instance,
            stream=stream,
            labels=labels,
            entities=entities,
            transforms=transforms,
            vector=tuple(spec.vector),
            model=spec.model,
            lateness=lateness,
            predictions_carry_features=spec.predictions_carry_features,
            definition=_definition(stream, labels, entities, transforms, spec.vector),
            spec=spec,
        )
        self.topics(pipeline)
        return pipeline

    def file_matches(self, name: str) -> None:
        stem = Path(self.file).stem
        if not self.file.startswith("<") and stem != name:
            raise self.fail(
                ("name",), f"the file is {stem}.yaml; name the pipeline {stem}, or rename the file."
            )

    def stream(self, spec: PipelineSpec) -> Stream:
        if len(spec.streams) != 1:
            raise self.fail(
                ("streams",),
                f"there are {len(spec.streams)}; this version takes exactly one stream of events.",
            )
        ((name, data),) = spec.streams.items()
        at = ("streams", name)
        stream = self.convert(data, StreamSpec, *at)
        fields = {}
        for field_name, value in stream.fields.items():
            where = (*at, "fields", field_name)
            if not _NAME.fullmatch(field_name):
                raise self.fail(where, "a field's name has letters, digits and '_'.")
            given = self.convert({"type": value} if isinstance(value, str) else value, FieldSpec, *where)
            fields[field_name] = self.field(given, field_name, where)
        for role, field in (("id", stream.id), ("time", stream.time)):
            self.known_field(field, fields, (*at, role))
            if fields[field].optional:
                raise self.fail((*at, "fields", field), f"the event's {role} cannot be optional.")
        if fields[stream.id].type not in ("int", "string"):
            raise self.fail(
                (*at, "id"), f"{stream.id} is a {fields[stream.id].type}; an id is int or string."
            )
        if fields[stream.time].type != "timestamp":
            raise self.fail(
                (*at, "time"), f"{stream.time} is no timestamp; declare it as one, with its unit."
            )
        return Stream(self.topic(stream.topic, name, at), stream.id, stream.time, fields)

    def field(self, given: FieldSpec, name: str, at: tuple[Any, ...]) -> Field:
        if given.scale and given.type != "decimal":
            raise self.fail((*at, "scale"), f"a {given.type} has no scale; use type: decimal, or drop it.")
        if not 0 <= given.scale <= 9:
            raise self.fail((*at, "scale"), f"{given.scale} is not between 0 and 9 decimals.")
        self.values(given, (*at, "values"))
        return Field(name, given.type, 10**given.scale, given.unit, given.optional, tuple(given.values))

    def values(self, given: FieldSpec, at: tuple[Any, ...]) -> None:
        if given.type != "category":
            if given.values:
                raise self.fail(at, f"a {given.type} has no list of values; use type: category, or drop it.")
            return
        if not given.values:
            raise self.fail(at, "a category needs its values; write values: [web, shop].")
        if len(given.values) > _MOST_VALUES:
            raise self.fail(
                at, f"{len(given.values)} are more than {_MOST_VALUES} values; declare it as a string."
            )
        for i, value in enumerate(given.values):
            if value in given.values[:i]:
                raise self.fail((*at, i), f"{value!r} stands twice; each value has one code.")

    def compares(self, stream: Stream, names: Iterable[str]) -> None:
        """Give the strings among these names a column of the block."""
        self.hashed |= {n for n in names if n in stream.fields and stream.fields[n].type == "string"}

    def labels(self, spec: PipelineSpec, stream: Stream) -> Labels | None:
        if spec.labels is None:
            return None
        for role in ("field", "known"):
            name = getattr(spec.labels, role)
            if not _NAME.fullmatch(name):
                raise self.fail(("labels", role), "a field's name has letters, digits and '_'.")
            if name in stream.fields:
                raise self.fail(
                    ("labels", role), f"{name} is a field of the stream; an event cannot know it."
                )
        if spec.labels.field == spec.labels.known:
            raise self.fail(
                ("labels", "known"), f"{spec.labels.known} is the label itself; name the field with the time."
            )
        topic = self.topic(spec.labels.topic, "labels", ("labels",))
        return Labels(topic, spec.labels.field, spec.labels.known)

    def topic(self, given: str | None, name: str, at: tuple[Any, ...]) -> str:
        if given is not None and not _TOPIC.fullmatch(given):
            raise self.fail((*at, "topic"), f"{given!r} is no topic name: letters, digits, '.', '_' and '-'.")
        return given or f"{self.instance}.{name}"

    def topics(self, pipeline: Pipeline) -> None:
        labels = [pipeline.labels.topic] if pipeline.labels else []
        uses = [
            pipeline.predictions,
            pipeline.dead_letters,
            pipeline.control,
            *(e.log for e in pipeline.entities),
            *labels,
        ]
        for topic in uses:
            if uses.count(topic) > 1:
                at = "labels" if topic in labels else "streams"
                raise self.fail(
                    (at,), f"the topic {topic} has another use; write topic: with a name of its own."
                )

    def transforms(
        self, spec: PipelineSpec, stream: Stream, entities: tuple[Entity, ...]
    ) -> dict[str, expressions.Expression]:
        """All transforms in the order of the file: what one names stands before it."""
        given = {name: self.transform(name, data) for name, data in spec.transforms.items()}
        known = {**stream.fields, **{name: Field(name, "float") for e in entities for name in e.features}}
        compiled: dict[str, expressions.Expression] = {}
        for name, one in given.items():
            self.new_name(name, stream, ("transforms", name))
            self.in_order(name, given, compiled)
            try:
                if isinstance(one, str):
                    compiled[name] = expressions.parse(one, known)
                else:
                    inputs = [expressions.find(n, known) for n in one.inputs]
                    compiled[name] = own_functions.load(one.function, inputs)
            except expressions.ExpressionError as error:
                raise self.fail(("transforms", name), _sentence(error)) from None
            known[name] = Field(name, "float")
        return compiled

    def transform(self, name: str, data: Any) -> str | FunctionSpec:
        if isinstance(data, str):
            return data
        if isinstance(data, dict):
            return self.convert(data, FunctionSpec, "transforms", name)
        raise self.fail(
            ("transforms", name),
            f"{data!r} is no transform; write an expression, or {{function: package.module:name, inputs: [FIELD]}}.",
        )

    def in_order(self, name: str, given: dict[str, str | FunctionSpec], before: Container[str]) -> None:
        """Refuse a transform that names itself or a later one."""
        for other in _named(given[name]):
            if other in given and other not in before:
                way = _way(other, name, given)
                if way:
                    raise self.fail(
                        ("transforms", name),
                        f"it needs itself ({' -> '.join([name, *way])}); write one of them without the other.",
                    )
                raise self.fail(
                    ("transforms", name), f"{other} is written further down; move it above {name}."
                )

    def entities(self, spec: PipelineSpec, stream: Stream, lateness: int) -> tuple[Entity, ...]:
        if not spec.entities:
            raise self.fail(("entities",), "there is none; name at least one, with its key and features.")
        entities: list[Entity] = []
        taken = set(spec.transforms)
        for name, data in spec.entities.items():
            at = ("entities", name)
            if not _TOPIC.fullmatch(name):
                raise self.fail(at, "an entity's name has letters, digits, '.', '_' and '-'.")
            entity = self.convert(data, EntitySpec, *at)
            self.known_field(entity.key, stream.fields, (*at, "key"))
            if stream.fields[entity.key].type not in ("int", "string"):
                raise self.fail((*at, "key"), f"{entity.key} is no int or string, so it cannot be a key.")
            log = f"{self.instance}.{name}.log" if entities else stream.topic
            entities.append(self.entity(spec, stream, name, entity, log, lateness, taken))
        return tuple(entities)

    def entity(
        self, spec: PipelineSpec, stream: Stream, name: str, entity: EntitySpec, log: str, lateness: int,
        taken: set[str],
    ) -> Entity:  # fmt: skip
        at = ("entities", name)
        first = log == stream.topic
        hop = 0 if entity.hop is None else self.duration(entity.hop, *at, "hop")
        if entity.hop is not None and (hop <= 0 or first):
            problem = "a hop is longer than 0; write 1s, 1m or the like." if hop <= 0 else (
                "the first entity cannot have a hop, for it drops events that come twice, and cells have no ids; put "
                "one without a hop before it."
            )  # fmt: skip
            raise self.fail((*at, "hop"), problem)
        features = _Features(self, spec, stream, first, hop)
        for feature_name, data in entity.features.items():
            where = (*at, "features", feature_name)
            self.new_name(feature_name, stream, where)
            for output in features.add(feature_name, self.convert(data, FeatureSpec, *where), where):
                if output in taken or output in stream.fields:
                    raise self.fail(
                        where, f"there is another {output}: a field, feature or transform; rename one."
                    )
                taken.add(output)
        plan = aggregates.plan(
            features.aggregates, [stream.fields[v].optional for v in features.values], lateness,
            len(features.filters), hop,
        )  # fmt: skip
        return Entity(
            name, entity.key, log, tuple(features.names), tuple(features.values), tuple(features.filters.values()),
            tuple(features.aggregates), any(a.kind in aggregates.OF_LABELS for a in features.aggregates), plan,
        )  # fmt: skip

    def vector(
        self, spec: PipelineSpec, stream: Stream, transforms: dict[str, Any], entities: tuple[Entity, ...]
    ) -> None:
        known = [*stream.fields, *transforms, *(name for e in entities for name in e.features)]
        for i, name in enumerate(spec.vector):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else "name a field, a transform or a feature."
                raise self.fail(("vector", i), f"there is no {name!r}; {hint}")
            if name in stream.fields and stream.fields[name].type in ("string", "timestamp"):
                raise self.fail(("vector", i), f"{name} is a {stream.fields[name].type}, not a number.")
            if spec.vector.index(name) != i:
                raise self.fail(("vector", i), f"{name} stands twice; a model takes each input once.")
        if not spec.vector:
            raise self.fail(("vector",), "it is empty; name what the model sees, in its order.")

    def model(self, spec: PipelineSpec) -> None:
        model = spec.model
        if not model.decisions:
            raise self.fail(("model", "decisions"), "there is none; write for instance alert: 0.01.")
        for name, share in model.decisions.items():
            if not 0 < share < 1:
                raise self.fail(("model", "decisions", name), f"{share} is no share between 0 and 1.")
        for bound in ("trees", "depth", "learning_rate", "test_days"):
            if not 0 < getattr(model, bound) < math.inf:
                raise self.fail(("model", bound), "it must be above 0.")

    def new_name(self, name: str, stream: Stream, at: tuple[Any, ...]) -> None:
        if not _NAME.fullmatch(name):
            raise self.fail(at, "a feature's name has letters, digits and '_'.")
        if name in stream.fields:
            raise self.fail(at, "a field of the stream has this name; rename the feature.")

    def known_field(self, name: str, fields: dict[str, Field], at: tuple[Any, ...]) -> None:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(fields)}."
            raise self.fail(at, f"the stream has no field {name!r}; {hint}")

    def duration(self, text: str, *at: Any) -> int:
        """Milliseconds of '90s', '1h', '7d'."""
        duration = milliseconds(text)
        if duration is None:
            raise self.fail(at, f"{text!r} is no duration; write a whole number and ms, s, m, h or d: 7d.")
        if duration > LONGEST_MS:
            raise self.fail(at, f"{text!r} is longer than 4000 days.")
        return duration


def milliseconds(text: str) -> int | None:
    """Milliseconds of '90s', '1h', '7d'; None for what is no duration."""
    match = re.fullmatch(r"(\d+)(ms|s|m|h|d)", text)
    return int(match[1]) * _UNITS_MS[match[2]] if match else None


class _Features:
    """Compiles the features of one entity, one after the other."""

    def __init__(
        self, compiler: _Compiler, spec: PipelineSpec, stream: Stream, first: bool, hop: int
    ) -> None:
        self._compiler, self._spec, self._stream = compiler, spec, stream
        self._first, self._hop = first, hop  # whether the entity's log is the stream itself; ms, 0 without
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
        value, divisor = self._value(feature, kind, delay, at)
        names = []
        for suffix, condition in self._conditions(feature, at):
            chosen = None if condition is None else self._filter(condition, at)
            one = aggregates.Aggregate(kind, window, delay, value, divisor, number, chosen)
            self.aggregates.append(one)
            each = f"{name}{suffix}"
            names += [each] if kind not in aggregates.LISTS else [f"{each}_{i + 1}" for i in range(one.width)]
        self.names += names
        return names

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

    def _value(self, feature: FeatureSpec, kind: int, delay: int, at: tuple[Any, ...]) -> tuple[int, int]:
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
        self._compiler.known_field(feature.of, self._stream.fields, (*at, "of"))
        field = self._stream.fields[feature.of]
        if field.type not in ("int", "decimal") and not (kind == windows.DISTINCT and field.textual):
            raise self._fail(
                (*at, "of"),
                f"{feature.of} is a {field.type}; aggregates are exact on integers only: declare it as int, or as "
                "{type: decimal, scale: 2}.",
            )
        self._compiler.compares(self._stream, [feature.of])
        if feature.of not in self.values:
            self.values.append(feature.of)
        return self.values.index(feature.of), field.divisor

    def _of_labels(self, feature: FeatureSpec, at: tuple[Any, ...], delay: int) -> None:
        labels, what = self._spec.labels, feature.aggregate
        if labels is None:
            raise self._fail(at, f"a {what} needs labels; add 'labels:' with field and known.")
        if feature.of != labels.field:
            raise self._fail((*at, "of"), f"a {what} is of the label; write of: {labels.field}.")
        if self._first:
            raise self._fail(
                at,
                "the first entity's log is the stream itself, which carries no labels; put an entity without "
                "label features first.",
            )
        if delay <= 0:
            raise self._fail(
                (*at, "delay"), "no label is known at its event; write the delay by which it is, delay: 7d."
            )

    def _conditions(self, feature: FeatureSpec, at: tuple[Any, ...]) -> list[tuple[str, str | None]]:
        """For each feature what its name ends in, and which events it is of."""
        if feature.by is None:
            return [("", feature.where)]
        if len(feature.by) != 1:
            raise self._fail(
                (*at, "by"), "it names one field, with a list of its values; write by: {FIELD: [1, 2]}."
            )
        ((field, values),) = feature.by.items()
        self._compiler.known_field(field, self._stream.fields, (*at, "by"))
        if not values or len(set(values)) < len(values):
            raise self._fail((*at, "by", field), "name at least one value, and each once.")
        both = "" if feature.where is None else f"({feature.where}) and "
        found: list[tuple[str, str | None]] = [
            (f"_{value}", f"{both}{field} == {value!r}") for value in values
        ]
        for suffix, _ in found:
            if not _NAME.fullmatch(suffix):
                raise self._fail(
                    (*at, "by", field),
                    f"{suffix[1:]!r} does not go into a name; write a feature with where: for it.",
                )
        return found

    def _filter(self, text: str, at: tuple[Any, ...]) -> int:
        """The number of the filter: those that say the same are one."""
        try:
            found = expressions.parse(text, self._stream.fields)
        except expressions.ExpressionError as error:
            raise self._fail((*at, "where"), _sentence(error)) from None
        self._compiler.compares(self._stream, found.uses)
        self.filters.setdefault(found.text, found)
        if len(self.filters) > MOST_FILTERS:
            raise self._fail((*at, "where"), f"an entity has {MOST_FILTERS} filters at most; share some.")
        return list(self.filters).index(found.text)


def _sentence(error: Exception) -> str:
    text = str(error)
    return text if text.endswith("?") else f"{text}."


def _named(transform: str | FunctionSpec) -> list[str]:
    """What a transform names, whether it exists or not."""
    return sorted(expressions.names(transform)) if isinstance(transform, str) else transform.inputs


def _way(start: str, end: str, given: dict[str, str | FunctionSpec]) -> list[str]:
    """By which transforms one needs another: from start to end, or empty."""
    ways, seen = [[start]], {start}
    for way in ways:
        if way[-1] == end:
            return way
        further = [n for n in _named(given[way[-1]]) if n in given and n not in seen]
        seen.update(further)
        ways += [[*way, n] for n in further]
    return []


def _needed(
    transforms: dict[str, expressions.Expression], vector: list[str]
) -> dict[str, expressions.Expression]:
    """Those that the vector names, and what they need, in their order."""
    wanted = set(vector)
    for name in reversed(transforms):
        if name in wanted:
            wanted.update(transforms[name].uses)
    return {name: t for name, t in transforms.items() if name in wanted}


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one in silence; a definition must not."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="a key is a name, not a list or a mapping", problem_mark=key.start_mark
            )
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def used_fields(
    stream: Stream, entities: tuple[Entity, ...], transforms: dict[str, expressions.Expression],
    vector: Sequence[str],
) -> set[str]:  # fmt: skip
    """The fields whose type decides a feature's value."""
    used = {stream.id, stream.time, *(e.key for e in entities), *(v for e in entities for v in e.values)}
    used |= {name for e in entities for f in e.filters for name in f.uses}
    return used | {name for t in transforms.values() for name in t.uses} | (set(vector) & set(stream.fields))


def _definition(
    stream: Stream, labels: Labels | None, entities: tuple[Entity, ...],
    transforms: dict[str, expressions.Expression], vector: list[str],
) -> str:  # fmt: skip
    """A hash of all that decides a feature's value, and of nothing else: no topic, no decision, no comment."""
    used = used_fields(stream, entities, transforms, vector)
    meaning = {
        "meaning": MEANING,
        "id": stream.id,
        "time": stream.time,
        "block": [f.name for f in stream.columns],  # the order in which records between stages hold them
        "fields": [
            (f.name, f.type, f.divisor, f.unit, f.optional, *([f.values] if f.values else []))
            for n, f in sorted(stream.fields.items())
            if n in used
        ],
        "label": labels.field if labels else None,
        "entities": [
            (
                e.name,
                e.key,
                e.features,
                e.values,
                [astuple(a) for a in e.aggregates],
                [f.text for f in e.filters],
                e.plan.retention,
                e.plan.hop,
            )
            for e in entities
        ],
        "transforms": [(name, t.text) for name, t in sorted(transforms.items())],
        "vector": vector,
    }
    return hashlib.sha256(msgspec.json.encode(meaning)).hexdigest()[:16]
