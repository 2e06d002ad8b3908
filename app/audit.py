"""What came of a rough run, against what its logs say: nothing lost, doubled, different or unaccounted for.

The judgement is by the same undisturbed fold as the demo's (`app.verify`); here each finding has a name
and a place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from app import kafka, verify
from models import dead_letters
from models.pipeline import Pipeline
from models.predictions import Prediction, decode, identities, identity
from models.windows import Floats
from tables.mirror import MirrorReader

TOGETHER = 500  # ids that the mirror is asked for at once
NAMED = 10  # findings of a sort that are told, of perhaps thousands


@dataclass(frozen=True)
class Served:
    """A prediction and where it stands in its topic."""

    partition: int
    offset: int
    prediction: Prediction


@dataclass
class Findings:
    """counts: how many there are of each sort; named: the first of each, with their places."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[dict[str, Any]] = field(default_factory=list)

    def add(self, sort: str, **place: Any) -> None:
        self.counts[sort] += 1
        if self.counts[sort] <= NAMED:
            self.named.append({"finding": sort, **place})


async def read_served(pipeline: Pipeline, address: str) -> list[Served]:
    """All predictions, by partition and offset."""
    found = [
        Served(r.partition, r.offset, decode(r.value))
        async for r in kafka.read_between(address, pipeline.predictions)
    ]
    return sorted(found, key=lambda s: (s.partition, s.offset))


def judge(
    pipeline: Pipeline, expected: verify.Expected, served: list[Served], sent: set[int],
    score: Callable[[Floats], Any], findings: Findings,
) -> None:  # fmt: skip
    """Compare predictions with the fold of the logs, and with the ids of the events that were sent.

    served: by partition and offset; score: the model's scores of vectors. Adds `lost` and `doubled` as a
    consumer sees it that drops by the highest origin offset, `doubled_plain` as one that drops nothing,
    and `differing` for each prediction whose features, score or origin are not those of the fold.
    """
    _missing_and_doubled(pipeline, expected, served, sent, findings)
    _differing(pipeline, expected, served, score, findings)


def _missing_and_doubled(
    pipeline: Pipeline, expected: verify.Expected, served: list[Served], sent: set[int], findings: Findings
) -> None:
    plain: dict[int, Served] = {}
    kept: dict[int, Served] = {}
    highest: dict[int, int] = {}
    for one in served:
        id_, origin = identity(pipeline, one.prediction), one.prediction.origin
        if id_ in plain:
            findings.add("doubled_plain", **_place(one), before=_place(plain[id_]))
        plain.setdefault(id_, one)
        if origin.offset <= highest.get(origin.partition, -1):
            continue
        highest[origin.partition] = origin.offset
        if id_ in kept:
            findings.add("doubled", **_place(one), before=_place(kept[id_]))
        kept.setdefault(id_, one)
    at = {int(id_): row for row, id_ in enumerate(expected.ids.tolist())}
    for id_ in sorted((sent | at.keys()) - kept.keys()):
        logs = expected.places[at[id_]].tolist() if id_ in at else None
        seen = _place(plain[id_]) if id_ in plain else None  # a prediction that the consumer's rule drops
        findings.add("lost", id=id_, logs=logs, dropped=seen)


def _differing(
    pipeline: Pipeline, expected: verify.Expected, served: list[Served], score: Callable[[Floats], Any],
    findings: Findings,
) -> None:  # fmt: skip
    if not served:
        return
    predictions = [s.prediction for s in served]
    wrong = verify.differing(pipeline, expected, predictions)
    rows, known = expected.rows(identities(pipeline, predictions))
    wrong[known] |= [
        (p.origin.partition, p.origin.offset) != tuple(place)
        for p, place in zip(
            (p for p, is_known in zip(predictions, known, strict=True) if is_known),
            expected.places[rows[known], -1].tolist(), strict=True,
        )
    ]  # fmt: skip
    vectors = expected.vectors[rows[known]]
    scores = np.asarray(score(vectors), np.float64) if len(vectors) else np.empty(0)
    given = np.array([p.score for p in predictions], np.float64)[known]  # NaN where there is none
    by_model = np.array([p.version is not None for p in predictions], np.bool_)[known]
    wrong[known] |= by_model & ~((scores == given) | (np.isnan(scores) & np.isnan(given)))
    for i in np.flatnonzero(wrong).tolist():
        findings.add(
            "differing", **_place(served[i]), **_difference(pipeline, expected, served[i].prediction)
        )


