"""A stream's typed fields, and what a column of the int64 block holds of each.

Integers, scaled decimals and timestamps (ms) stand there as they are, categories as the place of
their value and strings, where they have a column, as a hash: NULL where absent. Floats stand there
as their bits, NaN where absent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.windows import NULL, Floats, Ints

OTHER = -1  # the code of a text that is none of a category's values


@dataclass(frozen=True)
class Field:
    """A typed field. `divisor`: how many units of the int64 column make one (100 for cents).

    `values`: of a category, in the order of their codes. `hashed`: whether a string has a column.
    """

    name: str
    type: str
    divisor: int = 1
    unit: str = "ms"
    optional: bool = False
    values: tuple[str, ...] = ()
    hashed: bool = False

    @property
    def integral(self) -> bool:
        """Whether its column is int64 (NULL where absent); a float's is float64 (NaN)."""
        return self.type in ("int", "decimal", "timestamp", "category") or self.hashed

    @property
    def textual(self) -> bool:
        """Whether it is a text, whose column of codes or hashes is compared and not calculated with."""
        return self.type in ("category", "string")

    @property
    def in_block(self) -> bool:
        """Whether the block has a column for it."""
        return self.type != "string" or self.hashed

    def code(self, text: str) -> int:
        """What stands for a text in the column of a textual field.

        >>> Field("CHANNEL", "category", values=("web", "shop")).code("shop")
        1
        """
        if self.type == "string":
            return event_id(text)
        return self.values.index(text) if text in self.values else OTHER


def event_id(value: int | str) -> int:
    """The 64-bit id of an event: an integer is its own, a string's is a hash.

    >>> event_id(42), event_id("42") == event_id("42")
    (42, True)
    """
    if isinstance(value, int):
        return value
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little", signed=True)


def joined(parts: Sequence[int | str | None]) -> int | str | None:
    """The key of an entity by the values of its key fields; null where one of them is.

    >>> joined([7]), joined(["a|b", 7]), joined(["a", None])
    (7, 'a\\\\|b|7', None)
    """
    if len(parts) == 1:
        return parts[0]
    if None in parts:
        return None
    return "|".join(str(part).replace("\\", "\\\\").replace("|", "\\|") for part in parts)


def as_float(column: Ints, field: Field) -> Floats:
    """A field's column of the block as float64, NaN where absent, in its own unit (not cents)."""
    if field.type == "float":
        return column.view(np.float64)
    values = column / field.divisor
    values[column == NULL] = np.nan
    return values


def operand(column: Ints, field: Field) -> Ints | Floats:
    """What an expression sees of a column: float64, or the codes and hashes of texts."""
    column = np.ascontiguousarray(column)
    return column if field.textual else as_float(column, field)
