"""`up`, `down`, `status`, `addresses`: the services beside a worker, as all the rest sees them."""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from app.errors import HeadraceError, ServiceMissing, ServicesBusy, UnknownService
from app.local import kafka, mlflow, postgres, valkey
from app.local.ports import reserve
from app.local.process import Launch, Running, Server
from app.settings import OFF, POSTGRES, SQLITE, Settings, variable

LOCK_WITHIN = 660.0  # seconds; longer than the slowest `up`, which fetches 54 MB
STOP_WITHIN = 20.0  # seconds to end in good order

_T = TypeVar("_T")

Progress = Callable[[str, str], None]
"""Called with a service's name and what happens to it; from several threads, one per service."""


class Kind(Protocol):
    """What the modules `kafka`, `valkey`, `postgres` and `mlflow` have in common."""

    def launch(
        self,
        home: Path,
        preferred_port: int,
        reserve: Callable[[int], int],
        report: Callable[[str], None],
        /,
    ) -> Launch: ...
    def answers(self, port: int, /) -> bool: ...
    def address(self, home: Path, port: int, /) -> str: ...
    def data(self, home: Path, /) -> Path: ...


@dataclass(frozen=True)
class Service:
    """One service: its names here and for people, the setting that replaces it, its seconds to get ready."""

    name: str
    label: str
    setting: str
    within: float
    kind: Kind

    def configured(self, settings: Settings) -> str | None:
        """The address that the settings give, if they do."""
        address: str | None = getattr(settings, self.setting)
        return address

    def server(self, settings: Settings) -> Server:
        return Server(self.label, settings.data_root.resolve() / self.name)

    def address(self, server: Server, running: Running) -> str:
        return self.kind.address(server.home, running.port)


LEDGER = Service("postgres", "PostgreSQL", "postgres_url", 60.0, postgres)
MLFLOW = Service("mlflow", "MLflow", "mlflow", 90.0, mlflow)
SERVICES = (
    Service("kafka", "Kafka", "kafka", 90.0, kafka),
    Service("redis", "Redis", "redis_url", 30.0, valkey),
    LEDGER,
    MLFLOW,
)


@dataclass(frozen=True)
class Addresses:
    """Where the services are. To read one that is nowhere raises ServiceMissing, which says what to do."""

    known: Mapping[str, str]

    @property
    def kafka(self) -> str:
        return self._need("kafka")

    @property
    def redis_url(self) -> str:
        return self._need("redis")

    @property
    def postgres_url(self) -> str:
        return self._need("postgres")

    @property
    def mlflow(self) -> str | None:
        """None where the folder of models is all the registry."""
        address = self.known.get("mlflow")
        return None if address == OFF else address

    def get(self, name: str) -> str | None:
        """The address of a service that one can do without, or None."""
        return self.known.get(name)

    def _need(self, name: str) -> str:
        if name not in self.known:
            service = next(service for service in SERVICES if service.name == name)
            raise ServiceMissing(service.label, variable(service.setting))
        return self.known[name]


@dataclass(frozen=True)
class ServiceStatus:
    """What `headrace status` says of one service. The address has no password in it."""

    name: str
    label: str
    state: Literal["configured", "running", "silent", "stopped"]
    address: str | None = None
    pid: int | None = None
    since: float | None = None
    data: Path | None = None
    log: Path | None = None
    note: str = ""


def _silent(_service: str, _event: str) -> None: ...


def up(settings: Settings, only: Collection[str] | None = None, progress: Progress = _silent) -> Addresses:
    """Start what is neither configured nor running, side by side, and return when all of it answers.

    What keeps its data in another one is started behind that, which is started too. Calling it again changes
    nothing. A service that fails is stopped, the others stay; then HeadraceError is raised, with a sentence for each.
    """
    chosen = [service for service in _choose(only) if not service.configured(settings)]
    with _locked(settings.data_root):
        _side_by_side(lambda row: _up_in_turn(row, settings, progress), _rows(chosen, settings))
    return addresses(settings)


def down(
    settings: Settings,
    only: Collection[str] | None = None,
    progress: Progress = _silent,
    remove_data: bool = False,
) -> None:
    """Stop what runs under the data root, children included; by force when it takes too long.

    remove_data: also delete what they keep, wherever it is (not the jars of Kafka, nor a Docker volume).
    """
    if not settings.data_root.exists():
        return
    with _locked(settings.data_root):
        _side_by_side(lambda service: _down(service, settings, progress, remove_data), _choose(only))


def kill(settings: Settings, name: str) -> None:
    """End a service that runs under the data root as a crash would. `up` starts it again."""
    with _locked(settings.data_root):
        for service in _choose([name]):
            service.server(settings).kill()


def status(settings: Settings) -> list[ServiceStatus]:
    """How each service is now. A configured one is not asked: it may be a cluster, or need credentials."""
    return [_status(service, settings) for service in SERVICES]


