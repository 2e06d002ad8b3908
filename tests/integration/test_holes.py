"""A record between stages that a broker acknowledged and lost: noticed, and sent again by its writer."""

import sys
from pathlib import Path

import pytest

from app import replay, session, verify
from app.local.services import Addresses
from app.settings import Settings
from models.pipeline import find

# A worker whose outbox takes some records and loses them, as if Kafka had.
LOSING = """
import sys
from agents import outbox
from app.cli import main

put_many = outbox.Outbox.put_many
seen = 0

def losing(self, topic, partitions, keys, values):
    global seen
    rows = list(zip(partitions, keys, values))
    if topic.endswith("terminal.log"):
        kept = [row for n, row in enumerate(rows, seen) if not any(a <= n < b for a, b in LOST)]
        seen += len(rows)
        rows = kept
    if rows:
        put_many(self, topic, *(list(column) for column in zip(*rows)))

outbox.Outbox.put_many = losing
sys.argv[0] = "headrace"
main()
"""


def losing(process: session.Process, *lost: tuple[int, int]) -> session.Process:
    """The worker, with an outbox that loses the records of these numbers on the way to the last log."""
    process._arguments[:3] = [sys.executable, "-c", LOSING.replace("LOST", repr(lost))]
    return process


@pytest.mark.timeout(240)
async def test_a_missing_record_is_sent_again_and_nothing_differs(
    trained: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline = find("card-fraud", trained.pipelines, "cards-holes")
    await session.fresh(trained, pipeline, addresses)
    worker = losing(session.Process(trained, pipeline, "worker"), (5000, 5001), (7000, 7300))
    tape = replay.tape(cards, pipeline, "2018-04-10", "2018-04-14")
    try:
        worker.start()
        await worker.ready()
        reader = session.Predictions(addresses.kafka, pipeline)
        async with reader.reading():
            await replay.publish(tape, pipeline, addresses.kafka, 4000)
            await reader.until(tape.events, worker.check)
        metrics = await worker.metrics()
    finally:
        worker.stop()
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    assert verdict.predictions == tape.events
    assert metrics["headrace_records_total{terminal,gap}"] > 0
    said = worker.log.read_text()
    assert "has not arrived; what came from there is sent again" in said
