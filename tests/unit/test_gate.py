"""What is checked of a version before it scores: each reason is told by promote, log, metrics and show alike."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from onnx import TensorProto

from app.cli import main
from app.metrics import _of_models
from app.model_life import ModelLife
from app.serving import Serving
from models.scoring import Card, Refused
from tables.model_folder import CHAMPION, ModelFolder
from tests.fixtures.models import SHOP, SHOP_YAML, card, graph, slow_graph

FIRST = card().version
A, B, NB = SHOP.vector


def bad(**changes: Any) -> Card:
    return card(**{"version": "bad"} | changes)


# By what is wrong: the graph and card, the reason, and what the sentence says of it.
WRONG: dict[str, tuple[Callable[[], bytes], Card, str, str]] = {
    "names": (graph, bad(features=[A, "C", NB]), "features", "takes other features .*first difference: C"),
    "fewer": (graph, bad(features=[A, B]), "features", f"takes other features .*first difference: {NB}"),
    "order": (graph, bad(features=[B, A, NB]), "features", "the features in another order .*first difference: B"),
    "definition": (graph, bad(definition="f" * 16), "definition", "trained on definition ffff"),
    "input": (lambda: graph(kind=TensorProto.DOUBLE), bad(), "graph", r"takes tensor\(double\)"),
    "output": (lambda: graph(gives=TensorProto.DOUBLE), bad(), "graph", r"gives tensor\(double\)"),
    "golden": (lambda: graph(1.01), bad(), "golden", "scores its own golden vectors .* away"),
    "slow": (slow_graph, bad(golden_scores=[0.5, 0.5]), "slow", "us for an event, and 200 are allowed"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_version_that_is_not_fit_is_named_everywhere(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, of, reason, says = WRONG[wrong]
    (tmp_path / "shop.yaml").write_text(SHOP_YAML)
    for name, value in (("PIPELINES", tmp_path), ("MODELS_ROOT", tmp_path / "m"), ("MLFLOW", "off")):
        monkeypatch.setenv(f"HEADRACE_{name}", str(value))
    folder, told = ModelFolder(tmp_path / "m"), list[str]()
    life = ModelLife(SHOP, folder)
    folder.save(graph(), card())
    folder.save(made(), of)
    # 1. no alias comes to name it by promote
    life.promote(FIRST)
    for alias in (CHAMPION, "challenger-x"):
        with pytest.raises(Refused, match=says) as refused:
            life.promote("bad", alias)
        assert refused.value.reason == reason
    assert life.aliases() == {CHAMPION: FIRST}
    # 2. a worker whose alias was set past that scores on, and says so in log and metrics, once
    serving = Serving(life, 0.1, told.append)
    await serving.look()
    folder.point("shop", CHAMPION, "bad")
    await serving.look()
    await serving.look()
    assert serving.models[CHAMPION].card.version == FIRST
    (line,) = [t for t in told if "bad" in t]
    assert line.startswith(f"shop: model {FIRST} scores on. ")
    assert refused.match(says) and str(refused.value).split(" takes ")[0] in line
    assert samples(serving) >= {
        ("headrace_model_refused_total", (reason,), 1),
        ("headrace_model_refused_version", ("bad", reason), 1),
        ("headrace_model", ("shop", FIRST, SHOP.definition), 1),
    }
    # 3. show tells the same, and ends with 1
    shown = CliRunner().invoke(main, ["models", "show", "bad", "-p", "shop", "--json"])
    found = json.loads(shown.stdout)
    assert (shown.exit_code, found["reason"], found["aliases"]) == (1, reason, [CHAMPION])
    assert found["refused"].startswith("The model bad ")


def samples(serving: Serving) -> set[tuple[str, tuple[str, ...], float]]:
    """Name, labels and value of each."""
    return {
        (s.name, tuple(s.labels.values()), s.value) for family in _of_models(serving) for s in family.samples
    }


async def test_a_version_that_is_fit_is_not_in_the_way() -> None:
    serving: Any = SimpleNamespace(models={}, refusals={}, refused={}, away=None, taken_back={})
    assert not [s for s in samples(serving) if s[0].startswith("headrace_model")]