def _difference(pipeline: Pipeline, expected: verify.Expected, prediction: Prediction) -> dict[str, Any]:
    """What is different, for whoever looks for the cause."""
    rows, known = expected.rows(identities(pipeline, [prediction]))
    if not known[0]:
        return {"why": "no such event in the logs"}
    vector, place = expected.vectors[rows[0]], expected.places[rows[0]].tolist()
    served = verify.vectors(pipeline, [prediction])[0]
    features = {
        name: {"served": _plain(a), "folded": _plain(b)}
        for name, a, b, same in zip(pipeline.vector, served, vector, verify.same(served, vector), strict=True)
        if not same
    }
    return {"logs": place, "features": features}


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _place(served: Served) -> dict[str, Any]:
    origin = served.prediction.origin
    return {
        "id": served.prediction.id, "partition": served.partition, "offset": served.offset,
        "origin": [origin.partition, origin.offset],
    }  # fmt: skip


async def dead_letters_of(
    pipeline: Pipeline, address: str, malformed: Counter[tuple[str, bytes]], findings: Findings
) -> int:
    """How many records have a dead letter. Adds `unaccounted` for bad records without one, and for others' letters."""
    topics = {topic for topic, _ in malformed}
    bad: set[tuple[str, int, int]] = set()
    there: Counter[tuple[str, bytes]] = Counter()
    for topic in sorted(topics):
        async for r in kafka.read_between(address, topic):
            if (topic, r.value) in malformed:
                bad.add((topic, r.partition, r.offset))
                there[topic, r.value] += 1
    for topic, value in malformed - there:
        findings.add(
            "unaccounted", why="was sent and is not in its topic", topic=topic, value=repr(value[:100])
        )
    found = {
        (letter.topic, letter.partition, letter.offset)
        for letter in [
            dead_letters.decode(r.value) async for r in kafka.read_between(address, pipeline.dead_letters)
        ]
    }
    _unaccounted(bad - found, "has no dead letter", findings)
    _unaccounted(found - bad, "has a dead letter and is good", findings)
    return len(found)


def _unaccounted(records: Iterable[tuple[str, int, int]], why: str, findings: Findings) -> None:
    for topic, partition, offset in sorted(records):
        findings.add("unaccounted", why=why, topic=topic, partition=partition, offset=offset)


async def mirrored(mirror: MirrorReader, expected: verify.Expected, findings: Findings) -> None:
    """Compare the mirror with the profiles as of their newest event: `mirror_missing`, `mirror_differing`.

    Values are compared, and what the compact profiles say. One that no window reaches any more may be gone.
    """
    for latest in expected.latest:
        names, entity = list(latest.entity.features), latest.entity
        clock = int(latest.times.max(initial=0))
        for at in range(0, len(latest.keys), TOGETHER):
            here = slice(at, at + TOGETHER)
            ids = [key.decode() for key in latest.keys[here]]
            found = await mirror.read(entity, ids)
            for id_, time, row, held in zip(
                ids, latest.times[here].tolist(), latest.features[here], found, strict=True
            ):
                place = {"entity": entity.name, "key": id_}
                if held is None:
                    if time + entity.retention > clock:
                        findings.add("mirror_missing", **place)
                    continue
                values = np.array([held.features[name] for name in names], np.float64)
                right = verify.same(values, row)
                if held.time == time and right.all():
                    values = np.array(list(held.at(time).values()), np.float64)
                    right = verify.same(values, row)
                if held.time != time or not right.all():
                    wrong = [n for n, same in zip(names, right, strict=True) if not same]
                    findings.add(
                        "mirror_differing", **place, time={"held": held.time, "folded": time}, features=wrong
                    )
