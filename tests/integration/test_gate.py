"""The gate of a real worker with a real MLflow server: versions that are not fit, each for another reason."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from onnx import TensorProto

from app import replay, session
from app.cli import main
from app.local import services
from app.local.services import Addresses
from app.model_life import ModelLife
from app.registry import Mlflow
from app.settings import Settings
from models.pipeline import find
from models.scoring import Card, Refused
from tables.model_folder import CHAMPION, ModelFolder
from tests.fixtures.models import graph, slow_graph
from tests.integration.test_registry import Fleet, all_served, served

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

NAME = "flight-delays"


def unfit(given: bytes, good: Card) -> dict[str, tuple[bytes, Card]]:
    """By the reason for which it is to be refused, and what is wrong: a graph and a card."""
    first, *rest = good.features
    width = len(good.features)
    even = msgspec.structs.replace(good, golden_scores=[0.5] * len(good.golden))
    return {
        "features.names": (given, msgspec.structs.replace(good, features=["OTHER", *rest])),
        "features.order": (given, msgspec.structs.replace(good, features=[*rest, first])),
        "definition.hash": (given, msgspec.structs.replace(good, definition="f" * 16)),
        "graph.input": (graph(width=width, kind=TensorProto.DOUBLE), good),
        "graph.output": (graph(width=width, gives=TensorProto.DOUBLE), good),
        "golden.scores": (given, even),
        "slow.row": (slow_graph(width), even),
    }


async def test_each_item_of_the_gate(
    trained: Settings, addresses: Addresses, flights: Path, tmp_path: Path
) -> None:
    pipeline = find(NAME, trained.pipelines, "flights-gate")
    await session.fresh(trained, pipeline, addresses)
    mlflow = services.up(trained, ["mlflow"]).mlflow or ""
    try:
        folder = ModelFolder(tmp_path / "here")
        trained_folder = ModelFolder(trained.models_root)
        champion = trained_folder.aliases(NAME)[CHAMPION]
        given, good = trained_folder.read(NAME, champion)
        folder.save(given, good)
        ours = ModelLife(pipeline, Mlflow(mlflow, folder), row_us=200.0)
        ours.registry.publish(NAME, champion)
        ours.registry.point(NAME, CHAMPION, champion)
        versions = unfit(given, good)
        for version, (made, of) in versions.items():
            folder.save(made, msgspec.structs.replace(of, version=version))
            ours.registry.publish(NAME, version)
        with Fleet(trained, pipeline, mlflow, tmp_path, 1) as fleet:
            [worker] = fleet.workers
            await worker.ready()
            for version in versions:
                reason = version.partition(".")[0]
                with pytest.raises(Refused) as refused:
                    ours.promote(version)
                assert refused.value.reason == reason
                ours.registry.point(NAME, CHAMPION, version)  # as one can in MLflow's own pages
                named = f"headrace_model_refused_version{{{reason},{version}}}"
                await fleet.until(lambda m, named=named: named in m)  # type: ignore[misc]
                await fleet.scored_by(champion)
                [told] = [line for line in worker.log.read_text().splitlines() if f" {version} " in line]
                assert f"{champion} scores on" in told
                shown = await asyncio.to_thread(
                    CliRunner(env={"HEADRACE_MLFLOW": mlflow, "HEADRACE_MODELS_ROOT": str(folder.root)}).invoke,
                    main, ["models", "show", version, "-p", NAME, "--json"],
                )  # fmt: skip
                assert (shown.exit_code, json.loads(shown.stdout)["reason"]) == (1, reason)
            counts = await worker.metrics()
            told_of = {k: v for k, v in counts.items() if k.startswith("headrace_model_refused_total")}
            assert told_of == {
                "headrace_model_refused_total{features}": 2, "headrace_model_refused_total{definition}": 1,
                "headrace_model_refused_total{graph}": 2, "headrace_model_refused_total{golden}": 1,
                "headrace_model_refused_total{slow}": 1,
            }  # fmt: skip
            tape = replay.tape(flights, pipeline, "2013-03-01", "2013-03-02")
            await replay.publish(tape, pipeline, addresses.kafka, None)
            await all_served(pipeline, addresses.kafka, tape.events, worker)
        assert {p.version for _, p in await served(pipeline, addresses.kafka)} == {champion}
    finally:
        services.down(trained, ["mlflow"])
