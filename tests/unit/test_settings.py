"""Where a setting comes from, and what a person reads when it is wrong."""

import doctest
import os
import re
from pathlib import Path

import pytest
import yaml

import app.settings
from app.errors import HeadraceError, SettingsError
from app.settings import Settings, variable

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty directory without any setting in the environment."""
    for name in os.environ:
        if name.upper().startswith("HEADRACE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    return tmp_path


def refusal() -> str:
    with pytest.raises(SettingsError) as refused:
        Settings()
    return str(refused.value)


def test_defaults() -> None:
    settings = Settings()
    assert (settings.kafka, settings.redis_url, settings.postgres_url) == (None, None, None)
    assert settings.data_root == Path(".headrace")
    assert settings.models_root == Path("model_artifacts")
    assert settings.pipelines == Path("configs/pipelines")
    assert (settings.kafka_port, settings.redis_port, settings.postgres_port) == (9092, 6379, 5432)
    assert (settings.api_host, settings.api_port, settings.worker_port) == ("127.0.0.1", 8080, 8081)
    assert (settings.partitions, settings.replication, settings.log_level) == (8, 1, "WARNING")


def test_environment_wins_over_dotenv_over_yaml_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("configs/settings.yaml").write_text("kafka_port: 1001\nredis_port: 1001\npostgres_port: 1001\n")
    Path(".env").write_text("HEADRACE_KAFKA_PORT=1002\nHEADRACE_REDIS_PORT=1002\n")
    monkeypatch.setenv("HEADRACE_KAFKA_PORT", "1003")
    settings = Settings()
    assert (settings.kafka_port, settings.redis_port, settings.postgres_port) == (1003, 1002, 1001)
    assert settings.api_port == 8080
    assert Settings(kafka_port=1004).kafka_port == 1004


def test_an_empty_value_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_KAFKA", "")
    Path(".env").write_text("HEADRACE_REDIS_URL=\n")
    Path("configs/settings.yaml").write_text("postgres_url:\n")
    settings = Settings()
    assert (settings.kafka, settings.redis_url, settings.postgres_url) == (None, None, None)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("kafka_port", "abc", "is 'abc', but it should be a valid integer"),
        ("kafka_port", "70000", "it should be less than or equal to 65535"),
        ("api_port", "0", "remove it for the default 8080"),
        ("partitions", "0", "it should be greater than or equal to 1"),
        ("replication", "-1", "remove it for the default 1"),
        ("kafka", "kafka://localhost", "it should be HOST:PORT"),
        ("kafka", "localhost", "it should be HOST:PORT"),
        ("kafka", "a:9092,b", "it should be HOST:PORT"),
        ("redis_url", "localhost:6379", "it should start with redis:// or rediss:// or unix://"),
        ("postgres_url", "mysql://db", "it should start with postgresql:// or postgres://"),
        ("mlflow_store", "mysql", "it should be sqlite or postgres, or a URL of SQLAlchemy"),
        ("without_model", "guess", "'wait', 'fold' or 'features'"),
        ("log_level", "loud", "'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable(field), value)
    text = refusal()
    assert text.startswith(f"{variable(field)} (or {field} in configs/settings.yaml)")
    assert says in text
    assert "correct it, or remove it" in text
    assert "\n" not in text


def test_each_wrong_value_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_KAFKA_PORT", "x")
    monkeypatch.setenv("HEADRACE_PARTITIONS", "x")
    assert [line.split()[0] for line in refusal().splitlines()] == [
        "HEADRACE_KAFKA_PORT",
        "HEADRACE_PARTITIONS",
    ]


def test_values_that_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_KAFKA", "a.example:9092, b.example:9092")
    monkeypatch.setenv("HEADRACE_REDIS_URL", "rediss://:pw@cache/0")
    monkeypatch.setenv("HEADRACE_POSTGRES_URL", "postgres://u:pw@db/x")
    monkeypatch.setenv("HEADRACE_MLFLOW_STORE", "mysql+pymysql://u:pw@db/x")
    monkeypatch.setenv("HEADRACE_LOG_LEVEL", "info")
    settings = Settings()
    assert settings.kafka == "a.example:9092, b.example:9092"
    assert settings.log_level == "INFO"
    assert "pw" not in repr(settings), "a password does not belong into a log"


def test_a_password_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", "http://user:secret@cache")
    assert "secret" not in refusal()


def test_the_variable_that_kubernetes_sets_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_API_PORT", "tcp://10.0.0.7:8080")
    assert "enableServiceLinks: false" in refusal()


def test_an_unknown_name_in_a_file_is_refused_unless_it_is_of_another_program() -> None:
    Path(".env").write_text("PIPELINE=flight-delays\nHEADRACE_KAFAK=localhost:9092\n")
    assert refusal().startswith(
        "HEADRACE_KAFAK (or kafak in configs/settings.yaml) is no setting of Headrace"
    )
    Path(".env").write_text("PIPELINE=flight-delays\n")
    assert Settings().kafka is None
    Path("configs/settings.yaml").write_text("kafak: localhost:9092\n")
    assert refusal().startswith(
        "HEADRACE_KAFAK (or kafak in configs/settings.yaml) is no setting of Headrace"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kafka_port: [", "is no valid YAML"),
        ("- kafka_port", "should hold lines like"),
        ("word", "should hold lines"),
    ],
)
def test_a_broken_yaml_file(text: str, says: str) -> None:
    Path("configs/settings.yaml").write_text(text)
    assert refusal().startswith("configs/settings.yaml ")
    assert says in refusal()


def test_exit_codes() -> None:
    assert HeadraceError.exit_code == 1
    assert SettingsError.exit_code == 2
    assert issubclass(SettingsError, HeadraceError)


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.kafka_port = 1


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_the_example_of_the_environment_names_every_setting_with_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (ROOT / "ops/envs/.env.example").read_text()
    shown = dict(re.findall(r"^# (HEADRACE_\w+)=(.*)$", text, re.MULTILINE))
    assert list(shown) == [variable(name) for name in Settings.model_fields]
    for name, value in shown.items():
        monkeypatch.setenv(name, value)
    differing = {
        name
        for name, field in Settings.model_fields.items()
        if field.default is not None and getattr(Settings(), name) != field.default
    }
    assert differing == set()


def test_the_example_of_the_file_names_every_setting_with_its_default() -> None:
    text = (ROOT / "configs/settings.yaml").read_text()
    assert yaml.safe_load(text) is None, "the file as shipped must change nothing"
    shown = yaml.safe_load("\n".join(re.findall(r"^# (\w+: \S+)$", text, re.MULTILINE)))
    assert list(shown) == list(Settings.model_fields)
    settings = Settings(**shown)
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    assert {name: getattr(settings, name) for name in shown if defaults[name] is not None} == {
        name: default for name, default in defaults.items() if default is not None
    }


def test_the_examples_in_the_docstrings() -> None:
    result = doctest.testmod(app.settings)
    assert (result.failed, result.attempted > 0) == (0, True)
