"""Transforms: equal to the same expression in plain Python, row by row; and what is refused."""

from __future__ import annotations

import datetime as dt
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.expressions import FUNCTIONS, ExpressionError, parse

FIELDS = {"A": "decimal", "B": "int", "C": "float", "T": "timestamp", "S": "string"}
ROWS = [
    {"A": a, "B": b, "C": c, "T": t}
    for a, b, c, t in [
        (1.5, 3.0, -0.25, 0.0),
        (0.0, -7.0, 1e300, 1_600_000_000_000.0),
        (math.nan, 2.0, math.nan, math.nan),
        (-2.75, 0.0, 0.1, 1_382_659_199_999.0),
        (2.0, 2.0, 2.0, 2.0),
    ]
]
COLUMNS = {name: np.array([row[name] for row in ROWS]) for name in "ABCT"}


def value(text: str, **fields: float) -> float:
    (result,) = parse(text, FIELDS).evaluate({k: np.array([v]) for k, v in fields.items()}).tolist()
    return float(result)


# --- the oracle: the same tree, in float64, one row at a time ----------------------------------


@dataclass(frozen=True)
class Tree:
    text: str
    of: Callable[[dict[str, Any]], Any]


def _number(f: Callable[..., Any], *parts: Tree) -> Callable[[dict[str, Any]], Any]:
    return lambda row: np.float64(f(*(p.of(row) for p in parts)))


ARITHMETIC = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "%": operator.mod, "//": operator.floordiv,
}  # fmt: skip
COMPARISON = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
    "!=": operator.ne,
}  # fmt: skip
LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
}

LEAVES = st.sampled_from(
    [Tree(name, lambda row, name=name: np.float64(row[name])) for name in "ABCT"]
    + [Tree(str(n), lambda row, n=n: np.float64(n)) for n in (0, 1, 2, 0.5, 3, True, False, 10**12)]
)


def _grown(part: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    def infix(operators: dict[str, Callable[[Any, Any], Any]]) -> st.SearchStrategy[Tree]:
        return st.builds(
            lambda op, a, b: Tree(f"({a.text} {op} {b.text})", _number(operators[op], a, b)),
            st.sampled_from(sorted(operators)), part, part,
        )  # fmt: skip

    unary = {
        "-{}": operator.neg, "(not {})": operator.not_, "abs({})": abs, "floor({})": np.floor,
        "isnan({})": math.isnan, "sqrt({})": np.sqrt,
    }  # fmt: skip
    return st.one_of(
        infix(ARITHMETIC),
        infix(COMPARISON),
        infix(LOGIC),
        st.builds(
            lambda f, a: Tree(f.format(f"({a.text})"), _number(unary[f], a)),
            st.sampled_from(sorted(unary)), part,
        ),
        st.builds(
            lambda f, a, b: Tree(f"{f}({a.text}, {b.text})", _number(getattr(np, f), a, b)),
            st.sampled_from(["minimum", "maximum"]), part, part,
        ),
        st.builds(
            lambda a, c, b: Tree(
                f"({a.text} if {c.text} else {b.text})", _number(lambda x, y, z: x if y else z, a, c, b)
            ),
            part, part, part,
        ),
    )  # fmt: skip


TREES = st.recursive(LEAVES, _grown, max_leaves=8)


@given(TREES)
def test_a_transform_is_the_same_expression_row_by_row(tree: Tree) -> None:
    # a field first, for what has none is refused
    text = f"{tree.text} + 0 * B"
    transform = parse(text, FIELDS)
    with np.errstate(all="ignore"):
        expected = [float(tree.of(row) + 0 * np.float64(row["B"])) for row in ROWS]
    values = transform.evaluate(COLUMNS)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, expected, err_msg=text)
    assert parse(transform.text, FIELDS).text == transform.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(A > 0) + (B > 0)", 2.0),
        ("(A > 0) - (B > 0)", 0.0),
        ("-(A > 0)", -1.0),
        ("log1p(A > 0)", math.log1p(1.0)),
        ("sqrt((A > 0) + (B > 0))", math.sqrt(2.0)),
        ("A ** 2", 2.25),
        ("B * 2 ** -1", 1.5),
        ("B ** 0.5", math.sqrt(3.0)),
        ("B * 1000000000000000000000000", 3e24),
        ("log1p(A)", math.log1p(1.5)),
        ("minute(T) + 0 * A", 40.0),
    ],
)
def test_numbers_are_float64_at_each_step(text: str, expected: float) -> None:
    """A boolean adds up, a power may be negative, nothing overflows."""
    assert value(text, A=1.5, B=3.0, T=1_600_000_800_000.0) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("op", "truths"),
    [("<", "100"), ("<=", "110"), (">", "001"), (">=", "011"), ("==", "010"), ("!=", "101")],
)
def test_comparisons_at_their_edges(op: str, truths: str) -> None:
    assert [value(f"A {op} 2", A=a) for a in (1.0, 2.0, 3.0)] == [float(t) for t in truths]


