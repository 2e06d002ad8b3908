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
    ReversalsSpec,
    StreamSpec,
    milliseconds,
)  # fmt: skip
from models.streams import Stream, Streams

# Raised when the meaning of an aggregate or the layout of a profile changes: every definition hash
# changes with it, so no store, vector or model of another meaning is ever read.
MEANING = 3

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,200}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Reversals:
    """A topic that takes events of the first stream out again. known: the field with the time of it.

    looked_up: what a record lacks of its event's time and keys, the ledger has.
    """

    topic: str
    known: str
    looked_up: bool = False


@dataclass(frozen=True)
class Labels:
    """A topic of labels of events of the first stream. known: the field with the time at which each became known.

    looked_up: what a record lacks of its event's time and keys, the ledger has.
    """

    topic: str
    field: str
    known: str
    looked_up: bool = False


@dataclass(frozen=True)
class Entity:
    """One stage of the chain: whose log it folds, and the features that it reads."""

    name: str
    keys: tuple[str, ...]  # the fields that name it, together
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

    @property
    def key(self) -> str:
        """The names of its key fields, for people."""
        return "|".join(self.keys)

    def is_of(self, stream: Stream) -> bool:
        """Whether events of a stream carry its key."""
        return all(key in stream.fields for key in self.keys)


