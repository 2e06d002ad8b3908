"""Versions compared on made records: what is joined, and the figures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from app import comparison
from app.comparison import NothingToCompare, compared, last_labels, read
from app.model_life import ModelLife
from models.comparison import Observed, compare, rank_correlation
from models.pipeline import Pipeline, find, parse
from models.predictions import Origin, Prediction
from models.scoring import Decisions
from models.shadows import Scored, Shadow
from tables.model_folder import CHAMPION, ModelFolder
from tests.conftest import PIPELINES
from tests.fixtures.models import SHOP_YAML, card, graph, sigmoid

DAY = 86_400_000
SHOP = parse(SHOP_YAML + "labels: {known: KNOWN, field: BACK}\n")


def observed(n: int = 300, seed: int = 0) -> Observed:
    """Version a on all events, b on the later half; every fifth has no label."""
    random, found = np.random.default_rng(seed), Observed()
    for id_ in range(n):
        found.add(id_, id_ * DAY // 100, "a", float(random.random()))
        if id_ >= n // 2:
            found.add(id_, id_ * DAY // 100, "b", float(random.random()))
        if id_ % 5:
            found.labels[id_] = int(random.random() < 0.3)
    return found


def by_hand(labels: list[int], scores: list[float], times: list[int]) -> dict[str, float]:
    """In plain Python, from the definitions."""
    rows = list(zip(scores, labels, strict=True))
    pairs = [(p, n) for p, positive in rows if positive for n, other in rows if not other]
    ranked = sorted(rows, reverse=True)
    hits, ap = 0, 0.0
    for place, (_, label) in enumerate(ranked, 1):
        hits += label
        ap += label * hits / place
    days: dict[int, list[tuple[float, int]]] = {}
    for score, label, time in zip(scores, labels, times, strict=True):
        days.setdefault(time // DAY, []).append((score, label))
    firsts = [[label for _, label in sorted(day, reverse=True)[:100]] for day in days.values()]
    return {
        "auc": sum(p > n for p, n in pairs) / len(pairs),
        "ap": ap / hits,
        "precision_at_top": sum(sum(f) / len(f) for f in firsts) / len(firsts),
    }


def test_each_version_alone_on_its_own_events() -> None:
    seen = observed()
    a, b = compare(seen, None, {}).versions
    assert (a.version, a.events, a.labelled, b.version, b.events, b.labelled) == (
        "a",
        300,
        240,
        "b",
        150,
        120,
    )
    for figures in (a, b):
        ids = [i for i in seen.scores[figures.version] if i in seen.labels]
        expected = by_hand(
            [seen.labels[i] for i in ids], [seen.scores[figures.version][i] for i in ids], [seen.times[i] for i in ids]
        )  # fmt: skip
        assert figures.positives == sum(seen.labels[i] for i in ids)
        for name, value in expected.items():
            assert getattr(figures, name) == pytest.approx(value), name
        assert figures.quantiles["0.5"] == np.median([*seen.scores[figures.version].values()])


def test_two_versions_on_the_events_of_both() -> None:
    seen = observed()
    decide = {
        "a": Decisions(card(thresholds={"stop": 0.5})).of,
        "b": Decisions(card(thresholds={"stop": 0.9, "look": 0.5})).of,
    }
    found = compare(seen, ("a", "b"), decide)
    assert [(f.version, f.events) for f in found.versions] == [("a", 150), ("b", 150)]
    (pair,) = found.pairs
    both = [(seen.scores["a"][i], b) for i, b in seen.scores["b"].items()]
    # a stops where b looks, from 0.5 on; b stops from 0.9 on
    same = sum((x >= 0.5, y >= 0.9) == (True, True) or (x < 0.5 and y < 0.5) for x, y in both)
    assert pair.decisions_differ == pytest.approx(1 - same / 150)
    assert (pair.versions, pair.events) == (("a", "b"), 150)
    assert abs(pair.rank_correlation) < 0.3
    assert compare(seen, ("a", "b"), {"a": decide["a"]}).pairs[0].decisions_differ is None


def test_ranks_of_equal_scores_are_their_mean() -> None:
    a, b = np.array([1.0, 2, 2, 4]), np.array([10.0, 30, 20, 40])
    assert rank_correlation(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert math.isnan(rank_correlation(a, np.ones(4)))


async def test_of_what_a_canary_has_decided_the_champion_s_score_is_in_the_shadow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topics = Topics(monkeypatch)
    topics.predict(SHOP, 1, 0, "b", 0.9)
    topics.shadow(SHOP, 1, 0, b=0.9, champion=0.4)
    assert (await read(SHOP, "", 0, 9)).scores == {"a": {1: 0.4}, "b": {1: 0.9}}


def test_without_labels_there_are_scores_only() -> None:
    seen = observed()
    seen.labels = {}
    a, b = compare(seen, ("a", "b"), {}).versions
    for figures in (a, b):
        assert (figures.labelled, figures.positives) == (0, 0)
        assert all(math.isnan(x) for x in (figures.auc, figures.ap, figures.precision_at_top))
    assert msgspec.json.decode(msgspec.json.encode(a))["auc"] is None


def test_of_equal_scores_a_day_s_first_are_any() -> None:
    seen = Observed()
    for n in reversed(range(150)):
        seen.add(n * 7919 % 1009, n, "a", 0.5)
        seen.labels[n * 7919 % 1009] = int(n < 100)
    assert compare(seen, None, {}).versions[0].precision_at_top == pytest.approx(100 / 150)


def test_a_score_that_is_no_number_is_left_out() -> None:
    seen = Observed()
    seen.add(1, 0, "a", None)
    assert (seen.times, seen.scores) == ({}, {})


# --- what is read -------------------------------------------------------------------------------


def label(id_: int, state: str, timestamp: int, partition: int = 0, offset: int = 0) -> Any:
    value = f'{{"ID": {id_}, "AT": 1700000000000, "BUYER": 1, "BACK": {state}, "KNOWN": 1700000000000}}'
    return SimpleNamespace(
        value=value.encode(), timestamp=timestamp, partition=partition, offset=offset, key=b""
    )


def test_the_last_label_counts_wherever_it_stands() -> None:
    records = [
        label(1, "0", 10), label(1, "1", 20, 1, 7), label(1, "0", 15, 0, 1),  # flips, through two partitions
        label(2, "1", 10, 0, 2), label(2, "null", 10, 0, 3),  # is taken back in the same millisecond
        label(3, "7", 10, 0, 4),  # is none
        label(5, "0", 30, 1, 8), label(5, "1", 40, 0, 7),
        label(4, "0", 10, 0, 5), label(4, "1", 10, 0, 6),
    ]  # fmt: skip
    assert last_labels(SHOP, records[::-1]) == {1: 1, 4: 1, 5: 1}


class Topics:
    """What is in the topics of an instance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, list[Any]] = {}
        monkeypatch.setattr(comparison.kafka, "partitions_of", self._partitions)
        monkeypatch.setattr(comparison.kafka, "read_between", self._read)

    async def _partitions(self, _: str, names: list[str]) -> dict[str, int]:
        return {name: int(name in self.held) for name in names}

    async def _read(self, _: str, topic: str) -> Any:
        for value in self.held[topic]:
            yield value if hasattr(value, "value") else SimpleNamespace(value=value)

    def predict(
        self, pipeline: Pipeline, id_: int, time: int, version: str, score: float, stream: str | None = None
    ) -> None:
        made = Prediction(id_, time, score, "pass", "shop", version, "", False, Origin(0, id_), stream=stream)
        self.held.setdefault(pipeline.predictions, []).append(msgspec.json.encode(made))

    def shadow(
        self, pipeline: Pipeline, id_: int, time: int, stream: str | None = None, champion: float | None = None,
        **theirs: float,
    ) -> None:  # fmt: skip
        given = {f"challenger-{v}": Scored(v, score) for v, score in theirs.items()}
        made = Shadow(id_, time, Origin(0, id_), "", Scored("a", champion), given, stream)
        self.held.setdefault(pipeline.shadow, []).append(msgspec.json.encode(made))


