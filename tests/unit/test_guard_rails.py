"""Each rail by its bound, and what `headrace quality` makes of records and of a canary that turns out worse."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import canary_watch
from app.canary_watch import Watch
from app.errors import RegistryError
from app.model_life import ModelLife
from app.quality import BEHIND, NoLabels, Quality
from models import guard_rails
from models.canary import Canary
from models.evaluation import DAY_MS
from models.guard_rails import EVENTS, ROWS, Bounds, of_latency, of_quality, of_scores, psi
from models.pipeline import parse
from models.predictions import Origin
from models.scoring import Model
from models.shadows import Scored, Shadow
from tables.model_folder import CANARY, CHAMPION, ModelFolder
from tests.fixtures.models import SHOP, SHOP_YAML, card, graph, sigmoid

LABELLED = parse(SHOP_YAML + "labels: {known: KNOWN, field: BACK}\n")

_COUNTS = st.dictionaries(st.sampled_from("abc"), st.integers(0, 1000), min_size=1).filter(
    lambda c: sum(c.values()) > 0
)


# --- bounds -------------------------------------------------------------------------------------


@given(_COUNTS, _COUNTS)
def test_psi_is_a_distance_of_shares(a: dict[str, int], b: dict[str, int]) -> None:
    assert psi(a, b) == pytest.approx(psi(b, a))
    assert psi(a, b) >= 0
    assert psi(a, {name: 7 * n for name, n in a.items()}) == pytest.approx(0, abs=1e-9)


def test_psi_by_hand() -> None:
    found = psi({"x": 80, "y": 20}, {"x": 60, "y": 40})
    assert found == pytest.approx((0.6 - 0.8) * math.log(0.6 / 0.8) + (0.4 - 0.2) * math.log(0.4 / 0.2))


def test_a_rail_holds_at_its_bound_and_gives_way_behind_it() -> None:
    bounds = Bounds(psi=0.1, row_us=50, ap_drop=0.05, positives=100)
    assert of_latency("v", 1000, 0.05, bounds) is None
    slow = of_latency("v", 1000, 0.051, bounds)
    assert slow == (
        "latency",
        "The canary v took 51.0 us for an event, over 1,000 events, and 50 are allowed.",
    )
    assert of_scores("v", {"pass": 98, "block": 2}, {"pass": 97, "block": 3}, bounds) is None
    other = of_scores("v", {"pass": 80, "block": 20}, {"pass": 98, "block": 2}, bounds)
    assert other is not None
    assert other.sentence == (
        "The canary v has 'block' for 20.00% of 100 events, of which the champion has it for 2.00%: PSI 0.45 over all "
        "decisions, and 0.1 is allowed."
    )
    assert of_quality("v", 0.45, 0.5, 100, bounds) is None
    assert of_quality("v", 0.44, 0.5, 99, bounds) is None
    assert of_quality("v", float("nan"), 0.5, 100, bounds) is None
    worse = of_quality("v", 0.44, 0.5, 100, bounds)
    assert worse == (
        "quality",
        "The canary v has average precision 0.440 over events with 100 positive labels, of which the champion has "
        "0.500: 0.05 less is allowed.",
    )


@pytest.mark.parametrize(("share", "taken"), [(10, False), (12, True)])
def test_a_canary_that_finds_nothing_passes_where_there_is_little_to_find(share: int, taken: bool) -> None:
    """What the page says of the default, by events of a thousand."""
    champion, nothing = {"pass": 1000 - share, "block": share}, {"pass": 1000}
    assert (of_scores("v", nothing, champion, Bounds()) is not None) == taken


def test_failures_are_one_line() -> None:
    assert guard_rails.failed("v", ValueError("")).sentence == "The canary v failed to score (ValueError)."
    assert guard_rails.failed("v", ValueError("a\nb")).sentence == "The canary v failed to score (a)."


# --- what a worker sees -------------------------------------------------------------------------


@pytest.fixture
def model() -> Model:
    return Model(graph(), card(thresholds={"stop": 0.5}), SHOP)


def test_time_is_of_all_calls_and_judged_by_enough_rows(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(canary_watch, "time", SimpleNamespace(thread_time=lambda: next(clock) / 10))
    watch = Watch(model, Bounds(row_us=199))
    rows = np.zeros((ROWS // 2, 3))
    assert watch.model.score_many(rows).tolist() == model.score_many(rows).tolist()
    assert watch.breach() is None
    watch.model.score_many(rows)
    breach = watch.breach()
    assert breach is not None
    assert (breach.rail, "took 200.0 us" in breach.sentence) == ("latency", True)
    assert watch.breach() is None  # what is judged is forgotten


def test_where_traffic_is_low_a_call_is_not_taken_for_a_slow_model(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sound forest of 500 trees, 77 us for a row of 256, takes some 550 for one that comes alone."""
    for seconds, slow in ((550e-6, False), (2.1e-3, True)):
        clock = iter(np.arange(4 * ROWS) * seconds)
        monkeypatch.setattr(
            canary_watch, "time", SimpleNamespace(thread_time=lambda clock=clock: next(clock))
        )
        watch = Watch(model, Bounds(row_us=200))
        for _ in range(ROWS):
            watch.model.score_many(np.zeros((1, 3)))
        assert (watch.breach() is not None) == slow


