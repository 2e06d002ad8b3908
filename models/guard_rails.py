"""What takes a canary back by itself: evidence goes in, and a sentence comes out where a bound is passed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

Rail = Literal["failed", "scores", "latency", "quality"]

ROWS = 1000  # events that a canary has scored, before its time is judged
EVENTS = (
    2000  # that both have scored, before the decisions are compared: chance alone moves PSI by some .002 then
)
LONGEST = 300  # of what a graph says when it fails: registries have bounds
LEAST = 1e-4  # of a share: an empty one would have an infinite logarithm


class Breach(NamedTuple):
    """Which rail, and the sentence for people."""

    rail: Rail
    sentence: str


class Bounds(NamedTuple):
    """psi: of the canary's decisions against the champion's; row_us: microseconds for an event; ap_drop: by how much
    the average precision may be lower; positives: known ones, before that is judged."""

    psi: float = 0.05
    row_us: float = 200.0
    ap_drop: float = 0.05
    positives: int = 100


def failed(version: str, error: Exception) -> Breach:
    """It raised while it scored, or gave no score for each event."""
    first = (str(error) or type(error).__name__).splitlines()[0][:LONGEST]
    return Breach("failed", f"The canary {version} failed to score ({first}).")


def of_latency(version: str, rows: int, seconds: float, bounds: Bounds) -> Breach | None:
    """rows, seconds: events since the last judgement, and the processor time that they took."""
    took = seconds / rows * 1e6
    if took <= bounds.row_us:
        return None
    return Breach(
        "latency",
        f"The canary {version} took {took:.1f} us for an event, over {rows:,} events, and {bounds.row_us:g} are "
        "allowed.",
    )


def of_scores(
    version: str, canary: Mapping[str, int], champion: Mapping[str, int], bounds: Bounds
) -> Breach | None:
    """canary, champion: how often each takes which decision, on the same events, by thresholds of its own.

    Scores themselves are not compared: two sound models may have quite other ones of most events, and say the same.
    """
    found = psi(champion, canary)
    if found <= bounds.psi:
        return None
    events = sum(canary.values())
    name = max({**canary, **champion}, key=lambda n: _part(_share(champion, n), _share(canary, n)))
    ours, theirs = (counts.get(name, 0) / events for counts in (canary, champion))
    return Breach(
        "scores",
        f"The canary {version} has {name!r} for {ours:.2%} of {events:,} events, of which the champion has it for "
        f"{theirs:.2%}: PSI {found:.2f} over all decisions, and {bounds.psi:g} is allowed.",
    )


def of_quality(version: str, ours: float, theirs: float, positives: int, bounds: Bounds) -> Breach | None:
    """ours, theirs: average precision of canary and champion over the same events; positives: among them."""
    if positives < bounds.positives or not ours < theirs - bounds.ap_drop:
        return None
    return Breach(
        "quality",
        f"The canary {version} has average precision {ours:.3f} over events with {positives:,} positive labels, of "
        f"which the champion has {theirs:.3f}: {bounds.ap_drop:g} less is allowed.",
    )


def psi(expected: Mapping[str, int], found: Mapping[str, int]) -> float:
    """Population stability index of counts by name: 0 where shares are the same; above .1 they are said to have moved.

    >>> round(psi({"block": 10, "pass": 990}, {"block": 50, "pass": 950}), 3)
    0.066
    """
    return sum(_part(_share(expected, name), _share(found, name)) for name in {**expected, **found})


def _share(counts: Mapping[str, int], name: str) -> float:
    return max(counts.get(name, 0) / sum(counts.values()), LEAST)


def _part(expected: float, found: float) -> float:
    return (found - expected) * math.log(found / expected)