@dataclass(frozen=True)
class Pipeline:
    """instance: the name of its topics, stores and mirror, which is the pipeline's unless run as another.

    fields: of all streams together. routed: whether the first entity's log is written by the router, because
    the first stream's own topic cannot be it. transforms: those that the vector needs, each behind what it names.
    """

    name: str
    instance: str
    streams: tuple[Stream, ...]
    fields: dict[str, Field]
    labels: Labels | None
    reversals: Reversals | None
    routed: bool
    entities: tuple[Entity, ...]
    transforms: dict[str, expressions.Expression]
    vector: tuple[str, ...]
    model: ModelSpec
    lateness: int
    predictions_carry_features: bool
    definition: str  # the definition hash: 16 hex digits
    spec: PipelineSpec  # what it was compiled from, to be compared with another version

    @property
    def stream(self) -> Stream:
        """The first stream: labels and reversals are of its events."""
        return self.streams[0]

    @cached_property
    def columns(self) -> list[Field]:
        """The fields that have a column of the int64 block, in its order."""
        return [f for f in self.fields.values() if f.in_block]

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The topics that others write and workers read: events first, then what is said of them."""
        said = [x.topic for x in self.said if x is not self.labels or any(e.labelled for e in self.entities)]
        return (*(stream.topic for stream in self.streams), *said)

    @property
    def said(self) -> list[Labels | Reversals]:
        """What else is sent: topics that say something of events of the first stream."""
        return [x for x in (self.labels, self.reversals) if x is not None]

    @property
    def predictions(self) -> str:
        return f"{self.instance}.predictions"

    @property
    def shadow(self) -> str:
        """The topic of what challengers say of the same events."""
        return f"{self.instance}.shadow"

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
                parts = {"labels": LabelsSpec, "reversals": ReversalsSpec, "model": ModelSpec}
                owner: Any = parts[str(inner[0])] if inner else to
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
        found = Streams(self, spec.streams)
        streams, fields = found.all, found.fields
        labels = self.labels(spec.labels, fields)
        reversals = self.reversals(spec.reversals, fields)
        lateness = self.duration(spec.lateness, "lateness")
        entities = self.entities(spec, streams, fields, lateness)
        routed = (
            len(streams) > 1 or len(entities[0].keys) > 1 or entities[0].labelled or reversals is not None
        )
        if not routed:
            entities[0] = replace(entities[0], log=streams[0].topic)
        transforms = self.transforms(spec, fields, entities)
        self.vector(spec, fields, transforms, entities)
        transforms = _needed(transforms, spec.vector)
        self.compares((name for t in transforms.values() for name in t.uses), fields)
        self.model(spec)
        streams = [replace(s, fields=self.with_columns(s.fields)) for s in streams]
        fields = self.with_columns(fields)
        pipeline = Pipeline(
            name=spec.name,
            instance=self.instance,
            streams=tuple(streams),
            fields=fields,
            labels=labels,
            reversals=reversals,
            routed=routed,
            entities=tuple(entities),
            transforms=transforms,
            vector=tuple(spec.vector),
            model=spec.model,
            lateness=lateness,
            predictions_carry_features=spec.predictions_carry_features,
            definition="",
            spec=spec,
        )
        self.topics(pipeline)
        return replace(pipeline, definition=_definition(pipeline))

    def file_matches(self, name: str) -> None:
        stem = Path(self.file).stem
        if not self.file.startswith("<") and stem != name:
            raise self.fail(
                ("name",), f"the file is {stem}.yaml; name the pipeline {stem}, or rename the file."
            )

    def compares(self, names: Iterable[str], fields: Mapping[str, Field]) -> None:
        """Give the strings among these names a column of the block."""
        self.hashed |= {n for n in names if n in fields and fields[n].type == "string"}

    def with_columns(self, fields: Mapping[str, Field]) -> dict[str, Field]:
        return {name: replace(f, hashed=name in self.hashed) for name, f in fields.items()}

    def labels(self, given: LabelsSpec | None, fields: Mapping[str, Field]) -> Labels | None:
        if given is None:
            return None
        for role in ("field", "known"):
            self.said(getattr(given, role), fields, ("labels", role))
        if given.field == given.known:
            raise self.fail(
                ("labels", "known"), f"{given.known} is the label itself; name the field with the time."
            )
        return Labels(
            self.topic(given.topic, "labels", ("labels",)), given.field, given.known, given.keys == "ledger"
        )

    def reversals(self, given: ReversalsSpec | None, fields: Mapping[str, Field]) -> Reversals | None:
        if given is None:
            return None
        self.said(given.known, fields, ("reversals", "known"))
        return Reversals(
            self.topic(given.topic, "reversals", ("reversals",)), given.known, given.keys == "ledger"
        )

    def said(self, name: str, fields: Mapping[str, Field], at: tuple[Any, ...]) -> None:
        """A field of a topic that says something of events."""
        if not NAME.fullmatch(name):
            raise self.fail(at, "a field's name has letters, digits and '_'.")
        if name in fields:
            raise self.fail(at, f"{name} is a field of a stream; an event cannot know it.")

    def topic(self, given: str | None, name: str, at: tuple[Any, ...]) -> str:
        if given is not None and not _TOPIC.fullmatch(given):
            raise self.fail((*at, "topic"), f"{given!r} is no topic name: letters, digits, '.', '_' and '-'.")
        return given or f"{self.instance}.{name}"

    def topics(self, pipeline: Pipeline) -> None:
        """No topic may have two uses."""
        logs = [e.log for e in pipeline.entities if e.log != pipeline.stream.topic]
        own = (pipeline.predictions, pipeline.shadow, pipeline.dead_letters, pipeline.control)
        uses = [(topic, "") for topic in own]
        uses += [(log, "") for log in logs]
        uses += [(s.topic, f"streams.{s.name}") for s in pipeline.streams]
        uses += [(x.topic, type(x).__name__.lower()) for x in pipeline.said]
        for topic, what in reversed(uses):
            if what and [t for t, _ in uses].count(topic) > 1:
                raise self.fail(
                    tuple(what.split(".")),
                    f"the topic {topic} has another use; write topic: with a name of its own.",
                )

    def transforms(
        self, spec: PipelineSpec, fields: Mapping[str, Field], entities: Sequence[Entity]
    ) -> dict[str, expressions.Expression]:
        """All transforms in the order of the file: what one names stands before it."""
        given = {name: self.transform(name, data) for name, data in spec.transforms.items()}
        known = {**fields, **{name: Field(name, "float") for e in entities for name in e.features}}
        compiled: dict[str, expressions.Expression] = {}
        for name, one in given.items():
            self.new_name(name, fields, ("transforms", name))
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

    def entities(
        self, spec: PipelineSpec, streams: Sequence[Stream], fields: Mapping[str, Field], lateness: int
    ) -> list[Entity]:
        if not spec.entities:
            raise self.fail(("entities",), "there is none; name at least one, with its key and features.")
        entities: list[Entity] = []
        taken = set(spec.transforms)
        for name, data in spec.entities.items():
            at = ("entities", name)
            if not _TOPIC.fullmatch(name):
                raise self.fail(at, "an entity's name has letters, digits, '.', '_' and '-'.")
            given = self.convert(data, EntitySpec, *at)
            keys = self.keys(given, streams, fields, at)
            one = self.entity(spec, streams, fields, name, given, keys, lateness, taken)
            self.cells(one, entities, streams, at)
            entities.append(one)
        return entities

    def cells(
        self, entity: Entity, before: Sequence[Entity], streams: Sequence[Stream], at: tuple[Any, ...]
    ) -> None:
        """An entity with a hop has no ids: what comes twice must have been dropped before it."""
        if not entity.plan.hop:
            return
        for stream in streams:
            if entity.is_of(stream) and not any(
                e.is_of(stream)
                and not e.plan.hop
                and not any(stream.fields[k].optional for k in e.keys)
                and e.retention >= entity.retention
                for e in before
            ):
                raise self.fail(
                    (*at, "hop"),
                    f"events of {stream.name} that come twice would count twice, for cells have no ids; put an entity "
                    "without a hop before it, whose key all of them have and that looks back as far.",
                )

    def keys(
        self, given: EntitySpec, streams: Sequence[Stream], fields: Mapping[str, Field], at: tuple[Any, ...]
    ) -> tuple[str, ...]:
        keys = (given.key,) if isinstance(given.key, str) else tuple(given.key)
        if not keys or len(set(keys)) < len(keys):
            raise self.fail((*at, "key"), "name at least one field, and each once.")
        for key in keys:
            self.known_field(key, fields, (*at, "key"))
            if fields[key].type not in ("int", "string"):
                raise self.fail((*at, "key"), f"{key} is no int or string, so it cannot be a key.")
        if not any(all(key in stream.fields for key in keys) for stream in streams):
            raise self.fail(
                (*at, "key"), f"no stream has {' and '.join(keys)}; a key is made of the fields of one event."
            )
        return keys

    def entity(
        self, spec: PipelineSpec, streams: Sequence[Stream], fields: Mapping[str, Field], name: str,
        given: EntitySpec, keys: tuple[str, ...], lateness: int, taken: set[str],
    ) -> Entity:  # fmt: skip
        at = ("entities", name)
        hop = 0 if given.hop is None else self.duration(given.hop, *at, "hop")
        self.hop(spec, given, hop, at)
        # what is said of events reaches only who has their key
        heard = spec.labels if all(key in streams[0].fields for key in keys) else None
        features = Features(self, fields, streams, keys, heard, hop)
        for feature_name, data in given.features.items():
            where = (*at, "features", feature_name)
            self.new_name(feature_name, fields, where)
            for output in features.add(feature_name, self.convert(data, FeatureSpec, *where), where):
                if output in taken or output in fields:
                    raise self.fail(
                        where, f"there is another {output}: a field, feature or transform; rename one."
                    )
                taken.add(output)
        plan = aggregates.plan(
            features.aggregates, [fields[v].optional for v in features.values], lateness,
            len(features.filters), hop,
        )  # fmt: skip
        return Entity(
            name, keys, f"{self.instance}.{name}.log", tuple(features.names), tuple(features.values),
            tuple(features.filters.values()), tuple(features.aggregates),
            any(a.kind in aggregates.OF_LABELS for a in features.aggregates), plan,
        )  # fmt: skip

    def hop(self, spec: PipelineSpec, given: EntitySpec, hop: int, at: tuple[Any, ...]) -> None:
        if given.hop is None:
            return
        if hop <= 0:
            raise self.fail((*at, "hop"), "a hop is longer than 0; write 1s, 1m or the like.")
        if spec.reversals is not None:
            raise self.fail(
                (*at, "hop"), "an event cannot be taken out of a cell; drop the hop, or reversals."
            )

    def vector(
        self, spec: PipelineSpec, fields: Mapping[str, Field], transforms: dict[str, Any],
        entities: Sequence[Entity],
    ) -> None:  # fmt: skip
        known = [*fields, *transforms, *(name for e in entities for name in e.features)]
        for i, name in enumerate(spec.vector):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else "name a field, a transform or a feature."
                raise self.fail(("vector", i), f"there is no {name!r}; {hint}")
            if name in fields and fields[name].type in ("string", "timestamp"):
                raise self.fail(("vector", i), f"{name} is a {fields[name].type}, not a number.")
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

    def new_name(self, name: str, fields: Mapping[str, Field], at: tuple[Any, ...]) -> None:
        if not NAME.fullmatch(name):
            raise self.fail(at, "a feature's name has letters, digits and '_'.")
        if name in fields:
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


def used_fields(pipeline: Pipeline) -> set[str]:
    """The fields whose type decides a feature's value."""
    entities, fields = pipeline.entities, pipeline.fields
    used = {name for stream in pipeline.streams for name in (stream.id, stream.time)}
    used |= {name for e in entities for name in (*e.keys, *e.values)}
    used |= {name for e in entities for f in e.filters for name in f.uses}
    return (
        used
        | {name for t in pipeline.transforms.values() for name in t.uses}
        | (set(pipeline.vector) & fields.keys())
    )