def test_decisions_are_judged_by_enough_events_at_a_time(model: Model) -> None:
    watch, low, high = Watch(model, Bounds()), np.zeros(EVENTS, np.float32), np.ones(EVENTS, np.float32)
    watch.both(low, model, low)
    assert watch.breach() is None
    watch.both(high[1:], model, low[1:])
    assert watch.breach() is None  # one is missing
    watch.both(high[:1], model, low[:1])
    breach = watch.breach()
    assert breach is not None
    assert "has 'stop' for 100.00% of 2,000 events, of which the champion has it for 0.00%" in breach.sentence


# --- what labels say ----------------------------------------------------------------------------


class Bench:
    """A champion that is right, a canary that is wrong, and who judges them."""

    def __init__(self, folder: ModelFolder, **bounds: Any) -> None:
        self.life, self.told = ModelLife(LABELLED, folder, row_us=1e6), list[str]()
        for version, weight in (("good", 1.0), ("poor", 2.0)):
            made = card(
                version=version, definition=LABELLED.definition,
                golden_scores=sigmoid([0.0, 2.0 * weight]).tolist(),
            )  # fmt: skip
            folder.save(graph(weight), made)
        folder.point("shop", CHAMPION, "good")
        self.quality = Quality(self.life, 3, 1000, Bounds(positives=10, **bounds), self.told.append)
        self._offsets = 0

    def record(self, topic: str, value: bytes) -> Any:
        self._offsets += 1
        return SimpleNamespace(topic=topic, value=value, timestamp=5, partition=0, offset=self._offsets)

    def predicted(self, id_: int, time: int, version: str | None, score: float | None) -> Any:
        value = {"id": id_, "event_time": time, "score": score, "version": version, "features": {"A": None}}
        return self.record(LABELLED.predictions, json.dumps(value).encode())

    def shadowed(self, id_: int, time: int, champion: float | None, canary: float) -> Any:
        made = Shadow(
            id_, time, Origin(0, id_), "", Scored("good", champion), {CANARY: Scored("poor", canary)}
        )
        return self.record(LABELLED.shadow, msgspec.json.encode(made))

    def labelled(self, id_: int, time: int, label: int | None) -> Any:
        assert LABELLED.labels is not None
        value = {"ID": id_, "AT": time, "BACK": label, "KNOWN": time, "BUYER": 1}
        return self.record(LABELLED.labels.topic, json.dumps(value).encode())

    def events(self, n: int) -> None:
        """Half of them are the canary's; all labels come."""
        for id_ in range(n):
            label, time = id_ % 2, DAY_MS + id_
            right, wrong = (0.9, 0.1) if label else (0.1, 0.9)
            by_canary = id_ % 4 < 2
            made = self.predicted(id_, time, "poor" if by_canary else "good", wrong if by_canary else right)
            self.quality.take([made, self.shadowed(id_, time, right, wrong), self.labelled(id_, time, label)])
        self.quality.take([self.predicted(-1, 3 * DAY_MS, "good", 0.5)])


@pytest.fixture
def bench(tmp_path: Any) -> Bench:
    return Bench(ModelFolder(tmp_path))


def test_records_become_figures_whoever_decided(bench: Bench) -> None:
    bench.events(40)
    realised = bench.quality.realised
    assert [realised.of(version)[0].labelled for version in ("good", "poor")] == [40, 40]
    assert [realised.of(version)[0].auc for version in ("good", "poor")] == [1.0, 0.0]


def test_what_is_no_score_and_none_of_ours_is_passed_over(bench: Bench) -> None:
    topics = bench.quality.topics
    bench.quality.take(
        [bench.record(topic, value) for topic in topics for value in (b"", b"junk", b'{"id": 1}')]
    )
    bench.quality.take([
        bench.predicted(1, DAY_MS, None, None), bench.shadowed(2, DAY_MS, None, 0.5), bench.labelled(1, DAY_MS, 1),
        bench.labelled(2, DAY_MS, 1), bench.predicted(-1, 3 * DAY_MS, "good", 0.5),
    ])  # fmt: skip
    assert bench.quality.realised.versions() == ["poor"]


