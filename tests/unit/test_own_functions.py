"""A user's functions as transforms: what is taken, and each way to be refused with its remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from models.expressions import ExpressionError
from models.fields import Field
from models.own_functions import FunctionFailed, load
from models.windows import NULL

X, HOUR = Field("X", "float"), Field("HOUR", "float")
OWN = "tests.fixtures.own"


def test_a_function_takes_its_inputs_by_position() -> None:
    risk = load(f"{OWN}:risk", [X, HOUR])
    assert risk.uses == ("HOUR", "X")
    values = risk.evaluate({"X": np.array([1.0, np.nan, 3.0]), "HOUR": np.array([5.0, 7.0, 8.0])})
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, [2.0, np.nan, 3.0])


def test_truth_is_a_number() -> None:
    assert load(f"{OWN}:large", [X]).evaluate({"X": np.array([1e4, 1.0])}).tolist() == [1.0, 0.0]


def test_what_it_returns_is_its_own() -> None:
    x = np.array([1.0, 2.0])
    values = load(f"{OWN}:itself", [X]).evaluate({"X": x})
    values[0] = 5.0
    assert x.tolist() == [1.0, 2.0]
    x[1] = 7.0  # lent to the function for reading only, and still the caller's to write


def test_no_events_are_no_call() -> None:
    assert load(f"{OWN}:first", [X]).evaluate({"X": np.empty(0)}).shape == (0,)


def test_a_category_is_its_code() -> None:
    kind = Field("K", "category", values=("a", "b"))
    values = load(f"{OWN}:itself", [kind]).evaluate({"K": np.array([1, -1, NULL])})
    np.testing.assert_array_equal(values, [1.0, -1.0, np.nan])


REFUSED = {
    OWN: "'tests.fixtures.own' names no function; write package.module:name",
    ":risk": "names no function",
    "nowhere.at_all:risk": "nowhere.at_all cannot be imported (ModuleNotFoundError: No module named 'nowhere')",
    f"{OWN}:rusk": "has no function 'rusk'; define it there with def",
    f"{OWN}:constant": "has no function 'constant'",
    f"{OWN}:ufunc": "has no function 'ufunc'",
    f"{OWN}:generated": "the source of tests.fixtures.own:generated cannot be read; define it in a file",
    f"{OWN}:risk": "it raised TypeError: risk() missing 1 required positional argument: 'hour'; it must take as many",
    f"{OWN}:changes": "it changes its inputs; work on copies",
    f"{OWN}:writes": "read-only; it must take as many arrays as it has inputs, leave them as they are",
    f"{OWN}:random": "other values for the same inputs; leave out random numbers",
    f"{OWN}:remembers": "other values for the same inputs",
    f"{OWN}:ranks": "other values for a row alone than among others; leave out sums",
    f"{OWN}:centred": "other values for a row alone",
    f"{OWN}:total": "it returned a float64, not an array of numbers",
    f"{OWN}:texts": "it returned an array of <U32, not an array of numbers",
    f"{OWN}:rows": "it returned a list, not an array of numbers; return float64 (n,)",
    f"{OWN}:pair": "it returned the shape (2, 100) for 100 rows; return one number for each",
    f"{OWN}:strict": "it raised OverflowError: cannot convert float infinity to integer; it must",
}


@pytest.mark.parametrize(("name", "says"), REFUSED.items(), ids=[n.rpartition(":")[2] or n for n in REFUSED])
def test_what_is_no_good_function_is_refused(name: str, says: str) -> None:
    with pytest.raises(ExpressionError) as refused:
        load(name, [X])
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_inputs_are_numbers_and_there_are_some() -> None:
    with pytest.raises(ExpressionError, match="inputs is empty; name what the function takes"):
        load(f"{OWN}:risk", [])
    with pytest.raises(ExpressionError, match="S is a string; a function takes numbers"):
        load(f"{OWN}:risk", [X, Field("S", "string")])


def test_a_function_that_fails_later_is_told_by_name() -> None:
    late = load(f"{OWN}:small_only", [X])
    assert late.evaluate({"X": np.array([1.0])}).tolist() == [1.0]
    with pytest.raises(
        FunctionFailed,
        match=r"^The function tests\.fixtures\.own:small_only failed on an event: it raised KeyError: .*\.$",
    ):
        late.evaluate({"X": np.array([7.25])})


def test_its_text_holds_name_inputs_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def text(source: str, *inputs: Field) -> str:
        monkeypatch.delitem(sys.modules, "my_own", raising=False)
        (tmp_path / "my_own.py").write_text(source)
        return load("my_own:f", inputs).text

    plain = "def f(x):\n    return x + 1\n"
    texts = [
        text(plain, X), text(plain, HOUR), text("def f(x, y):\n    return x + y\n", X, HOUR),
        text("def f(x, y):\n    return x + y\n", HOUR, X), text("def f(x):\n    return x + 2\n", X),
    ]  # fmt: skip
    assert len(set(texts)) == len(texts)
    assert text(f"import math\n\n\n{plain}\ndef g():\n    pass\n", X) == texts[0]
    assert texts[0].startswith("my_own:f(X) of ")


def test_a_module_that_ends_itself_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_own.py").write_text("raise RuntimeError('no licence')\n")
    with pytest.raises(ExpressionError, match=r"cannot be imported \(RuntimeError: no licence\)"):
        load("broken_own:f", [X])
