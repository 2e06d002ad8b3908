"""The demonstration: real events through real servers, proved afterwards, in one command."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from app import history, lifecycle, replay, session, verify
from app.datasets.cards import write_cards
from app.datasets.flights import write_flights
from app.datasets.network import write_network
from app.local import services
from app.model_life import ModelLife
from app.settings import Settings
from app.terminal import progress, shown
from models.errors import HeadraceError
from models.evaluation import evaluate
from models.pipeline import Pipeline, find
from models.predictions import Prediction
from models.scoring import ModelError
from models.windows import POSITIVE, UNKNOWN, Floats
from tables.model_folder import ModelFolder


@dataclass(frozen=True)
class Story:
    """What a pipeline's demonstration replays. Days are UTC.

    file: which `make` writes, with several streams the last one in their folder. until: training sees what is
    before; start, end: what is streamed, the first part to fill the windows; counted: from here on scores count
    for AUC; rate: events a second.
    """

    file: str
    make: Callable[[Path, Callable[[int, int], None]], int]
    until: str
    start: str
    end: str
    counted: str
    rate: float


STORIES = {
    "flight-delays": Story(
        "flights.parquet", write_flights, "2013-09-01", "2013-08-21", "2013-09-15", "2013-09-01", 1000
    ),
    "flight-network": Story(
        "network/flights.parquet", lambda path, advance: write_network(path.parent, advance),
        "2013-09-01", "2013-08-21", "2013-09-15", "2013-09-01", 2000,
    ),
    "card-fraud": Story(
        "cards-demo.parquet",
        lambda path, advance: write_cards(path, customers=1000, terminals=2000, progress=advance),
        "2018-09-01", "2018-07-25", "2018-09-12", "2018-09-01", 5000,
    ),
}  # fmt: skip


@dataclass
class Summary:
    """What a run came to. Times in ms are from when an event was due to be sent until its prediction arrived."""

    pipeline: str
    events: int
    predictions: int
    lost: int
    doubled: int
    features_equal: bool
    cells: int
    order_skew_cells: int
    events_per_s: float
    p50_ms: float
    p99_ms: float
    auc: float
    ap: float
    seconds: float

    @property
    def good(self) -> bool:
        return self.features_equal and not self.lost and not self.doubled

    def as_json(self) -> str:
        return msgspec.json.encode(asdict(self)).decode()


def run(settings: Settings, name: str, data: Path, stay: bool, quiet: bool) -> Summary:
    """Run it and leave nothing running. quiet: nothing but steps, on standard error."""
    if name not in STORIES:
        raise HeadraceError(f"There is no demonstration of {name!r}; there are {', '.join(STORIES)}.")
    started = time.perf_counter()
    settings = session.with_own_models(settings, "demo")
    console = Console(stderr=True)
    pipeline = find(name, settings.pipelines, f"{name}-demo")
    story = STORIES[name]
    console.rule(f"Headrace: {name}")
    with session.running_services(
        settings, lambda s, e: console.print(f"  {s:>8}  {e}", highlight=False)
    ) as addresses:
        file = _data(data / story.file, story, console)
        if len(pipeline.streams) > 1:
            file = file.parent
        _model(pipeline, file, story, settings, console)
        return asyncio.run(_stream(settings, pipeline, story, file, addresses, console, stay, quiet, started))


def _data(file: Path, story: Story, console: Console) -> Path:
    if not file.exists():
        with progress("data") as advance:
            story.make(file, advance)
    console.print(f"      data  {file}", highlight=False)
    return file


def _model(pipeline: Pipeline, file: Path, story: Story, settings: Settings, console: Console) -> None:
    """Features and model, unless those of this definition are there."""
    life = ModelLife(pipeline, ModelFolder(settings.models_root))
    try:
        model = life.champion()
    except ModelError:
        features = file.with_name(f"{file.stem}.features.parquet")
        rows = history.compute(file, features, pipeline)
        console.print(f"  features  {rows:,} rows in {features}", highlight=False)
        lifecycle.train(
            life, features,
            lambda step: console.print(f"     train  {step}", highlight=False), story.until,
        )  # fmt: skip
        model = life.champion()
    console.print(f"     model  {model.card.version} of definition {model.card.definition}", highlight=False)


async def _stream(
    settings: Settings, pipeline: Pipeline, story: Story, file: Path, addresses: services.Addresses, console: Console,
    stay: bool, quiet: bool, started: float,
) -> Summary:  # fmt: skip
    await session.fresh(settings, pipeline, addresses)
    worker = session.Process(settings, pipeline, "worker")
    api = session.Process(settings, pipeline, "api")
    try:
        worker.start()
        api.start()
        tape = replay.tape(file, pipeline, story.start, story.end)
        await asyncio.gather(worker.ready(), api.ready())
        console.print(
            f"    worker  ready, {story.rate:,.0f} events/s from {story.start} to {story.end}",
            highlight=False,
        )
        scored = tape.scored(pipeline)
        board = _Board(pipeline, tape.events, scored, console, quiet)
        reader = session.Predictions(addresses.kafka, pipeline, board.see)
        due: Floats = np.zeros(tape.events)
        async with reader.reading():
            with board.live():
                await replay.publish(tape, pipeline, addresses.kafka, story.rate, board.sent, due)
                await reader.until(scored, worker.check)
        summary = await _summary(pipeline, story, tape, reader, due, addresses.kafka, started)
        if not quiet:
            _show(summary, pipeline, addresses, api.url, worker.url)
        if stay:
            Console().print("\nAll of it runs on. Ctrl-C stops what this command started.", style="bold")
            with contextlib.suppress(asyncio.CancelledError):  # Ctrl-C: the run itself went well
                await asyncio.Event().wait()
        return summary
    finally:
        for process in (api, worker):
            process.stop()


async def _summary(
    pipeline: Pipeline, story: Story, tape: replay.Tape, reader: session.Predictions, due: Floats, address: str,
    started: float,
) -> Summary:  # fmt: skip
    verdict, expected = await verify.check(pipeline, address)
    ids = np.array(reader.ids, np.int64)
    order = np.argsort(tape.history.ids)
    at = order[np.minimum(np.searchsorted(tape.history.ids, ids, sorter=order), len(order) - 1)]
    arrived = np.array(reader.arrived)
    waited = (arrived - due[at]) * 1000
    counted = tape.history.times[at] >= history.instant(story.counted)
    auc = ap = float("nan")
    if tape.history.labels is not None:
        labels = tape.history.labels[at]
        counted &= labels != UNKNOWN
        figures = evaluate((labels[counted] == POSITIVE).astype(np.int8), np.array(reader.scores)[counted])
        auc, ap = figures["auc"], figures["ap"]
    span = float(arrived.max() - due.min()) if len(arrived) else float("nan")
    p50, p99 = np.percentile(waited, [50, 99]).tolist() if len(waited) else (float("nan"), float("nan"))
    return Summary(
        pipeline.name, verdict.events, verdict.predictions, verdict.lost, verdict.doubled, verdict.features_equal,
        verdict.cells, verify.order_skew(pipeline, tape.history, expected), round(len(arrived) / span, 1),
        round(p50, 2), round(p99, 2), round(auc, 4), round(ap, 4), round(time.perf_counter() - started, 1),
    )  # fmt: skip


class _Board:
    """The live table: how far it is, and what was scored highest."""

    def __init__(self, pipeline: Pipeline, events: int, scored: int, console: Console, quiet: bool) -> None:
        self._pipeline, self._events, self._scored = pipeline, events, scored
        self._console, self._quiet = console, quiet
        self._sent = self._predicted = 0
        self._decisions: dict[str, int] = {}
        self._recent: deque[Prediction] = deque(maxlen=8)
        self._began = time.monotonic()

    def sent(self, done: int, _: int) -> None:
        self._sent = done

    def see(self, prediction: Prediction) -> None:
        self._predicted += 1
        decision = prediction.decision or "without a model"
        self._decisions[decision] = self._decisions.get(decision, 0) + 1
        if prediction.score is not None and decision != self._pipeline.model.otherwise:
            self._recent.append(prediction)

    def live(self) -> Live:
        self._began = time.monotonic()
        return Live(
            console=self._console, get_renderable=self._render, refresh_per_second=1 if self._quiet else 5,
            transient=True,
        )  # fmt: skip

    def _render(self) -> Group:
        rate = self._predicted / max(0.001, time.monotonic() - self._began)
        line = (
            f"sent {self._sent:,} of {self._events:,}   predicted {self._predicted:,}   {rate:,.0f}/s   "
            + "   ".join(f"{name} {count:,}" for name, count in sorted(self._decisions.items()))
        )
        bar = ProgressBar(total=self._scored, completed=self._predicted, width=60)
        table = Table(title="latest that stood out", box=None, title_justify="left", header_style="bold")
        for column in ("event", "score", "decision", "log", "offset"):
            table.add_column(column)
        for p in reversed(self._recent):
            table.add_row(
                str(p.id), f"{p.score:.3f}", p.decision, str(p.origin.partition), str(p.origin.offset)
            )
        return Group(line, bar, table)


def _show(summary: Summary, pipeline: Pipeline, addresses: services.Addresses, api: str, worker: str) -> None:
    console = Console()
    table = Table(box=None, show_header=False, title="What came of it", title_justify="left")
    for name, value in asdict(summary).items():
        table.add_row(name.replace("_", " "), shown(value))
    console.print(table)
    entity = pipeline.entities[-1]
    example = {"dest": "LAX", "terminal": "7", "carrier": "UA"}.get(entity.name, "ID")
    console.print("\nTo try:", style="bold")
    for line in (
        f"curl '{api}/v1/features/{entity.name}/{example}?at=newest'",
        f"curl {worker}/metrics",
        f"Kafka {addresses.kafka}: predictions in {pipeline.predictions}, events into {pipeline.stream.topic}",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
