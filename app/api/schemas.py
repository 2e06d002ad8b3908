"""What requests and answers of the API hold. `/openapi.json` is made of these, and requests are checked by them.

Times are RFC 3339 in UTC. A time in a request may also be milliseconds since 1970.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

MOST_KEYS = 1000  # entities of one request, whatever the setting
LONGEST_ID = 1000  # characters
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Id = Annotated[str, Meta(min_length=1, max_length=LONGEST_ID)]
Short = Annotated[str, Meta(max_length=64)]
Long = Annotated[str, Meta(max_length=2000)]
Score = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Source = Literal["worker", "mirror"]
Degraded = Literal["retention-cut", "other-definition", "too-far-back"]

_AT = (
    "The time that values are read at: `now` (the default), `newest` (that of the entity's newest event), RFC 3339, or "
    "milliseconds since 1970."
)


class FeaturesQuery(Struct, forbid_unknown_fields=True):
    at: Annotated[str, Meta(description=_AT, max_length=64)] = "now"
    features: Annotated[Long | None, Meta(description="Names with commas between; all by default.")] = None


class Wanted(Struct, forbid_unknown_fields=True):
    """One entity by its name and id."""

    entity: Name
    id: Id


class FeaturesRequest(Struct, forbid_unknown_fields=True):
    """Many entities at once, of any kinds. HEADRACE_API_BATCH says how many at most."""

    entities: Annotated[list[Wanted], Meta(min_length=1, max_length=MOST_KEYS)]
    at: Annotated[str, Meta(description=_AT, max_length=64)] = "now"
    features: Annotated[list[Name] | None, Meta(description="Names; all by default.")] = None


class Features(Struct):
    """An entity's features at a time.

    as_of: the time at which they were read; newest: event time of the newest event in them; age_s: since then, by the
    server's clock; offset: of the entity's last record in its log. degraded, with its reason: they are not what the
    whole log says. source: the profile in this worker, or its copy in the mirror.
    """

    pipeline: str
    entity: str
    id: str
    as_of: dt.datetime
    newest: dt.datetime
    age_s: float
    offset: int
    definition: str
    degraded: bool
    reason: Degraded | None
    source: Source
    features: dict[str, float | None]


class ManyFeatures(Struct):
    """In the order of the request; null where there are no features of an entity."""

    results: list[Features | None]


class Label(Struct):
    """What became known of an event: 1, 0, or null for unknown again."""

    value: int | None
    known_at: dt.datetime | None
    sent_at: dt.datetime | None


class Origin(Struct):
    """The place in the last entity's log from which a prediction can be computed again."""

    log: str
    partition: int
    offset: int


class Prediction(Struct):
    """A prediction. score and what goes with it: null where there was no model. features: its vector by name, null
    where the topic's predictions have none. reversed: the event was taken back. label: null while none is known, and
    in live predictions."""

    pipeline: str
    id: int | str
    stream: str
    event_time: dt.datetime
    scored_at: dt.datetime
    score: float | None
    decision: str | None
    model: str | None
    version: str | None
    definition: str
    late: bool
    degraded: bool
    origin: Origin
    keys: dict[str, str | None]
    features: dict[str, float | None] | None = None
    label: Label | None = None
    reversed: bool = False


class EventQuery(Struct, forbid_unknown_fields=True):
    stream: Annotated[
        str | None, Meta(description="Of which stream the event is; the first one by default.")
    ] = None


class EventPredictions(Struct):
    """Predictions of one event, the newest first: another definition or model may have predicted it again."""

    predictions: list[Prediction]


class PageQuery(Struct, forbid_unknown_fields=True, rename={"start": "from", "end": "to"}):
    entity: Annotated[Name, Meta(description="An entity of the pipeline.")]
    id: Annotated[Id, Meta(description="Its key.")]
    start: Annotated[Short | None, Meta(description="Of events from this time on.")] = None
    end: Annotated[Short | None, Meta(description="Of events before this time.")] = None
    min_score: Annotated[Score | None, Meta(description="The least score.")] = None
    limit: Annotated[int, Meta(ge=1, le=1000, description="Predictions of a page.")] = 100
    cursor: Annotated[
        Long | None, Meta(description="`next` of the page before; leave it out for the first.")
    ] = None


