"""The folder of models: versions whole or not at all, aliases, and files that are not what they were."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.scoring import Model, ModelError, Refused
from tables.model_folder import CHAMPION, PREVIOUS, ModelFolder
from tests.fixtures.models import SHOP, card, graph, sigmoid

VERSION = card().version
SECOND = card(version="second", golden_scores=sigmoid([0.0, 4.0]).tolist())


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """With a champion."""
    folder = ModelFolder(tmp_path)
    folder.save(graph(), card())
    folder.point("shop", CHAMPION, VERSION)
    return folder


def test_what_is_saved_is_loaded(folder: ModelFolder) -> None:
    where = folder.save(graph(), card())
    assert where == folder.root / "shop" / VERSION
    model = folder.load(SHOP)
    assert model.card == card()
    assert (where / "model.onnx").read_bytes() == graph()
    assert (where / "features.txt").read_text().split() == list(SHOP.vector)
    rows = np.array([[0.5, np.nan, 1.0]])
    assert model.score_many(rows) == Model(graph(), card(), SHOP).score_many(rows)


def test_a_version_scores_once_an_alias_names_it(folder: ModelFolder) -> None:
    folder.save(graph(2.0), SECOND, {"manifest.json": b"{}"})
    assert folder.load(SHOP).card == card()
    folder.point("shop", CHAMPION, "second")
    folder.point("shop", PREVIOUS, VERSION)
    assert folder.load(SHOP).card == SECOND
    assert folder.aliases("shop") == {CHAMPION: "second", PREVIOUS: VERSION}
    assert (folder.root / "shop" / "second" / "manifest.json").read_bytes() == b"{}"
    folder.archive("shop", VERSION)
    assert {v.version: (v.archived, v.definition) for v in folder.versions("shop")} == {
        VERSION: (True, SHOP.definition),
        "second": (False, SHOP.definition),
    }
    assert (folder.aliases("none"), folder.versions("none")) == ({}, [])


@pytest.mark.parametrize("write", range(7))
def test_a_crash_while_saving_leaves_the_old_champion(
    write: int, folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(write))

    def crashing(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    for name in ("write_bytes", "write_text", "replace"):
        monkeypatch.setattr(Path, name, crashing(getattr(Path, name)))
    with pytest.raises(KeyboardInterrupt):
        folder.save(graph(2.0), SECOND)
        folder.point("shop", CHAMPION, "second")
    monkeypatch.undo()
    assert folder.load(SHOP).card == card()
    assert set(folder.aliases("shop")) == {CHAMPION}
    # What is listed is whole, and a second try succeeds.
    assert all(folder.load(SHOP, v.version) for v in folder.versions("shop"))
    folder.save(graph(2.0), SECOND)
    assert folder.load(SHOP, "second").card == SECOND


def test_two_that_save_the_same_do_no_harm(folder: ModelFolder) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def save() -> None:
        start.wait()
        try:
            folder.save(graph(2.0), SECOND)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert folder.load(SHOP, "second").card == SECOND
    assert sorted(f.name for f in (folder.root / "shop").iterdir()) == [VERSION, CHAMPION, "second"]


def test_no_champion_is_told_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model of shop .*`headrace train --pipeline shop`"):
        ModelFolder(tmp_path).load(SHOP)


@pytest.mark.parametrize("gone", ["model.json", "model.onnx", "digest"])
def test_a_missing_file_is_named(gone: str, folder: ModelFolder) -> None:
    (folder.root / "shop" / VERSION / gone).unlink()
    with pytest.raises(Refused, match=rf"{gone} cannot be read.*`headrace train --pipeline shop`"):
        folder.load(SHOP)


@pytest.mark.parametrize("file", ["model.json", "model.onnx"])
@pytest.mark.parametrize("harm", ["truncated", "a byte", "nothing", "more"])
def test_a_file_that_is_not_what_was_written_is_refused(file: str, harm: str, folder: ModelFolder) -> None:
    path = folder.root / "shop" / VERSION / file
    whole = path.read_bytes()
    middle = len(whole) // 2
    changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes(
        {"truncated": whole[:-10], "a byte": changed, "nothing": b"", "more": whole + b" "}[harm]
    )
    with pytest.raises(Refused, match=f"{VERSION} is damaged .*; train again, or promote another") as refused:
        folder.load(SHOP)
    assert refused.value.reason == "damaged"
    folder.save(graph(), card())  # the same version, whole
    assert folder.load(SHOP).card == card()


def test_a_card_of_another_version_or_none_is_refused(folder: ModelFolder) -> None:
    files = {
        name: (folder.root / "shop" / VERSION / name).read_bytes() for name in ("model.onnx", "model.json")
    }
    folder.adopt("shop", "renamed", files)
    with pytest.raises(Refused, match=rf"renamed is damaged \(its card is of {VERSION}\)"):
        folder.load(SHOP, "renamed")
    for text in (b"", b"{", b'{"pipeline": "shop"}', b"[]", b'{"version": 3}', b"\xff"):
        folder.adopt("shop", "odd", files | {"model.json": text})
        with pytest.raises(Refused, match=r"odd is damaged .*its card cannot be read"):
            folder.load(SHOP, "odd")
    assert {v.version for v in folder.versions("shop")} == {VERSION, "renamed", "odd"}


def test_a_file_above_the_bound_is_not_read(folder: ModelFolder) -> None:
    path = folder.root / "shop" / VERSION / "model.onnx"
    with path.open("ab") as file:
        file.truncate(3 * 2**20)
    with pytest.raises(Refused, match=r"model\.onnx of .* larger than 2 MiB.*HEADRACE_MODEL_MIB") as refused:
        ModelFolder(folder.root, largest=2 * 2**20).load(SHOP)
    assert refused.value.reason == "size"
