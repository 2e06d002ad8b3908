"""`headrace mirror` beside a worker."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from app import kafka
from app.local.services import Addresses
from app.settings import Settings
from tables.mirror import Mirror, connect
from tests.integration.test_stream import running

pytestmark = pytest.mark.integration


def command(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "mirror", *arguments],
        capture_output=True, text=True, timeout=100, check=False, env=os.environ,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.timeout(200)
async def test_a_mirror_is_rebuilt_and_shown(trained: Settings, addresses: Addresses) -> None:
    payment = {
        "TRANSACTION_ID": 1, "TX_DATETIME": 1_530_000_000_000, "CUSTOMER_ID": 7, "TERMINAL_ID": 3, "TX_AMOUNT": 12.5,
    }  # fmt: skip
    which = ("--pipeline", "card-fraud", "--as", "cards-mirror")
    async with running(trained, addresses, "card-fraud", "cards-mirror") as run:
        producer = kafka.producer(addresses.kafka)
        await producer.start()
        await producer.send_and_wait(run.pipeline.stream.topic, msgspec.json.encode(payment), key=b"7")
        await producer.stop()
        await run.predicted(1)
        client: Any = connect(addresses.redis_url)
        mirror, (customer, _) = Mirror(client, run.pipeline), run.pipeline.entities
        for _ in range(100):
            if (await mirror.read(customer, ["7"]))[0] is not None:
                break
            await asyncio.sleep(0.1)
        at = await mirror.key_of(customer, "7")
        await client.hset(at, customer.features[0], "77")  # altered by hand
        code, out, err = await asyncio.to_thread(command, "rebuild", *which, "--json")
        assert (code, json.loads(out)["partitions"]) == (0, 8), err
        (found,) = await mirror.read(customer, ["7"])
        assert found is not None
        assert found.features[customer.features[0]] == 1
        await client.hset(at + b"8", "_offset", "1")  # of nobody
        assert (await asyncio.to_thread(command, "rebuild", *which, "--empty"))[0] == 0
        assert await client.exists(at + b"8") == 0
        code, out, err = await asyncio.to_thread(command, "show", *which, "customer", "7", "--json")
        assert code == 0, err
        shown = json.loads(out)
        assert (shown["key"], shown["features"]) == (at.decode(), found.features)
        assert shown["now"][customer.features[0]] == 0
        assert "12.5" in (await asyncio.to_thread(command, "show", *which, "customer", "7"))[1]
        code, _, err = await asyncio.to_thread(command, "show", *which, "customer", "8")
        assert (code, "nothing of customer 8" in err) == (1, True)
        await mirror.close()