def addresses(settings: Settings) -> Addresses:
    """Where the services are: the settings win over what runs under the data root. Asks no server."""
    known = {}
    for service in SERVICES:
        server = service.server(settings)
        if configured := service.configured(settings):
            known[service.name] = configured
        elif running := server.running():
            known[service.name] = service.address(server, running)
    return Addresses(known)


def _choose(only: Collection[str] | None) -> list[Service]:
    names = [service.name for service in SERVICES]
    for name in only or ():
        if name not in names:
            raise UnknownService(name, names)
    return [service for service in SERVICES if only is None or service.name in only]


def _rows(chosen: list[Service], settings: Settings) -> list[list[Service]]:
    """Those that wait for nothing, each by itself; MLflow behind PostgreSQL, where its tables are there."""
    if MLFLOW not in chosen or settings.mlflow_store != POSTGRES or LEDGER.configured(settings):
        return [[service] for service in chosen]
    return [[LEDGER, MLFLOW], *([service] for service in chosen if service not in (LEDGER, MLFLOW))]


def _up_in_turn(row: list[Service], settings: Settings, progress: Progress) -> None:
    for service in row:
        _up(service, settings, progress)


def _launcher(service: Service, settings: Settings) -> Callable[..., Launch]:
    """How to start it. MLflow must be told where its tables are."""
    if service is not MLFLOW or settings.mlflow_store == SQLITE:
        return service.kind.launch
    if settings.mlflow_store != POSTGRES:
        return partial(mlflow.launch, store=settings.mlflow_store)
    return partial(mlflow.launch, store=mlflow.database_in(addresses(settings).postgres_url))


def _up(service: Service, settings: Settings, progress: Progress) -> None:
    def report(event: str) -> None:
        progress(service.name, event)

    began = time.monotonic()
    server = service.server(settings)
    if server.running():
        server.wait(service.kind.answers, service.within)
        report("runs already")
        return
    server.home.mkdir(parents=True, exist_ok=True)
    report("starting")
    with contextlib.ExitStack() as ports:
        preferred: int = getattr(settings, f"{service.name}_port")
        launch = _launcher(service, settings)(
            server.home, preferred, lambda port: ports.enter_context(reserve(port)), report
        )
        server.start(launch)
        try:
            server.wait(service.kind.answers, service.within)
        except HeadraceError:
            server.stop(STOP_WITHIN)
            raise
    if launch.port != preferred:
        report(f"port {preferred} is taken, uses {launch.port}")
    report(f"ready in {time.monotonic() - began:.1f} s")


def _down(service: Service, settings: Settings, progress: Progress, remove_data: bool) -> None:
    server = service.server(settings)
    if server.stop(STOP_WITHIN):
        progress(service.name, "stopped")
    data, link = service.kind.data(server.home), server.home / "data"
    if remove_data and data.exists():
        shutil.rmtree(data)
        if link.is_symlink():
            link.unlink()
        progress(service.name, "data removed")


def _status(service: Service, settings: Settings) -> ServiceStatus:
    if configured := service.configured(settings):
        return ServiceStatus(
            service.name,
            service.label,
            "configured",
            _without_password(configured),
            note=variable(service.setting),
        )
    server = service.server(settings)
    running = server.running()
    data = service.kind.data(server.home)
    inside = data.is_relative_to(server.home) or not data.exists()
    return ServiceStatus(
        name=service.name,
        label=service.label,
        state="stopped" if not running else "running" if service.kind.answers(running.port) else "silent",
        address=_without_password(service.address(server, running)) if running else None,
        pid=running.pid if running else None,
        since=running.since if running else None,
        data=data if data.exists() else None,
        log=server.log if server.log.exists() else None,
        note="" if inside else "its data is outside of the data root, where its system user can reach it",
    )


def _without_password(address: str) -> str:
    """
    >>> _without_password("postgresql://headrace:secret@127.0.0.1:5432/headrace")
    'postgresql://headrace:***@127.0.0.1:5432/headrace'
    """
    password = urlsplit(address).password if "://" in address else None
    return address.replace(f":{password}@", ":***@") if password else address


def _side_by_side(act: Callable[[_T], None], chosen: Iterable[_T]) -> None:
    """Do it to all at once, each to its end, and raise what failed as one error."""
    with ThreadPoolExecutor(len(SERVICES), thread_name_prefix="services") as pool:
        futures = [pool.submit(act, service) for service in chosen]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, HeadraceError) or len(errors) == 1:
            raise error
    if errors:
        raise HeadraceError("\n".join(map(str, errors)))


@contextlib.contextmanager
def _locked(data_root: Path) -> Iterator[None]:
    """Keep another `up` or `down` of this data root waiting. The lock ends with its process at the latest."""
    data_root.mkdir(parents=True, exist_ok=True)
    path = data_root.resolve() / "services.lock"
    deadline = time.monotonic() + LOCK_WITHIN
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServicesBusy(path, LOCK_WITHIN) from None
                time.sleep(0.1)
        yield
