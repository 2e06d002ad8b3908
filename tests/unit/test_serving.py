"""A worker follows the champion of a folder: what passes scores, what does not leaves the old one at it."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from app import model_life, serving
from app.errors import RegistryError
from app.model_life import ModelLife, NotPromoted
from app.serving import Serving
from models.canary import Canary
from models.guard_rails import EVENTS, ROWS, Bounds
from models.scoring import Card, Model, ModelError, Refused
from tables.model_folder import CANARY, CHAMPION, PREVIOUS, ModelFolder
from tests.fixtures.models import SHOP, card, graph, sigmoid

FIRST = card().version


def second(**changes: Any) -> Card:
    return card(**{"version": "second", "golden_scores": sigmoid([0.0, 4.0]).tolist()} | changes)


class World:
    """A folder with a champion, and a worker that follows it."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder, self.told = folder, list[str]()
        self.life = ModelLife(SHOP, folder, row_us=1e6)
        self.serving = Serving(self.life, 0.01, self.told.append)

    def save(self, saved: Card, weight: float = 1.0) -> None:
        self.folder.save(graph(weight), saved)

    def point(self, version: str) -> None:
        """As one would who passes the gate by."""
        self.folder.point("shop", CHAMPION, version)

    async def look(self) -> None:
        """As the worker does every few seconds."""
        await self.serving.look()
        await self.serving.look_at_challengers()

    @property
    def versions(self) -> dict[str, str]:
        return {alias: model.card.version for alias, model in self.serving.models.items()}

    @property
    def scores(self) -> str:
        return self.serving.models[CHAMPION].card.version


@pytest.fixture
def world(tmp_path: Any) -> World:
    world = World(ModelFolder(tmp_path, largest=2**20))
    world.save(card())
    world.save(second(), 2.0)
    world.point(FIRST)
    return world


async def test_a_worker_changes_to_what_the_alias_names(world: World) -> None:
    await world.serving.look()
    assert (world.scores, world.serving.shown) == (FIRST, f"model {FIRST}")
    before = world.serving.models[CHAMPION]
    await world.serving.look()
    assert world.serving.models[CHAMPION] is before
    world.life.promote("second")
    await world.serving.look()
    assert world.scores == "second"
    assert world.life.rollback() == FIRST
    await world.serving.look()
    assert world.scores == FIRST
    assert len(world.told) == 3


