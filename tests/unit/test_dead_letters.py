"""Dead letters: bad input comes back as it came."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.dead_letters import (
    LARGEST,
    LARGEST_BESIDE,
    DeadLetter,
    Origin,
    Original,
    Replayed,
    decode,
    encode,
    original,
)
from models.events import Reason

BYTES = st.binary(max_size=30) | st.text(max_size=10).map(str.encode)
HEADERS = st.lists(st.tuples(st.text(max_size=5), st.none() | BYTES), max_size=3)
WHY = Reason("not-json", "no JSON")
ORIGIN = Origin("raw", 3, 2**40)


def letter(key: bytes | None, value: bytes | None, headers: Any = (), why: Reason = WHY) -> DeadLetter:
    found = decode(encode("shop", why, ORIGIN, 1_600_000_000_000, key, value, headers))
    assert isinstance(found, DeadLetter)
    return found


@given(st.none() | BYTES, BYTES, HEADERS)
def test_a_record_comes_back_as_it_came(
    key: bytes | None, value: bytes, headers: list[tuple[str, bytes | None]]
) -> None:
    found = letter(key, value, headers)
    assert (original(found), found.cut) == (Original(key, value, headers), False)


def test_a_letter_says_where_it_came_from_and_why() -> None:
    raw = encode("shop", WHY, ORIGIN, 1_600_000_000_000, b"k", b"hello", [("trace", b"7"), ("no", None)])
    assert json.loads(raw) == {
        "record": "letter", "pipeline": "shop", "reason": "not-json", "error": "no JSON", "topic": "raw",
        "partition": 3, "offset": 2**40, "timestamp": 1_600_000_000_000, "key": "k",
        "headers": [["trace", "7"], ["no", None]], "value": "hello", "encoding": "utf-8", "size": 5, "cut": False,
    }  # fmt: skip


def test_a_letter_and_its_replay_are_told_apart_and_have_one_origin() -> None:
    mark = decode(msgspec.json.encode(Replayed(*ORIGIN, 1, 12)))
    assert isinstance(mark, Replayed)
    assert mark.origin == letter(None, b"x").origin == Origin.parse("raw/3/1099511627776")


@pytest.mark.parametrize("text", ["", "raw", "raw/3", "raw/x/1", "a/raw/3/1"])
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(ValueError):
        Origin.parse(text)


def test_what_is_no_text_is_base64_and_says_so() -> None:
    for key, value, header in [
        (b"k", b"\xff\x00", b"h"), (b"\xff", b"text", b"h"), (None, b"\xc3", b"h"), (b"k", b"text", b"\xff"),
    ]:  # fmt: skip
        found = letter(key, value, [("h", header)])
        assert found.encoding == "base64"
        assert base64.b64decode(found.value) == value
        assert (found.key is None) == (key is None)
        assert original(found) == (key, value, [("h", header)])


def test_a_record_of_nothing_is_empty() -> None:
    found = letter(None, None)
    assert (found.value, found.key, found.encoding, found.headers) == ("", None, "utf-8", [])
    assert original(found) == (None, b"", [])


def test_a_value_above_the_bound_is_cut_and_says_its_size() -> None:
    for whole in (b"\x00" * (LARGEST + 5), b"\xff" * (LARGEST + 5), b"x" + "\u00e9".encode() * LARGEST):
        found = letter(b"k", whole)
        assert (found.size, found.cut) == (len(whole), True)
        assert whole.startswith(original(found).value)
        assert LARGEST - 4 < len(original(found).value) <= LARGEST
    assert letter(b"k", b"x" * LARGEST).cut is False


def test_key_headers_and_sentence_are_bounded_too_whatever_is_in_them() -> None:
    big = b"\x00" * 700_000
    for key, headers in [
        (big, []), (b"k", [("h", big)]), (b"k", [("a", b"1"), ("\x00" * 9000, b""), ("b", b"2")]),
        (b"k", [("h", b"\x00" * 100)] * 5000),
    ]:  # fmt: skip
        why = Reason("wrong-key", "\x00" * 10**6)
        raw = encode("shop", why, ORIGIN, 0, key, big, headers)
        assert len(raw) < 1_000_000
        found = decode(raw)
        kept = original(found)
        assert found.cut
        assert key.startswith(kept.key)
        assert kept.headers == headers[: len(kept.headers)]  # whole ones
    found = letter(b"k" * LARGEST_BESIDE, b"v", [("h", None)])
    assert (found.cut, found.headers) == (True, [])