def test_the_last_label_counts_by_when_it_was_sent(bench: Bench) -> None:
    first, last = bench.labelled(1, DAY_MS, 1), bench.labelled(1, DAY_MS, 0)
    first.timestamp, first.partition = 9, 1
    bench.quality.take([bench.predicted(1, DAY_MS, "good", 0.5), first, last])
    bench.quality.take([bench.predicted(-1, 3 * DAY_MS, "good", 0.5)])
    assert bench.quality.realised.of("good")[0].positives == 1
    again = bench.labelled(1, DAY_MS, None)
    again.timestamp = 10
    bench.quality.take([again])
    assert bench.quality.realised.of("good")[0].labelled == 0


def test_labels_that_have_the_id_alone_count_whenever_they_come(tmp_path: Any) -> None:
    """Of those neither time nor keys are known here; the event's score tells its day."""
    by_id = parse(SHOP_YAML + "labels: {known: KNOWN, field: BACK, keys: ledger}\n")
    quality = Quality(ModelLife(by_id, ModelFolder(tmp_path)), 3, 1000, Bounds(), print)
    bench = Bench(ModelFolder(tmp_path))

    def label(id_: int, day: int) -> Any:
        value = json.dumps({"ID": id_, "BACK": 1, "KNOWN": day * DAY_MS}).encode()
        return bench.record(quality.topics[2], value)

    early, made = label(1, 2), [bench.predicted(id_, DAY_MS, "good", 0.5) for id_ in (1, 2)]
    quality.take([early, *made, label(2, 3)])
    quality.take([bench.predicted(-1, 3 * DAY_MS, "good", 0.5)])
    assert quality.realised.until == 2
    assert quality.realised.of("good")[0].labelled == 2
    assert list(quality.realised._counts) == [1]


def test_that_there_is_no_room_for_events_is_told_once(bench: Bench) -> None:
    bench.quality.take([bench.predicted(id_, DAY_MS, "good", 0.5) for id_ in range(1000)])
    assert bench.told == []
    for id_ in (1000, 1001):
        bench.quality.take([bench.predicted(id_, DAY_MS, "good", 0.5)])
    assert len(bench.told) == 1
    assert "let go before their labels come" in bench.told[0]


async def test_a_canary_that_turns_out_worse_is_taken_back(bench: Bench) -> None:
    bench.events(40)
    await bench.quality.look()  # there is none
    bench.life.set_canary("poor", 50)
    await bench.quality.look()
    noted = bench.life.registry.canary("shop", "poor")
    assert noted is not None
    assert (noted.rail, noted.share) == ("quality", 50)
    assert "of which the champion has 1.000" in str(noted.reason)
    assert bench.told == [f"shop: {noted.reason} It is taken back."]
    await bench.quality.look()
    assert len(bench.told) == 1


async def test_a_canary_with_few_labels_or_good_figures_stays(tmp_path: Any) -> None:
    for how in ({"ap_drop": 1.0}, {}):
        bench = Bench(ModelFolder(tmp_path), **how)
        bench.events(40 if how else 16)
        bench.life.set_canary("poor", 50)
        await bench.quality.look()
        assert bench.life.canary(bench.life.aliases()) == Canary(
            50, bench.life.registry.canary("shop", "poor").since
        )  # type: ignore[union-attr]


async def test_a_registry_that_is_away_is_told_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.events(40)
    bench.life.set_canary("poor", 50)
    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "note", lambda *_: (_ for _ in ()).throw(RegistryError("It is away.")))
        await bench.quality.look()
        await bench.quality.look()
    assert bench.told == ["It is away. No canary is taken back meanwhile."]
    await bench.quality.look()
    assert bench.quality.away is None
    assert bench.life.registry.canary("shop", "poor").rail == "quality"  # type: ignore[union-attr]


def test_it_says_whether_its_figures_are_of_all(bench: Bench) -> None:
    assert "Nothing is read yet" in str(bench.quality.behind)
    bench.quality.left = 1200
    assert bench.quality.behind == "1,200 records are still to be read."
    bench.quality.whole = True
    assert bench.quality.behind is None  # more come all the time
    bench.quality.left = BEHIND + 1
    assert bench.quality.behind == "20,001 records are still to be read."


def test_without_labels_there_is_nothing_to_judge_by(tmp_path: Any) -> None:
    with pytest.raises(NoLabels, match="shop has no labels to judge by"):
        Quality(ModelLife(SHOP, ModelFolder(tmp_path)), 3, 10, Bounds(), print)