def _definition(pipeline: Pipeline) -> str:
    """A hash of all that decides a feature's value, and of nothing else: no topic, no decision, no comment."""
    used, several = used_fields(pipeline), len(pipeline.streams) > 1
    meaning = {
        "meaning": MEANING,
        "streams": [(s.name if several else "", s.id, s.time, s.scored) for s in pipeline.streams],
        # which entities a stream feeds follows from what it carries
        "carried": [
            [(n, f.optional) for n, f in sorted(s.fields.items()) if n in used]
            for s in (pipeline.streams if several else ())
        ],
        "block": [f.name for f in pipeline.columns],  # the order in which records between stages hold them
        "fields": [
            (f.name, f.type, f.divisor, f.unit, f.optional, *([f.values] if f.values else []))
            for n, f in sorted(pipeline.fields.items())
            if n in used
        ],
        "label": pipeline.labels.field if pipeline.labels else None,
        "reversals": pipeline.reversals is not None,
        "routed": pipeline.routed,
        "entities": [
            (
                e.name,
                e.keys,
                e.features,
                e.values,
                [astuple(a) for a in e.aggregates],
                [f.text for f in e.filters],
                e.plan.retention,
                e.plan.hop,
            )
            for e in pipeline.entities
        ],
        "transforms": [(name, t.text) for name, t in sorted(pipeline.transforms.items())],
        "vector": pipeline.vector,
    }
    return hashlib.sha256(msgspec.json.encode(meaning)).hexdigest()[:16]
