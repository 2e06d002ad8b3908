"""Expressions over named columns: the transforms of a pipeline, and conditions on its events.

>>> fields = {"AT": Field("AT", "timestamp"), "CHANNEL": Field("CHANNEL", "category", values=("web", "shop"))}
>>> night = parse("hour(AT) <= 6 and CHANNEL == 'web'", fields)
>>> night.evaluate({"AT": np.array([3.6e6, 43.2e6]), "CHANNEL": np.array([0, 0])}).tolist()
[1.0, 0.0]
>>> night.uses
('AT', 'CHANNEL')

Arithmetic, comparisons, `in`, `and`, `or`, `not`, `x if c else y` and `models.functions`; all is
float64 and vectorised. What is absent is NaN, and a comparison with it is false, as in NumPy. A
text is only compared.
"""

from __future__ import annotations

import ast
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.fields import Field
from models.functions import CONSTANTS, FUNCTIONS, power
from models.windows import NULL

Columns = Mapping[str, npt.NDArray[Any]]
Evaluate = Callable[[Columns], Any]

_BINARY: dict[type, Callable[..., Any]] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.true_divide,
    ast.Mod: np.mod, ast.FloorDiv: np.floor_divide, ast.Pow: power,
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
    """`text`: what decides its value, in one normal form, so that spacing does not change a definition."""

    text: str
    uses: tuple[str, ...]
    _evaluate: Evaluate

    def evaluate(self, columns: Columns) -> npt.NDArray[np.float64]:
        """The value (n,) for each event: of the event alone, to the bit.

        columns: arrays (n,) by name: float64 with NaN where absent, times in ms; of a category or
        string the int64 column of the block.
        """
        with np.errstate(all="ignore"):
            values = self._evaluate(columns)
        return one_nan(values)


def one_nan(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """With one NaN for all: the sign of a sum of NaNs depends on where in an array they stand."""
    return np.where(np.isnan(values), np.nan, values)


def parse(text: str, fields: Mapping[str, Field]) -> Expression:
    """Compile an expression over these fields by name. Raises ExpressionError."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ExpressionError(f"it does not parse ({error.msg}); write it like 'hour(AT) <= 6'") from None
    parser = _Parser(fields)
    evaluate = parser.build(tree.body)
    if not parser.uses:
        raise ExpressionError("it uses no field, so it would be a constant; name a field")
    return Expression(ast.unparse(tree), tuple(sorted(parser.uses)), evaluate)


def names(text: str) -> set[str]:
    """What an expression names, whether that exists or not; nothing of one that does not parse."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def find(name: str, fields: Mapping[str, Field]) -> Field:
    """The field of this name. Raises ExpressionError."""
    if name not in fields:
        near = difflib.get_close_matches(name, fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
        raise ExpressionError(f"there is no {name!r}; {hint}")
    return fields[name]


class _Parser:
    """Compiles one expression; `uses` gathers the names in it."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        self.fields = fields
        self.uses: set[str] = set()

    def build(self, node: ast.expr) -> Evaluate:  # noqa: PLR0911 - one per form
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return _constant(_number(value))
            case ast.Constant(value=str() as text):
                raise ExpressionError(
                    f"the text {text!r} can only be compared with a category or a string: F == {text!r}"
                )
            case ast.Name(id=name):
                return self.number(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _apply(_BINARY[type(op)], self.build(left), self.build(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _apply(np.negative, self.build(operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _apply(np.logical_not, self.build(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.compare(node, left, op, right)
            case ast.BoolOp(op=op, values=[first, *rest]):
                result = self.build(first)
                for part in rest:
                    result = _apply(_LOGIC[type(op)], result, self.build(part))
                return result
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return _apply(np.where, self.build(test), self.build(body), self.build(orelse))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.call(name, arguments)
        raise _not_allowed(node)

    def number(self, name: str) -> Evaluate:
        if name in CONSTANTS and name not in self.fields:
            return _constant(CONSTANTS[name])
        field = find(name, self.fields)
        if field.textual:
            raise ExpressionError(
                f"{name} is a {field.type}, no number; compare it with a text: {name} == '...'"
            )
        self.uses.add(name)
        return lambda columns: np.asarray(columns[name], np.float64)

    def call(self, name: str, arguments: list[ast.expr]) -> Evaluate:
        if name not in FUNCTIONS:
            raise ExpressionError(f"there is no function {name!r}; there are {', '.join(FUNCTIONS)}")
        fewest, most = FUNCTIONS[name].arguments
        if not fewest <= len(arguments) <= most:
            form = FUNCTIONS[name].form
            raise ExpressionError(f"{name} does not take {len(arguments)} argument(s); write {form}")
        if name == "isnan" and (field := self.textual(arguments[0])):
            return self.among(field, [NULL])
        return _apply(FUNCTIONS[name].call, *map(self.build, arguments))

    def compare(self, node: ast.expr, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Evaluate:
        field = self.textual(left)
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.Tuple | ast.List) or not right.elts:
                raise ExpressionError(
                    f"{ast.unparse(node)!r} is not allowed; write what it may be: in (a, b)"
                )
            if field:
                found = self.among(field, self.codes(field, right.elts))
            else:
                found = _apply(_any_of, self.build(left), *map(self.build, right.elts))
            return found if isinstance(op, ast.In) else _apply(np.logical_not, found)
        if field and isinstance(op, ast.Eq | ast.NotEq):
            found = self.among(field, self.codes(field, [right]))
            return found if isinstance(op, ast.Eq) else _apply(np.logical_not, found)
        if type(op) in _COMPARE:
            return _apply(_COMPARE[type(op)], self.build(left), self.build(right))
        raise _not_allowed(node)

    def textual(self, node: ast.expr) -> Field | None:
        """The category or string that stands here, if one does."""
        field = self.fields.get(node.id) if isinstance(node, ast.Name) else None
        return field if field and field.textual else None

    def codes(self, field: Field, parts: Sequence[ast.expr]) -> list[int]:
        found = []
        for part in parts:
            if not isinstance(part, ast.Constant) or not isinstance(part.value, str):
                raise ExpressionError(
                    f"{field.name} is a {field.type} and compared with {ast.unparse(part)}; write a text in quotes"
                )
            if field.type == "category" and part.value not in field.values:
                raise ExpressionError(
                    f"{field.name} has no value {part.value!r}; its values are {', '.join(field.values)}"
                )
            found.append(field.code(part.value))
        return found

    def among(self, field: Field, codes: list[int]) -> Evaluate:
        """Whether the column holds one of these."""
        self.uses.add(field.name)
        return _apply(_any_of, lambda columns: columns[field.name], *(_constant(code) for code in codes))


def _any_of(x: Any, *others: Any) -> Any:
    return functools.reduce(np.logical_or, (np.equal(x, other) for other in others))


def _constant(value: float) -> Evaluate:
    return lambda columns: value


def _not_allowed(node: ast.expr) -> ExpressionError:
    return ExpressionError(
        f"{ast.unparse(node)!r} is not allowed; use fields, numbers, + - * / % ** //, one comparison at a "
        f"time, in (a, b), and, or, not, 'x if c else y', and {', '.join(FUNCTIONS)}"
    )


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ExpressionError("a number is too large for a float64; write a smaller one") from None


def _apply(function: Callable[..., Any], *parts: Evaluate) -> Evaluate:
    """In float64 at each step: booleans do not add up, and integers overflow."""
    return lambda columns: np.asarray(function(*(part(columns) for part in parts)), np.float64)