class Page(Struct):
    """Predictions of the newest events first. next: the cursor of the next page; null behind the last."""

    predictions: list[Prediction]
    next: str | None


class PublishQuery(Struct, forbid_unknown_fields=True):
    wait: Annotated[
        Literal["ack", "prediction"],
        Meta(description="What to wait for: that Kafka has it, or the prediction, too."),
    ] = "ack"
    wait_s: Annotated[
        float, Meta(gt=0, le=30, description="The longest wait for predictions, in seconds.")
    ] = 2.0


class Placed(Struct):
    """Where Kafka keeps an event."""

    partition: int
    offset: int


class Published(Struct):
    """In the order of the request. predictions: with `wait=prediction`, null for each that did not come in time."""

    topic: str
    places: list[Placed]
    predictions: list[Prediction | None] | None = None


class StreamQuery(Struct, forbid_unknown_fields=True):
    entity: Annotated[str | None, Meta(description="With `id`: only predictions about it.")] = None
    id: Annotated[str | None, Meta(description="The entity's key.")] = None
    min_score: Annotated[Score | None, Meta(description="The least score.")] = None
    decision: Annotated[str | None, Meta(description="Only this decision.")] = None
    for_s: Annotated[
        Seconds | None,
        Meta(description="End after so many seconds; without it, when the client goes."),
    ] = None


class ExplainQuery(Struct, forbid_unknown_fields=True):
    at: Annotated[
        Short | None,
        Meta(
            description="Explain as of this time: RFC 3339 or milliseconds since 1970; else as of the newest event."
        ),
    ] = None
    event: Annotated[Long | None, Meta(description="Explain as of this event, by its id.")] = None


class StreamInfo(Struct):
    """A stream: its topic, and its fields with their types."""

    name: str
    topic: str
    id: str
    time: str
    scored: bool
    fields: dict[str, str]


class EntityInfo(Struct):
    """An entity: the fields that name it, its log, its features, and how far back they look."""

    name: str
    keys: list[str]
    log: str
    retention_s: float
    features: list[str]


class PipelineInfo(Struct):
    """A pipeline as it runs. vector: the features of the model in their order."""

    name: str
    instance: str
    definition: str
    streams: list[StreamInfo]
    labels: str | None
    reversals: str | None
    entities: list[EntityInfo]
    vector: list[str]
    predictions: str


class Pipelines(Struct):
    pipelines: list[PipelineInfo]


class ModelInfo(Struct):
    """A version. fits: its definition is that of the running pipeline."""

    version: str
    registered: dt.datetime
    definition: str
    fits: bool
    archived: bool
    aliases: list[str]
    metrics: dict[str, float]


class Models(Struct):
    """The versions of the pipeline's model, the newest first, and which of them each alias names."""

    pipeline: str
    aliases: dict[str, str]
    versions: list[ModelInfo]


class Nothing(Struct, forbid_unknown_fields=True):
    """A query that asks for nothing."""


def instant(ms: int) -> dt.datetime:
    """Milliseconds since 1970 as a time of answers.

    >>> instant(1_378_000_000_123).isoformat()
    '2013-09-01T01:46:40.123000+00:00'
    """
    return _EPOCH + ms * _MS


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MS = dt.timedelta(milliseconds=1)
LATEST_MS = 4_102_444_800_000  # 2100-01-01, as in events


def parsed_time(text: str) -> int | None:
    """Milliseconds of RFC 3339 or of milliseconds; None for what is neither, or no time between 1970 and 2100.

    >>> parsed_time("2013-09-01T00:00:00Z") == parsed_time("1377993600000") == parsed_time("2013-09-01")
    True
    """
    try:
        if text.isascii() and text.isdigit():
            time = int(text)
        else:
            # in a query + is a space
            found = dt.datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
            if found.tzinfo is None:
                found = found.replace(tzinfo=dt.UTC)
            time = (found - _EPOCH) // _MS
    except (ValueError, OverflowError):
        return None
    return time if 0 <= time < LATEST_MS else None


encode = msgspec.json.Encoder().encode


def decoded(body: bytes, to: Any) -> Any:
    """Raises msgspec.DecodeError, or ValidationError, which names the field."""
    return msgspec.json.decode(body, type=to)
