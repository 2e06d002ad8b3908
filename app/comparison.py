"""`headrace models compare`: predictions, challengers' records and labels of an instance, joined by event."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import click
import msgspec

from app import kafka
from app.errors import RegistryError
from app.model_life import ModelLife
from app.terminal import table
from models import predictions, shadows
from models.comparison import Comparison, Decide, Observed, compare
from models.errors import HeadraceError
from models.events import LabelDecoder
from models.pipeline import Pipeline
from models.quality import TOP
from models.scoring import Decisions, ModelError
from models.windows import NEGATIVE, POSITIVE

LABELS = {NEGATIVE: 0, POSITIVE: 1}


class NothingToCompare(HeadraceError):
    """There are no scores to compare."""

    exit_code = 2


async def compared(
    life: ModelLife, address: str, named: tuple[str, ...], since: float, until: float
) -> Comparison:
    """named: two versions or aliases, or none for all. since, until: event times, ms; the second is left out.

    Raises NothingToCompare.
    """
    pipeline = life.pipeline
    observed = await read(pipeline, address, since, until)
    if not observed.scores:
        raise NothingToCompare(
            f"{pipeline.predictions} holds no scores of these days; let `headrace worker` score some events."
        )
    two = _two(life, observed, named)
    if two is not None and not observed.common(two):
        raise NothingToCompare(
            f"The versions {two[0]} and {two[1]} have scored no event in common; promote one of them as "
            "challenger-NAME while the other scores."
        )
    return compare(observed, two, _decisions(life, two or tuple(observed.scores)))


def _two(life: ModelLife, observed: Observed, named: tuple[str, ...]) -> tuple[str, str] | None:
    """The versions that are named so, or have the alias."""
    if not named:
        return None
    if not set(named) <= observed.scores.keys():
        aliases = life.aliases()
        named = tuple(aliases.get(name, name) for name in named)
    for name in named:
        if name not in observed.scores:
            raise NothingToCompare(
                f"{name} has scored no event of these days; those that have are {', '.join(observed.scores)}."
            )
    if named[0] == named[1]:
        raise NothingToCompare(f"Both are the version {named[0]}; name two.")
    return named[0], named[1]


def _decisions(life: ModelLife, versions: tuple[str, ...]) -> Mapping[str, Decide]:
    """Of those versions whose cards can be had."""
    found = {}
    for version in versions:
        with contextlib.suppress(ModelError, RegistryError):
            life.registry.fetch(life.pipeline.name, version)
            _, card = life.registry.folder.read(life.pipeline.name, version)
            found[version] = Decisions(card).of
    return found


async def read(pipeline: Pipeline, address: str, since: float, until: float) -> Observed:
    """What the topics hold now, of events of this time. A prediction comes before its event's shadow."""
    observed, identity = Observed(), predictions.identity
    topics = [pipeline.predictions, pipeline.shadow, *([pipeline.labels.topic] if pipeline.labels else [])]
    there = await kafka.partitions_of(address, topics)
    async for made in _decoded(address, there, pipeline.predictions, predictions.decode):
        if since <= made.event_time < until and made.version is not None:
            observed.add(identity(pipeline, made), made.event_time, made.version, made.score)
    async for shadow in _decoded(address, there, pipeline.shadow, shadows.decode):
        if since <= shadow.event_time < until:
            for scored in (shadow.champion, *shadow.challengers.values()):
                observed.add(identity(pipeline, shadow), shadow.event_time, scored.version, scored.score)
    if pipeline.labels is not None and there[pipeline.labels.topic]:
        records = [r async for r in kafka.read_between(address, pipeline.labels.topic)]
        observed.labels = last_labels(pipeline, records)
    return observed


async def _decoded(address: str, there: Mapping[str, int], topic: str, decode: Any) -> AsyncIterator[Any]:
    """The records of a topic that are what they should be."""
    if there[topic]:
        async for record in kafka.read_between(address, topic):
            with contextlib.suppress(msgspec.MsgspecError):  # a topic may be written by hand
                yield decode(record.value or b"")


def last_labels(pipeline: Pipeline, records: list[Any]) -> dict[int, int]:
    """The last label that was sent of each event, by its 64-bit id; none where that says that it is not known.

    records: of the labels' topic. Those of one partition are in its order, as sent.
    """
    assert pipeline.labels is not None
    ordered = sorted(records, key=lambda r: (r.timestamp, r.partition, r.offset))
    batch, _, _ = LabelDecoder(pipeline, pipeline.labels).decode([r.value or b"" for r in ordered])
    last = dict(zip(batch.ids.tolist(), batch.states.tolist(), strict=True))
    return {id_: LABELS[state] for id_, state in last.items() if state in LABELS}


def show(found: Comparison) -> None:
    """Print it: a column for each version, a row for each pair."""
    columns = [
        {
            "events": f.events, "with a known label": f.labelled, "positive": f.positives, "AUC": f.auc,
            "average precision": f.ap, f"precision of a day's first {TOP}": f.precision_at_top,
            "calibration error": f.calibration_error, "positives to expected": f.calibration_ratio,
            **{f"score, quantile {q}": value for q, value in f.quantiles.items()},
        }
        for f in found.versions
    ]  # fmt: skip
    rows = [[name, *(_number(c[name]) for c in columns)] for name in columns[0]]
    table(["of version", *(f.version for f in found.versions)], rows)
    if found.pairs:
        click.echo()
        table(
            ["version", "and", "events of both", "decisions differ", "rank correlation"],
            [[*p.versions, p.events, p.decisions_differ, _number(p.rank_correlation)] for p in found.pairs],
        )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
