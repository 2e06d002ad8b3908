"""What a look-up over HTTP takes: an open load on one API process, and how soon an event shows in its answers."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import msgspec
import numpy as np
import uvloop

from app import replay, session
from app.bench import WARM_UP_S, Load, run
from app.settings import Settings
from models.errors import HeadraceError

EVENT_RATE = 2000.0  # events a second while freshness is measured
FRESH_S = 15.0
SAMPLE_S, POLL_S = 0.05, 0.005  # an event is followed that often, and asked for that often
FOLLOWED = 3  # events at a time, so that asking is no load of its own
SEEN_S = 5.0  # what does not show by then counts as that
BATCH, BATCH_RATE, BATCH_S = 100, 20.0, 10.0
CONNECTIONS = 32


def lookup(settings: Settings, name: str, rate: float, seconds: float) -> dict[str, Any]:
    """So many look-ups of one entity a second; then of a hundred at once; while events come, their freshness.

    Each is due at its time whatever came of those before, and is measured from then.
    """

    async def measure(load: Load) -> dict[str, Any]:
        return await _measure(load, rate, seconds)

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    return run(settings, name, int(EVENT_RATE * (FRESH_S + WARM_UP_S)), measure)


async def _measure(load: Load, rate: float, seconds: float) -> dict[str, Any]:
    settings, pipeline = load.settings, load.pipeline
    await session.fresh(settings, pipeline, load.addresses)
    worker, api = session.Process(settings, pipeline, "worker"), session.Process(settings, pipeline, "api")
    try:
        for process in (worker, api):
            process.start()
        for process in (worker, api):
            await process.ready()
        client = await Client.connected(api.port, CONNECTIONS)
        load.report(f"{EVENT_RATE:,.0f} events/s for {FRESH_S + WARM_UP_S:.0f} s: how soon they show")
        fresh, keys = await _freshness(load, client)
        load.report(f"{rate:,.0f} look-ups/s for {seconds:.0f} s")
        entity = pipeline.entities[0].name
        ones = [_get(f"/v1/features/{entity}/{key}") for key in keys]
        await _open_load(client, cycle(ones), rate, WARM_UP_S / 2)
        before, began = await api.metrics(), time.perf_counter()
        one = await _open_load(client, cycle(ones), rate, seconds)
        after, took = await api.metrics(), time.perf_counter() - began
        load.report(f"{BATCH_RATE:,.0f} look-ups/s of {BATCH} entities for {BATCH_S:.0f} s")
        many = await _open_load(client, _batches(entity, keys), BATCH_RATE, BATCH_S)
        client.close()
    finally:
        worker.stop()
        api.stop()
    cpu = after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"]
    return {
        "bench": "lookup",
        "pipeline": pipeline.name,
        "rate": round(len(one) / took, 1),
        "p50_ms": _percentile(one, 50),
        "p99_ms": _percentile(one, 99),
        "batch_p50_ms": _percentile(many, 50),
        "batch_p99_ms": _percentile(many, 99),
        "freshness_p50_ms": _percentile(fresh, 50),
        "freshness_p99_ms": _percentile(fresh, 99),
        "cpu_us_per_request": round(cpu / len(one) * 1e6, 1),
        "machine_load": round(os.getloadavg()[0], 2),  # others may be at work, too
    }


def _percentile(waited: list[float], of: float) -> float:
    return round(float(np.percentile(np.array(waited) * 1000, of)), 2)


async def _freshness(load: Load, client: Client) -> tuple[list[float], list[str]]:
    """From when events were due to be sent until a look-up knows them, s; and the keys that there are."""
    tape, entity = load.tape, load.pipeline.entities[0].name
    rows = tape.rows[~tape.is_label]
    times = tape.history.times[rows].tolist()
    keys = [key.decode() for key, label in zip(tape.keys, tape.is_label, strict=True) if not label and key]
    due = np.zeros(tape.events)
    sending = asyncio.create_task(
        replay.publish(tape, load.pipeline, load.addresses.kafka, EVENT_RATE, None, due)
    )
    waited: list[float] = []
    following: set[asyncio.Task[None]] = set()

    async def follow(number: int) -> None:
        question = _get(f"/v1/features/{entity}/{keys[number]}?at=newest")
        while (now := time.time()) - due[number] < SEEN_S:
            status, body = await client.ask(question)
            if status == 200 and _newest(body) >= times[number]:
                break
            await asyncio.sleep(POLL_S)
        waited.append(now - due[number] if status == 200 else SEEN_S)

    began, last = time.monotonic(), 0
    while not sending.done():
        await asyncio.sleep(SAMPLE_S)
        sent = int(np.count_nonzero(due))
        if time.monotonic() - began > WARM_UP_S and sent > last and len(following) < FOLLOWED:
            last = sent
            task = asyncio.create_task(follow(sent - 1))
            following.add(task)
            task.add_done_callback(following.discard)
    await sending
    await asyncio.gather(*following)
    return waited, list(dict.fromkeys(keys))


class _Newest(msgspec.Struct):
    newest: Any


def _newest(body: bytes) -> float:
    found = msgspec.json.decode(body, type=_Newest).newest
    return dt.datetime.fromisoformat(found).timestamp() * 1000 + 0.5


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def _batches(entity: str, keys: list[str]) -> Iterator[bytes]:
    """Questions of a hundred entities each."""
    rng = np.random.default_rng(7)
    while True:
        chosen = rng.choice(len(keys), BATCH).tolist()
        body = msgspec.json.encode({"entities": [{"entity": entity, "id": keys[i]} for i in chosen]})
        head = f"Host: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        yield b"POST /v1/features HTTP/1.1\r\n" + head.encode() + body


async def _open_load(client: Client, questions: Iterator[bytes], rate: float, seconds: float) -> list[float]:
    """Ask at this rate, whatever comes back. Returns from when each was due until it was answered, s."""
    waited: list[float] = []
    asking: set[asyncio.Task[None]] = set()

    async def one(question: bytes, due: float) -> None:
        status, body = await client.ask(question)
        waited.append(time.perf_counter() - due)
        if status != 200:
            raise HeadraceError(f"A look-up was answered by {status}: {body[:200].decode(errors='replace')}")

    began, asked = time.perf_counter(), 0
    failed: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        asking.discard(task)
        if (error := task.exception()) is not None:
            failed.append(error)

    while asked < rate * seconds:
        now = time.perf_counter()
        while asked < rate * seconds and began + asked / rate <= now:
            task = asyncio.create_task(one(next(questions), began + asked / rate))
            asking.add(task)
            task.add_done_callback(ended)
            asked += 1
        await asyncio.sleep(max(0.0, began + asked / rate - time.perf_counter()))
    await asyncio.gather(*asking, return_exceptions=True)
    if failed:
        raise failed[0]
    return waited


class Client:
    """As little HTTP as an answer with a length needs, so that what is measured is the server."""

    def __init__(self) -> None:
        self._idle: asyncio.LifoQueue[_Connection] = asyncio.LifoQueue()
        self._all: list[_Connection] = []

    @classmethod
    async def connected(cls, port: int, connections: int) -> Client:
        """A client of a port of this machine."""
        client = cls()
        for _ in range(connections):
            _, made = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
            client._all.append(made)
            client._idle.put_nowait(made)
        return client

    async def ask(self, question: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connection = await self._idle.get()
        try:
            return await connection.ask(question)
        finally:
            self._idle.put_nowait(connection)

    def close(self) -> None:
        """Let go of all connections."""
        for connection in self._all:
            connection.transport.close()


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self) -> None:
        self._came = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def ask(self, question: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(question)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._came += data
        end = self._came.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._came[:end]).lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self._came) >= end + 4 + length:
            status, body = int(head[9:12]), bytes(self._came[end + 4 : end + 4 + length])
            del self._came[: end + 4 + length]
            if self._answer is not None and not self._answer.done():
                self._answer.set_result((status, body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(HeadraceError("The API has closed a connection; see its log."))
