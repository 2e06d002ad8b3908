"""A challenger in the shadow of a real worker: the same vectors, the same bits, and what `compare` makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from sklearn import metrics

from app import kafka, lifecycle, replay, session, verify
from app.cli import main
from app.local.services import Addresses
from app.model_life import ModelLife
from app.settings import OFF, Settings
from models import shadows
from models.model_files import ModelFile
from models.pipeline import Pipeline, find
from models.predictions import Prediction, decode
from models.scoring import Model
from tables.model_folder import CHAMPION, ModelFolder

pytestmark = pytest.mark.integration

NAME, ALIAS = "card-fraud", "challenger-small"


@pytest.fixture(scope="module")
def two(trained: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A folder of models of its own: the trained champion, and a version of fewer trees."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(trained.models_root / NAME, folder / NAME)
    settings = trained.model_copy(update={"models_root": folder, "mlflow": OFF})
    small = ModelFile(parameters={"max_iter": 15, "learning_rate": 0.3})
    features = trained.data_root / f"{NAME}.features.parquet"
    lifecycle.train(life_of(settings), features, lambda step: None, model=small)
    return settings


def life_of(settings: Settings) -> ModelLife:
    return ModelLife(find(NAME, settings.pipelines), ModelFolder(settings.models_root), row_us=1e6)


@contextlib.asynccontextmanager
async def at_work(
    settings: Settings, pipeline: Pipeline, addresses: Addresses
) -> AsyncIterator[session.Process]:
    await session.fresh(settings, pipeline, addresses)
    worker = session.Process(settings, pipeline, "worker", HEADRACE_MODEL_EVERY_S="1")
    worker.start()
    try:
        await worker.ready()
        yield worker
    finally:
        worker.stop()


async def until(worker: session.Process, reached: Callable[[dict[str, float]], bool]) -> None:
    async with asyncio.timeout(120):
        while not reached(await worker.metrics()):
            worker.check()
            await asyncio.sleep(0.1)


async def predictions_of(pipeline: Pipeline, address: str) -> dict[Any, Prediction]:
    records = [r async for r in kafka.read_between(address, pipeline.predictions)]
    return {(r.partition, p.origin.offset): p for r in records for p in [decode(r.value)]}


async def shadows_of(pipeline: Pipeline, address: str) -> list[tuple[Any, shadows.Shadow]]:
    """With the place of each."""
    records = [r async for r in kafka.read_between(address, pipeline.shadow)]
    return [((r.partition, s.origin.offset), s) for r in records for s in [shadows.decode(r.value)]]


def scores_of(settings: Settings, version: str, predictions: list[Prediction]) -> list[float]:
    """By a model loaded here, from the vectors that the predictions carry."""
    pipeline = find(NAME, settings.pipelines)
    model: Model = ModelFolder(settings.models_root).load(pipeline, version)
    return model.score_many(verify.vectors(pipeline, predictions)).astype(np.float64).tolist()


def compared(settings: Settings, pipeline: Pipeline, *words: str) -> Any:
    environment = {"HEADRACE_MODELS_ROOT": str(settings.models_root), "HEADRACE_MLFLOW": OFF}
    words = ("models", "compare", *words, "-p", NAME, "--as", pipeline.instance, "--json")
    return CliRunner(env=environment).invoke(main, words)


@pytest.mark.timeout(300)
async def test_a_challenger_scores_the_same_vectors_and_is_compared(
    two: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline, life = find(NAME, two.pipelines, "cards-shadow"), life_of(two)
    champion = life.aliases()[CHAMPION]
    (challenger,) = (v.version for v in life.registry.versions(NAME) if v.version != champion)
    async with at_work(two, pipeline, addresses) as worker:
        empty = await asyncio.to_thread(compared, two, pipeline)
        assert (empty.exit_code, len(empty.stderr.splitlines())) == (2, 1)
        # 1. two days with the challenger, one without
        life.promote(challenger, ALIAS)
        named = f"headrace_challenger{{{ALIAS},{challenger}}}"
        await until(worker, lambda m: named in m)
        first = replay.tape(cards, pipeline, "2018-04-20", "2018-04-22")
        await replay.publish(first, pipeline, addresses.kafka, 3000)
        await until(worker, lambda m: m["headrace_shadows_total"] == first.events)
        assert life.withdraw(ALIAS) == challenger
        await until(worker, lambda m: named not in m)
        second = replay.tape(cards, pipeline, "2018-04-22", "2018-04-23")
        await replay.publish(second, pipeline, addresses.kafka, 3000)
        await until(worker, lambda m: m["headrace_predictions_total"] == first.events + second.events)
        found = await worker.metrics()
        assert (found["headrace_shadows_total"], found["headrace_shadows_missed_total"]) == (first.events, 0)
    predictions = await predictions_of(pipeline, addresses.kafka)
    made = await shadows_of(pipeline, addresses.kafka)
    assert (len(predictions), len(made)) == (first.events + second.events, first.events)
    # 2. one record of each, at its prediction's place, with the bits of an offline scoring
    assert len(dict(made)) == len(made)
    theirs = [predictions[place] for place, _ in made]
    assert [(s.id, s.event_time, s.origin, s.champion.score) for _, s in made] == [
        (p.id, p.event_time, p.origin, p.score) for p in theirs
    ]
    assert {(s.champion.version, s.challengers[ALIAS].version) for _, s in made} == {(champion, challenger)}
    assert [s.challengers[ALIAS].score for _, s in made] == scores_of(two, challenger, theirs)
    assert [s.champion.score for _, s in made] == scores_of(two, champion, theirs)
    # 3. some labels flip, one is taken back
    labels = await flip(pipeline, addresses.kafka, [p.id for p in theirs])
    # 4. what compare says is what is in the topics
    answer = await asyncio.to_thread(compared, two, pipeline, champion, challenger)
    assert answer.exit_code == 0, answer.stderr
    judge(json.loads(answer.stdout), labels, {champion: theirs}, made, life)
    # 5. all versions, each on its own events, of some days
    answer = await asyncio.to_thread(compared, two, pipeline, "--from", "2018-04-21", "--to", "2018-04-23")
    times = [p.event_time for p in predictions.values()]
    day = [history for history in times if history >= min(times) // 86_400_000 * 86_400_000 + 86_400_000]
    both = [s for _, s in made if s.event_time in set(day)]
    assert {f["version"]: f["events"] for f in json.loads(answer.stdout)["versions"]} == {
        champion: len(day), challenger: len(both),
    }  # fmt: skip


async def flip(pipeline: Pipeline, address: str, ids: list[Any]) -> dict[Any, int]:
    """Send other labels of three events, and none of a fourth. What is known of all then, read by hand."""
    assert pipeline.labels is not None
    topic, known, there = pipeline.labels.topic, pipeline.labels.field, dict[Any, tuple[int, bytes]]()
    async for record in kafka.read_between(address, topic):
        there[json.loads(record.value)["TRANSACTION_ID"]] = record.partition, record.value
    labelled = [id_ for id_ in ids if id_ in there]
    producer = kafka.producer(address)
    await producer.start()
    for n, id_ in enumerate(labelled[:4]):
        partition, value = there[id_]
        body = json.loads(value)
        body[known] = None if n == 3 else 1 - body[known]
        value = msgspec.json.encode(body)
        await producer.send_and_wait(topic, value, key=b"any", partition=(partition + 1) % 4)
        there[id_] = partition, value
    await producer.stop()
    states = {id_: json.loads(value)[known] for id_, (_, value) in there.items()}
    return {id_: state for id_, state in states.items() if state is not None}


def judge(found: Any, labels: dict[Any, int], predicted: Any, made: Any, life: ModelLife) -> None:
    """Compare with scikit-learn and scipy."""
    ((champion, predictions),) = predicted.items()
    challenger = made[0][1].challengers[ALIAS].version
    scores = {
        champion: [p.score for p in predictions],
        challenger: [s.challengers[ALIAS].score for _, s in made],
    }
    known = [i for i, p in enumerate(predictions) if p.id in labels]
    truth = np.array([labels[predictions[i].id] for i in known])
    days = np.array([predictions[i].event_time // 86_400_000 for i in known])
    assert [f["version"] for f in found["versions"]] == [champion, challenger]
    for figures in found["versions"]:
        own = np.array(scores[figures["version"]])
        judged = own[known]
        assert (figures["events"], figures["labelled"], figures["positives"]) == (
            len(made), len(known), int(truth.sum()),
        )  # fmt: skip
        assert figures["positives"] > 10
        assert figures["auc"] == pytest.approx(metrics.roc_auc_score(truth, judged))
        assert figures["ap"] == pytest.approx(metrics.average_precision_score(truth, judged))
        order = {
            day: sorted(np.flatnonzero(days == day).tolist(), key=lambda i: (-judged[i], at(predictions[known[i]])))
            for day in set(days.tolist())
        }  # fmt: skip
        firsts = [truth[rows[:100]].mean() for rows in order.values()]
        assert figures["precision_at_top"] == pytest.approx(np.mean(firsts))
        assert figures["quantiles"]["0.99"] == pytest.approx(np.quantile(own, 0.99))
        assert 0 <= figures["calibration_error"] < 0.1
    (pair,) = found["pairs"]
    decided = [_decisions(life, version, given) for version, given in scores.items()]
    differ = sum(a != b for a, b in zip(*decided, strict=True))
    assert pair["decisions_differ"] == pytest.approx(differ / len(made))
    assert 0 < differ < len(made) / 2
    assert pair["rank_correlation"] == pytest.approx(stats.spearmanr(*scores.values()).statistic)


def at(prediction: Prediction) -> Any:
    return prediction.event_time, prediction.id


def _decisions(life: ModelLife, version: str, scores: list[float]) -> list[str]:
    card = life.load(version).card
    ranked = sorted(card.thresholds.items(), key=lambda item: -item[1])
    return [next((name for name, t in ranked if s >= t), card.otherwise) for s in scores]


@pytest.mark.timeout(400)
async def test_workers_are_killed_and_no_prediction_has_two_records_nor_one_of_other_bits(
    two: Settings, addresses: Addresses, cards: Path
) -> None:
    pipeline, life = find(NAME, two.pipelines, "cards-shadow-killed"), life_of(two)
    champion = life.aliases()[CHAMPION]
    (challenger,) = (v.version for v in life.registry.versions(NAME) if v.version != champion)
    life.promote(challenger, ALIAS)
    await session.fresh(two, pipeline, addresses)
    workers = [session.Process(two, pipeline, "worker", n) for n in (1, 2)]
    tape, rng = replay.tape(cards, pipeline, "2018-04-10", "2018-04-14"), random.Random(6)
    try:
        for worker in workers:
            worker.start()
        await asyncio.gather(*(worker.ready() for worker in workers))
        publishing = asyncio.create_task(replay.publish(tape, pipeline, addresses.kafka, 400))
        kills = 0
        while not publishing.done():
            worker = rng.choice(workers)
            seen = (await worker.metrics())["headrace_shadows_total"]
            more = seen + rng.randint(50, 800)
            await until(worker, lambda m, more=more: m["headrace_shadows_total"] > more or publishing.done())
            await asyncio.sleep(rng.random() / 5)
            assert worker.stop(signal.SIGKILL) == -signal.SIGKILL
            kills += 1
            await asyncio.sleep(rng.random() * 3)
            worker.start()
            await worker.ready()
        await publishing
        async with asyncio.timeout(120):
            while len(await predictions_of(pipeline, addresses.kafka)) < tape.events:
                for worker in workers:
                    worker.check()
                await asyncio.sleep(0.5)
        assert [(await w.metrics())["headrace_shadows_missed_total"] for w in workers] == [0, 0]
    finally:
        life.withdraw(ALIAS)
        codes = [worker.stop() for worker in workers]
    assert codes == [0, 0]
    verdict, _ = await verify.check(pipeline, addresses.kafka)
    assert (verdict.lost, verdict.doubled, verdict.differing) == (0, 0, 0)
    predictions = await predictions_of(pipeline, addresses.kafka)
    made = await shadows_of(pipeline, addresses.kafka)
    print(f"\n{kills} kills, {len(predictions)} predictions, {len(predictions) - len(made)} without a record")
    # 1. at most one each, of a prediction that is out, and with the bits of an offline scoring
    assert len(dict(made)) == len(made) <= len(predictions)
    theirs = [predictions[place] for place, _ in made]
    assert [(s.id, s.champion.version, s.champion.score) for _, s in made] == [
        (p.id, p.version, p.score) for p in theirs
    ]
    assert [s.challengers[ALIAS].score for _, s in made] == scores_of(two, challenger, theirs)
    # 2. of each partition a run of events for each kill at most is without one, and no more
    assert kills >= 3
    recorded = set(dict(made))
    for partition in range(two.partitions):
        origins = sorted(place for place in predictions if place[0] == partition)
        runs = [there for there, _ in groupby(place in recorded for place in origins)]
        assert runs.count(False) <= kills
    assert len(made) > len(predictions) / 2
