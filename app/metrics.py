"""Prometheus metrics of a worker, read from its counters when they are asked for: none on the hot path."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tables.model_folder import CANARY, CHAMPION

if TYPE_CHECKING:
    from app.serving import Serving
    from app.worker import Worker

_Family = tuple[str, str, list[str]]  # name, help, labels

RECORDS: _Family = ("headrace_records", "Records folded, by what became of them", ["entity", "outcome"])
PROFILES: _Family = ("headrace_profiles", "Profiles in memory", ["entity"])
PROFILE_BYTES: _Family = ("headrace_profile_bytes", "Memory of profiles, in bytes", ["entity"])
LOADED: _Family = ("headrace_profiles_loaded", "Profiles read from a store", ["entity"])
EVICTED: _Family = ("headrace_profiles_evicted", "Profiles let go from memory to make room", ["entity"])
ORDER_SKEW: _Family = (
    "headrace_order_skew_seconds",
    "How far, in event time, those who write an entity's log were apart at most since the start",
    ["entity"],
)
POSITION: _Family = (
    "headrace_position",
    "Next offset of a log that is not yet flushed",
    ["topic", "partition"],
)
HELD: _Family = (
    "headrace_partition_held",
    "1 for each partition that this worker holds",
    ["topic", "partition"],
)
REBALANCES: _Family = ("headrace_rebalances", "How often partitions were shared out anew", [])
UNSCORED: _Family = ("headrace_unscored", "Events folded while there was no model", [])
PREDICTIONS: _Family = ("headrace_predictions", "Predictions sent to Kafka", [])
ROUTED: _Family = ("headrace_routed", "Records of a topic that were written to the entities' logs", ["topic"])
ROUTED_WAITING: _Family = (
    "headrace_routed_waiting", "Records of a topic that wait for what the ledger knows", ["topic"],
)  # fmt: skip
DEAD_LETTERS: _Family = ("headrace_dead_letters", "Records sent to the dead letters", [])
MIRRORED: _Family = ("headrace_mirrored", "Profiles written to the mirror", [])
MIRROR_REBUILDING: _Family = (
    "headrace_mirror_rebuilding",
    "Partitions whose profiles are written to the mirror anew",
    [],
)
MIRROR_WAITING: _Family = (
    "headrace_mirror_waiting",
    "Profiles that have changed since they were mirrored",
    [],
)
MIRROR_LAG: _Family = (
    "headrace_mirror_lag_seconds",
    "For how long what the mirror lacks has been waiting, at most",
    [],
)
MIRROR_REFUSED: _Family = (
    "headrace_mirror_refused",
    "Partitions held here whose mirror another owner writes",
    [],
)
MIRROR_UP: _Family = ("headrace_mirror_up", "1 while Redis takes the mirror", [])
CHECKPOINT_POSITION: _Family = (
    "headrace_checkpoint_position", "Position of a partition's last checkpoint", ["entity", "partition"],
)  # fmt: skip
CHECKPOINT_AGE: _Family = (
    "headrace_checkpoint_age_seconds", "Since a partition's last checkpoint", ["entity", "partition"],
)  # fmt: skip
CHECKPOINT_FAILURES: _Family = ("headrace_checkpoint_failures", "Checkpoints that could not be taken", [])
MODEL: _Family = ("headrace_model", "The model that scores", ["pipeline", "version", "definition"])
REFUSED: _Family = ("headrace_model_refused", "Versions that were refused", ["reason"])
REFUSED_VERSION: _Family = (
    "headrace_model_refused_version", "Versions that are to score, but are refused", ["version", "reason"],
)  # fmt: skip
CHALLENGER: _Family = (
    "headrace_challenger",
    "1 for each model that scores in the shadow",
    ["alias", "version"],
)
CANARY_SHARE: _Family = (
    "headrace_canary",
    "Percent of the entities for which the canary decides",
    ["version"],
)
TAKEN_BACK: _Family = (
    "headrace_canary_taken_back", "Versions that a guard rail has ended as the canary", ["version", "rail"],
)  # fmt: skip
SHADOWS: _Family = ("headrace_shadows", "Records of challengers that Kafka has taken", [])
SHADOWS_MISSED: _Family = ("headrace_shadows_missed", "Predictions that challengers were too late for", [])
REGISTRY_UP: _Family = ("headrace_registry_up", "1 while the registry of models answers", [])


class WorkerCollector(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker = self._worker
        records, profiles = CounterMetricFamily(*_of(RECORDS)), GaugeMetricFamily(*_of(PROFILES))
        sizes, positions = GaugeMetricFamily(*_of(PROFILE_BYTES)), GaugeMetricFamily(*_of(POSITION))
        loaded, evicted = CounterMetricFamily(*_of(LOADED)), CounterMetricFamily(*_of(EVICTED))
        skews = GaugeMetricFamily(*_of(ORDER_SKEW))
        for stage in worker.stages:
            skews.add_metric([stage.entity.name], stage.order_skew / 1000)
            for outcome, count in stage.counts.items():
                records.add_metric([stage.entity.name, outcome], count)
            profiles.add_metric([stage.entity.name], stage.size)
            sizes.add_metric([stage.entity.name], stage.nbytes)
            loaded.add_metric([stage.entity.name], stage.loaded)
            evicted.add_metric([stage.entity.name], stage.evicted)
        for tp, offset in worker.partitions.committable.items():
            positions.add_metric([tp.topic, str(tp.partition)], offset)
        held = GaugeMetricFamily(*_of(HELD))
        for tp in sorted(worker.partitions.held):
            held.add_metric([tp.topic, str(tp.partition)], 1)
        routed, waiting = CounterMetricFamily(*_of(ROUTED)), GaugeMetricFamily(*_of(ROUTED_WAITING))
        for topic, route in worker.routes.items():
            routed.add_metric([topic], route.routed)
            waiting.add_metric([topic], route.waiting)
        yield from (records, profiles, sizes, loaded, evicted, skews, positions, held)
        yield from _of_models(worker.serving)
        yield CounterMetricFamily(*SHADOWS[:2], value=worker.shadow.sent)
        yield CounterMetricFamily(*SHADOWS_MISSED[:2], value=worker.shadow.missed)
        yield CounterMetricFamily(*REBALANCES[:2], value=worker.partitions.rebalances)
        yield CounterMetricFamily(*PREDICTIONS[:2], value=worker.score.predicted)
        yield CounterMetricFamily(*UNSCORED[:2], value=worker.score.unscored)
        yield from (routed, waiting)
        yield CounterMetricFamily(*DEAD_LETTERS[:2], value=worker.dead_letters)
        yield CounterMetricFamily(*MIRRORED[:2], value=worker.mirror.written)
        yield GaugeMetricFamily(*MIRROR_UP[:2], value=worker.mirror.failing is None)
        yield GaugeMetricFamily(*MIRROR_WAITING[:2], value=worker.mirror.waiting)
        yield GaugeMetricFamily(*MIRROR_LAG[:2], value=worker.mirror.lag_s)
        yield GaugeMetricFamily(*MIRROR_REFUSED[:2], value=len(worker.mirror.refused))
        yield GaugeMetricFamily(*MIRROR_REBUILDING[:2], value=worker.mirror.rebuilding)
        if worker.checkpoint is not None:
            checkpointed, ages = (
                GaugeMetricFamily(*_of(CHECKPOINT_POSITION)), GaugeMetricFamily(*_of(CHECKPOINT_AGE)),
            )  # fmt: skip
            for taken in worker.checkpoint.taken:
                labels = [taken.entity, str(taken.partition)]
                checkpointed.add_metric(labels, taken.position)
                ages.add_metric(labels, max(0.0, time.time() - taken.created_at / 1000))
            yield from (checkpointed, ages)
            yield CounterMetricFamily(*CHECKPOINT_FAILURES[:2], value=worker.checkpoint.failures)


def _of_models(serving: Serving) -> Iterator[Metric]:
    model, refused = GaugeMetricFamily(*_of(MODEL)), CounterMetricFamily(*_of(REFUSED))
    challenger, canary = GaugeMetricFamily(*_of(CHALLENGER)), GaugeMetricFamily(*_of(CANARY_SHARE))
    taken_back = GaugeMetricFamily(*_of(TAKEN_BACK))
    for version, rail in serving.taken_back.items():
        taken_back.add_metric([version, rail], 1)
    for alias, card in [(alias, m.card) for alias, m in serving.models.items()]:
        if alias == CHAMPION:
            model.add_metric([card.pipeline, card.version, card.definition], 1)
        elif alias == CANARY:
            canary.add_metric([card.version], serving.shares[CANARY])
        else:
            challenger.add_metric([alias, card.version], 1)
    for reason, count in serving.refusals.items():
        refused.add_metric([reason], count)
    named = GaugeMetricFamily(*_of(REFUSED_VERSION))
    for version, why in sorted({(r.version, r.reason) for r in serving.refused.values()}):
        named.add_metric([version, why], 1)
    yield from (model, challenger, canary, taken_back, refused, named)
    yield GaugeMetricFamily(*REGISTRY_UP[:2], value=serving.away is None)


def _of(metric: _Family) -> tuple[str, str, None, list[str]]:
    name, text, labels = metric
    return name, text, None, labels


def registry(worker: Worker) -> CollectorRegistry:
    result = CollectorRegistry()
    result.register(WorkerCollector(worker))
    ProcessCollector(registry=result)  # CPU seconds and memory of the process
    return result
