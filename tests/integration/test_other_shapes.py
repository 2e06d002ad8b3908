"""A pipeline of another shape than the shipped ones: one entity, text ids, ISO times, floats, nulls."""

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import history, kafka, lifecycle, replay, session, verify
from app.local.services import Addresses
from app.model_life import ModelLife
from app.settings import Settings
from models.model_files import ModelFile
from models.pipeline import load
from models.predictions import decode
from tables.model_folder import ModelFolder
from tests.integration.test_stream import Run

pytestmark = pytest.mark.integration

LOGINS = """
name: logins
streams:
  logins:
    id: LOGIN
    time: AT
    fields:
      LOGIN: string
      AT: {type: timestamp, unit: iso}
      USER: {type: string, optional: true}
      SECONDS: {type: float, optional: true}
      BYTES: {type: int, optional: true}
labels: {field: BAD, known: KNOWN_AT}
transforms:
  LOG_SECONDS: log1p(SECONDS)
  EARLY: 1 if hour(AT) < 6 else 0
entities:
  user:
    key: USER
    features:
      USER_NB_1H: {aggregate: count, window: 1h}
      USER_BYTES_1D: {aggregate: sum, of: BYTES, window: 1d}
      USER_MEAN_BYTES_10M: {aggregate: mean, of: BYTES, window: 10m, delay: 5m}
vector: [SECONDS, LOG_SECONDS, EARLY, BYTES, USER_NB_1H, USER_BYTES_1D, USER_MEAN_BYTES_10M]
model: {decisions: {ask: 0.1}}
predictions_carry_features: true
"""
ROWS = 6000


def write(path: Path) -> None:
    rng = np.random.default_rng(3)
    start = dt.datetime(2024, 2, 27, tzinfo=dt.UTC)
    seconds = np.sort(rng.uniform(0, 10 * 86_400, ROWS))
    at = [start + dt.timedelta(milliseconds=int(s * 1000)) for s in seconds]
    users = rng.integers(0, 40, ROWS)
    bytes_ = rng.integers(-5, 10_000, ROWS)
    columns = {
        "LOGIN": [f"login-é-{i}" for i in range(ROWS)],
        "AT": pa.array(at, pa.timestamp("us", tz="UTC")),
        "USER": [None if u == 0 else f"user {u}" for u in users],
        "SECONDS": [None if i % 17 == 0 else float(x) for i, x in enumerate(rng.exponential(0.3, ROWS))],
        "BYTES": [None if i % 11 == 0 else int(x) for i, x in enumerate(bytes_)],
        "BAD": (bytes_ > 9000).astype(np.int8),
        "KNOWN_AT": pa.array([a + dt.timedelta(hours=2) for a in at], pa.timestamp("us", tz="UTC")),
    }
    pq.write_table(pa.table(columns), path)


@pytest.mark.timeout(120)
async def test_one_entity_text_ids_iso_times_floats_and_nulls(
    world: Settings, addresses: Addresses, tmp_path: Path
) -> None:
    (tmp_path / "logins.yaml").write_text(LOGINS)
    write(tmp_path / "logins.parquet")
    pipeline = load(tmp_path / "logins.yaml", "logins-shape")
    history.compute(tmp_path / "logins.parquet", tmp_path / "features.parquet", pipeline)
    life = ModelLife(pipeline, ModelFolder(world.models_root))
    lifecycle.train(
        life, tmp_path / "features.parquet", lambda step: None,
        model=ModelFile(kind="logistic_regression", test_days=2),
    )  # fmt: skip
    tape = replay.tape(tmp_path / "logins.parquet", pipeline)
    await session.fresh(world, pipeline, addresses)
    worker = session.Process(world.model_copy(update={"pipelines": tmp_path}), pipeline, "worker")
    try:
        worker.start()
        await worker.ready()
        run = Run(world, pipeline, addresses, worker)
        await run.publish(tape)
        await run.predicted(ROWS)
    finally:
        worker.stop()
    verdict, expected = await verify.check(pipeline, addresses.kafka)
    assert (verdict.events, verdict.predictions) == (ROWS, ROWS)
    assert (verdict.lost, verdict.doubled, verdict.differing, verdict.rejected) == (0, 0, 0, 0)
    # One partition holds a user's whole log, in order of time, so not even order can differ.
    assert verify.order_skew(pipeline, tape.history, expected) == 0
    ids = {decode(r.value).id async for r in kafka.read_between(addresses.kafka, pipeline.predictions)}
    assert ids == {f"login-é-{i}" for i in range(ROWS)}
