"""Transforms: equal to the same expression in plain Python, row by row; and what is refused."""

from __future__ import annotations

import datetime as dt
import math
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.expressions import ExpressionError, names, parse
from models.fields import Field
from models.functions import FUNCTIONS, SAMPLE
from models.windows import NULL

KINDS = {"A": "decimal", "B": "int", "C": "float", "T": "timestamp", "S": "string"}
FIELDS = {
    **{name: Field(name, kind) for name, kind in KINDS.items()},
    "K": Field("K", "category", values=("web", "shop", "phone")),
}
ROWS: list[dict[str, Any]] = [
    {"A": a, "B": b, "C": c, "T": t, "S": s, "K": k}
    for a, b, c, t, s, k in [
        (1.5, 3.0, -0.25, 0.0, "a", "web"),
        (0.0, -7.0, 1e300, 1_600_000_000_000.0, "", "phone"),
        (math.nan, 2.0, math.nan, math.nan, None, None),
        (-2.75, 0.0, 0.1, 1_382_659_199_999.0, "b", "by post"),
        (2.0, 2.0, 2.0, 2.0, "a", "shop"),
    ]
]
COLUMNS: dict[str, Any] = {name: np.array([row[name] for row in ROWS]) for name in "ABCT"} | {
    name: np.array([NULL if row[name] is None else FIELDS[name].code(row[name]) for row in ROWS])
    for name in "SK"
}


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
TEXTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "(K == 'web')": lambda row: row["K"] == "web",
    "(K != 'shop')": lambda row: row["K"] != "shop",
    "(K in ('web', 'phone'))": lambda row: row["K"] in ("web", "phone"),
    "(K not in ['shop'])": lambda row: row["K"] not in ("shop",),
    "isnan(K)": lambda row: row["K"] is None,
    "(S == 'a')": lambda row: row["S"] == "a",
    "(S != '')": lambda row: row["S"] != "",
    "(S in ('b', 'c'))": lambda row: row["S"] in ("b", "c"),
    "isnan(S)": lambda row: row["S"] is None,
}
COMPARISON = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq,
    "!=": operator.ne,
}  # fmt: skip
LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
}

THREE: dict[str, Callable[..., Any]] = {
    "clip": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "bucket": lambda x, one, two: math.nan if math.isnan(x) else float(x >= one) + float(x >= two),
}

LEAVES = st.sampled_from(
    [Tree(name, lambda row, name=name: np.float64(row[name])) for name in "ABCT"]
    + [Tree(str(n), lambda row, n=n: np.float64(n)) for n in (0, 1, 2, 0.5, 3, True, False, 10**12)]
    + [Tree("pi", lambda row: np.float64(math.pi))]
    + [Tree(text, lambda row, of=of: np.float64(of(row))) for text, of in TEXTS.items()]
)


