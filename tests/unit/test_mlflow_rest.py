"""What a server at HEADRACE_MLFLOW may answer, and the one sentence for each."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app import mlflow_rest
from app.errors import RegistryError
from app.mlflow_rest import AlreadyThere, NotThere, Rest
from app.registry import Mlflow
from models.scoring import Refused
from tables.model_folder import ModelFolder

Answer = tuple[int, bytes]
RUN = "mlflow-artifacts:/1/abc/artifacts"


class Server(ThreadingHTTPServer):
    """Answers each path as it is told, and keeps what was asked."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked = answers, list[tuple[str, str | None]]()

    @property
    def at(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/base").removeprefix("/api/2.0/mlflow/")
        self.server.asked.append((self.path, self.headers["Authorization"]))
        status, body = self.server.answers.get(path, (404, b"<html>nothing here</html>"))
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body.decode())
        self.send_header("Content-Length", str(len(body) + (9 if status == 299 else 0)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving(**answers: Answer) -> Iterator[Server]:
    with Server({path.replace("__", "/"): answer for path, answer in answers.items()}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        ((404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no x"}'), NotThere, "refuses .*no x"),
        ((400, b'{"error_code": "RESOURCE_ALREADY_EXISTS"}'), AlreadyThere, "RESOURCE_ALREADY_EXISTS"),
        ((500, b"oops"), RegistryError, r"refuses what was asked \(500 Internal Server Error\)"),
        ((404, b"<html>"), RegistryError, "refuses what was asked"),
        ((401, b""), RegistryError, r"does not let this in \(401\); set HEADRACE_MLFLOW_TOKEN"),
        ((403, b""), RegistryError, r"does not let this in \(403\)"),
        ((200, b"<html>a page</html>"), RegistryError, "is no MLflow server; set HEADRACE_MLFLOW to one"),
        ((200, b'{"other": 1}'), RegistryError, "is no MLflow server"),
        ((200, b"[]"), RegistryError, "is no MLflow server"),
        ((302, b"http://127.0.0.1:1/elsewhere"), RegistryError, r"refuses what was asked \(302"),
    ],
)
def test_an_answer_that_is_none(answer: Answer, kind: type[RegistryError], sentence: str) -> None:
    with serving(x=answer) as server, pytest.raises(RegistryError, match=sentence) as error:
        Rest(f"http://{server.at}", None).get("x", "wanted")
    assert type(error.value) is kind
    assert len(str(error.value).splitlines()) == 1


def test_a_server_that_is_away_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match=r"does not answer .*Connection refused.*; start it, or set"):
        Rest("http://127.0.0.1:1", None).get("x")
    monkeypatch.setattr(mlflow_rest, "ANSWER_S", 0.1)
    with Server({}) as silent, pytest.raises(RegistryError, match=r"does not answer \(timed out\)"):
        Rest(f"http://{silent.at}", None).get("x")


@pytest.mark.parametrize(
    ("userinfo", "token", "sent"),
    [
        ("", None, None),
        ("", "t0ken", "Bearer t0ken"),
        ("u:p%40ss@", None, "Basic dTpwQHNz"),
        ("u@", "t", "Bearer t"),
    ],
)
def test_who_asks_is_told_in_a_header_and_in_no_sentence(
    userinfo: str, token: str | None, sent: str | None
) -> None:
    with serving(x=(500, b"")) as server:
        with pytest.raises(RegistryError) as error:
            Rest(f"http://{userinfo}{server.at}/base", token).get("x", name="a b&c")
        assert server.asked == [("/base/api/2.0/mlflow/x?name=a+b%26c", sent)]
    assert "p%40ss" not in str(error.value)
    assert "t0ken" not in str(error.value)


def test_artifacts_elsewhere_are_told() -> None:
    with pytest.raises(RegistryError, match=r"keeps artifacts at s3://bucket/1 .*--serve-artifacts"):
        Rest("http://127.0.0.1:1", None).download("s3://bucket/1", "model.onnx", 10)


def test_a_file_that_breaks_off_is_refused(tmp_path: Path) -> None:
    """The digest tells, whatever HTTP says."""
    rows = [
        {"version": str(number), "source": RUN, "creation_timestamp": 1,
         "tags": [{"key": "headrace.version", "value": version}, {"key": "headrace.digest", "value": "00"}]}
        for number, version in enumerate(("v1", "../v1"))
    ]  # fmt: skip
    found = json.dumps({"model_versions": rows}).encode()
    with serving(**{"model-versions__search": (200, found)}) as server:
        place = "/api/2.0/mlflow-artifacts/artifacts/1/abc/artifacts/"
        for file in ("model.onnx", "model.json", "features.txt"):
            server.answers[place + file] = (299, b"half of")
        registry = Mlflow(f"http://{server.at}", ModelFolder(tmp_path / "models"))
        with pytest.raises(Refused, match="v1 is damaged") as refused:
            registry.fetch("shop", "v1")
        assert refused.value.reason == "damaged"
        small = Mlflow(f"http://{server.at}", ModelFolder(tmp_path / "models", largest=3))
        with pytest.raises(Refused, match=r"model\.onnx of the model v1 is larger"):
            small.fetch("shop", "v1")
        for odd in ("../v1", "v2", "#1"):
            with pytest.raises(Refused, match="was not registered by Headrace"):
                registry.fetch("shop", odd)
    assert not (tmp_path / "models").exists()
