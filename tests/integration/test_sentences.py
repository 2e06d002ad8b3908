"""What a user sees when something is missing: one sentence, an exit code, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.session import free_port
from app.settings import Settings
from tests.conftest import PIPELINES

pytestmark = pytest.mark.integration


def headrace(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run the command line. Its exit code and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments], env=os.environ | environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "sentence"),
    [
        (["worker", "-p", "card-frad"], {}, 2, "did you mean card-fraud?"),
        (["models", "rollback", "-p", "card-fraud"], {"HEADRACE_MODELS_ROOT": "x"}, 1, "promote a version by its name"),
        (["worker", "-p", "card-fraud"], {"HEADRACE_KAFKA": "127.0.0.1:1"}, 1, "No Kafka answers at 127.0.0.1:1"),
        (["worker", "-p", "card-fraud", "--as", "unmade"], {}, 1, "create --pipeline card-fraud --as unmade"),
        (["worker", "-p", "card-fraud"], {"HEADRACE_KAFKA": "nonsense"}, 2, "HEADRACE_KAFKA"),
        (["topics", "create", "-p", "card-fraud"], {"HEADRACE_KAFKA": "127.0.0.1:1"}, 1, "No Kafka answers"),
        (["replay", "nowhere.parquet", "-p", "card-fraud"], {}, 2, "nowhere.parquet"),
        (["train", "-p", "card-fraud", "--features", "nowhere.parquet"], {}, 2, "nowhere.parquet"),
        (["demo", "-p", "other"], {}, 1, "There is no demonstration of 'other'"),
        (["check", "nowhere.yaml"], {}, 2, "nowhere.yaml"),
        (["worker"], {}, 2, "Missing option"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(
    trained: Settings, arguments: list[str], environment: dict[str, str], code: int, sentence: str
) -> None:
    got, printed = headrace(*arguments, **environment)
    assert sentence in printed
    assert "Traceback" not in printed
    assert got == code


def test_nothing_is_running(tmp_path: Path) -> None:
    own = {"HEADRACE_DATA_ROOT": str(tmp_path), "HEADRACE_PIPELINES": str(PIPELINES), "HEADRACE_KAFKA": ""}
    code, printed = headrace("topics", "create", "-p", "card-fraud", **own)
    assert (code, "Traceback" in printed) == (1, False)
    assert "headrace up" in printed


def test_a_taken_port_is_told(trained: Settings) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", free_port()))
        holder.listen()
        port = str(holder.getsockname()[1])
        code, printed = headrace("api", "-p", "card-fraud", "--port", port)
    assert (code, "Traceback" in printed) == (1, False)
    assert f"127.0.0.1:{port}" in printed


def test_help_names_every_command_and_gives_examples() -> None:
    code, printed = headrace("--help")
    assert code == 0
    for command in ("up", "down", "status", "check", "topics", "data", "features", "train", "worker", "api", "replay",
                    "dlq", "bench", "demo"):  # fmt: skip
        assert f"  {command} " in printed
        code, own = headrace(command, "--help")
        assert code == 0
        assert "Example:" in own or "Commands:" in own
