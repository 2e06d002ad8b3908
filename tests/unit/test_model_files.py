"""Model files: the shipped ones are taken, and what is wrong is told with file, line, key and remedy."""

import sys
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from models import estimators
from models.model_files import Kind, ModelFile, ModelFileError, find, parse
from models.pipeline import find as find_pipeline
from models.scoring import ModelError
from tests.conftest import MODEL_FILES, PIPELINES

SHIPPED = sorted(path.stem for path in MODEL_FILES.glob("*.yaml"))


def test_there_is_one_of_each_kind() -> None:
    assert set(get_args(Kind)) == set(estimators.KINDS) <= set(SHIPPED)
    for name in get_args(Kind):
        assert find(name, MODEL_FILES).kind == name


def test_the_default_is_the_file_that_pipelines_name_by_default() -> None:
    shipped = find(find_pipeline("flight-delays", PIPELINES).model.train, MODEL_FILES)
    defaults = estimators.KINDS[shipped.kind].defaults
    library = {"max_iter": 100, "learning_rate": 0.1}  # what scikit-learn takes
    assert defaults | library == defaults | library | shipped.parameters
    assert msgspec.structs.replace(shipped, parameters={}) == ModelFile()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_taken_by_name_and_by_path(name: str, tmp_path: Path) -> None:
    assert find(name, MODEL_FILES) == find(str(MODEL_FILES / f"{name}.yaml"), tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: xgboost\nsead: 1", "m.yaml:2: sead: there is no such key; did you mean seed?"),
        ("kind: xgboost\nzzz: 1", "m.yaml:2: zzz: there is no such key; there are: kind, parameters, seed,"),
        ("seed: 1", "m.yaml:1: kind: it is missing; write one of logistic_regression,"),
        ("kind: forest", "m.yaml:1: kind: Invalid enum value 'forest'; write one of logistic_regression,"),
        ("kind: xgboost\ntest_days: many", "m.yaml:2: test_days: Expected `int`, got `str`; see docs/training.md."),
        ("kind: xgboost\n\ntest_days: 0", "m.yaml:3: test_days: 0 is less than 1."),
        ("kind: xgboost\ntrain_days: -1", "m.yaml:2: train_days: -1 is less than 1."),
        ("kind: xgboost\ntop: 0", "m.yaml:2: top: 0 is less than 1."),
        ("kind: xgboost\nseed: -1", "m.yaml:2: seed: -1 is not between 0 and"),
        ("kind: xgboost\nfalse_positive_rate: 2", "m.yaml:2: false_positive_rate: 2.0 is no share"),
        ("kind: xgboost\nreview_cost: .nan", "m.yaml:2: review_cost: nan is no amount"),
        ("kind: xgboost\nreview_cost: 5", "m.yaml:2: review_cost: without an amount"),
        ("kind: xgboost\nskip_known: true", "m.yaml:2: skip_known: it needs the entity"),
        (
            "kind: xgboost\nparameters:\n  max_depth: 3\n  max_dept: 3",
            "m.yaml:4: parameters.max_dept: xgboost takes no such parameter; did you mean max_depth?",
        ),
        (
            "kind: random_forest\nparameters: {random_state: 3}",
            "m.yaml:2: parameters.random_state: random_forest takes no such parameter; there are: bootstrap,",
        ),
        ("kind: lightgbm\nparameters: {objective: mse}", "m.yaml:2: parameters.objective: lightgbm takes no such"),
        ("- kind", "m.yaml:1: a model file is a mapping that begins with 'kind:'."),
        ("kind: [", "mend the YAML"),
        ("kind: !!python/name:os.system x", "mend the YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_file_line_key_and_remedy(text: str, says: str) -> None:
    with pytest.raises(ModelFileError) as refused:
        parse(text, "m.yaml")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no model file 'xgbost' in .*; did you mean xgboost"):
        find("xgbost", MODEL_FILES)
    with pytest.raises(ModelFileError, match="there are: cards, gradient_boosting"):
        find("zzz", MODEL_FILES)
    with pytest.raises(ModelFileError, match=r"absent\.yaml: cannot be read"):
        find(str(tmp_path / "absent.yaml"), MODEL_FILES)
    (tmp_path / "latin.yaml").write_bytes(b"kind: \xe9")
    with pytest.raises(ModelFileError, match="save the file as UTF-8"):
        find("latin", tmp_path)


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [("xgboost", "xgboost", "boosting"), ("random_forest", "sklearn.ensemble", "train")],
)
def test_without_its_library_the_extra_is_named(
    kind: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError, match=rf"pip install 'headrace\[{name}\]'"):
        parse(f"kind: {kind}")
