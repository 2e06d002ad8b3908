"""What becomes of a running instance when its pipeline file changes: `compare` two versions of it.

Parsed structures are compared key by key, so a key that a file gains is compared without being named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from models.fields import Field
from models.pipeline import Labels, Pipeline, Reversals, used_fields
from models.specs import EntitySpec, FeatureSpec, FieldSpec, StreamSpec, milliseconds
from models.streams import Stream

Level = Literal["safe", "rebuild", "breaks"]

_REBUILD = "stores and mirror are folded again from the log: compute features and train before workers start"
_NEW_INSTANCE = "give it a topic of its own in a new instance (--as), and move producers there"
# Keys of a file that decide no feature's value: what a change of them does.
_HARMLESS = {
    "model": "it counts from the next `headrace train` on",
    "predictions_carry_features": "consumers that read features of predictions find them or not",
}


@dataclass(frozen=True)
class Change:
    """One difference. what: where in the file; change: from what to what; effect: what happens, and the remedy.

    level: `safe`; `rebuild`, the definition hash changes, so stores and mirror are folded again and models
    are trained anew; `breaks`, what running producers send is refused, misread or not read.
    """

    what: str
    change: str
    level: Level
    effect: str


def compare(before: Pipeline, after: Pipeline) -> list[Change]:
    """What differs between two versions of a pipeline, in the order of its file. Empty where nothing does."""
    changes = [
        *_names(before, after),
        *_streams(before, after),
        *_labels(before, after),
        *_reversals(before, after),
        *_entities(before, after),
        *_others(before, after),
    ]
    if before.definition != after.definition and all(change.level == "safe" for change in changes):
        order = "order of numeric fields, entities or features"
        changes.append(Change("definition", order, "rebuild", _REBUILD))
    return changes


def _names(before: Pipeline, after: Pipeline) -> Iterator[Change]:
    if before.instance != after.instance:
        effect = (
            f"its topics, stores, mirror and models are others: run `headrace topics create` and train, "
            f"and consumers read {after.predictions}"
        )
        yield Change("name", f"{before.instance} > {after.instance}", "rebuild", effect)
    old_topics, new_topics = _topics(before), _topics(after)
    for what, old in old_topics.items():
        new = new_topics.get(what, old)
        if old != new:
            effect = (
                f"what is sent to {old} is not read any more, and stores hold positions of it: run a new "
                f"instance (--as), and move producers to {new}"
            )
            yield Change(f"{what}.topic", f"{old} > {new}", "breaks", effect)


def _topics(pipeline: Pipeline) -> dict[str, str]:
    """What others write, by where it stands in the file; one stream may have any name."""
    several = len(pipeline.streams) > 1
    topics = {f"streams.{s.name}" if several else "streams": s.topic for s in pipeline.streams}
    return topics | {type(said).__name__.lower(): said.topic for said in pipeline.said}


# --- the streams' events and the labels ----------------------------------------------------------


def _streams(before: Pipeline, after: Pipeline) -> Iterator[Change]:
    """One stream may have another name; of several, each is known by its own."""
    if len(before.streams) == len(after.streams) == 1:
        yield from _stream("streams", before, before.stream, after, after.stream)
        return
    old, new = ({stream.name: stream for stream in p.streams} for p in (before, after))
    for name in {**old, **new}:
        if name in old and name in new:
            yield from _stream(f"streams.{name}", before, old[name], after, new[name])
        else:
            came = (
                "run `headrace topics create`; "
                if name in new
                else "what is sent to it is not read any more; "
            )
            yield Change(f"streams.{name}", _came(old.get(name)), "rebuild", came + _REBUILD)
    if before.stream.name != after.stream.name and {*old} == {*new}:
        change = f"first: {before.stream.name} > {after.stream.name}"
        yield Change("streams", change, "rebuild", f"labels and reversals are of the first; {_REBUILD}")


def _stream(at: str, before: Pipeline, was: Stream, after: Pipeline, is_: Stream) -> Iterator[Change]:
    old, new = (msgspec.convert(p.spec.streams[s.name], StreamSpec) for p, s in ((before, was), (after, is_)))
    change = _differences(_plain(old, "fields", "topic"), _plain(new, "fields", "topic"))
    if change:
        yield Change(at, change, "rebuild", _REBUILD)
    used = used_fields(before) | used_fields(after)
    for name in {**was.fields, **is_.fields}:
        a, b = was.fields.get(name), is_.fields.get(name)
        if a == b:
            continue
        change = _differences(_field(old, name), _field(new, name)) if a and b else _came(a)
        level, effect = _refused(name, a, b)
        # Numeric fields, used or not, are columns of the records between stages.
        column = not (a and b) and any(f.type != "string" for f in (a, b) if f)
        if name in used or column:
            level, effect = "breaks" if level == "breaks" else "rebuild", f"{effect}; {_REBUILD}"
        yield Change(f"{at}.fields.{name}", change, level, effect)


def _refused(name: str, before: Field | None, after: Field | None) -> tuple[Level, str]:
    """What becomes of events as producers send them now."""
    if after is None:
        return "safe", "events may go on carrying it: fields that a file does not name are ignored"
    missing = "go to the dead letters (missing-field): let producers send it first, or declare it optional"
    if before is None:
        if after.optional:
            return "safe", "events without it are taken as they are"
        return "breaks", f"events without {name} {missing}"
    if not _fits(before, after):
        timed = before.type == after.type == "timestamp" and "iso" not in (before.unit, after.unit)
        said = "is read in another unit" if timed else "goes to the dead letters where it does not fit"
        effect = f"what is sent as {name} now {said}: add a field of another name, or {_NEW_INSTANCE}"
        return "breaks", effect
    if before.optional and not after.optional:
        return "breaks", f"events without {name} {missing.replace('send it first', 'send it always')}"
    return "safe", "events as they are sent now are taken"


def _fits(before: Field, after: Field) -> bool:
    """Whether each value that was sent for the one is a value of the other, and the same."""
    if before.type == after.type:
        same_unit = before.unit == after.unit or before.type != "timestamp"
        return same_unit and before.divisor <= after.divisor
    return (before.type, after.type) in {("int", "decimal"), ("int", "float"), ("decimal", "float")}


def _labels(before: Pipeline, after: Pipeline) -> Iterator[Change]:
    if before.labels is None and after.labels is None:
        return
    if before.labels is None or after.labels is None:
        came = "run `headrace topics create`; " if after.labels else "labels that are sent are not read; "
        yield Change("labels", _came(before.labels), "rebuild", came + _REBUILD)
        return
    if before.labels.field != after.labels.field:
        change = f"{before.labels.field} > {after.labels.field}"
        yield Change("labels.field", change, "rebuild", _REBUILD)
    lacking = sorted(_needs_of_labels(after) - _needs_of_labels(before))
    if lacking:
        names = ", ".join(lacking)
        effect = (
            f"labels without {names} go to the dead letters (missing-field), or do not reach their entity where a "
            "key is optional: let their producers send it first"
        )
        yield Change("labels", f"need {names}", "breaks", effect)
    yield from _looked_up("labels", before.labels, after.labels)


def _reversals(before: Pipeline, after: Pipeline) -> Iterator[Change]:
    old, new = before.reversals, after.reversals
    if (old is None) != (new is None):
        came = "run `headrace topics create`; " if new else "reversals that are sent are not read; "
        yield Change("reversals", _came(old), "rebuild", came + _REBUILD)
    elif old is not None and new is not None and old.known != new.known:
        effect = f"reversals without {new.known} go to the dead letters (missing-field)"
        yield Change("reversals.known", f"{old.known} > {new.known}", "breaks", effect)
    yield from _looked_up("reversals", old, new)


def _looked_up(name: str, old: Labels | Reversals | None, new: Labels | Reversals | None) -> Iterator[Change]:
    if old is None or new is None or old.looked_up == new.looked_up:
        return
    if new.looked_up:
        effect = (
            "they need not carry their event's time and keys; workers ask the ledger: `headrace ledger run`"
        )
        yield Change(f"{name}.keys", "carried > ledger", "safe", effect)
    else:
        effect = "those without their event's time and keys go to the dead letters (missing-field)"
        yield Change(f"{name}.keys", "ledger > carried", "breaks", effect)


def _needs_of_labels(pipeline: Pipeline) -> set[str]:
    """The fields that a label must carry to be of use."""
    stream, labels = pipeline.stream, pipeline.labels
    assert labels is not None
    keys = {key for e in pipeline.entities if e.labelled for key in e.keys}
    found = set() if labels.looked_up else keys | {stream.time}
    return found | {stream.id, labels.field, labels.known}


# --- entities and the rest -----------------------------------------------------------------------


def _entities(before: Pipeline, after: Pipeline) -> Iterator[Change]:
    first, now = before.entities[0], after.entities[0]
    if after.routed and not before.routed:
        effect = f"what is sent goes into {now.log} first: run `headrace topics create`; {_REBUILD}"
        yield Change("entities", f"{now.name} gets a log of its own", "rebuild", effect)
    if before.routed and not after.routed:
        effect = (
            f"events are not routed any more, so producers are to key them by {now.key}; others go to the dead "
            f"letters (wrong-key): {_NEW_INSTANCE}, keyed by {now.key}"
        )
        yield Change("entities", f"{now.name} has {now.log} as its log", "breaks", effect)
    elif first.keys != now.keys and not after.routed:
        effect = (
            f"producers key events by {first.key}, so those whose {now.key} belongs in another partition go to "
            f"the dead letters (wrong-key): {_NEW_INSTANCE}, keyed by {now.key}"
        )
        yield Change("entities", f"first key: {first.key} > {now.key}", "breaks", effect)
    scored, to_score = before.entities[-1].log, after.entities[-1].log
    if before.instance == after.instance and scored != to_score:
        effect = (
            f"predictions are numbered by the log that is scored, and those of {scored} would hide the new ones: "
            "run a new instance (--as)"
        )
        yield Change("entities", f"scored: {scored} > {to_score}", "breaks", effect)
    old, new = (
        {name: msgspec.convert(data, EntitySpec) for name, data in p.spec.entities.items()}
        for p in (before, after)
    )
    for name in {**old, **new}:
        at = f"entities.{name}"
        if name not in old or name not in new:
            came = "run `headrace topics create`; " if name in new and name != now.name else ""
            yield Change(at, _came(old.get(name)), "rebuild", came + _REBUILD)
            continue
        change = _differences(_plain(old[name], "features"), _plain(new[name], "features"))
        if change:
            yield Change(at, change, "rebuild", _REBUILD)
        yield from _by_name(f"{at}.features", _features(old[name]), _features(new[name]))


def _others(before: Pipeline, after: Pipeline) -> Iterator[Change]:
    texts = [{name: {"is": t.text} for name, t in p.transforms.items()} for p in (before, after)]
    yield from _by_name("transforms", *texts)
    told = ("name", "streams", "labels", "reversals", "entities", "transforms")
    old, new = _plain(before.spec, *told), _plain(after.spec, *told)
    for key in old:
        if _meant(old[key]) == _meant(new[key]):
            continue
        decides = key not in _HARMLESS and before.definition != after.definition
        effect = _HARMLESS.get(key, _REBUILD if decides else "no feature's value changes")
        yield Change(key, _change(old[key], new[key]), "rebuild" if decides else "safe", effect)


def _by_name(at: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in {**old, **new}:
        if name not in old or name not in new:
            yield Change(f"{at}.{name}", _came(old.get(name)), "rebuild", _REBUILD)
        elif change := _differences(old[name], new[name]):
            yield Change(f"{at}.{name}", change, "rebuild", _REBUILD)


# --- structures ------------------------------------------------------------------------------------


def _features(entity: EntitySpec) -> dict[str, dict[str, Any]]:
    return {name: _plain(msgspec.convert(data, FeatureSpec)) for name, data in entity.features.items()}


def _field(stream: StreamSpec, name: str) -> dict[str, Any]:
    data = stream.fields[name]
    return _plain(msgspec.convert({"type": data} if isinstance(data, str) else data, FieldSpec))


def _plain(spec: msgspec.Struct, *without: str) -> dict[str, Any]:
    """A part of a file as plain data, with its defaults."""
    data: dict[str, Any] = msgspec.to_builtins(spec)
    return {key: value for key, value in data.items() if key not in without}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys with other values, as `window: 1h > 2h`; empty where none is. Durations are equal by length."""
    return ", ".join(
        f"{key}: {_change(old.get(key), new.get(key))}"
        for key in {**old, **new}
        if _meant(old.get(key)) != _meant(new.get(key))
    )


def _change(old: Any, new: Any) -> str:
    """From what to what; of a mapping its differences, of a list what came and went."""
    if isinstance(old, dict) and isinstance(new, dict):
        return _differences(old, new)
    if isinstance(old, list) and isinstance(new, list):
        gone = [f"-{_said(x)}" for x in old if x not in new]
        return ", ".join(gone + [f"+{_said(x)}" for x in new if x not in old]) or "another order"
    return f"{_said(old)} > {_said(new)}"


def _meant(value: Any) -> Any:
    duration = milliseconds(value) if isinstance(value, str) else None
    return value if duration is None else duration


def _said(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _came(before: object | None) -> str:
    return "added" if before is None else "removed"
