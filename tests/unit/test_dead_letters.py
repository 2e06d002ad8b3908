"""Dead letters: bad input comes back as it came."""

from __future__ import annotations

import base64
import json

from hypothesis import given
from hypothesis import strategies as st

from models.dead_letters import LARGEST, decode, encode, original

BYTES = st.binary(max_size=30) | st.text(max_size=10).map(str.encode)


@given(st.none() | BYTES, BYTES)
def test_key_and_value_come_back_as_they_came(key: bytes | None, value: bytes) -> None:
    assert original(decode(encode("shop", "why", "t", 0, 1, 2, key, value))) == (key, value)


def test_a_letter_says_where_it_came_from_and_why() -> None:
    assert json.loads(encode("shop", "no JSON", "raw", 3, 2**40, 1_600_000_000_000, b"k", b"hello")) == {
        "pipeline": "shop", "reason": "no JSON", "topic": "raw", "partition": 3, "offset": 2**40,
        "timestamp": 1_600_000_000_000, "key": "k", "value": "hello", "encoding": "utf-8", "size": 5,
    }  # fmt: skip


def test_what_is_no_text_is_base64_and_says_so() -> None:
    for key, value in [(b"k", b"\xff\x00"), (b"\xff", b"text"), (None, b"\xc3")]:
        letter = decode(encode("shop", "why", "t", 0, 1, 2, key, value))
        assert letter.encoding == "base64"
        assert base64.b64decode(letter.value) == value
        assert (letter.key is None) == (key is None)


def test_a_record_of_nothing_is_empty() -> None:
    letter = decode(encode("shop", "the record is empty", "t", 0, 1, 2, None, None))
    assert (letter.value, letter.key, letter.encoding) == ("", None, "utf-8")
    assert original(letter) == (None, b"")


def test_a_value_above_the_bound_is_cut_and_says_its_size() -> None:
    for whole in (b'"' * (LARGEST + 5), b"\xff" * (LARGEST + 5), "é".encode() * LARGEST):
        raw = encode("p", "too large", "t", 0, 1, 2, b"k", whole)
        letter = decode(raw)
        assert letter.size == len(whole)
        assert len(raw) < 1_000_000
        assert whole.startswith(original(letter)[1][:1000])