def _grown(part: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    def infix(operators: dict[str, Callable[[Any, Any], Any]]) -> st.SearchStrategy[Tree]:
        return st.builds(
            lambda op, a, b: Tree(f"({a.text} {op} {b.text})", _number(operators[op], a, b)),
            st.sampled_from(sorted(operators)), part, part,
        )  # fmt: skip

    unary = {
        "-{}": operator.neg, "(not {})": operator.not_, "abs({})": abs, "floor({})": np.floor,
        "isnan({})": math.isnan, "sqrt({})": np.sqrt, "ceil({})": np.ceil, "round({})": np.rint,
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
            lambda f, a, b, c: Tree(f"{f}({a.text}, {b.text}, {c.text})", _number(THREE[f], a, b, c)),
            st.sampled_from(sorted(THREE)), part, part, part,
        ),
        st.builds(
            lambda a, b: Tree(f"coalesce({a.text}, {b.text})", _number(lambda x, y: y if math.isnan(x) else x, a, b)),
            part, part,
        ),
        st.builds(
            lambda a, b, c: Tree(
                f"({a.text} in ({b.text}, {c.text}))", _number(lambda x, *others: any(x == o for o in others), a, b, c)
            ),
            part, part, part,
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
        ("A in (1, 1.5)", 1.0),
        ("A not in (1, 1.5)", 0.0),
        ("bucket(B, 3)", 1.0),
        ("bucket(B, 9, 3, 3.1, -1, 0)", 3.0),
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
    assert [value(f"{f}(T)", T=ms) for f in ("hour", "weekday", "minute", "month", "day_of_month")] == [
        time.hour, time.weekday(), time.minute, time.month, time.day,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["month", "day_of_month"])
def test_what_is_no_time_has_no_date(name: str) -> None:
    assert all(math.isnan(value(f"{name}(T)", T=t)) for t in (math.nan, math.inf, 1e300))
    assert value(f"{name}(T)", T=-1.0) == {"month": 12, "day_of_month": 31}[name]


@pytest.mark.parametrize("name", ["exp", "log", "log1p", "sin", "cos"])
@given(number=st.floats(1e-300, 700.0))
def test_functions_of_calculus_are_the_c_library_s(name: str, number: float) -> None:
    assert value(f"{name}(A)", A=number) == getattr(math, name)(number)


@given(
    st.floats(1e-3, 100) | st.integers(-50, 50).map(float), st.sampled_from([-1.0, 0.0, 0.5, 1.7, 2.0, 3.0])
)
def test_a_power_is_the_c_library_s(base: float, exponent: float) -> None:
    """Whether the exponent is written out or a column."""
    if (base < 0 and exponent % 1) or (base == 0 and exponent < 0):
        base = abs(base) + 1
    assert (
        value(f"A ** {exponent}", A=base) == value("A ** B", A=base, B=exponent) == math.pow(base, exponent)
    )


@pytest.mark.filterwarnings("error")
def test_outside_of_their_range_they_are_nan_or_infinite() -> None:
    texts = [
        "exp(A * 1000)",
        "log(A - 1)",
        "log(-A)",
        "log1p(-A - 1)",
        "sin(A / 0)",
        "(-A) ** 0.5",
        "0 ** -A",
    ]
    assert list(map(str, (value(t, A=1.0) for t in texts))) == [
        "inf",
        "-inf",
        "nan",
        "nan",
        "nan",
        "nan",
        "inf",
    ]


# --- the same bits wherever an event stands ----------------------------------------------------

ANY = (
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, math.nan, -math.nan, math.inf, -math.inf, 5e-324])
    | st.floats()
)
CALCULUS = st.sampled_from(["exp", "log", "log1p", "sin", "cos"])
NUMBERS = st.recursive(
    st.sampled_from(["A", "B", "C", "2", "0.5"]),
    lambda part: st.one_of(
        st.builds("{}({})".format, CALCULUS, part),
        st.builds("({} {} {})".format, part, st.sampled_from(["+", "-", "*", "/", "%", "//", "**"]), part),
        st.builds("{}({}, {})".format, st.sampled_from(["minimum", "maximum", "coalesce"]), part, part),
        st.builds("bucket({}, {}, {})".format, part, part, part),
    ),
    max_leaves=6,
)


@given(NUMBERS, st.lists(st.tuples(ANY, ANY, ANY), min_size=1, max_size=40), st.integers(0, 7))
def test_a_batch_is_its_events_one_by_one(
    text: str, rows: list[tuple[float, float, float]], ahead: int
) -> None:
    transform = parse(f"{text} + 0 * A", FIELDS)
    room = np.zeros((3, len(rows) + 8))[:, ahead : ahead + len(rows)]  # anywhere in memory
    room[:] = np.array(rows).T
    columns = dict(zip("ABC", room, strict=True))
    alone = [
        transform.evaluate({n: c[i : i + 1].copy() for n, c in columns.items()}) for i in range(len(rows))
    ]
    assert transform.evaluate(columns).tobytes() == np.concatenate(alone).tobytes(), text


@pytest.mark.parametrize("op", ["+", "*"])
def test_a_nan_has_one_sign(op: str) -> None:
    """Of two NaNs the processor keeps one or the other, by where in an array they stand."""
    transform = parse(f"A {op} B", FIELDS)
    for n in range(1, 40):
        columns = {"A": np.full(n, math.nan), "B": np.full(n, -math.nan)}
        assert transform.evaluate(columns).tobytes() == np.full(n, math.nan).tobytes()
    x = np.full(3, -math.nan)
    before = x.tobytes()
    parse("A", FIELDS).evaluate({"A": x})
    assert x.tobytes() == before, "what it is given stays as it is"


