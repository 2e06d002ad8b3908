"""Dead letters: input that is none of the stream's, whole, with the reason and where it came from."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from models.events import Reason

# JSON writes a byte as up to six, and a broker takes records of a megabyte: so much of a value is kept,
LARGEST = 128 * 1024
LARGEST_BESIDE = 8 * 1024  # so much of key and headers together,
LONGEST_ERROR = 1000  # and so many characters of the sentence, which may name a key of any length.

Headers = Sequence[tuple[str, bytes | None]]


class Origin(NamedTuple):
    """Where a record stood. A letter is known by it: a worker that crashed may have written it twice.

    >>> str(Origin.parse("shop.orders/3/17"))
    'shop.orders/3/17'
    """

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Origin:
        """Raises ValueError where the text is not topic/partition/offset."""
        topic, partition, offset = text.split("/")
        return cls(topic, int(partition), int(offset))


class DeadLetter(msgspec.Struct, tag_field="record", tag="letter"):
    """`value`, `key` and headers are text where all their bytes are UTF-8, else base64, which `encoding` says.

    `size` is the value's length in bytes. `cut`: not all of value, key and headers is here; the rest is
    at the origin.
    """

    pipeline: str
    reason: str
    error: str
    topic: str
    partition: int
    offset: int
    timestamp: int
    key: str | None
    headers: list[tuple[str, str | None]]
    value: str
    encoding: str = "utf-8"
    size: int = 0
    cut: bool = False

    @property
    def origin(self) -> Origin:
        return Origin(self.topic, self.partition, self.offset)


class Replayed(msgspec.Struct, tag_field="record", tag="replayed"):
    """Says in the dead letters that the letter of this origin was sent again, and where it stands now."""

    topic: str
    partition: int
    offset: int
    to_partition: int
    to_offset: int

    @property
    def origin(self) -> Origin:
        return Origin(self.topic, self.partition, self.offset)


class Original(NamedTuple):
    """A record as it came."""

    key: bytes | None
    value: bytes
    headers: Headers


def encode(
    pipeline: str, reason: Reason, origin: Origin, timestamp: int,
    key: bytes | None, value: bytes | None, headers: Headers = (),
) -> bytes:  # fmt: skip
    """A dead letter as JSON, of at most some 850 kB."""
    whole = Original(key, value or b"", headers)
    kept = _cut(whole)
    encoding = "utf-8" if all(map(_is_text, _parts(kept))) else "base64"
    text = bytes.decode if encoding == "utf-8" else _base64
    letter = DeadLetter(
        pipeline, reason.code, reason.error[:LONGEST_ERROR], *origin, timestamp,
        None if kept.key is None else text(kept.key),
        [(name, None if data is None else text(data)) for name, data in kept.headers],
        text(kept.value), encoding, len(whole.value), list(_parts(kept)) != list(_parts(whole)),
    )  # fmt: skip
    return msgspec.json.encode(letter)


def original(letter: DeadLetter) -> Original:
    """The record as it came; of a letter that was cut, what is here of it."""
    read = base64.b64decode if letter.encoding == "base64" else str.encode
    return Original(
        None if letter.key is None else read(letter.key),
        read(letter.value),
        [(name, None if text is None else read(text)) for name, text in letter.headers],
    )


def _cut(record: Original) -> Original:
    """What a letter has room for: the beginning of value and key, and whole headers as they fit."""
    key = None if record.key is None else _beginning(record.key, LARGEST_BESIDE)
    room, headers = LARGEST_BESIDE - len(key or b""), []
    for name, data in record.headers:
        room -= len(name.encode()) + len(data or b"")
        if room < 0:
            break
        headers.append((name, data))
    return Original(key, _beginning(record.value, LARGEST), headers)


def _beginning(data: bytes, most: int) -> bytes:
    """At most so many bytes, and of text no half character at the end."""
    if len(data) <= most:
        return data
    ends = (data[: most - less] for less in range(4))  # a character has up to four bytes
    return next(filter(_is_text, ends), data[:most])


def _parts(record: Original) -> Iterable[bytes]:
    yield from (record.key or b"", record.value)
    for name, data in record.headers:
        yield from (name.encode(), data or b"")


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


decode = msgspec.json.Decoder(DeadLetter | Replayed).decode
