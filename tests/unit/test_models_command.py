"""`headrace models`, on a folder alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from app.cli import main
from models.canary import Canary
from tables.model_folder import CHAMPION, ModelFolder
from tests.fixtures.models import SHOP_YAML, card, graph, sigmoid

FIRST = card().version


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFolder:
    """With two versions of which the first is the champion."""
    (tmp_path / "shop.yaml").write_text(SHOP_YAML)
    for name, value in (
        ("PIPELINES", tmp_path),
        ("MODELS_ROOT", tmp_path / "m"),
        ("DATA_ROOT", tmp_path / "d"),
    ):
        monkeypatch.setenv(f"HEADRACE_{name}", str(value))
    monkeypatch.setenv("HEADRACE_MLFLOW", "off")
    folder = ModelFolder(tmp_path / "m")
    folder.save(graph(), card())
    folder.save(graph(2.0), card(version="second", golden_scores=sigmoid([0.0, 4.0]).tolist()))
    folder.point("shop", CHAMPION, FIRST)
    return folder


def models(*words: str) -> Result:
    return CliRunner().invoke(main, ["models", *words, "--pipeline", "shop"])


def listed(*words: str) -> dict[str, Any]:
    return {row.pop("version"): row for row in json.loads(models("list", "--json", *words).stdout)}


def test_a_version_from_its_promotion_to_the_archive(folder: ModelFolder) -> None:
    assert {v: row["aliases"] for v, row in listed().items()} == {FIRST: [CHAMPION], "second": []}
    assert models("promote", "second").stdout == "second is the champion of shop\n"
    assert models("rollback").stdout == f"{FIRST} is the champion of shop\n"
    assert models("shadow", "second", "x").exit_code == 0
    assert listed()["second"]["aliases"] == ["challenger-x", "previous"]
    assert models("withdraw", "challenger-x").stdout == "second is no challenger-x of shop any more\n"
    assert listed()["second"]["aliases"] == ["previous"]
    folder.save(graph(), card(version="third"))
    assert models("archive", "third").exit_code == 0
    assert "third" not in listed()
    assert listed("--all")["third"]["archived"]
    assert "third" in models("list", "--all").stdout


def test_a_canary_from_its_share_to_its_end(folder: ModelFolder) -> None:
    assert (
        models("canary", "second", "--share", "2.5").stdout
        == "second is the canary of shop, for 2.5 % of its entities\n"
    )
    row = listed()["second"]
    assert (row["aliases"], row["canary"]["share"], "reason" in row["canary"]) == (["canary"], 2.5, False)
    assert "2.5 %" in models("list").stdout
    assert listed()[FIRST]["canary"] is None
    # a rail has taken it back
    noted = folder.canary("shop", "second")
    assert noted is not None
    folder.note("shop", "second", Canary(2.5, noted.since, "latency", "It was slow.", noted.since + 1))
    assert "second was taken back: It was slow.\n" in models("list").stdout
    assert json.loads(models("show", "canary", "--json").stdout)["canary"]["rail"] == "latency"
    assert "It was slow." in models("show", "canary").stdout
    assert (
        "version second is the canary; promote another, or withdraw it" in models("archive", "second").stderr
    )
    assert models("withdraw", "canary").stdout == "second is no canary of shop any more\n"
    assert listed()["second"]["aliases"] == []
    # who becomes the champion is none any more
    for way in (("promote", "second"), ("rollback",)):
        other = "second" if way[0] == "promote" else FIRST
        assert models("canary", other, "--share", "5").exit_code == 0
        assert models(*way).exit_code == 0
        assert "canary" not in folder.aliases("shop")
    for share in ("0", "101", "x"):
        assert models("canary", "second", "--share", share).exit_code == 2


def test_what_cannot_be_done_is_told_in_a_sentence(folder: ModelFolder) -> None:
    for words, sentence in (
        (("rollback",), "No champion of shop is known before this one"),
        (("archive", FIRST), "is the champion; promote another, or withdraw it, first"),
        (("withdraw", "challenger-x"), "shop has no challenger challenger-x; it has none."),
        (("promote", "third"), "There is no version third of shop"),
        (("show", "third"), "There is no version third of shop"),
    ):
        result = models(*words)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert sentence in result.stderr


def test_a_version_that_workers_refuse_is_shown_with_the_reason(folder: ModelFolder) -> None:
    shown = models("show", CHAMPION, "--json")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["thresholds"] == card().thresholds
    folder.save(graph(3.0), card(version="bad"))
    shown = models("show", "bad")
    assert shown.exit_code == 1
    assert "golden" in shown.stdout
    assert models("promote", "bad").exit_code == 1
    assert folder.aliases("shop") == {CHAMPION: FIRST}