async def test_predictions_shadows_and_labels_meet_by_event(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = Topics(monkeypatch)
    for id_ in range(4):
        topics.predict(SHOP, id_, id_ * DAY, "a", id_ / 10)
    topics.shadow(SHOP, 1, DAY, b=0.5, c=0.6)
    topics.shadow(SHOP, 2, 2 * DAY, b=0.7)
    topics.held[SHOP.predictions].append(b"by hand")
    topics.held[SHOP.shadow].append(b"{}")
    topics.held["shop.labels"] = [label(1, "1", 1), label(9, "1", 1)]
    found = await read(SHOP, "", DAY, 3 * DAY)
    assert found.scores == {"a": {1: 0.1, 2: 0.2}, "b": {1: 0.5, 2: 0.7}, "c": {1: 0.6}}
    assert (found.times, found.labels) == ({1: DAY, 2: 2 * DAY}, {1: 1, 9: 1})


async def test_ids_are_each_stream_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    topics, several = Topics(monkeypatch), find("flight-network", PIPELINES)
    first, second = (stream.name for stream in several.streams[:2])
    topics.predict(several, 1, 0, "a", 0.1, first)
    topics.predict(several, 1, 0, "a", 0.2, second)
    topics.shadow(several, 1, 0, second, b=0.3)
    found = await read(several, "", 0, 1)
    other = several.streams[1].identity(1)
    assert found.scores == {"a": {1: 0.1, other: 0.2}, "b": {other: 0.3}}


async def test_what_cannot_be_compared_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    topics, folder = Topics(monkeypatch), ModelFolder(tmp_path)
    life = ModelLife(SHOP, folder)
    with pytest.raises(NothingToCompare, match=r"shop\.predictions holds no scores") as error:
        await compared(life, "", (), 0, 9)
    assert error.value.exit_code == 2
    topics.predict(SHOP, 1, 0, "a", 0.1)
    topics.shadow(SHOP, 1, 0, b=0.9)
    topics.shadow(SHOP, 2, 0, c=0.9)
    for two, sentence in (
        (("a", "d"), "d has scored no event of these days; those that have are a, b, c"),
        (("a", "a"), "Both are the version a; name two"),
        (("a", "c"), "a and c have scored no event in common"),
    ):
        with pytest.raises(NothingToCompare, match=sentence):
            await compared(life, "", two, 0, 9)
    # By aliases, and with the thresholds of those versions that are there.
    folder.save(graph(), card(version="a", definition=SHOP.definition))
    folder.save(
        graph(2.0), card(version="b", definition=SHOP.definition, golden_scores=sigmoid([0, 4]).tolist())
    )
    folder.point("shop", CHAMPION, "a")
    folder.point("shop", "challenger-b", "b")
    found = await compared(life, "", (CHAMPION, "challenger-b"), 0, 9)
    assert [f.version for f in found.versions] == ["a", "b"]
    assert [(p.versions, p.decisions_differ) for p in found.pairs] == [(("a", "b"), 1.0)]
    everything = await compared(life, "", (), 0, 9)
    assert [f.version for f in everything.versions] == ["a", "b", "c"]
    assert [p.versions for p in everything.pairs] == [("a", "b")]


def test_it_reads_well_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    seen = observed()
    comparison.show(compare(seen, None, {}))
    seen.labels = {}
    comparison.show(compare(seen, ("a", "b"), {}))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["events", "300", "150"] in lines
    assert ["AUC", "-", "-"] in lines
    assert any(line[:4] == ["a", "b", "150", "-"] for line in lines)
