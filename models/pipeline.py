"""Pipeline files: what a user writes, checked, and compiled once to what the fold walks.

`load` reads `configs/pipelines/NAME.yaml` and returns a `Pipeline`, or raises `PipelineError` with
file, line, field and remedy. Nothing behind this module looks at YAML again.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from models import aggregates, expressions, own_functions, windows
from models.errors import HeadraceError
from models.features import Features, sentence
from models.fields import Field
from models.specs import (
    LONGEST_MS,
    NAME,
    EntitySpec,
    FeatureSpec,
    FieldSpec,
    FunctionSpec,
    LabelsSpec,
    ModelSpec,
    PipelineError,
    PipelineSpec,
    StreamSpec,
    milliseconds,
)  # fmt: skip

# Raised when the meaning of an aggregate or the layout of a profile changes: every definition hash
# changes with it, so no store, vector or model of another meaning is ever read.
MEANING = 2

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,200}")
_MOST_VALUES = 1000  # of a category: more of them are a key or an id
_T = TypeVar("_T")


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
    models.specs.PipelineError: x.yaml:1: $: Object missing required field `streams`; ...
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
        self.compares((name for t in transforms.values() for name in t.uses), stream.fields)
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
            if not NAME.fullmatch(field_name):
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

    def compares(self, names: Iterable[str], fields: Mapping[str, Field]) -> None:
        """Give the strings among these names a column of the block."""
        self.hashed |= {n for n in names if n in fields and fields[n].type == "string"}

    def labels(self, spec: PipelineSpec, stream: Stream) -> Labels | None:
        if spec.labels is None:
            return None
        for role in ("field", "known"):
            name = getattr(spec.labels, role)
            if not NAME.fullmatch(name):
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
                raise self.fail(("transforms", name), sentence(error)) from None
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
        features = Features(self, stream.fields, spec.labels, first, hop)
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

    def new_name(self, name: str, stream: Stream, at: tuple[Any, ...]) -> None:
        if not NAME.fullmatch(name):
            raise self.fail(at, "a feature's name has letters, digits and '_'.")
        if name in stream.fields:
            raise self.fail(at, "a field of the stream has this name; rename the feature.")

    def known_field(self, name: str, fields: Mapping[str, Field], at: tuple[Any, ...]) -> None:
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
