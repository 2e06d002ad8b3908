"""Transforms that are a user's Python function: found, tried out, and called like an expression.

A function takes float64 arrays (n,), NaN where absent, and returns as many numbers. It has to be
pure and may not look beyond a row, or training and serving would not agree: `load` tries that on a
sample, as `headrace check` and every start do.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.errors import HeadraceError
from models.expressions import Columns, Expression, ExpressionError, one_nan
from models.fields import Field, as_float
from models.windows import Floats

SAMPLE_ROWS = 100  # more than any vector register, and quick to try one by one


class FunctionFailed(HeadraceError):
    """A function that did on an event what it did not on the sample. It ends the worker."""


def load(name: str, inputs: Sequence[Field]) -> Expression:
    """A transform by a function, `package.module:name`, of these inputs. Raises ExpressionError."""
    function = _found(name)
    for field in inputs:
        if field.type == "string":
            raise ExpressionError(f"{field.name} is a string; a function takes numbers, times and categories")
    if not inputs:
        raise ExpressionError("inputs is empty; name what the function takes, in its order")

    def evaluate(columns: Columns) -> Floats:
        arrays = [_floats(columns[f.name], f) for f in inputs]
        try:
            return _called(function, arrays)
        except ExpressionError as error:
            raise FunctionFailed(f"The function {name} failed on an event: {error}.") from None

    _try(function, len(inputs))
    names = tuple(f.name for f in inputs)
    source = hashlib.sha256(_source(function, name).encode()).hexdigest()[:16]
    return Expression(f"{name}({', '.join(names)}) of {source}", tuple(sorted(set(names))), evaluate)


def _found(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ExpressionError(f"{name!r} names no function; write package.module:name")
    try:
        function: Any = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever a user's module does when it is imported
        raise ExpressionError(
            f"{module} cannot be imported ({_told(error)}); install it, or put its folder on PYTHONPATH"
        ) from None
    if not inspect.isfunction(function):
        raise ExpressionError(f"{module} has no function {attribute!r}; define it there with def")
    return function


def _source(function: Callable[..., Any], name: str) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        raise ExpressionError(f"the source of {name} cannot be read; define it in a file, with def") from None


def _floats(column: Any, field: Field) -> Floats:
    return as_float(column, field) if field.type == "category" else column


def _called(function: Callable[..., Any], arrays: Sequence[Floats]) -> Floats:
    """What it makes of these; they are lent, not given. Raises ExpressionError."""
    lent = [np.ascontiguousarray(a, np.float64).view() for a in arrays]
    for array in lent:
        array.flags.writeable = False
    if not len(lent[0]):
        return np.empty(0)
    try:
        with np.errstate(all="ignore"):
            result = function(*lent)
    except Exception as error:  # whatever a user's function raises
        raise ExpressionError(
            f"it raised {_told(error)}; it must take as many arrays as it has inputs, leave them as they "
            "are, and do with NaN and infinity"
        ) from None
    if not isinstance(result, np.ndarray) or result.dtype.kind not in "biuf":
        raise ExpressionError(f"it returned {_kind(result)}, not an array of numbers; return float64 (n,)")
    if result.shape != lent[0].shape:
        raise ExpressionError(
            f"it returned the shape {result.shape} for {len(lent[0])} rows; return one number for each"
        )
    return np.asarray(result, np.float64)


def _try(function: Callable[..., Any], count: int) -> None:
    """Twice on the same sample, then row by row: the same bits each time."""
    sample = _sample(count)
    before = [a.tobytes() for a in sample]
    once = one_nan(_called(function, sample)).tobytes()
    again = one_nan(_called(function, sample)).tobytes()
    if [a.tobytes() for a in sample] != before:
        raise ExpressionError("it changes its inputs; work on copies")
    if once != again:
        raise ExpressionError(
            "it gives other values for the same inputs; leave out random numbers, clocks and what it keeps"
        )
    rows = [_called(function, [a[i : i + 1] for a in sample]) for i in range(SAMPLE_ROWS)]
    if one_nan(np.concatenate(rows)).tobytes() != once:
        raise ExpressionError(
            "it gives other values for a row alone than among others; leave out sums, means and ranks over the array"
        )


def _sample(count: int) -> list[Floats]:
    """Numbers of all sizes, and those that are special; a different order for each input."""
    random = np.random.default_rng(0)
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e9, 1.6e12]
    sizes = 10.0 ** random.integers(-3, 7, SAMPLE_ROWS - len(special))
    numbers = np.concatenate([random.normal(size=len(sizes)) * sizes, special])
    return [random.permutation(numbers) for _ in range(count)]


def _kind(result: object) -> str:
    return f"an array of {result.dtype}" if isinstance(result, np.ndarray) else f"a {type(result).__name__}"


def _told(error: Exception) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
