"""Dead letters: input that is none of the stream's, whole, with the reason and where it came from."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

# JSON writes a byte as up to six, and a broker takes records of a megabyte.
LARGEST = 128 * 1024


class DeadLetter(msgspec.Struct):
    """`value` and `key` are text where the bytes are UTF-8, else base64, which `encoding` says.

    `size` is the value's length in bytes; of one above LARGEST only so much is here, the rest at its origin.
    """

    pipeline: str
    reason: str
    topic: str
    partition: int
    offset: int
    timestamp: int
    key: str | None
    value: str
    encoding: str = "utf-8"
    size: int = 0


def encode(
    pipeline: str, reason: str, topic: str, partition: int, offset: int, timestamp: int,
    key: bytes | None, value: bytes | None,
) -> bytes:  # fmt: skip
    """A dead letter as JSON."""
    whole = value or b""
    kept = whole if len(whole) <= LARGEST else whole[:LARGEST].decode(errors="ignore").encode()
    encoding, (text_key, text) = "utf-8", _texts(key, kept)
    if text is None:
        encoding = "base64"
        text_key = None if key is None else base64.b64encode(key).decode()
        text = base64.b64encode(kept).decode()
    letter = DeadLetter(
        pipeline, reason, topic, partition, offset, timestamp, text_key, text, encoding, len(whole)
    )
    return msgspec.json.encode(letter)


def original(letter: DeadLetter) -> tuple[bytes | None, bytes]:
    """The record's key and value as they came."""
    read: Any = base64.b64decode if letter.encoding == "base64" else str.encode
    return (None if letter.key is None else read(letter.key)), read(letter.value)


def _texts(key: bytes | None, value: bytes) -> tuple[str | None, str | None]:
    try:
        return (None if key is None else key.decode()), value.decode()
    except UnicodeDecodeError:
        return None, None


decode = msgspec.json.Decoder(DeadLetter).decode
