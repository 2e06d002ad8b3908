"""Workers while there is no model: what they do with events is said, counted, and exact through every crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import explain_table
from app.explain import Served
from app.settings import Settings, Without
from app.worker import Partitions, Worker
from models.errors import HeadraceError
from models.predictions import decode
from tests.fixtures import simulation
from tests.fixtures.pipelines import shop
from tests.fixtures.simulation import ADDRESSES, ARRIVED, LATE, LOST, SERVING, SHOP, counts_of, simulated
from tests.unit.test_exactness import OLD, ORDERS, Step, end_of, histories

PROMOTE: Step = ("promote",)
PROGRESS: Step = ("progress",)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has a champion until a history promotes one."""
    with monkeypatch.context() as patch:
        patch.delitem(SERVING.models, "champion")
        yield


def lived(root: Path, steps: list[Step], without: Without) -> tuple[list[str], list[list[bool]]]:
    """What is wrong at the end of a history, and by partition which of its predictions have a score."""
    with pytest.MonkeyPatch.context() as patch, simulated(root, False, SHOP, without) as world:
        patch.delitem(SERVING.models, "champion", raising=False)
        found = end_of(world, steps)
        return found, [[decode(r.value or b"").score is not None for r in log] for log in world.predictions]


# --- features alone -----------------------------------------------------------------------------


@settings(max_examples=max(settings().max_examples // 2, 20))
@given(histories(), st.integers(0, 40))
def test_in_every_history_each_event_goes_out_once_and_scores_begin_with_the_model(
    steps: list[Step], when: int
) -> None:
    with TemporaryDirectory() as root:
        steps = [*steps[: when + 1], PROMOTE, *steps[when + 1 :]]
        found, scored = lived(Path(root), steps, "features")
        assert found == []
        assert all(log == sorted(log) for log in scored)


@pytest.mark.parametrize("fate", [LOST, ARRIVED, LATE])
def test_a_crash_doubles_nothing_that_went_out_without_a_score(fate: int, tmp_path: Path) -> None:
    """What arrived stays without one; what did not is scored by now."""
    folded = [("poll", 0, 100, -1, True), ("arrive", 0, -1), ("acknowledge", 0), ("poll", 0, 100, -1, True)]
    crash = ("crash", 0, 0, [fate], OLD)
    found, scored = lived(
        tmp_path, [("start", 0, OLD), *ORDERS, *folded, crash, PROMOTE, PROGRESS], "features"
    )
    assert found == []
    assert any(map(any, scored))
    assert all(map(all, scored)) == (fate != ARRIVED)  # a fence keeps out what is late


# --- folded, and never scored -------------------------------------------------------------------


def test_what_was_folded_without_a_model_is_never_scored(tmp_path: Path) -> None:
    before, after = ORDERS[:4], ORDERS[4:]
    steps = [("start", 0, OLD), *before, *[PROGRESS] * 3, PROMOTE, *after]
    found, scored = lived(tmp_path, steps, "fold")
    assert {finding.partition(":")[0] for finding in found} == {"lost"}
    assert len(found) == len(before)
    assert all(map(all, scored))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("without", "sent"), [("fold", 0), ("features", 4)])
async def test_events_without_a_model_are_counted(without: Without, sent: int, tmp_path: Path) -> None:
    with simulated(tmp_path, False, SHOP, without) as world:
        await world.run([("start", 0, OLD), *ORDERS[:4], *[PROGRESS] * 3])
        score = world.slots[0].worker.score  # type: ignore[union-attr]
        assert (score.unscored, score.predicted) == (4, sent)
        for process in world._ever:
            process.end(0)


# --- waiting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("without", "held"), [("wait", True), ("fold", False), ("features", False)])
def test_the_last_log_is_held_back_only_for_those_who_wait(without: Without, held: bool) -> None:
    serving = SimpleNamespace(models=dict[str, Any]())
    settings_ = SimpleNamespace(without_model=without)
    worker: Any = SimpleNamespace(pipeline=SHOP, in_step=None, serving=serving, settings=settings_, routes={})
    partitions = Partitions(worker, "")
    assert partitions.held_back == ({SHOP.entities[-1].log} if held else set())
    serving.models["champion"] = simulation.Score()
    assert partitions.held_back == set()


def test_who_waits_folds_no_event_that_cannot_be_scored(tmp_path: Path) -> None:
    """Should one be handed over all the same, the worker ends before it passes."""
    found, _ = lived(tmp_path, [("start", 0, OLD), *ORDERS, *[PROGRESS] * 3, PROMOTE], "wait")
    assert found == ["died: 'champion'"]


# --- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "ready", "says"),
    [
        ("wait", False, "Nothing is scored: No model of shop is the champion."),
        ("fold", False, "Nothing is scored, and what is folded meanwhile never will be: No model"),
        ("features", True, "Predictions carry features and no score: No model"),
    ],
)
async def test_readiness_tells_that_there_is_no_model(
    without: Without, ready: bool, says: str, tmp_path: Path
) -> None:
    serving: Any = SimpleNamespace(
        models={}, shares={}, why="No model of shop is the champion.", drop=None, watch=lambda *_: None
    )
    given = Settings(data_root=tmp_path, checkpoints="off", without_model=without)
    worker = Worker(SHOP, serving, counts_of(SHOP), ADDRESSES, given, 0)
    worker.watchdog.stop()
    worker.producer = worker.shadow_producer = None  # type: ignore[assignment]
    worker.wire()
    worker.partitions.held = {("any", 0)}  # type: ignore[arg-type]
    reason = await worker._ready()
    assert (reason is None) == ready
    assert ((worker._remark() if ready else reason) or "").startswith(says)
    serving.models["champion"] = simulation.Score()
    assert await worker._ready() is worker._remark() is None


def test_features_alone_need_features(tmp_path: Path) -> None:
    bare = shop("lateness: 1h", "predictions_carry_features: false")
    given = Settings(data_root=tmp_path, checkpoints="off", without_model="features")
    with pytest.raises(HeadraceError, match="predictions of shop carry none; drop"):
        Worker(bare, SERVING, counts_of(bare), ADDRESSES, given, 0)


# --- who reads them -----------------------------------------------------------------------------


def test_explain_says_that_there_was_no_model() -> None:
    served = Served(None, None, None, False, {"AMOUNT": 1.0}, [])
    event: Any = SimpleNamespace(id=1, time=0, outcome="folded", partition=0, offset=0)
    found: Any = SimpleNamespace(
        entity="buyer", key="7", instance="shop", event=event, prediction=served, now=0, incomplete=[]
    )
    sentences = " ".join(explain_table._sentences(found))
    assert "It was folded without a model, and has no score; the values that it holds are" in sentences
    found.prediction = msgspec.structs.replace(served, decision="pass", version="1")
    assert "predicted as pass, score no number" in explain_table._sentences(found)[1]
