"""Row transforms: a feature of the event alone, written as an expression over its fields.

>>> fields = {"AT": "timestamp", "AMOUNT": "decimal"}
>>> night = parse("hour(AT) <= 6", fields)
>>> night.evaluate({"AT": np.array([3_600_000, 43_200_000])}).tolist()
[1.0, 0.0]
>>> parse("log1p(AMOUNT / 2) * (weekday(AT) >= 5)", fields).uses
('AMOUNT', 'AT')

Arithmetic, comparisons, `and`, `or`, `not`, `x if c else y` and the functions below; all are float64
and vectorised. What is absent is NaN, and a comparison with it is false, as in NumPy.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Columns = Mapping[str, npt.NDArray[Any]]
Evaluate = Callable[[Columns], Any]

_MS_PER_DAY = 86_400_000


def _hour(times: Any) -> Any:
    """Hour of the day, UTC, 0 to 23."""
    return np.floor_divide(times, 3_600_000) % 24


def _weekday(times: Any) -> Any:
    """Day of the week, UTC, Monday 0 to Sunday 6 (1970-01-01 was a Thursday)."""
    return (np.floor_divide(times, _MS_PER_DAY) + 3) % 7


def _minute(times: Any) -> Any:
    """Minute of the hour, UTC, 0 to 59."""
    return np.floor_divide(times, 60_000) % 60


FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "hour": (_hour, 1),
    "weekday": (_weekday, 1),
    "minute": (_minute, 1),
    "abs": (np.abs, 1),
    "floor": (np.floor, 1),
    "log1p": (np.log1p, 1),
    "sqrt": (np.sqrt, 1),
    "minimum": (np.minimum, 2),
    "maximum": (np.maximum, 2),
    "isnan": (np.isnan, 1),
}

_BINARY: dict[type, Callable[..., Any]] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.true_divide,
    ast.Mod: np.mod, ast.FloorDiv: np.floor_divide, ast.Pow: np.power,
}  # fmt: skip
_COMPARE: dict[type, Callable[..., Any]] = {
    ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal,
    ast.Eq: np.equal, ast.NotEq: np.not_equal,
}  # fmt: skip
_LOGIC: dict[type, Callable[..., Any]] = {ast.And: np.logical_and, ast.Or: np.logical_or}


class ExpressionError(ValueError):
    """What is wrong with an expression, and what would be right."""


@dataclass(frozen=True)
class Expression:
    text: str  # in one normal form, so that spacing does not change a definition
    uses: tuple[str, ...]
    _evaluate: Evaluate

    def evaluate(self, columns: Columns) -> npt.NDArray[np.float64]:
        """The value (n,) for each event. columns: arrays (n,) by field name, NaN where absent; times in ms."""
        with np.errstate(all="ignore"):
            values: npt.NDArray[np.float64] = self._evaluate(columns)
        return values


def parse(text: str, fields: Mapping[str, str]) -> Expression:
    """Compile an expression over fields (name to type). Raises ExpressionError."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ExpressionError(f"it does not parse ({error.msg}); write it like 'hour(AT) <= 6'") from None
    uses: set[str] = set()
    evaluate = _build(tree.body, fields, uses)
    if not uses:
        raise ExpressionError("it uses no field of the stream, so it would be a constant; name a field")
    return Expression(ast.unparse(tree), tuple(sorted(uses)), evaluate)


def _build(node: ast.expr, fields: Mapping[str, str], uses: set[str]) -> Evaluate:  # noqa: PLR0911 - one per form
    def build(part: ast.expr) -> Evaluate:
        return _build(part, fields, uses)

    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            number = _number(value)
            return lambda columns: number
        case ast.Name(id=name):
            return _field(name, fields, uses)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _apply(_BINARY[type(op)], build(left), build(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _apply(np.negative, build(operand))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _apply(np.logical_not, build(operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _apply(_COMPARE[type(op)], build(left), build(right))
        case ast.BoolOp(op=op, values=[first, *rest]):
            result = build(first)
            for part in rest:
                result = _apply(_LOGIC[type(op)], result, build(part))
            return result
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _apply(np.where, build(test), build(body), build(orelse))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name not in FUNCTIONS:
                raise ExpressionError(f"there is no function {name!r}; there are {', '.join(FUNCTIONS)}")
            function, count = FUNCTIONS[name]
            if len(arguments) != count:
                raise ExpressionError(f"{name} takes {count} argument(s), not {len(arguments)}")
            return _apply(function, *map(build, arguments))
    raise ExpressionError(
        f"{ast.unparse(node)!r} is not allowed; use fields, numbers, + - * / % ** //, one comparison at a "
        f"time, and, or, not, 'x if c else y', and {', '.join(FUNCTIONS)}"
    )


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ExpressionError("a number is too large for a float64; write a smaller one") from None


def _field(name: str, fields: Mapping[str, str], uses: set[str]) -> Evaluate:
    if name not in fields:
        raise ExpressionError(f"the stream has no field {name!r}; it has {', '.join(fields)}")
    if fields[name] == "string":
        raise ExpressionError(f"{name} is a string; a transform needs numbers or timestamps")
    uses.add(name)
    return lambda columns: np.asarray(columns[name], np.float64)


def _apply(function: Callable[..., Any], *parts: Evaluate) -> Evaluate:
    """In float64 at each step: booleans do not add up, and integers overflow."""
    return lambda columns: np.asarray(function(*(part(columns) for part in parts)), np.float64)
