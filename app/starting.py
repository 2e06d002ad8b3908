"""All processes of a pipeline on one machine, as the Procfile has them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from honcho import environ, manager

from app.settings import Settings
from models.errors import HeadraceError

END_S = 45  # longer than a worker's own bound for its end


def start(procfile: Path, settings: Settings, pipeline: str, counts: Mapping[str, int]) -> None:
    """Run until SIGTERM, Ctrl-C, or the end of one of them, which ends the others.

    counts: how many of each, by its name in the Procfile; one of those that are not named. Workers get ports of their
    own from HEADRACE_WORKER_PORT on. Raises HeadraceError where one ended by itself.
    """
    found = _processes(procfile)
    unknown = [name for name in counts if name not in found]
    if unknown:
        raise HeadraceError(f"{procfile} has no process {unknown[0]!r}; it has {', '.join(found)}.")
    manager.KILL_WAIT = END_S
    running = manager.Manager()
    for name, command in found.items():
        for number in range(counts.get(name, 1)):
            running.add_process(
                f"{name}.{number + 1}", command, env=_environment(settings, pipeline, name, number)
            )
    running.loop()
    if running.returncode not in (130, 143):  # what honcho says of Ctrl-C and SIGTERM
        raise HeadraceError("A process ended by itself, so all were: its last lines above say why.")


def _processes(procfile: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = environ.parse_procfile(procfile.read_text()).processes
    except OSError as error:
        raise HeadraceError(f"{procfile} cannot be read ({error.strerror}); give another --file.") from None
    if not found:
        raise HeadraceError(
            f"{procfile} names no process; write lines such as: api: headrace api -p card-fraud"
        )
    return found


def _environment(settings: Settings, pipeline: str, name: str, number: int) -> dict[str, str]:
    """Commands are found where this one was."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    own = {"PATH": path, "PIPELINE": pipeline, "PYTHONUNBUFFERED": "1"}
    if name == "worker":
        own["HEADRACE_WORKER_PORT"] = str(settings.worker_port + number)
    return os.environ | own