def test_what_is_absent_is_nan_and_compares_as_false() -> None:
    nan = math.nan
    assert math.isnan(value("A + B", A=nan, B=1.0))
    assert math.isnan(value("hour(T)", T=nan))
    assert [value(f"A {op} 1", A=nan) for op in ("<", "<=", ">", ">=", "==")] == [0.0] * 5
    assert value("isnan(A)", A=nan) == 1.0
    assert value("0 if isnan(A) else A", A=nan) == 0.0


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_division_by_zero() -> None:
    assert value("A / B", A=1.0, B=0.0) == math.inf
    assert math.isnan(value("A % B", A=1.0, B=0.0))
    assert math.isnan(value("sqrt(A)", A=-1.0))


TIMES = st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2099, 12, 31)).map(
    lambda t: t.replace(tzinfo=dt.UTC)
)


@given(TIMES)
def test_hours_weekdays_and_minutes_are_the_calendar_s(time: dt.datetime) -> None:
    ms = float((time - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1))
    assert [value(f"{f}(T)", T=ms) for f in ("hour", "weekday", "minute")] == [
        time.hour, time.weekday(), time.minute,
    ]  # fmt: skip


def test_spelling_does_not_matter_and_fields_are_known() -> None:
    one, other = parse("hour( T )<=6 and (B>1)", FIELDS), parse("  hour(T) <= 6 and B > 1\n", FIELDS)
    assert one.text == other.text == "hour(T) <= 6 and B > 1"
    assert one.uses == ("B", "T")
    assert parse("hour(T) <= 7", FIELDS).text != parse("hour(T) <= 6", FIELDS).text


REFUSED = {
    "": "does not parse",
    "A +": "does not parse (invalid syntax); write it like 'hour(AT) <= 6'",
    "A; B": "does not parse",
    "A = 1": "does not parse",
    "1 + 2": "uses no field of the stream",
    "D + 1": "no field 'D'; it has A, B, C, T, S",
    "S == 1": "S is a string; a transform needs numbers",
    "A == 'x'": "'x'\" is not allowed",
    "A < B < 3": "'A < B < 3' is not allowed; use fields, numbers",
    "A + 1j": "'1j' is not allowed",
    "+A": "'+A' is not allowed",
    "~A": "'~A' is not allowed",
    "A @ B": "'A @ B' is not allowed",
    "A in B": "'A in B' is not allowed",
    "A is B": "'A is B' is not allowed",
    "A.real": "'A.real' is not allowed",
    "A[0]": "'A[0]' is not allowed",
    "[A]": "'[A]' is not allowed",
    "lambda: A": "'lambda: A' is not allowed",
    "(A := B)": "'(A := B)' is not allowed",
    "abs(*A)": "'*A' is not allowed",
    "abs(A, x=B)": "'abs(A, x=B)' is not allowed",
    "A.abs(B)": "'A.abs(B)' is not allowed",
    "exp(A)": "no function 'exp'; there are hour, weekday",
    "__import__(A)": "no function '__import__'",
    "hour(A, B)": "hour takes 1 argument(s), not 2",
    "minimum(A)": "minimum takes 2 argument(s), not 1",
    f"A + {'9' * 400}": "too large for a float64",
}


@pytest.mark.parametrize(("text", "says"), REFUSED.items(), ids=[t[:20] or "nothing" for t in REFUSED])
def test_what_is_no_transform_is_refused(text: str, says: str) -> None:
    with pytest.raises(ExpressionError) as refused:
        parse(text, FIELDS)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_takes_the_arguments_it_says(name: str) -> None:
    arguments = ", ".join(["A"] * FUNCTIONS[name][1])
    assert parse(f"{name}({arguments})", FIELDS).evaluate(COLUMNS).shape == (len(ROWS),)
