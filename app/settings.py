"""What a deployment decides: addresses, places, ports. Nothing below `app` reads this; it gets plain values.

A value comes from the environment (`HEADRACE_KAFKA`), else `.env`, else `configs/settings.yaml`, else it is
the default. The two files are looked up in the current directory.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from app.errors import SettingsError
from models.guard_rails import Bounds

if TYPE_CHECKING:
    from app.api.server import Limits

PREFIX = "HEADRACE_"
YAML_FILE = "configs/settings.yaml"
OFF = "off"
SQLITE, POSTGRES = STORES = ("sqlite", "postgres")  # of MLflow, that need no URL
SECRET = frozenset(
    {"redis_url", "postgres_url", "mlflow", "mlflow_token", "mlflow_store"}
)  # they may hold a password: neither in a repr nor in an error


def variable(field: str) -> str:
    """The environment variable of a setting.

    >>> variable("redis_url")
    'HEADRACE_REDIS_URL'
    """
    return PREFIX + field.upper()


def environment(settings: "Settings") -> dict[str, str]:
    """What makes another process see the same settings."""
    return {variable(name): str(value) for name, value in settings if value is not None}


def _bootstrap(value: str) -> str:
    for server in value.split(","):
        host, _, port = server.strip().rpartition(":")
        if not host or not port.isdigit() or "/" in server:
            raise ValueError("it should be HOST:PORT, or several of them with commas between")
    return value


def _url(*schemes: str) -> AfterValidator:
    def check(value: str) -> str:
        if not value.startswith(tuple(f"{scheme}://" for scheme in schemes)):
            raise ValueError(f"it should start with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        return value

    return AfterValidator(check)


def _server(value: str) -> str:
    if value.lower() == OFF:
        return OFF
    if not value.startswith(("http://", "https://")):
        raise ValueError(f"it should start with http:// or https://, or be {OFF}")
    return value.rstrip("/")


def _store(value: str) -> str:
    if value.lower() in STORES:
        return value.lower()
    if "://" not in value:
        raise ValueError(f"it should be {' or '.join(STORES)}, or a URL of SQLAlchemy")
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]
Metric = Literal["ap", "auc"]
Delivery = Literal["fenced", "transactional"]
Without = Literal["wait", "fold", "features"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class Settings(BaseSettings):
    """All settings, checked and frozen. Each value that cannot be honoured is a line of a SettingsError.

    Paths are kept as written: a relative one means the current directory of the command.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,  # `HEADRACE_KAFKA=` in a .env means "not set"
        dotenv_filtering="match_prefix",  # names of other programs in .env are theirs; ours are checked
        extra="forbid",
        frozen=True,
    )

    kafka: Annotated[str, AfterValidator(_bootstrap)] | None = Field(
        default=None, description="Bootstrap address of Kafka, HOST:PORT. Without it, that of `headrace up`."
    )
    redis_url: (
        Annotated[
            str,
            _url(
                "redis",
                "rediss",
                "unix",
                "redis+cluster",
                "rediss+cluster",
                "redis+sentinel",
                "rediss+sentinel",
            ),
        ]
        | None
    ) = Field(
        default=None,
        repr=False,
        description="URL of Redis or Valkey, the mirror for readers: one server, a cluster or sentinels. Without it, "
        "that of `headrace up`.",
    )
    mirror_every_s: Annotated[float, Field(ge=0.005, le=60)] = Field(
        default=0.05,
        description="Seconds between two writes of the mirror at least; under load it takes a twentieth of the worker.",
    )
    postgres_url: Annotated[str, _url("postgresql", "postgres")] | None = Field(
        default=None,
        repr=False,
        description="URL of PostgreSQL, the ledger. Without it, that of `headrace up`.",
    )
    mlflow: Annotated[str, AfterValidator(_server)] | None = Field(
        default=None,
        repr=False,
        description="URL of an MLflow 3 server, the registry of models, or off for the folder alone. Without it, that "
        "of `headrace up`, else the folder.",
    )
    mlflow_token: str | None = Field(
        default=None,
        repr=False,
        description="Token that MLflow asks for; a user and password go into the URL.",
    )
    mlflow_store: Annotated[str, AfterValidator(_store)] = Field(
        default=SQLITE,
        repr=False,
        description="Where the MLflow of `headrace up` keeps its tables: sqlite (a file of its own), postgres (a "
        "database of its own beside the ledger's), or a URL of SQLAlchemy.",
    )
    data_root: Path = Field(
        default=Path(".headrace"),
        description="Directory of all local state: stores of the worker, services of `headrace up`.",
    )
    models_root: Path = Field(
        default=Path("model_artifacts"), description="Directory of the models, one subdirectory per version."
    )
    pipelines: Path = Field(
        default=Path("configs/pipelines"), description="Directory of the pipeline definitions (YAML)."
    )
    model_files: Path = Field(
        default=Path("configs/models"),
        description="Directory of the model files, by which `headrace train` trains.",
    )
    checkpoints: str | None = Field(
        default=None,
        description="Folder or URL (fsspec) that copies of the stores go to, or off. Without it, "
        "checkpoints under the data root.",
    )
    checkpoint_every_s: Annotated[float, Field(ge=1)] = Field(
        default=60.0, description="Seconds between two checkpoints of a partition whose store has moved."
    )
    kafka_port: Port = Field(
        default=9092, description="Port that `headrace up` prefers for Kafka; when taken, the next free one."
    )
    redis_port: Port = Field(
        default=6379, description="Port that `headrace up` prefers for Valkey; when taken, the next free one."
    )
    postgres_port: Port = Field(
        default=5432,
        description="Port that `headrace up` prefers for PostgreSQL; when taken, the next free one.",
    )
    mlflow_port: Port = Field(
        default=5000, description="Port that `headrace up` prefers for MLflow; when taken, the next free one."
    )
    api_host: str = Field(default="127.0.0.1", description="Address that the query API listens on.")
    api_port: Port = Field(default=8080, description="Port that the query API listens on.")
    api_tokens: Path | None = Field(
        default=None,
        description="File of the API's tokens, as `headrace token new` makes it. Without it, or with off, the API asks "
        "for none.",
    )
    api_rate: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Requests a second that a token may make; 0 for no bound."
    )
    api_batch: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=500, description="Entities, or events, of one request to the API at most."
    )
    api_body_kib: Count = Field(default=1024, description="KiB that the body of a request may have.")
    api_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="Seconds until a request to the API is given up."
    )
    api_origins: str | None = Field(
        default=None,
        description="Origins of web pages that may ask the API (CORS), with commas between; none by default.",
    )
    worker_port: Port = Field(
        default=8081, description="Port of a worker's own pages: health, readiness, metrics."
    )
    ledger_port: Port = Field(
        default=8090, description="Port of the pages of `headrace ledger run`: health, readiness, metrics."
    )
    ledger_days: Count = Field(
        default=90,
        description="Days that predictions and labels stay in the ledger, counted from when they were sent.",
    )
    label_wait_s: Annotated[float, Field(ge=0)] = Field(
        default=300.0,
        description="Seconds that the event of a label without keys (`keys: ledger`) may take to come to the ledger; "
        "then the label is a dead letter.",
    )
    partitions: Count = Field(
        default=8,
        description="Partitions of a topic that Headrace makes; the most workers that share a stage.",
    )
    replication: Count = Field(
        default=1, description="Copies of each partition of a topic that Headrace makes; 3 in production."
    )
    delivery: Delivery = Field(
        default="fenced",
        description="How predictions reach Kafka: fenced (idempotent batches that an old owner cannot send), or "
        "transactional (each batch a transaction, for consumers that read committed; slower).",
    )
    alignment_s: Annotated[float, Field(ge=0)] = Field(
        default=10.0,
        description="How far, in seconds of event time, a partition that catches up may be ahead of the slowest; 0 for "
        "no bound.",
    )
    profiles_mib: Count = Field(
        default=1024,
        description="Memory of a worker's profiles, MiB; above it those not in use lately stay on disk only.",
    )
    model_every_s: Annotated[float, Field(ge=0.1, le=60)] = Field(
        default=2.0, description="Seconds between two looks of a worker at which model is the champion."
    )
    model_mib: Count = Field(default=256, description="Largest file of a model that is loaded, MiB.")
    model_row_us: Annotated[float, Field(gt=0)] = Field(
        default=200.0,
        description="Microseconds that a model may take for one event of a batch, or it is refused.",
    )
    promote_by: Metric | None = Field(
        default=None,
        description="Metric, ap or auc, in which a model must beat the champion on the same test days to be promoted.",
    )
    canary_psi: Annotated[float, Field(gt=0)] = Field(
        default=0.05,
        description="How far, by PSI, a canary's decisions may be from the champion's on the same events, or it is "
        "taken back.",
    )
    canary_row_us: Annotated[float, Field(gt=0)] = Field(
        default=200.0,
        description="Microseconds of processor time that a canary may take for an event, or it is taken back.",
    )
    canary_ap_drop: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05,
        description="How much lower than the champion's a canary's average precision may be on the same events, or it "
        "is taken back by `headrace quality`.",
    )
    canary_positives: Count = Field(
        default=100, description="Positive labels of these events, before the average precision is judged."
    )
    quality_days: Count = Field(
        default=7,
        description="Days of events over which `headrace quality` judges versions; they end a label delay ago.",
    )
    quality_events: Count = Field(
        default=1_000_000,
        description="Events that `headrace quality` keeps at most, for labels that come or change.",
    )
    quality_port: Port = Field(
        default=8089, description="Port of `headrace quality`: health, readiness, metrics."
    )
    without_model: Without = Field(
        default="wait",
        description="What workers do with events while there is no model: wait (they stay in the last log until they "
        "can be scored), fold (they are folded and never scored), or features (their predictions carry features "
        "and no score).",
    )
    session_s: Annotated[int, Field(ge=6, le=60)] = Field(
        default=6,
        description="Seconds of silence after which the group counts a worker out; from the broker's minimum of 6 "
        "to 10 is sensible.",
    )
    instance_id: Annotated[str, Field(min_length=1, max_length=249)] | None = Field(
        default=None,
        description="Name of this worker, unique and the same after a restart, e.g. the pod's: a static member of the "
        "group, which keeps its partitions when it is back within the session.",
    )
    log_level: Annotated[LogLevel, BeforeValidator(_upper)] = Field(
        default="WARNING",
        description="Least severe log record shown: DEBUG, INFO, WARNING, ERROR or CRITICAL.",
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as wrong:
            raise SettingsError("\n".join(_sentence(error) for error in wrong.errors())) from None

    @property
    def canary_bounds(self) -> Bounds:
        """What a canary must keep within."""
        return Bounds(self.canary_psi, self.canary_row_us, self.canary_ap_drop, self.canary_positives)

    @property
    def checkpoints_url(self) -> str | None:
        """Where checkpoints go; None where they are switched off."""
        if self.checkpoints is None:
            return str(self.data_root / "checkpoints")
        return None if self.checkpoints.lower() == OFF else self.checkpoints

    @property
    def api_limits(self) -> "Limits":
        """What the API asks of requests."""
        from app.api.server import Limits

        origins = frozenset(o.strip() for o in (self.api_origins or "").split(",") if o.strip())
        tokens = None if str(self.api_tokens).lower() in ("none", OFF) else self.api_tokens
        return Limits(
            tokens,
            self.api_rate,
            self.api_batch,
            self.api_body_kib * 1024,
            self.api_timeout_s,
            origins,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, dotenv_settings, InitSettingsSource(settings_cls, _read_yaml())


def _read_yaml() -> dict[str, Any]:
    path = Path(YAML_FILE)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        reason = " ".join(str(wrong).split())
        raise SettingsError(
            f"{YAML_FILE} is no valid YAML: {reason}; correct it, or remove the file."
        ) from None
    if not isinstance(values, dict | None):
        raise SettingsError(f"{YAML_FILE} should hold lines like `kafka_port: 9092`; correct or remove it.")
    return {str(name): value for name, value in (values or {}).items() if value is not None}


def _sentence(error: ErrorDetails) -> str:
    """One line for a person from one of pydantic's errors."""
    field = str(error["loc"][0])
    name = f"{variable(field)} (or {field} in {YAML_FILE})"
    if error["type"] == "extra_forbidden":
        known = "the names are in ops/envs/.env.example"
        return f"{name} is no setting of Headrace: correct the name, or remove it; {known}."
    shown = ":" if field in SECRET else f" is {error['input']!r}, but"
    should = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    default = Settings.model_fields[field].default
    remedy = "correct it, or remove it" + ("" if default is None else f" for the default {default}")
    if str(error["input"]).startswith("tcp://"):
        # Kubernetes sets HEADRACE_API_PORT=tcp://10.0.0.7:8080 in every pod beside a Service "headrace-api".
        remedy = "set `enableServiceLinks: false` in the pod, where Kubernetes sets this name for a Service"
    return f"{name}{shown} {should}; {remedy}."
