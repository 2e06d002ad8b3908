"""An explanation as people read it in a terminal."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from app.explain import Explanation
from app.terminal import table, utc
from models.explain import Event, Explained

SHOWN = 20  # events of a window that a terminal gets to see unasked


def show(found: Explanation, named: bool, everything: bool) -> None:
    """Print it. named: features were asked for by name, so their events are shown; everything: all of those."""
    for sentence in _sentences(found):
        click.echo(sentence)
    table(
        ["feature", "then", "predicted", "now", "window then", "events", "since then"],
        [_line(found, t) for t in found.features],
    )
    for told in found.features if named else ():
        rows = _events(told)
        cut = rows if everything else rows[:SHOWN]
        click.echo(
            f"\n{told.feature}: {len(told.then.events):,} events then, {len(told.now.events):,} now, newest first"
        )
        if rows:
            values = list(rows[0][0].values)
            table(
                ["id", "time", *values, "label", "since then"],
                [[str(e.id), utc(e.time), *e.values.values(), e.label, change] for e, change in cut],
            )
        if len(cut) < len(rows):
            click.echo(f"{len(rows) - len(cut):,} more; --all shows them.")
    if not named:
        click.echo("\n--feature NAME shows the events of one.")


def _sentences(found: Explanation) -> list[str]:
    who = f"{found.entity} {found.key} of {found.instance}"
    event, prediction = found.event, found.prediction
    if event is None:
        return [f"{who}: then is {utc(found.then)}, now {utc(found.now)}.", *_doubts(found)]
    result = [
        f"{who}: then is event {event.id} of {utc(event.time)} ({event.outcome}, partition {event.partition} "
        f"offset {event.offset}), now {utc(found.now)}."
    ]
    if prediction is None:
        result.append("Its prediction is not in the topic.")
    else:
        judged = (
            f"of {', '.join(prediction.differing)} differ" if prediction.differing else "are the same bits"
        )
        compared = f"; the values that it holds {judged}" if prediction.features else ""
        score = "no number" if prediction.score is None else f"{prediction.score:.4g}"
        said = f"It was predicted as {prediction.decision}, score {score}"
        if prediction.version is None:
            said = "It was folded without a model, and has no score"
        result.append(f"{said}{compared}.")
    return [*result, *_doubts(found)]


def _doubts(found: Explanation) -> list[str]:
    if not found.incomplete:
        return []
    return [
        f"The log reaches back to {utc(found.log_begins or 0)} only: {', '.join(found.incomplete)} may lack events."
    ]


def _line(found: Explanation, told: Explained) -> list[Any]:
    then, now = told.then, told.now
    served = found.prediction.features if found.prediction else {}
    differs = found.prediction is not None and told.feature in found.prediction.differing
    held = _number(served.get(told.feature)) if told.feature in served else None
    return [
        told.feature, _number(then.value), f"{held} (differs)" if differs else held, _number(now.value),
        f"{'its first event' if then.after is None else utc(then.after)} to {utc(then.until)}",
        len(then.events), _changes(told),
    ]  # fmt: skip


def _changes(told: Explained) -> str:
    counts = {"came": len(told.came), "left": len(told.left), "relabelled": len(told.relabelled)}
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _number(value: float | None) -> str:
    """All its digits: values are compared to the bit."""
    return "none" if value is None or np.isnan(value) else repr(value)


def _events(told: Explained) -> list[tuple[Event, str]]:
    """The events of either window, newest first, with what became of each since then."""
    left = {(e.id, e.time) for e in told.left}
    labels = {(r.id, r.time): f"now {r.now}" for r in told.relabelled}
    rows = [
        (e, "left" if (e.id, e.time) in left else labels.get((e.id, e.time), "")) for e in told.then.events
    ] + [(e, "came") for e in told.came]
    return sorted(rows, key=lambda row: row[0].time, reverse=True)
