"""Real services and real data, made once for the whole test session and taken down at its end."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import history, lifecycle
from app.datasets.cards import write_cards
from app.datasets.flights import write_flights
from app.local import services
from app.model_life import ModelLife
from app.settings import Settings
from models.pipeline import Pipeline, find
from tables.ledger import migrating
from tables.model_folder import ModelFolder

REPOSITORY = Path(__file__).parents[1]
PIPELINES = REPOSITORY / "configs" / "pipelines"
MODEL_FILES = REPOSITORY / "configs" / "models"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one folder of services share a process, so that there is one world of each; the others go anywhere."""
    for item in items:
        folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
        if folder != "unit":
            item.add_marker(
                pytest.mark.xdist_group("whole runs" if folder in ("e2e", "performance") else folder)
            )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a data root of its own, with Kafka and Redis running under it.

    Child processes see it too: it stands in the environment for the session's length.
    """
    root = tmp_path_factory.mktemp("world")
    # A server that is down for a moment finds its port free again, whatever the worlds of other processes do.
    apart = 250 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    own = {
        "HEADRACE_DATA_ROOT": str(root / "data"),
        "HEADRACE_MODELS_ROOT": str(root / "models"),
        "HEADRACE_PIPELINES": str(PIPELINES),
        "HEADRACE_MODEL_FILES": str(MODEL_FILES),
        "HEADRACE_PARTITIONS": "4",
        "HEADRACE_ALIGNMENT_S": "21600",  # tests replay days in seconds
        "HEADRACE_KAFKA_PORT": str(29092 + apart),
        "HEADRACE_REDIS_PORT": str(26379 + apart),
        "HEADRACE_POSTGRES_PORT": str(25432 + apart),
        "HEADRACE_MLFLOW_PORT": str(25000 + apart),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("HEADRACE_") and name not in ("HEADRACE_KAFKA", "HEADRACE_REDIS_URL"):
                patch.delenv(name)
        for name, value in own.items():
            patch.setenv(name, value)
        settings = Settings()
        services.up(settings, ["kafka", "redis"])
        try:
            yield settings
        finally:
            services.down(settings)


@pytest.fixture(scope="session")
def addresses(world: Settings) -> services.Addresses:
    return services.addresses(world)


@pytest.fixture(scope="session")
def postgres_url(world: Settings) -> str:
    """A PostgreSQL with the ledger's tables, for the tests that need one."""
    url = services.up(world, ["postgres"]).postgres_url
    asyncio.run(migrating.migrate(url))
    return url


@pytest.fixture(scope="session")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every flight of 2013."""
    path = tmp_path_factory.mktemp("flights") / "flights.parquet"
    write_flights(path)
    return path


@pytest.fixture(scope="session")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-five days of a city of 3,000 customers."""
    path = tmp_path_factory.mktemp("cards") / "cards.parquet"
    write_cards(path, customers=3000, terminals=6000, days=45)
    return path


@pytest.fixture(scope="session")
def trained(world: Settings, flights: Path, cards: Path) -> Settings:
    """The world with a model of each shipped pipeline."""
    for name, file in (("flight-delays", flights), ("card-fraud", cards)):
        pipeline: Pipeline = find(name, world.pipelines)
        features = world.data_root / f"{name}.features.parquet"
        history.compute(file, features, pipeline)
        life = ModelLife(pipeline, ModelFolder(world.models_root))
        lifecycle.train(life, features, lambda step: None)
    return world
