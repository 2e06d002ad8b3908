"""`headrace check` against what a real Kafka holds: refused events and labels, fields, and short retention."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka.admin import NewTopic
from click.testing import CliRunner

from app import kafka
from app.cli import main
from app.local.services import Addresses
from models.partitions import partition_of
from models.pipeline import Pipeline, find
from tests.conftest import PIPELINES

pytestmark = pytest.mark.integration

DAY_MS = 86_400_000
START = 1_530_000_000_000
PARTITIONS = 4
CARDS = PIPELINES / "card-fraud.yaml"


def event(number: int, **changes: Any) -> dict[str, Any]:
    """Payments of ten customers at five terminals, one a minute."""
    return {
        "TRANSACTION_ID": number, "TX_DATETIME": START + number * 60_000, "CUSTOMER_ID": number % 10,
        "TERMINAL_ID": number % 5, "TX_AMOUNT": 10.5, **changes,
    }  # fmt: skip


def label(number: int, **changes: Any) -> dict[str, Any]:
    head = {k: v for k, v in event(number).items() if k not in ("CUSTOMER_ID", "TX_AMOUNT")}
    return head | {"TX_FRAUD": 1, "LABEL_TS": START + DAY_MS} | changes


async def publish(address: str, pipeline: Pipeline, events: list[Any], labels: list[Any]) -> None:
    """Events in the partition of their customer, but for those that say `_in`, and labels."""
    assert pipeline.labels is not None
    producer = kafka.producer(address)
    await producer.start()
    for one in events:
        key = str(one.get("CUSTOMER_ID")).encode()
        partition = (partition_of(key, PARTITIONS) + one.pop("_moved", 0)) % PARTITIONS
        await producer.send(pipeline.stream.topic, msgspec.json.encode(one), key, partition)
    for one in labels:
        await producer.send(pipeline.labels.topic, msgspec.json.encode(one), b"x")
    await producer.stop()


def report(*arguments: str, file: Path = CARDS) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(main, ["check", str(file), "--json", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, json.loads(result.stdout)["card-fraud"]


def test_against_a_topic(addresses: Addresses, tmp_path: Path) -> None:
    pipeline = find("card-fraud", PIPELINES, "check-topic")
    asyncio.run(kafka.create_topics(addresses.kafka, pipeline, PARTITIONS, 1))
    good = [event(n, CHANNEL="web") for n in range(100)]
    asyncio.run(publish(addresses.kafka, pipeline, good, [label(n, WHO="bank") for n in range(10)]))
    named = ("--as", "check-topic", "--against", "topic")

    # what the file does not name is tolerated
    code, found = report(*named)
    events, labels = found["against"]["trials"]
    assert (code, found["breaks"]) == (0, False)
    assert (events["records"], events["refused"], events["unnamed"]) == (100, 0, ["CHANNEL"])
    assert (labels["records"], labels["refused"], labels["unnamed"]) == (10, 0, ["WHO"])
    assert {e["entity"]: e["rows"] for e in found["estimates"]} == {"customer": 10.0, "terminal": 20.0}
    assert [row["verdict"] for row in found["topics"]] == ["ok"]
    assert all(log["has"] == log["made"] > log["needed"] for log in found["logs"])

    # a changed file is told what of that it would refuse, of a field that it renames, adds or retypes
    changed = tmp_path / "card-fraud.yaml"
    text = CARDS.read_text().replace(
        "TX_AMOUNT: {type: decimal, scale: 2}", "TX_AMOUNT: int\n      POS: string"
    )
    changed.write_text(text)
    code, found = report(*named, file=changed)
    events, labels = found["against"]["trials"]
    assert (code, events["refused"], labels["refused"]) == (1, 100, 0)
    assert events["never"] == ["POS"]
    assert any("TX_AMOUNT" in r["error"] or "POS" in r["error"] for r in events["refusals"])

    # and the file as it is, what producers do wrong
    bad = [
        {k: v for k, v in event(200).items() if k != "TX_AMOUNT"}, event(201, TX_AMOUNT="9"), event(202, _moved=1),
        event(203, TX_AMOUNT=0.001), event(204, TX_DATETIME=4_000_000_000_000),
    ]  # fmt: skip
    asyncio.run(publish(addresses.kafka, pipeline, bad, [label(200, TX_FRAUD=2), {"TX_FRAUD": 1}]))
    code, found = report(*named)
    events, labels = found["against"]["trials"]
    assert code == 1
    assert events["by_reason"] == dict.fromkeys(
        ("missing-field", "wrong-value", "wrong-key", "wrong-decimal", "time-ahead"), 1
    )
    assert labels["by_reason"] == {"wrong-label": 1, "missing-field": 1}

    # the newest alone are read
    asyncio.run(publish(addresses.kafka, pipeline, [event(n) for n in range(1000, 5000)], []))
    code, found = report(*named)
    assert (code, found["against"]["trials"][0]["records"]) == (1, 1000)  # the labels are as they were
    assert found["against"]["trials"][0]["refused"] == 0
    asyncio.run(kafka.delete_topics(addresses.kafka, pipeline))


def test_retention_that_is_too_short_is_told(addresses: Addresses) -> None:
    pipeline = find("card-fraud", PIPELINES, "check-kept")
    assert report("--as", "check-kept")[1]["topics"][0]["verdict"] == "skipped"  # there are no topics yet
    log = pipeline.entities[1].log

    async def make() -> None:
        async with kafka.admin(addresses.kafka) as client:
            short = {"retention.ms": str(2 * DAY_MS)}
            await client.create_topics([NewTopic(log, PARTITIONS, 1, topic_configs=short)])
        await kafka.create_topics(addresses.kafka, pipeline, PARTITIONS, 1)

    asyncio.run(make())
    code, found = report("--as", "check-kept")
    assert code == 0  # a warning: nothing that is sent is refused
    (row,) = found["topics"]
    wanted = next(kept["made"] for kept in found["logs"] if kept["topic"] == log)
    assert (row["what"], row["verdict"], row["seen"]) == (log, "warn", "keeps records for 48 h")
    assert row["remedy"] == f"set its retention.ms to {wanted}"
    assert {kept["topic"]: kept["has"] for kept in found["logs"]}[log] == 2 * DAY_MS
    shown = CliRunner().invoke(main, ["check", str(CARDS), "--as", "check-kept"], env={"COLUMNS": "200"})
    assert "keeps records for 48 h" in shown.stdout
    asyncio.run(kafka.delete_topics(addresses.kafka, pipeline))


def test_a_topic_that_is_not_there_is_told(addresses: Addresses) -> None:
    result = CliRunner().invoke(main, ["check", str(CARDS), "--as", "check-none", "--against", "topic"])
    assert result.exit_code == 1
    assert "no topic check-none.transactions" in result.stderr
