"""The registry's server: MLflow of this Python, with SQLite and the artifacts beside it.

It is served by uvicorn as `mlflow server` serves it, but without that command: it imports all of MLflow once
more, which takes 6 s and 260 MB. So the variables are those that the command hands down in 3.17.2, which is
pinned.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from app.errors import ProgramMissing
from app.local.ports import HOST, exchange
from app.local.process import Launch

# The database is made before anybody is answered: with a first request it would take seconds.
SERVE = """
import sys, uvicorn
from mlflow.server.handlers import initialize_backend_stores
initialize_backend_stores(sys.argv[1], sys.argv[1], sys.argv[2])
uvicorn.run("mlflow.server.fastapi_app:app", host=sys.argv[3], port=int(sys.argv[4]), log_level="warning")
"""
ARTIFACTS = "mlflow-artifacts:/"
OK = b"HTTP/1.1 200"


def launch(
    home: Path, preferred_port: int, reserve: Callable[[int], int], _report: Callable[[str], None]
) -> Launch:
    """Say how to start the server."""
    if find_spec("mlflow") is None:
        remedy = 'Install it (`pip install "headrace[local]"`)'
        raise ProgramMissing("MLflow", "there is no Python package mlflow", remedy, "HEADRACE_MLFLOW")
    data(home).mkdir(exist_ok=True)
    port = reserve(preferred_port)
    database = f"sqlite:///{data(home) / 'mlflow.db'}"
    return Launch(
        command=(sys.executable, "-c", SERVE, database, ARTIFACTS, HOST, str(port)),
        port=port,
        cwd=home,
        env={
            "_MLFLOW_SERVER_FILE_STORE": database,
            "_MLFLOW_SERVER_REGISTRY_STORE": database,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": ARTIFACTS,
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(data(home) / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # it would start processes of its own
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
    )


def answers(port: int) -> bool:
    """Whether the server says that it is well."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    return exchange(port, request, len(OK)) == OK


def address(_home: Path, port: int) -> str:
    """Where its REST interface and its pages are."""
    return f"http://{HOST}:{port}"


def data(home: Path) -> Path:
    """Where database and artifacts are."""
    return home / "data"
