"""The registry's server: MLflow of this Python. The artifacts are beside it, its tables there too or in a database.

It is served by uvicorn as `mlflow server` serves it, but without that command: it imports all of MLflow once
more, which takes 6 s and 260 MB. So the variables are those that the command hands down in 3.17.2, which is
pinned.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from app.errors import ProgramMissing, ServiceFailed
from app.local.ports import HOST, exchange
from app.local.process import Launch

# The tables are made before anybody is answered: with a first request it would take seconds. Where they are may
# hold a password, which a command line would show to everybody.
SERVE = """
import os, sys, uvicorn
from mlflow.server.handlers import initialize_backend_stores
store = os.environ["_MLFLOW_SERVER_REGISTRY_STORE"]
initialize_backend_stores(store, store, sys.argv[1])
uvicorn.run("mlflow.server.fastapi_app:app", host=sys.argv[2], port=int(sys.argv[3]), log_level="warning")
"""
DATABASE = "mlflow"  # its own, for both it and the ledger change their tables by themselves
CONNECT_S = 10
ARTIFACTS = "mlflow-artifacts:/"
OK = b"HTTP/1.1 200"


def launch(
    home: Path, preferred_port: int, reserve: Callable[[int], int], _report: Callable[[str], None],
    store: str | None = None,
) -> Launch:  # fmt: skip
    """Say how to start the server. store: URL of the database with its tables; SQLite's file here by default."""
    if find_spec("mlflow") is None:
        remedy = 'Install it (`pip install "headrace[local]"`)'
        raise ProgramMissing("MLflow", "there is no Python package mlflow", remedy, "HEADRACE_MLFLOW")
    data(home).mkdir(exist_ok=True)
    port = reserve(preferred_port)
    database = f"sqlite:///{data(home) / 'mlflow.db'}" if store is None else _with_driver(store)
    return Launch(
        command=(sys.executable, "-c", SERVE, ARTIFACTS, HOST, str(port)),
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


def database_in(postgres: str) -> str:
    """The URL of MLflow's own database in this PostgreSQL, made where there is none."""
    _need_driver()
    import psycopg

    try:
        with psycopg.connect(postgres, autocommit=True, connect_timeout=CONNECT_S) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
            if known.fetchone() is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")
    except psycopg.Error as error:
        why = " ".join(str(error).split()) or type(error).__name__
        what = f"has no database in PostgreSQL ({why}). Let its user make {DATABASE}, or set HEADRACE_MLFLOW_STORE."
        raise ServiceFailed("MLflow", what) from None
    return urlsplit(postgres)._replace(path=f"/{DATABASE}").geturl()


def _with_driver(store: str) -> str:
    """The URL as SQLAlchemy takes it, where it leaves the driver open with that of the extra `local`.

    >>> _with_driver("postgres://u:p@h/d"), _with_driver("mysql+pymysql://h/d")
    ('postgresql+psycopg://u:p@h/d', 'mysql+pymysql://h/d')
    """
    scheme, _, rest = store.partition("://")
    if scheme not in ("postgres", "postgresql"):
        return store
    _need_driver()
    return f"postgresql+psycopg://{rest}"


def _need_driver() -> None:
    if find_spec("psycopg") is None:
        remedy = 'Install it (`pip install "headrace[local]"`), or set HEADRACE_MLFLOW_STORE=sqlite'
        raise ProgramMissing("MLflow", "there is no Python package psycopg", remedy, "HEADRACE_MLFLOW")