BITS = """
import hashlib, numpy as np
from models.expressions import ExpressionError, names, parse
from models.fields import Field
x = np.random.default_rng(0).lognormal(0, 3, 5000)
for f in ("exp(A)", "log(A)", "log1p(A)", "sin(A)", "cos(A)", "A ** 1.7", "A ** 2", "A / 7 % 0.7"):
    values = parse(f, {"A": Field("A", "float")}).evaluate({"A": x})
    print(f, hashlib.sha256(values.tobytes()).hexdigest())
"""


def test_processors_with_other_vector_instructions_give_the_same_bits() -> None:
    extensions = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])  # type: ignore[index, union-attr]
    runs = [
        subprocess.run(
            [sys.executable, "-c", BITS], env={**os.environ, "NPY_DISABLE_CPU_FEATURES": off},
            capture_output=True, check=True, text=True,
        ).stdout
        for off in ("", " ".join(extensions))
    ]  # fmt: skip
    assert runs[0].count("\n") == 8
    assert runs[0] == runs[1]


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
    "1 + 2": "uses no field, so it would be a constant; name a field",
    "2 * pi": "uses no field",
    "D + 1": "there is no 'D'; there are A, B, C, T, S, K",
    "AMOUNTS + 1": "there is no 'AMOUNTS'; did you mean AMOUNT?",
    "S == 1": "S is a string and compared with 1; write a text in quotes",
    "S == A": "S is a string and compared with A; write a text in quotes",
    "S + 1": "S is a string, no number; compare it with a text: S == '...'",
    "S < 'x'": "S is a string, no number",
    "hour(S)": "S is a string, no number",
    "K * 2": "K is a category, no number; compare it with a text: K == '...'",
    "K == 'wbe'": "K has no value 'wbe'; its values are web, shop, phone",
    "K in ('web', 'post')": "K has no value 'post'; its values are web, shop, phone",
    "K in ('web')": "\"K in 'web'\" is not allowed; write what it may be: in (a, b)",
    "K in ()": "'K in ()' is not allowed; write what it may be",
    "K is 'web'": "\"K is 'web'\" is not allowed",
    "A == 'x'": "the text 'x' can only be compared with a category or a string",
    "A in (1, 'x')": "the text 'x' can only be compared",
    "'web' == K": "the text 'web' can only be compared with a category or a string: F == 'web'",
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
    "tan(A)": "no function 'tan'; there are hour, minute",
    "__import__(A)": "no function '__import__'",
    "hour(A, B)": "hour does not take 2 argument(s); write hour(t)",
    "minimum(A)": "minimum does not take 1 argument(s); write minimum(x, y)",
    "bucket(A)": "bucket does not take 1 argument(s); write bucket(x, e, ...)",
    "isnan()": "isnan does not take 0 argument(s)",
    f"A + {'9' * 400}": "too large for a float64",
}


@pytest.mark.parametrize(("text", "says"), REFUSED.items(), ids=[t[:20] or "nothing" for t in REFUSED])
def test_what_is_no_transform_is_refused(text: str, says: str) -> None:
    with pytest.raises(ExpressionError) as refused:
        parse(text, FIELDS | {"AMOUNT": Field("AMOUNT", "int")} if text.startswith("AM") else FIELDS)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_s_example_is_true(name: str) -> None:
    text, expected = FUNCTIONS[name].example
    assert text.startswith(f"{name}(")
    given = {n: Field(n, "timestamp" if n == "t" else "float") for n in SAMPLE}
    (found,) = parse(text, given).evaluate({n: np.array([v]) for n, v in SAMPLE.items()}).tolist()
    assert found == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_takes_the_arguments_it_says(name: str) -> None:
    fewest, _ = FUNCTIONS[name].arguments
    assert parse(f"{name}({', '.join(['A'] * fewest)})", FIELDS).evaluate(COLUMNS).shape == (len(ROWS),)


def test_a_field_may_have_a_constant_s_name() -> None:
    fields = {"pi": Field("pi", "float")}
    assert parse("pi + 1", fields).evaluate({"pi": np.array([2.0])}).tolist() == [3.0]


def test_names_are_found_in_what_does_not_compile_too() -> None:
    assert names("LATER / abs(A) + 'B'") == {"LATER", "A", "abs"}
    assert names("A +") == set()
