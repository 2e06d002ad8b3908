"""One server process: started to outlive this command, found again by a later one, stopped for good."""

import contextlib
import json
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.errors import ServiceFailed

POLL_EVERY = 0.05  # seconds between two looks at a process that starts or ends
KILL_WITHIN = 10.0  # seconds that the kernel gets to end a killed process

# Servers that this very process started: it must collect their exit codes, or they stay as zombies.
_children: dict[int, "subprocess.Popen[bytes]"] = {}


@dataclass(frozen=True)
class Launch:
    """How to start a server: its command, with absolute paths, and the port that it will listen on.

    user: the system user it runs as (only root may name one); stop_signal: what makes it end in good order;
    cleanup: a command to run when it has ended, whatever way it did.
    """

    command: tuple[str, ...]
    port: int
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_signal: int = signal.SIGTERM
    cleanup: tuple[str, ...] = ()


@dataclass(frozen=True)
class Running:
    """A server that runs. `born` tells its process from a later one that got the same pid."""

    pid: int
    born: str
    port: int
    since: float
    stop_signal: int
    cleanup: tuple[str, ...]


class Server:
    """The server whose home is this directory: at most one process, recorded in `state.json`.

    Two commands must not start or stop the same server at once; `services` holds a lock for that.
    """

    def __init__(self, label: str, home: Path) -> None:
        self.label = label
        self.home = home
        self.log = home / "server.log"
        self._state = home / "state.json"

    def running(self) -> Running | None:
        """The recorded process, if that very one still runs (not after a reboot, nor as a zombie)."""
        try:
            recorded = json.loads(self._state.read_text())
            running = Running(**{**recorded, "cleanup": tuple(recorded["cleanup"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        process = _processes(running.pid).get(running.pid)
        return running if process and process.born == running.born else None

    def start(self, launch: Launch) -> Running:
        """Start the process in a session of its own and record it. It is not ready yet: see `wait`."""
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.previous"))
        try:
            with self.log.open("wb") as log:
                process = subprocess.Popen(
                    launch.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=launch.cwd,
                    env={**os.environ, **launch.env},
                    start_new_session=True,  # Ctrl-C in the terminal is not meant for the server
                    **identity(launch.user),
                )
        except OSError as error:
            raise ServiceFailed(self.label, f"cannot be started: {error}.") from error
        _children[process.pid] = process
        seen = _processes(process.pid).get(process.pid)
        born = seen.born if seen else ""  # it ended at once; `wait` tells
        running = Running(process.pid, born, launch.port, time.time(), launch.stop_signal, launch.cleanup)
        part = self._state.with_suffix(".part")
        part.write_text(json.dumps(asdict(running)))
        part.replace(self._state)
        return running

    def wait(self, answers: Callable[[int], bool], within: float) -> None:
        """Return when the server answers on its port; raise ServiceFailed when it ended or takes longer."""
        deadline = time.monotonic() + within
        while True:
            running = self.running()
            if running is None:
                raise ServiceFailed(self.label, "ended while it started.", self.log)
            if answers(running.port):
                return
            if time.monotonic() > deadline:
                what = f"runs as process {running.pid} but does not answer on port {running.port}"
                raise ServiceFailed(self.label, f"{what} (waited {within:.0f} s).", self.log)
            time.sleep(POLL_EVERY)

    def stop(self, patience: float) -> bool:
        """End the process and its children: in good order within `patience` seconds, else by force.

        Returns whether there was one. Nothing of it runs afterwards, or ServiceFailed is raised.
        """
        running = self.running()
        if running is None:
            self._state.unlink(missing_ok=True)
            return False
        family = _family(running.pid)
        try:
            os.kill(running.pid, running.stop_signal)
            if not _gone(family, patience):
                if running.pid in _alive(family):
                    family |= _family(running.pid)  # what it started since
                _kill(family)
        except PermissionError:
            raise ServiceFailed(
                self.label,
                f"runs as process {running.pid} of another user: stop it as that user, or as root.",
            ) from None
        except ProcessLookupError:
            pass  # it ended by itself between the look and the signal
        if not _gone(family, KILL_WITHIN):
            raise ServiceFailed(self.label, f"cannot be ended: processes {_alive(family)} ignore a kill.")
        if running.cleanup:
            subprocess.run(running.cleanup, capture_output=True, check=False, timeout=KILL_WITHIN)
        self._state.unlink(missing_ok=True)
        return True

    def kill(self) -> None:
        """End the process and its children as a crash would, without a word to them."""
        running = self.running()
        if running is None:
            return
        if running.cleanup:  # Docker's client stands for the server, which its end would not end
            subprocess.run(running.cleanup, capture_output=True, check=False, timeout=KILL_WITHIN)
        family = _family(running.pid)
        _kill(family)
        if not _gone(family, KILL_WITHIN):
            raise ServiceFailed(self.label, f"cannot be ended: processes {_alive(family)} ignore a kill.")
        self._state.unlink(missing_ok=True)


def _kill(family: Mapping[int, str]) -> None:
    for pid in _alive(family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def identity(user: str | None) -> dict[str, Any]:
    """The arguments that make subprocess run a command as that user; none for oneself."""
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@dataclass(frozen=True)
class _Process:
    parent: int
    group: int
    born: str


def _processes(*pids: int) -> dict[int, _Process]:
    """These processes (all without an argument), less those that ended and are not collected yet."""
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            _children.pop(pid, None)
    return _from_proc(pids) if Path("/proc/self/stat").exists() else _from_ps(pids)


def _from_proc(pids: Iterable[int]) -> dict[int, _Process]:
    boot_id = Path("/proc/sys/kernel/random/boot_id")  # start times count from the boot and repeat after it
    boot = boot_id.read_text().strip() if boot_id.exists() else ""
    found = {}
    for pid in pids or [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):  # ended meanwhile
            # The second field is the program's name in brackets, which may itself hold brackets and blanks.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[pid] = _Process(int(fields[1]), int(fields[2]), f"{fields[19]}@{boot}")
    return found


def _from_ps(pids: Iterable[int]) -> dict[int, _Process]:
    """The same where there is no /proc (macOS); the start time is to the second there."""
    which = ["-p", ",".join(map(str, pids))] if pids else ["-A"]
    command = ["ps", *which, "-o", "pid=,ppid=,pgid=,stat=,lstart="]
    lines = subprocess.run(
        command, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"}, timeout=KILL_WITHIN
    ).stdout.decode(errors="replace")
    rows = (line.split(maxsplit=4) for line in lines.splitlines())
    return {
        int(pid): _Process(int(parent), int(group), born)
        for pid, parent, group, stat, born in rows
        if not stat.startswith("Z")
    }


def _family(pid: int) -> dict[int, str]:
    """The process, those of its group, and all that descend from them; pid to birth."""
    table = _processes()
    members = {member for member, process in table.items() if pid in (member, process.group)}
    while more := {child for child, process in table.items() if process.parent in members} - members:
        members |= more
    return {member: table[member].born for member in members}


def _alive(family: Mapping[int, str]) -> list[int]:
    table = _processes(*family) if family else {}
    return [pid for pid, born in family.items() if pid in table and table[pid].born == born]


def _gone(family: Mapping[int, str], within: float) -> bool:
    deadline = time.monotonic() + within
    while _alive(family):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_EVERY)
    return True
