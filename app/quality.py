"""`headrace quality`: predictions and challengers' scores meet their labels, in the stream.

A process of its own without a store. It reads as far back as its window reaches when it starts, and counts in whatever
order records come, so it may be killed and started at any time, and a second one says the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import uvloop
from aiohttp import web
from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app import kafka
from app.api.pages import pages
from app.api.server import serve
from app.comparison import LABELS
from app.errors import RegistryError
from app.model_life import ModelLife
from models import shadows
from models.errors import HeadraceError
from models.evaluation import DAY_MS, auc_slack
from models.events import LabelDecoder
from models.guard_rails import Bounds, Breach, of_quality
from models.predictions import identity
from models.quality import Realised
from models.scoring import ModelError
from models.splits import label_delay
from models.windows import NULL
from tables.model_folder import CANARY, CHAMPION

BEHIND = 20_000  # records, of a stream that comes all the time: a second or so

_Family = tuple[str, str, list[str]]

OF_VERSION: dict[str, str] = {
    "labelled": "Events of the window whose label is known",
    "positives": "Of these, the positive ones",
    "auc": "Area under the ROC curve",
    "ap": "Average precision",
    "precision_at_top": "Share of positives among a day's first events by score, mean over the days",
    "calibration_error": "How far mean score and share of positives are apart, over bins of one size",
    "calibration_ratio": "Positives that came, for each that the scores expect",
}
AUC_SLACK: _Family = ("headrace_quality_auc_slack", "How far auc may be from the exact one", ["version"])
UNTIL: _Family = ("headrace_quality_until_seconds", "Event time at which the window ends", [])
KEPT: _Family = ("headrace_quality_events", "Events that are kept for labels to come", [])
LET_GO: _Family = ("headrace_quality_let_go", "Events without a label that there was no room for", [])
LEFT: _Family = ("headrace_quality_left", "Records that are still to be read", [])
UP: _Family = ("headrace_quality_registry_up", "1 while the registry of models answers", [])


class NoLabels(HeadraceError):
    """Without them nothing can be said."""

    exit_code = 2


class Made(msgspec.Struct):
    """What is of interest of a prediction."""

    id: int | str
    event_time: int
    score: float | None
    version: str | None
    stream: str | None = None


_decode = msgspec.json.Decoder(Made).decode


class Quality:
    """realised: what is known. left: records to be read, None before the first. whole: what was there at the start has
    been read. away: why the registry cannot be asked."""

    def __init__(
        self, life: ModelLife, days: int, most: int, bounds: Bounds, tell: Callable[[str], None]
    ) -> None:
        """Raises NoLabels."""
        pipeline = life.pipeline
        if pipeline.labels is None:
            raise NoLabels(
                f"The pipeline {pipeline.name} has no labels to judge by; give its file 'labels:'."
            )
        self._life, self._pipeline, self._bounds, self._tell = life, pipeline, bounds, tell
        self._labels = LabelDecoder(pipeline, pipeline.labels)
        self.realised = Realised(days, label_delay(pipeline), most)
        self.topics = [pipeline.predictions, pipeline.shadow, pipeline.labels.topic]
        self.left: int | None = None
        self.whole = False
        self._told_let_go = False
        self.away: str | None = None

    @property
    def reach(self) -> int:
        """How far back in the topics it has to read, ms: a day more, for the window is whole days."""
        return (self.realised.days + 2) * DAY_MS + self.realised.delay

    def take(self, records: Sequence[Any]) -> None:
        """Count what these say, whatever their order. What is none of ours is passed over."""
        labels = []
        for record in records:
            if record.topic == self.topics[2]:
                labels.append(record)
                continue
            with contextlib.suppress(msgspec.MsgspecError):
                if record.topic == self.topics[0]:
                    self._predicted(_decode(record.value or b""))
                else:
                    self._shadowed(shadows.decode(record.value or b""))
        if labels:
            self._labelled(labels)
        if self.realised.let_go and not self._told_let_go:
            self._told_let_go = True
            self._tell(
                "Events are let go before their labels come, so figures and the rail lack them; raise "
                "HEADRACE_QUALITY_EVENTS, or lower HEADRACE_QUALITY_DAYS."
            )

    def _predicted(self, made: Made) -> None:
        if made.score is not None and made.version is not None:
            id_ = identity(self._pipeline, made)
            self.realised.scored(id_, made.event_time, {made.version: made.score})

    def _shadowed(self, shadow: shadows.Shadow) -> None:
        found = [s for s in (shadow.champion, *shadow.challengers.values()) if s.score is not None]
        scores = {scored.version: scored.score for scored in found if scored.score is not None}
        self.realised.scored(identity(self._pipeline, shadow), shadow.event_time, scores)

    def _labelled(self, records: list[Any]) -> None:
        batch, kept, _ = self._labels.decode([r.value or b"" for r in records])
        # Who sends the event's id alone tells no time of it; it is not later than what is known of it.
        times = np.where(batch.times == NULL, batch.clocks, batch.times)
        rows = zip(batch.ids.tolist(), times.tolist(), batch.states.tolist(), kept.tolist(), strict=True)
        for id_, time_, state, at in rows:
            record = records[at]
            # As `headrace models compare` has it: the last that was sent of an event counts.
            stamp = (record.timestamp << 80) + (record.partition << 64) + record.offset
            self.realised.labelled(id_, time_, LABELS.get(state), stamp)

    async def look(self) -> None:
        """Take the canary back, if it has turned out worse than the champion."""
        life = self._life
        try:
            aliases = await asyncio.to_thread(life.aliases)
            canary = await asyncio.to_thread(life.canary, aliases)
            if canary is not None and canary.reason is None and CHAMPION in aliases:
                breach = self.breach(aliases[CANARY], aliases[CHAMPION])
                if breach is not None:
                    await asyncio.to_thread(life.take_back, aliases[CANARY], canary.since, breach)
                    self._tell(f"{life.pipeline.name}: {breach.sentence} It is taken back.")
            self.away = None
        except (RegistryError, ModelError, OSError) as error:
            if self.away is None:
                self._tell(f"{error} No canary is taken back meanwhile.")
            self.away = str(error)

    def breach(self, canary: str, champion: str) -> Breach | None:
        """What is wrong with a version, on the events of the window that both have scored."""
        ours, _ = self.realised.of(canary, [champion])
        theirs, _ = self.realised.of(champion, [canary])
        return of_quality(canary, ours.ap, theirs.ap, ours.positives, self._bounds)

    @property
    def behind(self) -> str | None:
        """Why its figures are not those of all records, if they are not."""
        if self.left is None:
            return "Nothing is read yet; it waits for Kafka."
        return None if self.whole and self.left <= BEHIND else f"{self.left:,} records are still to be read."


class QualityCollector(Collector):
    def __init__(self, quality: Quality) -> None:
        self._quality = quality

    def collect(self) -> Iterator[Metric]:
        quality, realised = self._quality, self._quality.realised
        families = {
            name: GaugeMetricFamily(f"headrace_quality_{name}", text, labels=["version"])
            for name, text in OF_VERSION.items()
        }
        slack = GaugeMetricFamily(AUC_SLACK[0], AUC_SLACK[1], labels=AUC_SLACK[2])
        for version in realised.versions():
            judged, steps = realised.of(version)
            for name, family in families.items():
                family.add_metric([version], getattr(judged, name))
            slack.add_metric([version], auc_slack(steps))
        yield from (*families.values(), slack)
        yield GaugeMetricFamily(*UNTIL[:2], value=(realised.until + 1) * DAY_MS / 1000)
        yield GaugeMetricFamily(*KEPT[:2], value=realised.kept)
        yield CounterMetricFamily(*LET_GO[:2], value=realised.let_go)
        yield GaugeMetricFamily(*LEFT[:2], value=quality.left or 0)
        yield GaugeMetricFamily(*UP[:2], value=quality.away is None)


def run(quality: Quality, address: str, host: str, port: int, every_s: float) -> None:
    """Serve until SIGTERM or Ctrl-C. every_s: between two looks at the canary."""
    uvloop.run(_run(quality, address, host, port, every_s))


async def _run(quality: Quality, address: str, host: str, port: int, every_s: float) -> None:
    registry = CollectorRegistry()
    registry.register(QualityCollector(quality))
    ProcessCollector(registry=registry)
    application = web.Application()

    async def ready() -> str | None:
        return quality.behind

    application.add_routes(pages(registry, ready))
    runner = await serve(application, host, port)
    say(f"http://{host}:{port}/metrics")
    work = asyncio.gather(_read(quality, address), _look(quality, every_s))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await work
    await runner.cleanup()


async def _read(quality: Quality, address: str) -> None:
    since = time.time_ns() // 1_000_000 - quality.reach
    try:
        async for some in kafka.tail(address, quality.topics, since):
            quality.take(some.records)
            quality.left, quality.whole = some.left, some.whole
            await asyncio.sleep(0)  # who asks for metrics is answered while much is read
    except KafkaError as error:
        raise HeadraceError(
            f"Kafka did not do what was asked ({error!r}). Started again, `headrace quality` reads its window anew."
        ) from None


async def _look(quality: Quality, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        if quality.behind is None:  # with half of the records read one version may have more of them
            await quality.look()


def say(text: str) -> None:
    """Tell who watches."""
    print(f"headrace quality: {text}", file=sys.stderr, flush=True)  # noqa: T201
