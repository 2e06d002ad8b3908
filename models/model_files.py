"""Model files: which model is trained, how, and by which measures it is judged.

`find` reads `configs/models/NAME.yaml`, or raises `ModelFileError` with file, line, key and remedy. What a
kind's parameters are called is asked of its library (models.estimators).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import yaml

from models import estimators
from models.errors import HeadraceError

Kind = Literal["logistic_regression", "random_forest", "gradient_boosting", "xgboost", "lightgbm"]


class ModelFileError(HeadraceError):
    """`file:line: key: what is wrong; what to write instead`."""

    exit_code = 2


class ModelFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One model file. Its defaults are those of `gradient_boosting.yaml`.

    parameters: of the library's classifier, by its names. test_days: the last days of the events, for the test.
    train_days: the days before the test, and before the delay of the labels, to train on; all where it is None.
    top: how many a day can be looked at. false_positive_rate: at which the recall is told. entity: one of the
    pipeline's, by which the first `top` of a day are taken. skip_known: leave events of entities that were known as
    positive by then out of the evaluation. amount: an input of the model that a missed positive costs, and
    review_cost what looking at an event does, in the same money.
    """

    kind: Kind = "gradient_boosting"
    parameters: dict[str, Any] = {}
    seed: int = 0
    test_days: int = 14
    train_days: int | None = None
    top: int = 100
    false_positive_rate: float = 0.01
    entity: str | None = None
    skip_known: bool = False
    amount: str | None = None
    review_cost: float = 0.0


def find(name: str, folder: Path) -> ModelFile:
    """The model file of this name in the folder, or at this path if it ends in .yaml."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: this is not UTF-8; save the file as UTF-8.") from None
    except OSError as error:
        if path.parent != folder:
            raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none'}."
    raise ModelFileError(f"There is no model file {name!r} in {folder}; {hint}")


def parse(text: str, file: str = "<model>") -> ModelFile:
    """Check the text of a model file. Raises ModelFileError.

    >>> parse("kind: random_forest\\nseeds: 1", "forest.yaml")
    Traceback (most recent call last):
    models.model_files.ModelFileError: forest.yaml:2: seeds: there is no such key; did you mean seed?
    """
    try:
        data = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ModelFileError(f"{file}: {' '.join(str(error).split())}; mend the YAML.") from None
    if not isinstance(data, dict):
        raise ModelFileError(f"{file}:1: a model file is a mapping that begins with 'kind:'.")
    problem = _unknown(data) or _wrong_type(data)
    if problem is None:
        model = msgspec.convert(data, ModelFile)
        problem = _out_of_range(model) or _not_the_kind_s(model)
        if problem is None:
            return model
    key, says = problem
    raise ModelFileError(f"{file}:{_line(root, key.split('.'))}: {key}: {says}")


def _line(node: Any, path: list[str]) -> int:
    """The line of the deepest key of this path that the file has."""
    line = 1
    for part in path:
        found = [pair for pair in getattr(node, "value", []) if pair[0].value == part]
        if not found:
            break
        node, line = found[0][1], found[0][0].start_mark.line + 1
    return line


def _unknown(data: dict[Any, Any]) -> tuple[str, str] | None:
    known = [f.name for f in msgspec.structs.fields(ModelFile)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}."
            return str(key), f"there is no such key; {hint}"
    return None if "kind" in data else ("kind", f"it is missing; write one of {', '.join(get_args(Kind))}.")


def _wrong_type(data: dict[Any, Any]) -> tuple[str, str] | None:
    try:
        msgspec.convert(data, ModelFile)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        key = re.split(r"[.\[`]", where)[0]
        kinds = f"; write one of {', '.join(get_args(Kind))}." if key == "kind" else "; see docs/training.md."
        return key, message + kinds
    return None


def _out_of_range(model: ModelFile) -> tuple[str, str] | None:
    days = {key: getattr(model, key) for key in ("test_days", "train_days", "top")}
    checks = [(key, value is None or value >= 1, f"{value} is less than 1.") for key, value in days.items()]
    rate = model.false_positive_rate
    checks += [
        ("seed", 0 <= model.seed < 2**31, f"{model.seed} is not between 0 and 2147483647."),
        ("false_positive_rate", 0 < rate < 1, f"{rate} is no share between 0 and 1."),
        ("review_cost", 0 <= model.review_cost < float("inf"), f"{model.review_cost} is no amount of money."),
        ("review_cost", bool(model.amount) or not model.review_cost,
         "without an amount it is compared with nothing; write amount:, or drop it."),
        ("skip_known", bool(model.entity) or not model.skip_known,
         "it needs the entity that is known; write entity: with one of the pipeline's."),
    ]  # fmt: skip
    return next(((key, says) for key, good, says in checks if not good), None)


def _not_the_kind_s(model: ModelFile) -> tuple[str, str] | None:
    known = estimators.parameters(model.kind)
    for name in model.parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}."
            return f"parameters.{name}", f"{model.kind} takes no such parameter; {hint}"
    return None