@pytest.mark.parametrize("reason", ["features", "definition", "golden", "damaged", "size", "slow"])
async def test_what_is_refused_is_named_once_and_the_old_one_scores_on(
    world: World, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.serving.look()
    bad = {
        "features": second(version="bad", features=["B", "A", "BUYER_NB"]),
        "definition": second(version="bad", definition="f" * 16),
        "golden": second(version="bad", golden_scores=[0.5, 0.9]),
    }.get(reason, second(version="bad"))
    world.save(bad, 2.0)
    if reason == "damaged":
        (world.folder.root / "shop" / "bad" / "model.onnx").write_bytes(graph(2.0)[:-5])
    if reason == "size":
        with (world.folder.root / "shop" / "bad" / "model.onnx").open("ab") as file:
            file.truncate(world.folder.largest + 1)
    if reason == "slow":
        monkeypatch.setattr(model_life, "_row_us", lambda model: 2e6)
    with pytest.raises(Refused):
        world.life.promote("bad")
    world.point("bad")
    for _ in range(3):
        await world.serving.look()
    monkeypatch.undo()
    assert world.scores == FIRST
    assert world.serving.refusals == {reason: 1}
    refused = world.serving.refused[CHAMPION]
    assert (refused.version, refused.reason) == ("bad", reason)
    assert len([told for told in world.told if "bad" in told and f"model {FIRST} scores on" in told]) == 1
    world.point("second")
    await world.serving.look()
    assert (world.scores, world.serving.refused) == ("second", {})


async def test_what_was_refused_gets_another_chance(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.serving.look()
    path = world.folder.root / "shop" / "second" / "model.onnx"
    path.write_bytes(b"half")
    world.point("second")
    await world.serving.look()
    path.write_bytes(graph(2.0))
    await world.serving.look()
    assert world.scores == FIRST
    monkeypatch.setattr(serving, "AGAIN_S", 0.0)
    await world.serving.look()
    assert (world.scores, world.serving.refused, world.serving.refusals) == ("second", {}, {"damaged": 1})


async def test_without_a_model_it_says_why(tmp_path: Any) -> None:
    world = World(ModelFolder(tmp_path))
    await world.serving.look()
    assert world.serving.models == {}
    assert "No model of shop is the champion; run `headrace train --pipeline shop`" in world.serving.why
    world.save(second(version="bad", definition="f" * 16))
    world.point("bad")
    await world.serving.look()
    assert world.serving.models == {}
    assert "trained on definition ffff" in world.serving.why
    assert world.serving.refusals == {"definition": 1}
    world.save(card())
    assert world.life.register(FIRST, promote=False)  # none that this definition takes was there
    await world.serving.look()
    assert world.scores == FIRST


async def test_a_folder_that_cannot_be_read_stops_nothing(world: World) -> None:
    pointer = world.folder.root / "shop" / CHAMPION
    pointer.write_bytes(b"\xff")
    await world.serving.look()
    assert world.serving.models == {}
    assert "aliases in" in world.serving.why
    pointer.write_text(FIRST)
    await world.serving.look()
    pointer.write_bytes(b"\xff")
    await world.serving.look()
    assert (world.scores, world.serving.away is None) == (FIRST, False)
    pointer.write_text("../shop/second")  # no name of a version
    await world.serving.look()
    assert world.scores == FIRST
    pointer.write_text("second")
    await world.serving.look()
    assert (world.scores, world.serving.away) == ("second", None)


def test_a_trained_version_becomes_the_champion_only_when_asked(world: World) -> None:
    assert not world.life.register("second", promote=False)
    assert world.life.aliases() == {CHAMPION: FIRST}
    assert world.life.register("second", promote=True)
    assert world.life.aliases() == {CHAMPION: "second", PREVIOUS: FIRST}


def test_a_challenger_has_an_alias_of_its_own(world: World) -> None:
    world.life.promote("second", "challenger-deep")
    assert world.life.aliases() == {CHAMPION: FIRST, "challenger-deep": "second"}
    for alias in ("previous", "best", "challenger-../x"):
        with pytest.raises(NotPromoted, match="neither champion nor challenger-NAME"):
            world.life.promote("second", alias)


# --- challengers ---------------------------------------------------------------------------------


@pytest.fixture
async def shadowed(world: World) -> World:
    """It scores by the champion, and by a challenger."""
    world.life.promote("second", "challenger-deep")
    await world.look()
    return world


async def test_challengers_come_change_and_go(shadowed: World) -> None:
    assert shadowed.versions == {CHAMPION: FIRST, "challenger-deep": "second"}
    shadowed.save(second(version="third"), 2.0)
    shadowed.life.promote("third", "challenger-wide")
    shadowed.life.promote("third", "challenger-deep")
    await shadowed.look()
    assert shadowed.versions == {CHAMPION: FIRST, "challenger-deep": "third", "challenger-wide": "third"}
    assert shadowed.life.withdraw("challenger-deep") == "third"
    await shadowed.look()
    assert shadowed.versions == {CHAMPION: FIRST, "challenger-wide": "third"}
    assert shadowed.told[-1] == "shop: challenger-deep scores no more"
    for alias in (CHAMPION, "challenger-deep"):
        with pytest.raises(NotPromoted, match=f"no challenger {alias}; it has challenger-wide"):
            shadowed.life.withdraw(alias)


async def test_a_challenger_that_is_refused_does_no_harm(shadowed: World) -> None:
    """Nor does the version that its alias named before score on under its name."""
    shadowed.save(second(version="bad", definition="f" * 16), 2.0)
    shadowed.folder.point("shop", "challenger-deep", "bad")
    for _ in range(3):
        await shadowed.look()
    assert shadowed.versions == {CHAMPION: FIRST}
    refused = shadowed.serving.refused["challenger-deep"]
    assert (refused.version, refused.reason, shadowed.serving.refusals) == (
        "bad",
        "definition",
        {"definition": 1},
    )
    assert (
        len([told for told in shadowed.told if "challenger-deep does not score. The model bad" in told]) == 1
    )
    shadowed.life.withdraw("challenger-deep")
    await shadowed.look()
    assert shadowed.serving.refused == {}


async def test_a_challenger_that_fails_stops_until_its_alias_names_another(
    shadowed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "AGAIN_S", 0.0)
    shadowed.serving.drop("challenger-deep", "other", RuntimeError("of a version before"))
    assert shadowed.versions == {CHAMPION: FIRST, "challenger-deep": "second"}
    shadowed.serving.drop("challenger-deep", "second", RuntimeError("no such kernel\nand more"))
    await shadowed.look()
    assert shadowed.versions == {CHAMPION: FIRST}
    assert shadowed.serving.refusals == {"failed": 1}
    assert "failed to score (no such kernel); train another, or withdraw challenger-deep" in shadowed.told[-1]
    shadowed.save(second(version="third"), 2.0)
    shadowed.life.promote("third", "challenger-deep")
    await shadowed.look()
    assert (shadowed.versions["challenger-deep"], shadowed.serving.refused) == ("third", {})


async def test_challengers_without_a_champion_are_no_model(tmp_path: Any) -> None:
    world = World(ModelFolder(tmp_path))
    world.save(second(), 2.0)
    world.folder.point("shop", "challenger-deep", "second")
    await world.look()
    assert (world.versions, world.serving.shown) == ({"challenger-deep": "second"}, "no model")
    assert "No model of shop is the champion" in world.serving.why


async def test_a_registry_that_is_away_stops_no_challenger(shadowed: World) -> None:
    pointer = shadowed.folder.root / "shop" / CHAMPION
    pointer.write_bytes(b"\xff")
    await shadowed.look()
    assert shadowed.serving.away is not None
    assert shadowed.versions == {CHAMPION: FIRST, "challenger-deep": "second"}


# --- the canary ----------------------------------------------------------------------------------


@pytest.fixture
async def tried(world: World) -> World:
    """A canary decides for a fifth of the entities."""
    assert world.life.set_canary("second", 20) == "second"
    await world.look()
    return world


def noted(world: World, version: str = "second") -> Canary:
    found = world.folder.canary("shop", version)
    assert found is not None
    return found


async def test_a_canary_comes_grows_and_goes(tried: World) -> None:
    assert tried.versions == {CHAMPION: FIRST, CANARY: "second"}
    assert (tried.serving.shares, tried.serving.taken_back) == ({CANARY: 20}, {})
    assert tried.told[-1] == "shop: canary, second, decides for 20 % by buyer from now on"
    model = tried.serving.models[CANARY]
    tried.life.set_canary(CANARY, 50)  # by its alias
    await tried.look()
    assert (tried.serving.shares, tried.serving.models[CANARY] is model) == ({CANARY: 50}, True)
    told = len(tried.told)
    await tried.look()
    assert len(tried.told) == told
    with pytest.raises(NotPromoted, match="has no challenger challenger-x; it has canary"):
        tried.life.withdraw("challenger-x")
    assert tried.life.withdraw(CANARY) == "second"
    await tried.look()
    assert (tried.versions, tried.serving.shares) == ({CHAMPION: FIRST}, {})
    assert tried.told[-1] == "shop: canary scores no more"


async def test_another_canary_never_has_the_share_of_the_one_before(tried: World) -> None:
    tried.save(second(version="third"), 2.0)
    tried.life.set_canary("third", 7)
    await tried.look()
    assert (tried.versions[CANARY], tried.serving.shares) == ("third", {CANARY: 7})
    # one that is refused leaves none
    tried.save(second(version="bad", definition="f" * 16), 2.0)
    with pytest.raises(Refused):
        tried.life.set_canary("bad", 7)
    tried.folder.note("shop", "bad", Canary(7, 1))
    tried.folder.point("shop", CANARY, "bad")
    await tried.look()
    assert (tried.versions, tried.serving.shares) == ({CHAMPION: FIRST}, {})
    assert tried.serving.refused[CANARY].reason == "definition"


async def test_what_has_the_alias_alone_decides_nothing(world: World) -> None:
    """As one can set it in MLflow's own pages; and so does the champion."""
    world.folder.point("shop", CANARY, "second")
    await world.look()
    assert world.versions == {CHAMPION: FIRST}
    for broken in (b"{", b"\xff"):
        (world.folder.root / "shop" / "second" / "canary").write_bytes(broken)
        await world.look()
        assert (world.versions, world.serving.away) == ({CHAMPION: FIRST}, None)
    world.folder.note("shop", FIRST, Canary(7, 1))
    world.folder.point("shop", CANARY, FIRST)
    await world.look()
    assert world.versions == {CHAMPION: FIRST}
    with pytest.raises(NotPromoted, match=f"version {FIRST} is the champion"):
        world.life.set_canary(FIRST, 5)


@pytest.mark.parametrize("name", ["second", CANARY])
async def test_the_canary_that_is_promoted_is_none_any_more(tried: World, name: str) -> None:
    assert tried.life.promote(name) == "second"
    assert tried.life.aliases() == {CHAMPION: "second", PREVIOUS: FIRST}
    await tried.look()
    assert (tried.versions, tried.serving.shares) == ({CHAMPION: "second"}, {})


async def test_two_aliases_of_a_version_have_one_graph(tried: World) -> None:
    tried.life.promote("second", "challenger-deep")
    await tried.look()
    assert tried.serving.models["challenger-deep"] is tried.serving.models[CANARY]


async def test_a_canary_that_fails_is_taken_back_and_the_registry_says_why(tried: World) -> None:
    other = Serving(tried.life, 0.01, tried.told.append)
    await other.look()
    await other.look_at_challengers()
    tried.serving.drop(CANARY, "second", RuntimeError("no such kernel\nand more"))
    assert (tried.versions, tried.serving.shares) == ({CHAMPION: FIRST}, {})  # at once
    sentence = "The canary second failed to score (no such kernel)."
    assert tried.told[-1] == f"shop: {sentence} It is taken back, and decides nothing more."
    await tried.look()
    assert (noted(tried).rail, noted(tried).reason, noted(tried).share) == ("failed", sentence, 20)
    # others follow, and say so; nobody sets it again
    await other.look()
    await other.look_at_challengers()
    assert f"shop: {sentence} It was taken back by another process." in tried.told
    for serving_ in (tried.serving, other):
        await serving_.look()
        await serving_.look_at_challengers()
        assert (set(serving_.models), serving_.taken_back) == ({CHAMPION}, {"second": "failed"})
    # but people may
    tried.life.set_canary("second", 5)
    await tried.look()
    assert (tried.versions[CANARY], tried.serving.shares, tried.serving.taken_back) == (
        "second",
        {CANARY: 5},
        {},
    )


async def test_what_the_registry_does_not_hear_is_told_it_later(
    tried: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "note", lambda *_: (_ for _ in ()).throw(RegistryError("away")))
        tried.serving.drop(CANARY, "second", RuntimeError("no"))
        patch.setattr(ModelLife, "load", lambda *_: pytest.fail("it is loaded again"))
        for _ in range(3):
            await tried.look()
        assert (tried.versions, tried.serving.away) == ({CHAMPION: FIRST}, "away")
        assert noted(tried).reason is None
    await tried.look()
    assert (tried.versions, noted(tried).rail) == ({CHAMPION: FIRST}, "failed")


async def test_a_version_that_cannot_be_had_leaves_no_canary(
    tried: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the one before would have its share."""
    tried.save(second(version="third"), 2.0)
    tried.life.set_canary("third", 90)
    with monkeypatch.context() as patch:
        patch.setattr(ModelLife, "load", lambda *_: (_ for _ in ()).throw(RegistryError("away")))
        await tried.look()
        assert (tried.versions, tried.serving.shares) == ({CHAMPION: FIRST}, {})
    await tried.look()
    assert (tried.versions[CANARY], tried.serving.shares) == ("third", {CANARY: 90})


async def test_what_fails_while_its_alias_is_looked_at_is_not_set_again(
    tried: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tried.serving.models[CANARY]

    def found(alias: str, version: str) -> Any:
        tried.serving.drop(CANARY, "second", RuntimeError("no"))
        return model

    monkeypatch.setattr(tried.serving, "_challenger", found)
    await tried.serving.look_at_challengers()
    assert (tried.versions, tried.serving.shares) == ({CHAMPION: FIRST}, {})


async def test_what_is_told_late_does_not_end_what_people_have_set_since(
    tried: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried.serving.drop(CANARY, "second", RuntimeError("no"))
    tried.folder.note("shop", "second", Canary(9, noted(tried).since + 1))
    await tried.look()
    assert (tried.versions[CANARY], tried.serving.shares, noted(tried).reason) == (
        "second",
        {CANARY: 9},
        None,
    )


def of_rows(value: float, n: int) -> Any:
    return np.full((n, 3), value)


async def test_a_slow_canary_is_taken_back(tried: World) -> None:
    tried.serving._bounds = Bounds(row_us=1e-3)
    tried.life.withdraw(CANARY)
    await tried.look()
    tried.life.set_canary("second", 20)
    await tried.look()
    tried.serving.models[CANARY].score_many(of_rows(0.5, ROWS - 1))
    await tried.look()
    assert CANARY in tried.versions  # too few to say
    tried.serving.models[CANARY].score_many(of_rows(0.5, 1))
    await tried.look()
    assert (tried.versions, noted(tried).rail) == ({CHAMPION: FIRST}, "latency")
    assert f"us for an event, over {ROWS:,} events, and 0.001 are allowed" in str(noted(tried).reason)


async def test_a_canary_that_decides_otherwise_is_taken_back(tried: World) -> None:
    champion, canary = tried.serving.models[CHAMPION], tried.serving.models[CANARY]
    alike = np.linspace(0, 1, EVENTS).astype(np.float32)
    for _ in range(3):
        tried.serving.watch("second", alike, champion, alike)
        await tried.look()
        assert tried.serving.models[CANARY] is canary
    bad = np.where(alike > 0.7, np.float32(np.nan), alike)
    tried.serving.watch(
        "before", bad, champion, alike
    )  # of another that was the canary when they were asked for
    await tried.look()
    assert CANARY in tried.versions
    tried.serving.watch("second", bad, champion, alike)
    await tried.look()
    assert (tried.versions, noted(tried).rail) == ({CHAMPION: FIRST}, "scores")
    assert "has 'no number' for 30.00% of 2,000 events, of which the champion has it for 0.00%" in str(
        noted(tried).reason
    )


def test_rollback_goes_to_the_champion_before_and_back(world: World) -> None:
    with pytest.raises(NotPromoted, match="No champion of shop is known before"):
        world.life.rollback()
    world.life.promote("second")
    world.life.promote("second")  # again: nothing changes
    assert world.life.rollback() == FIRST
    assert world.life.rollback() == "second"
    assert world.life.aliases() == {CHAMPION: "second", PREVIOUS: FIRST}


def test_what_is_archived_is_promoted_no_more(world: World) -> None:
    with pytest.raises(NotPromoted, match="is the champion; promote another, or withdraw it, first"):
        world.life.archive(FIRST)
    world.life.archive("second")
    with pytest.raises(NotPromoted, match="second is archived"):
        world.life.promote("second")
    with pytest.raises(RegistryError, match="no version third of shop"):
        world.life.promote("third")


@pytest.mark.parametrize(
    ("tested", "mine", "sentence"),
    [
        ((1, 2), 0.91, None),
        ((1, 2), 0.9, r"auc 0\.9000, which does not beat the 0\.9000"),
        ((1, 2), 0.8, "does not beat"),
        ((1, 3), 0.91, "not tested on the same period"),
        (None, 0.91, "not tested on the same period"),
    ],
)
def test_a_better_one_is_asked_for(
    world: World, tested: tuple[int, int] | None, mine: float, sentence: str | None
) -> None:
    world.folder.save(graph(), card(version="old", tested=(1, 2), metrics={"auc": 0.9}))
    world.point("old")
    world.save(second(version="new", tested=tested, metrics={"auc": mine}), 2.0)
    strict = ModelLife(SHOP, world.folder, row_us=1e6, by="auc")
    if sentence is None:
        strict.promote("new")
    else:
        with pytest.raises(NotPromoted, match=sentence):
            strict.promote("new")
    assert (strict.aliases()[CHAMPION] == "new") == (sentence is None)
    world.life.promote("new")  # not asked for


def test_what_one_is_told_of_a_version(world: World) -> None:
    found = world.life.examined(CHAMPION)
    assert (found["version"], found["refused"], found["aliases"]) == (FIRST, None, [CHAMPION])
    assert found["thresholds"] == card().thresholds
    world.save(second(version="bad", definition="f" * 16))
    found = world.life.examined("bad")
    assert found["reason"] == "definition"
    assert "trained on definition ffff" in found["refused"]
    with pytest.raises(RegistryError, match="no version none of shop"):
        world.life.examined("none")


def test_the_time_of_an_event_is_measured_and_bounded(world: World) -> None:
    took = model_life._row_us(Model(graph(), card(), SHOP))
    assert 0 < took < float("inf")
    impatient = ModelLife(SHOP, world.folder, row_us=1e-9)
    with pytest.raises(Refused, match=r"takes .* us for an event, and 1e-09 are allowed") as refused:
        impatient.load(FIRST)
    assert refused.value.reason == "slow"


def test_no_champion_is_told(world: World) -> None:
    with pytest.raises(ModelError, match="No model of shop is the champion"):
        ModelLife(SHOP, ModelFolder(world.folder.root / "none")).champion()


def test_a_worker_does_not_import_mlflow() -> None:
    """It would cost seconds and some hundred MB."""
    program = "import sys, app.worker, app.cli; print('mlflow' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"
