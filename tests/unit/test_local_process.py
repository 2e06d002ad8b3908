"""Server processes and their ports: started, found again, stopped; with small programs for servers."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import HeadraceError, ServiceFailed
from app.local import ports, process
from app.local.process import Launch, Running, Server

IGNORES_TERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(300)
"""
WITH_CHILDREN = """
import os, subprocess, sys, time
own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
grandchild = "import subprocess, sys, time; subprocess.Popen(['sleep', '300']); time.sleep(300)"
other = subprocess.Popen([sys.executable, "-c", grandchild])
time.sleep(0.3)
print("born", flush=True)
time.sleep(300)
"""


def eventually(condition: Callable[[], bool], within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    return pid in process._processes(pid)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server("Mill", tmp_path)
    yield server
    server.stop(patience=0.1)


def launch(server: Server, *command: str, **options: Any) -> Running:
    return server.start(Launch(command=command, port=1, cwd=server.home, **options))


def test_a_server_is_found_again_by_another_command_and_stopped(server: Server) -> None:
    started = launch(server, "/bin/sleep", "300")
    again = Server("Mill", server.home)
    assert again.running() == started
    assert again.stop(patience=5)
    assert not alive(started.pid)
    assert again.running() is None
    assert not (server.home / "state.json").exists()
    assert not again.stop(patience=5), "there was nothing left to stop"


def test_it_has_a_session_of_its_own(server: Server) -> None:
    """So that Ctrl-C, which the terminal sends to the command's process group, does not reach it."""
    pid = launch(server, "/bin/sleep", "300").pid
    assert os.getsid(pid) == os.getpgid(pid) == pid


def test_one_that_does_not_listen_is_killed(server: Server) -> None:
    pid = launch(server, sys.executable, "-c", IGNORES_TERM).pid
    assert eventually(lambda: "deaf" in server.log.read_text())
    began = time.monotonic()
    assert server.stop(patience=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    assert not alive(pid)


def test_children_go_with_it_even_those_of_other_sessions(server: Server) -> None:
    pid = launch(server, sys.executable, "-c", WITH_CHILDREN, stop_signal=signal.SIGKILL).pid
    assert eventually(lambda: "born" in server.log.read_text())
    family = process._family(pid)
    assert len(family) == 4
    assert server.stop(patience=0.2)
    assert [member for member in family if alive(member)] == []


def test_the_stop_signal_is_the_one_that_was_given(server: Server) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('asked', flush=True), sys.exit()))\n"
        "print('up', flush=True)\ntime.sleep(300)"
    )
    launch(server, sys.executable, "-c", code, stop_signal=signal.SIGINT)
    assert eventually(lambda: "up" in server.log.read_text())
    server.stop(patience=10)
    assert server.log.read_text().splitlines() == ["up", "asked"]


def test_the_cleanup_runs_when_it_has_ended(server: Server) -> None:
    left = server.home / "cleaned"
    launch(server, "/bin/sleep", "300", cleanup=("/usr/bin/env", "touch", str(left)))
    assert not left.exists()
    server.stop(patience=5)
    assert left.exists()


def test_a_pid_that_another_process_got_is_not_taken_for_it(server: Server) -> None:
    """As after a reboot: the recorded number lives, but it is this test."""
    mine = process._processes(os.getpid())[os.getpid()]
    state = {
        "pid": os.getpid(),
        "born": mine.born + "0",
        "port": 1,
        "since": 0.0,
        "stop_signal": 15,
        "cleanup": [],
    }
    (server.home / "state.json").write_text(json.dumps(state))
    assert server.running() is None
    assert not server.stop(patience=1), "it must not end somebody else's process"
    assert not (server.home / "state.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "null"])
def test_a_state_that_cannot_be_read_is_none(server: Server, text: str) -> None:
    (server.home / "state.json").write_text(text)
    assert server.running() is None


def test_one_that_was_killed_is_not_running(server: Server) -> None:
    pid = launch(server, "/bin/sleep", "300").pid
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: server.running() is None)


def test_a_failure_shows_the_end_of_the_log(server: Server) -> None:
    code = "for number in range(50): print('line', number)\nraise SystemExit('no water')"
    launch(server, sys.executable, "-c", code)
    with pytest.raises(ServiceFailed) as failed:
        server.wait(lambda port: False, within=30)
    text = str(failed.value)
    assert text.startswith(f"Mill ended while it started. Its log {server.log} ends with:\n")
    assert text.endswith("  no water")
    assert "line 49" in text
    assert "line 30" not in text


def test_one_that_does_not_answer_is_told_in_time(server: Server) -> None:
    pid = launch(server, "/bin/sleep", "300").pid
    with pytest.raises(ServiceFailed, match=f"runs as process {pid} but does not answer on port 1") as failed:
        server.wait(lambda port: False, within=0.2)
    assert str(failed.value).endswith("  (nothing)")
    assert alive(pid), "whoever waits decides what becomes of it"


def test_waiting_ends_with_the_first_answer(server: Server) -> None:
    launch(server, "/bin/sleep", "300")
    asked: list[int] = []

    def answers(port: int) -> bool:
        asked.append(port)
        return len(asked) == 3

    server.wait(answers, within=30)
    assert asked == [1, 1, 1]


def test_a_program_that_is_not_there(server: Server) -> None:
    with pytest.raises(ServiceFailed, match=r"Mill cannot be started: .*no-such-program"):
        launch(server, str(server.home / "no-such-program"))


def test_the_log_of_the_run_before_is_kept(server: Server) -> None:
    launch(server, "/bin/echo", "first")
    assert eventually(lambda: server.log.read_text() == "first\n")
    launch(server, "/bin/echo", "second")
    assert eventually(lambda: server.log.read_text() == "second\n")
    assert (server.home / "server.log.previous").read_text() == "first\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists() or not shutil.which("ps"), reason="needs both")
def test_ps_tells_what_proc_tells(server: Server) -> None:
    """The way of macOS, tried where both are to be had."""
    pid = launch(server, "/bin/sleep", "300").pid
    for found in (process._from_ps([pid]), process._from_ps([])):
        assert (found[pid].parent, found[pid].group) == (os.getpid(), pid)
        assert found[pid].born == process._from_ps([pid])[pid].born
    assert process._from_ps([pid]).keys() == process._from_proc([pid]).keys() == {pid}
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not process._from_ps([pid])), (
        "a process that ended does not count, collected or not"
    )


def test_a_free_port_is_taken_as_preferred() -> None:
    with ports.reserve(free := unused()) as port:
        assert port == free


def test_the_next_port_when_one_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        preferred = taken.getsockname()[1]
        with ports.reserve(preferred) as port:
            assert port > preferred


def test_a_server_on_all_interfaces_takes_the_port_too() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with ports.reserve(taken.getsockname()[1]) as port:
            assert port != taken.getsockname()[1]


def test_a_port_is_reserved_once_and_given_back() -> None:
    preferred = unused()
    with ports.reserve(preferred) as first, ports.reserve(preferred) as second:
        assert first == preferred
        assert second > preferred
    with ports.reserve(preferred) as again:
        assert again == preferred


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "NEXT_PORTS", 1)
    preferred = unused()
    with (
        ports.reserve(preferred),
        pytest.raises(HeadraceError, match=f"No port is free from {preferred} on"),
        ports.reserve(preferred),
    ):
        pass


def test_nobody_answers() -> None:
    assert ports.exchange(unused(), b"?", 1) == b""


def test_a_server_that_accepts_and_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "ANSWER_WITHIN", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert ports.exchange(silent.getsockname()[1], b"?", 1) == b""


def unused() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number
