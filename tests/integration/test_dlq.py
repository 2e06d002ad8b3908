"""Dead letters that are sent again: repaired events count once, and predictions equal the offline fold."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from app import dlq, kafka, verify
from app.local.services import Addresses
from app.settings import Settings
from models.dead_letters import LARGEST, encode
from models.events import Reason
from models.partitions import partition_of
from models.pipeline import Pipeline
from tests.integration.test_stream import Run, running

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240, func_only=True)]

MINUTE = 60_000
START = 1_530_000_000_000


def event(number: int, **changes: Any) -> dict[str, Any]:
    """Payments of ten customers at five terminals, one a minute."""
    return {
        "TRANSACTION_ID": number, "TX_DATETIME": START + number * MINUTE, "CUSTOMER_ID": number % 10,
        "TERMINAL_ID": number % 5, "TX_AMOUNT": 10.0 + number, **changes,
    }  # fmt: skip


async def command(run: Run, *arguments: str, stdin: bytes = b"") -> tuple[int, list[str]]:
    """`headrace dlq` on the run's instance. Its exit code and what it printed."""

    def call() -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "dlq", *arguments, "-p", "card-fraud", "--as", run.pipeline.instance],
            input=stdin, env=os.environ | {"COLUMNS": "200"}, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        printed = (done.stdout + done.stderr).decode()
        assert "Traceback" not in printed, printed
        return done.returncode, printed.splitlines()

    return await asyncio.to_thread(call)


async def letters_of(run: Run, count: int) -> list[dlq.Letter]:
    """The letters, once there are so many."""
    async with asyncio.timeout(30):
        while True:
            run.worker.check()
            found = await dlq.read(run.pipeline, run.addresses.kafka, dlq.Wanted())
            if len(found) >= count:
                assert len(found) == count
                return found
            await asyncio.sleep(0.1)


def elsewhere(key: bytes) -> int:
    """A partition of four in which a key does not belong."""
    return (partition_of(key, 4) + 1) % 4


async def records(address: str, topic: str) -> int:
    return len([r async for r in kafka.read_between(address, topic)])


async def test_repaired_events_count_once(trained: Settings, addresses: Addresses) -> None:
    broken = {
        7: msgspec.json.encode({k: v for k, v in event(7).items() if k != "TX_AMOUNT"}),
        18: msgspec.json.encode(event(18))[:-3] + b"\xff",
        29: msgspec.json.encode(event(29, TX_AMOUNT="39")),
        39: msgspec.json.encode(event(39)),  # in the wrong partition
        55: msgspec.json.encode(
            event(55, NOTE="x" * 600_000)
        ),  # larger than an event may be, and than a letter
    }
    async with running(trained, addresses, "card-fraud", "cards-letters") as run:
        stream = run.pipeline.stream.topic
        producer = kafka.producer(addresses.kafka)
        await producer.start()
        headers = [("trace", b"7"), ("raw", b"\x00\xff")]
        for number in range(120):
            key = str(number % 10).encode()
            partition = elsewhere(key) if number == 39 else partition_of(key, 4)
            value = broken.get(number, msgspec.json.encode(event(number)))
            await producer.send(stream, value, key=key, partition=partition, headers=headers)
        await producer.flush()
        await run.predicted(115)
        letters = {x.letter.reason: x for x in await letters_of(run, 5)}
        assert set(letters) == {"missing-field", "not-json", "wrong-value", "wrong-key", "too-large"}
        origins = {reason: str(x.origin) for reason, x in letters.items()}

        # A worker that crashed writes a letter twice: it counts once.
        twice = letters["missing-field"]
        await producer.send_and_wait(
            run.pipeline.dead_letters, msgspec.json.encode(twice.letter), key=b"", partition=twice.home
        )
        await producer.send_and_wait(run.pipeline.dead_letters, b"written by hand", key=b"", partition=0)
        await producer.stop()
        code, lines = await command(run, "list")
        assert code == 0
        assert [line.split() for line in lines[-5:]] == [["1", reason] for reason in
                [x.letter.reason for x in await letters_of(run, 5)]]  # fmt: skip
        assert sum(origins["missing-field"] in line for line in lines) == 1
        code, lines = await command(run, "list", "--json", "--reason", "wrong-key", "--since", "2026-01-01")
        (shown,) = map(json.loads, lines)
        assert (shown["reason"], shown["replayed"], shown["partition"]) == (
            "wrong-key",
            False,
            elsewhere(b"9"),
        )
        assert (await command(run, "list", "--json", "--since", "2099-01-01"))[1] == []
        assert len((await command(run, "list", "--json", "--limit", "2"))[1]) == 2

        code, lines = await command(run, "show", origins["not-json"])
        assert "   header  trace: 7" in lines and "   header  raw: 00ff" in lines
        assert lines[-1].replace(" ", "") == broken[18].hex()
        code, lines = await command(run, "show", origins["too-large"])
        assert lines[-1].encode() == broken[55]  # from its origin

        # Bytes that would be refused again are not sent, and a dry run sends nothing.
        before = await records(addresses.kafka, stream)
        code, lines = await command(run, "replay", "--all", "--dry-run")
        assert code == 1
        assert sum("would be refused again" in line for line in lines) == 4
        assert sum("would go to partition" in line for line in lines) == 1
        code, lines = await command(run, "replay", "--reason", "missing-field")
        assert (code, "missing required field" in lines[0]) == (1, True)
        assert await records(addresses.kafka, stream) == before

        code, lines = await command(run, "replay", "--origin", origins["wrong-key"])
        assert (code, lines[0].split("  ")[0]) == (0, origins["wrong-key"])
        assert f" to {stream}/{partition_of(b'9', 4)}/" in lines[0]
        for reason, number in (
            ("missing-field", 7),
            ("not-json", 18),
            ("wrong-value", 29),
            ("too-large", 55),
        ):
            code, lines = await command(
                run,
                "replay",
                "--origin",
                origins[reason],
                "--edit",
                "-",
                stdin=msgspec.json.encode(event(number)),
            )
            assert (code, len(lines)) == (0, 1), lines
        assert await records(addresses.kafka, stream) == before + 5

        # Once is enough: neither one nor all is sent again, unless it is asked for.
        code, lines = await command(run, "replay", "--all")
        assert (code, sum("was replayed before" in line for line in lines)) == (0, 5)
        assert await records(addresses.kafka, stream) == before + 5
        assert (await command(run, "replay", "--origin", origins["wrong-key"], "--again"))[0] == 0
        assert await records(addresses.kafka, stream) == before + 6
        assert all(x.replayed for x in await letters_of(run, 5))

        metrics = await run.predicted(120)
        async with asyncio.timeout(30):
            while metrics["headrace_records_total{customer,duplicate}"] < 1:
                await asyncio.sleep(0.05)
                metrics = await run.worker.metrics()
        # The repaired event keeps the headers of the record that it stands for.
        replayed = [r async for r in kafka.read_between(addresses.kafka, stream)][-1:]
        assert list(replayed[0].headers) == headers
    verdict, _ = await verify.check(run.pipeline, addresses.kafka)
    assert (verdict.events, verdict.predictions, verdict.lost, verdict.doubled) == (120, 120, 0, 0)
    assert (verdict.differing, verdict.features_equal, verdict.rejected) == (0, True, 5)


