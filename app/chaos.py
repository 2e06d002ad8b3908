"""Chaos: real workers under a rough load and many faults, every prediction compared at the end.

The run has services, topics, stores and models of its own, so what is killed here is nobody else's.
`app.traffic` makes the load, `app.faults` the faults, `app.audit` the judgement.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from rich.console import Console
from rich.live import Live

from app import audit, demo, faults, history, lifecycle, replay, session, traffic, verify
from app.datasets.cards import write_cards
from app.local import services
from app.settings import Settings
from app.terminal import table
from models.errors import HeadraceError
from models.pipeline import Pipeline, find
from models.predictions import Prediction, identity
from tables.mirror import Mirror, connect
from tables.model_folder import ModelFolder

STALLED_S = 60.0  # without a prediction: what is missing then does not come
SETTLED_S = 10.0  # without a record folded or a profile mirrored: what is not mirrored then does not come
OUT_S = 1.0  # a partition without predictions for so long was out already when a fault came
CITY_DAYS = 120
LOAD_DAYS = 50  # of those, at most: what is before lies past all windows and is sent as too late
CUSTOMER_DAY = 1.9  # payments of a customer a day, on average


@dataclass
class Summary:
    """What a run came to; docs/guarantees.md says how to read it. outage_s: seconds, by kind of fault."""

    pipeline: str
    seed: int
    minutes: float
    rate: float
    apart: bool = False
    sent: int = 0
    events: int = 0
    predictions: int = 0
    faults: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    zombies: int = 0
    self_stops: int = 0
    bad_ends: int = 0
    lost: int = 0
    doubled: int = 0
    doubled_plain: int = 0
    differing: int = 0
    dead_letters: int = 0
    dead_letters_unaccounted: int = 0
    mirror_missing: int = 0
    mirror_differing: int = 0
    load: dict[str, int] = field(default_factory=dict)
    outage_s: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        wrong = self.lost + self.doubled + self.doubled_plain + self.differing + self.dead_letters_unaccounted
        return self.events > 0 and not wrong

    def as_json(self) -> str:
        return msgspec.json.encode(asdict(self)).decode()


def run(
    settings: Settings, name: str, seed: int, minutes: float, rate: float, apart: bool, quiet: bool
) -> Summary:
    """Run it and leave nothing running. apart: see faults.Fleet. quiet: no table at the end."""
    started = time.perf_counter()
    root = settings.data_root / "chaos"
    settings = session.with_own_models(settings.model_copy(update={"data_root": root}), ".")
    root.mkdir(parents=True, exist_ok=True)
    # What the clients say of a broker that is away fills a file, not the terminal.
    logging.basicConfig(filename=root / "chaos.log", filemode="w", level=logging.WARNING)
    console = Console(stderr=True)
    pipeline = find(name, settings.pipelines, f"{name}-chaos")
    console.rule(f"Headrace: {name}, chaos {seed}")

    def report(text: str) -> None:
        console.print(f"  {text}", highlight=False)

    load = _load(settings, pipeline, seed, minutes * 60, rate, report)
    summary = Summary(name, seed, minutes, rate, apart)
    with session.running_services(settings, lambda s, e: report(f"{s}: {e}")) as addresses:
        settings = _on_the_same_ports(settings, addresses)
        with (root / "faults.jsonl").open("w") as log:
            chaos = Run(settings, pipeline, addresses, load, summary, console, log)
            asyncio.run(chaos.run())
    summary.seconds = round(time.perf_counter() - started, 1)
    if not quiet:
        _show(summary)
    return summary


async def together(*work: Coroutine[Any, Any, Any]) -> None:
    """Do all of it at once. Where one fails the others end, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _load(
    settings: Settings,
    pipeline: Pipeline,
    seed: int,
    seconds: float,
    rate: float,
    report: Callable[[str], None],
) -> traffic.Traffic:
    """Data, a model, and the load: the last events of the file, what is older than all windows as too late."""
    events = int(seconds * rate)
    file = _data(settings.data_root, pipeline, events)
    lifecycle.ensure(pipeline, file, settings.models_root, report)
    times = history.read(file, pipeline).history.times
    start = times[max(0, len(times) - events)]
    old = int(np.searchsorted(times, start - max(e.retention for e in pipeline.entities)))
    if len(times) < events or not old:
        raise HeadraceError(
            f"{file} is too short for {events:,} events; ask for a shorter run or a lower --rate."
        )
    spare = replay.tape(file, pipeline, None, str(np.datetime64(int(times[min(old, 20_000)]), "ms")))
    base = replay.tape(file, pipeline, str(np.datetime64(int(start), "ms")))
    load = traffic.mix(base, spare, pipeline, settings.partitions, rate, seed)
    report("load: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(load.kinds.items())))
    return load


def _data(root: Path, pipeline: Pipeline, events: int) -> Path:
    """A file with enough events, made once."""
    if pipeline.name == "card-fraud":
        thousands = max(3, math.ceil(events / LOAD_DAYS / CUSTOMER_DAY / 1000))
        file = root / f"cards-{thousands}k.parquet"
        if not file.exists():
            write_cards(file, customers=1000 * thousands, terminals=2000 * thousands, days=CITY_DAYS)
        return file
    story = demo.STORIES.get(pipeline.name)
    if story is None:
        raise HeadraceError(f"There is no chaos of {pipeline.name}; there are {', '.join(demo.STORIES)}.")
    file = root / story.file
    if not file.exists():
        story.make(file, lambda done, total: None)
    return file


def _on_the_same_ports(settings: Settings, addresses: services.Addresses) -> Settings:
    """A server that is started again is to have the address that it had."""
    ports = {
        f"{name}_port": int(address.split("/0")[0].rpartition(":")[2])
        for name, configured, address in (
            ("kafka", settings.kafka, addresses.kafka),
            ("redis", settings.redis_url, addresses.redis_url),
        )
        if not configured
    }
    return settings.model_copy(update=ports)


class Run:
    """One run on services that are there."""

    def __init__(
        self, settings: Settings, pipeline: Pipeline, addresses: services.Addresses, load: traffic.Traffic,
        summary: Summary, console: Console, log: IO[str],
    ) -> None:  # fmt: skip
        self._settings, self._pipeline, self._addresses = settings, pipeline, addresses
        self._load, self._summary, self._console, self._log = load, summary, console, log
        self._began = time.time()
        self._sent = 0
        self._next = "none"
        self._predicted: set[int] = set()
        self._arrivals: dict[int, list[float]] = {p: [] for p in range(settings.partitions)}
        self._done: list[tuple[str, float]] = []  # faults carried out: kind, and when it began
        self._fleet = faults.Fleet(settings, pipeline, addresses, self._note, summary.apart)
        own = {"kafka": not settings.kafka, "redis": not settings.redis_url}
        kinds = [k for k, kind in faults.KINDS.items() if kind.needs is None or own[kind.needs]]
        summary.left_out = sorted(faults.KINDS.keys() - kinds)
        self._plan = faults.plan(summary.minutes * 60, kinds, summary.seed)

    async def run(self) -> None:
        """The load and the faults, then the judgement."""
        await session.fresh(self._settings, self._pipeline, self._addresses)
        shutil.rmtree(self._settings.data_root / "apart", ignore_errors=True)
        try:
            async with self._fleet.supervised():
                for _ in range(faults.FEWEST):
                    self._fleet.add()
                await self._fleet.ready()
                await self._under_load()
            await self._fleet.stop()
        finally:
            self._fleet.end()
        await self._judge()

    async def _under_load(self) -> None:
        pipeline, address = self._pipeline, self._addresses.kafka
        reader = session.Predictions(address, pipeline, self._see)
        acts = faults.Faults(self._fleet, self._settings, self._addresses.redis_url)
        with Live(get_renderable=self._line, console=self._console, refresh_per_second=2, transient=True):
            async with reader.reading():
                self._began = time.time()
                load = replay.publish(self._load.tape, pipeline, address, self._summary.rate, self._count)
                await together(load, self._faults(acts))
                ended = time.time()
                await self._complete()
                await self._settled()
        self._summary.outage_s = outages(self._done, self._arrivals, ended)

    def _see(self, prediction: Prediction) -> None:
        self._predicted.add(identity(self._pipeline, prediction))
        self._arrivals[prediction.origin.partition].append(time.time())

    def _count(self, done: int, _: int) -> None:
        self._sent = done

    def _note(self, entry: dict[str, Any]) -> None:
        """A line of faults.jsonl. Times: seconds since the epoch, and since the load began."""
        now = time.time()
        line = {"time": round(now, 3), "at": round(now - self._began, 3), **entry}
        self._log.write(msgspec.json.encode(line).decode() + "\n")
        self._log.flush()

    async def _faults(self, acts: faults.Faults) -> None:
        free = 0.0  # when the next fault may begin
        last = self._summary.minutes * 60 - faults.QUIET_S
        for fault in self._plan:
            self._next = f"{fault.kind} at {max(fault.at, free):.0f} s"
            await asyncio.sleep(max(fault.at, free) - self._elapsed())
            if self._elapsed() + fault.lasts > last:
                break
            began = time.time()
            self._done.append((fault.kind, began))
            self._note(
                {"what": "begins", "kind": fault.kind, "due": round(fault.at, 3), "lasts": fault.lasts}
            )
            whom = await acts.act(fault)
            took = time.time() - began
            self._note({"what": "is over", "kind": fault.kind, "whom": whom, "took": round(took, 3)})
            self._console.print(
                f"  {began - self._began:6.1f} s  {fault.kind:<15} {took:5.1f} s  {whom}", highlight=False
            )
            free = self._elapsed() + faults.RECOVERY_S
        self._next = "none"

    def _elapsed(self) -> float:
        return time.time() - self._began

    def _line(self) -> str:
        return (
            f"  {self._elapsed():6.1f} s  sent {self._sent:,} of {self._load.tape.events:,}  predicted "
            f"{len(self._predicted):,}  workers: {self._fleet.states}  next: {self._next}"
        )

    async def _complete(self) -> None:
        """Wait until every event has its prediction, or none comes any more."""
        seen, since = -1, time.monotonic()
        while not self._load.valid <= self._predicted and time.monotonic() - since < STALLED_S:
            if len(self._predicted) != seen:
                seen, since = len(self._predicted), time.monotonic()
            await asyncio.sleep(0.2)
        self._note({"what": "complete", "missing": len(self._load.valid - self._predicted)})

    async def _settled(self) -> None:
        """Wait until labels are folded and mirrored too."""
        seen, since, deadline = -1.0, time.monotonic(), time.monotonic() + STALLED_S
        while time.monotonic() - since < SETTLED_S and time.monotonic() < deadline:
            done = await self._fleet.done()
            if done != seen or done < 0:
                seen, since = done, time.monotonic()
            await asyncio.sleep(0.2)

    async def _judge(self) -> None:
        self._console.print("  folding the logs again", highlight=False)
        pipeline, address, summary = self._pipeline, self._addresses.kafka, self._summary
        findings = audit.Findings()
        expected = await verify.fold_logs(pipeline, address)
        served = await audit.read_served(pipeline, address)
        model = ModelFolder(self._settings.models_root).load(pipeline)
        audit.judge(pipeline, expected, served, self._load.valid, model.score_many, findings)
        summary.dead_letters = await audit.dead_letters_of(pipeline, address, self._load.malformed, findings)
        mirror = Mirror(connect(self._addresses.redis_url), pipeline)
        await audit.mirrored(mirror, expected, findings)
        await mirror.close()
        found = findings.counts
        summary.sent, summary.events = self._load.tape.events, len(self._load.valid)
        summary.load = dict(sorted(self._load.kinds.items()))
        summary.predictions = len(served)
        summary.kinds = dict(sorted(Counter(kind for kind, _ in self._done).items()))
        summary.faults = len(self._done)
        summary.zombies = summary.kinds.get("worker_zombie", 0)
        summary.self_stops, summary.bad_ends = self._fleet.self_stops, self._fleet.bad_ends
        summary.lost, summary.differing = found["lost"], found["differing"]
        summary.doubled, summary.doubled_plain = found["doubled"], found["doubled_plain"]
        summary.dead_letters_unaccounted = found["unaccounted"]
        summary.mirror_missing, summary.mirror_differing = found["mirror_missing"], found["mirror_differing"]
        lines = "".join(msgspec.json.encode(line).decode() + "\n" for line in findings.named)
        (self._settings.data_root / "findings.jsonl").write_text(lines)


def outages(
    done: list[tuple[str, float]], arrivals: dict[int, list[float]], ended: float
) -> dict[str, dict[str, float]]:
    """How long predictions stayed away after each fault, by kind: n, median and max, seconds.

    done: kinds and times of faults, in order; arrivals: by partition, when each prediction came; ended: when the
    load did. Of a fault it is the longest gap in any partition that begins with it, or after it and before the next
    fault, less the usual gap. A gap that had lasted OUT_S by then is of the fault before.

    >>> outages([("kill", 10.0)], {0: [7.0, 8.0, 9.0, 10.0, 17.0, 18.0]}, 18.0)
    {'kill': {'n': 1, 'median': 6.0, 'max': 6.0}}
    """
    begins, ends = _gaps(arrivals, ended)
    usual = float(np.median(ends - begins)) if len(begins) else 0.0
    found: dict[str, list[float]] = {}
    for number, (kind, at) in enumerate(done):
        following = done[number + 1][1] if number + 1 < len(done) else ended
        before_next = (begins <= following - OUT_S) | (ends <= following)
        mine = (ends > at) & (begins > at - OUT_S) & before_next
        length = (ends[mine] - np.maximum(begins[mine], at)).max(initial=0.0)
        found.setdefault(kind, []).append(max(0.0, float(length) - usual))
    return {
        kind: {"n": len(all_), "median": round(float(np.median(all_)), 2), "max": round(max(all_), 2)}
        for kind, all_ in sorted(found.items())
    }


def _gaps(arrivals: dict[int, list[float]], ended: float) -> tuple[Any, Any]:
    """Where gaps between predictions of a partition begin and end, until the load's end."""
    begins, ends = [np.empty(0)], [np.empty(0)]
    for came in arrivals.values():
        moments = np.unique([*(t for t in came if t < ended), ended])
        begins.append(moments[:-1])
        ends.append(moments[1:])
    return np.concatenate(begins), np.concatenate(ends)


def _show(summary: Summary) -> None:
    rows = [(k.replace("_", " "), v) for k, v in asdict(summary).items() if not isinstance(v, dict | list)]
    table(["figure", "value"], rows)
    table(
        ["outage after", "faults", "median s", "max s"],
        [(kind, int(o["n"]), o["median"], o["max"]) for kind, o in summary.outage_s.items()],
    )
