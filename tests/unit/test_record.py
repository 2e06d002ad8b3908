"""What the agent of the ledger makes of records: rows, each once, and how far that goes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from agents.record import Recorder
from models.predictions import Place
from models.streams import Stream
from tables.ledger.writing import DAY_MS
from tests.fixtures.logs import log
from tests.fixtures.pipelines import shop

PIPELINE = shop("lateness: 1h", "lateness: 1h\nreversals: {known: GONE, keys: ledger}")
NOW = 1_600_000_000_000 + DAY_MS
PREDICTIONS = PIPELINE.predictions
assert PIPELINE.labels is not None and PIPELINE.reversals is not None


def made(id: int | str, origin: int, **more: Any) -> bytes:
    fields = {
        "id": id, "event_time": 5, "score": 0.5, "decision": "pass", "model": "shop", "version": "1", "definition": "d",
        "late": False, "degraded": True, "origin": {"partition": 0, "offset": origin}, "keys": {"shop": None},
        "features": {"AMOUNT": 1.50},
    }  # fmt: skip
    return json.dumps(fields | more).encode()


def rows(recorder: Recorder, topic: str, values: list[bytes], place: Place | None = None) -> Any:
    place = place or Place(0)
    return recorder.rows({(topic, 0): log(values)}, {(topic, 0): place}, NOW)


def test_a_prediction_is_a_row_once() -> None:
    recorder = Recorder(PIPELINE, 90)
    found = rows(recorder, PREDICTIONS, [made(1, 7), made(2, 8), made(1, 7), b"{", made(2, 8), made(3, 9)])
    assert [row[2:5] for row in found.predictions] == [(7, 1, "1"), (8, 2, "2"), (9, 3, "3")]
    assert found.predictions[0][-2:] == ('{"shop":null}', '{"AMOUNT": 1.5}')
    move = found.moves[PREDICTIONS, 0]
    assert (move.before, move.after) == (Place(0), Place(6, 9))
    assert (recorder.dropped, recorder.foreign) == (2, 1)
    assert rows(recorder, PREDICTIONS, [made(2, 8), made(3, 9)], Place(0, 9)).predictions == []


def test_an_id_is_known_by_its_64_bits_and_kept_as_it_is() -> None:
    (row,) = rows(Recorder(PIPELINE, 90), PREDICTIONS, [made("a\0b", 0)]).predictions
    stream: Stream = PIPELINE.stream
    assert (row[3], row[4]) == (stream.identity("a\0b"), "a\ufffdb")


def test_labels_and_reversals_need_not_say_more_than_the_id() -> None:
    assert PIPELINE.labels is not None and PIPELINE.reversals is not None
    recorder = Recorder(PIPELINE, 90)
    whole = {"ID": 1, "AT": 9, "SHOP": "a", "RETURNED": 0, "KNOWN": 5}
    values = [
        json.dumps(x).encode()
        for x in (whole, whole | {"RETURNED": None}, {"ID": 1, "RETURNED": 1, "KNOWN": 5})
    ]
    sent = 1_600_000_000_000
    found = rows(recorder, PIPELINE.labels.topic, values)
    assert found.labels == [(sent, False, 0, 0, 1, 9, 0, 5), (sent, False, 0, 1, 1, 9, None, 5)]
    assert recorder.foreign == 1  # of this stream the keys are carried
    found = rows(recorder, PIPELINE.reversals.topic, [b'{"ID": 1, "GONE": -3}'])
    assert found.labels == [(sent, True, 0, 0, 1, None, None, None)]


def test_what_was_sent_too_long_ago_is_left_out() -> None:
    recorder = Recorder(PIPELINE, 1)
    found = recorder.rows({(PREDICTIONS, 0): log([made(1, 1)])}, {(PREDICTIONS, 0): Place(0)}, NOW + 1)
    assert (found.predictions, recorder.expired, found.moves[PREDICTIONS, 0].after) == ([], 1, Place(1, 1))


def test_a_worker_does_not_load_what_only_the_ledger_needs() -> None:
    look = (
        "import sys, app.worker; print([m for m in ('asyncpg', 'sqlalchemy', 'alembic') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