async def test_labels_go_back_and_what_is_gone_is_told(trained: Settings, addresses: Addresses) -> None:
    async with running(trained, addresses, "card-fraud", "cards-letters-labels") as run:
        pipeline: Pipeline = run.pipeline
        assert pipeline.labels is not None
        topic = pipeline.labels.topic
        producer = kafka.producer(addresses.kafka)
        await producer.start()
        await producer.send_and_wait(topic, b"{}", key=b"L", partition=3)
        (letter,) = await letters_of(run, 1)
        label = {**event(1), "TX_FRAUD": 1, "LABEL_TS": START + MINUTE}
        code, lines = await command(
            run, "replay", "--origin", str(letter.origin), "--edit", "-", stdin=msgspec.json.encode(label)
        )
        assert (code, lines) == (0, [f"{topic}/3/0  replayed to {topic}/3/1"])
        back = [r async for r in kafka.read_between(addresses.kafka, topic)][-1]
        assert (back.key, msgspec.json.decode(back.value)) == (b"L", label)
        # One that was cut and whose record is gone; one of a log that only workers write.
        whole = b"x" * (LARGEST + 1)
        for of, offset in ((pipeline.stream.topic, 5000), (pipeline.entities[-1].log, 0)):
            gone = encode(
                pipeline.instance, Reason("not-json", "no"), dlq.Origin(of, 0, offset), START, None, whole, []
            )
            await producer.send_and_wait(pipeline.dead_letters, gone, key=b"", partition=0)
        await producer.stop()
        code, lines = await command(run, "replay", "--reason", "not-json")
        assert (code, "gone from its topic" in lines[0] + lines[1]) == (1, True)
        code, lines = await command(run, "show", f"{pipeline.stream.topic}/0/5000")
        assert (code, lines[-1]) == (0, "x" * LARGEST)
        assert any("the rest is gone" in line for line in lines)
        for wrong in ("nonsense", f"{topic}/0/99"):
            code, lines = await command(run, "show", wrong)
            assert (code, "has no letter of" in lines[0]) == (1, True)
        assert (await command(run, "replay"))[0] == 2
        assert (await command(run, "replay", "--all", "--edit", "-"))[0] == 2
