"""A canary decides for the entities that a hash gives it, whatever befalls workers, and for no others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faust.types import TP
from hypothesis import given, settings
from hypothesis import strategies as st

from models import shadows
from models.canary import chosen
from models.predictions import decode
from tests.fixtures import simulation
from tests.fixtures.simulation import PARTITIONS, STREAM, World, simulated
from tests.unit.test_exactness import OLD, ORDERS, Step, end_of, folded, histories
from tests.unit.test_shadow import Bench, Other, predicted

VERSION = "canary"
KEYS = [str(i).encode() for i in range(20_000)]


class Canary(simulation.Score):
    """It scores as the champion does, so that only the version tells who did."""

    card = SimpleNamespace(pipeline="shop", version=VERSION)


# --- who is chosen ------------------------------------------------------------------------------


@given(
    st.lists(st.binary(max_size=20) | st.none(), min_size=1),
    st.text("0123456789abcdef", min_size=1),
    st.floats(0, 100),
)
def test_the_hash_is_what_the_page_says(keys: list[bytes | None], version: str, share: float) -> None:
    def its(key: bytes | None) -> bool:
        if key is None:
            return False
        hashed = hashlib.blake2b(version.encode() + b"/" + key).digest()[:8]
        return int.from_bytes(hashed, "little") < share / 100 * 2**64

    assert chosen(keys, version, share).tolist() == [its(key) for key in keys]


def test_shares_are_met_grow_and_are_each_version_s_own() -> None:
    five, twenty, all_ = (chosen(KEYS, "5f0c", share) for share in (5, 20, 100))
    assert 0.045 < five.mean() < 0.055
    assert 0.19 < twenty.mean() < 0.21
    assert (five <= twenty).all()  # who was the canary's remains so
    assert all_.all()
    other = chosen(KEYS, "0d5a", 20)
    assert 0.03 < (twenty & other).mean() < 0.05  # 20 % of 20 %


# --- the agents ---------------------------------------------------------------------------------


class Counting(Other):
    """Tells how many rows it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score_many(self, vectors: Any) -> Any:
        self.asked.append(len(vectors))
        return super().score_many(vectors)


def by_row(model: Any, vectors: Any) -> list[float]:
    """The sums of this model may differ in the last bit between batches; those of ONNX graphs do not."""
    return [float(model.score_many(vectors[i : i + 1])[0]) for i in range(len(vectors))]


async def test_in_the_shadow_each_model_scores_what_it_did_not_decide() -> None:
    bench, canary = Bench(), Counting()
    bench.models = {"champion": simulation.Score(), "canary": canary, "challenger-x": canary}
    bench.shadow._models = bench.models
    events, mask = predicted(), np.array([True, False])
    ours, theirs = (by_row(model, events.vectors) for model in (simulation.Score(), Other()))
    events.scores[:] = theirs[0], ours[1]
    side: Any = SimpleNamespace(model=canary, mask=mask)
    whole = shadows.Predicted(**{**vars(events), "canary": side})
    bench.shadow.take(whole)
    await bench.shadow.once()
    assert canary.asked == [1]  # of two aliases once, and of one event
    found = {r.id: r for r in bench.records}
    for i, id_ in enumerate(events.ids):
        assert found[id_].champion == shadows.Scored("1", ours[i])
        assert found[id_].challengers == dict.fromkeys(
            ("canary", "challenger-x"), shadows.Scored("2", theirs[i])
        )
    ((version, scores, champion, champions),) = bench.watched
    assert (version, scores.tolist(), champion.card.version, champions.tolist()) == ("2", theirs, "1", ours)


# --- whole workers, and what befalls them -------------------------------------------------------


def misplaced(world: World, share: float) -> tuple[list[str], int]:
    """Predictions by another version than the hash says, and how many are the canary's."""
    customers: dict[int, set[bytes]] = {}
    for p in range(PARTITIONS):
        for record in world.broker.logs[TP(STREAM, p)]:
            try:
                order = json.loads(record.value or b"")
            except ValueError:
                continue
            customers.setdefault(order["ID"], set()).add(str(order["CUSTOMER"]).encode())
    made = [decode(r.value or b"") for log in world.predictions for r in log]
    made = [m for m in made if len(customers[int(m.id)]) == 1]  # an id that came twice may be of two
    its = chosen([min(customers[int(m.id)]) for m in made], VERSION, share).tolist()
    wanted = [VERSION if mine else "1" for mine in its]
    return [f"{m.version}: {m}" for m, v in zip(made, wanted, strict=True) if m.version != v], sum(its)


def lived(root: Path, steps: list[Step], share: float, canary: Any = None) -> tuple[list[str], int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(simulation.SERVING.models, "canary", canary or Canary())
        patch.setitem(simulation.SERVING.shares, "canary", share)
        with simulated(root, rocksdb=False) as world:
            found = end_of(world, steps)
            wrong, its = misplaced(world, share)
            return found + wrong, its


@settings(max_examples=max(settings().max_examples // 4, 20))
@given(histories(), st.sampled_from([30.0, 60.0]))
def test_in_every_history_an_entity_is_on_one_side(steps: list[Step], share: float) -> None:
    with TemporaryDirectory() as root:
        assert lived(Path(root), steps, share)[0] == []


@pytest.mark.parametrize("fate", [simulation.LOST, simulation.ARRIVED])
def test_a_crash_changes_no_side(tmp_path: Path, fate: str) -> None:
    steps = [("start", 0, OLD), *ORDERS, *folded(0), ("crash", 0, 0, [fate], OLD)]
    found, its = lived(tmp_path, steps, 60.0)
    assert (found, 0 < its < len(ORDERS)) == ([], True)


def test_without_the_same_salt_on_both_sides_of_a_crash_it_would_be_seen(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.score.chosen", lambda keys, version, share: chosen(keys, "other", share))
        found, _ = lived(tmp_path, [("start", 0, OLD), *ORDERS], 60.0)
    assert found


@pytest.mark.parametrize("harm", ["raises", "shape"])
def test_where_a_canary_fails_the_champion_decides(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[tuple[str, str, str]]()

    class Bad(Canary):
        def score_many(self, vectors: Any) -> Any:
            if harm == "raises":
                raise RuntimeError("no such kernel")
            return np.zeros(len(vectors) + 1, np.float32)

    def drop(alias: str, version: str, error: Exception) -> None:
        told.append((alias, version, str(error)))
        simulation.SERVING.models.pop("canary", None)

    monkeypatch.setattr(simulation.SERVING, "drop", drop)
    found, _ = lived(tmp_path, [("start", 0, OLD), *ORDERS], 100.0, Bad())
    assert told[0][:2] == ("canary", VERSION)
    assert [f for f in found if not f.startswith("1: ")] == []  # all there, once, with the champion's scores
    assert len(found) >= len(ORDERS) - 1
