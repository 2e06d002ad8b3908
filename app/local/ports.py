"""Free ports of the loopback interface, and a few bytes to and fro on one that is in use."""

import contextlib
import socket
from collections.abc import Iterator

from app.errors import HeadraceError

HOST = "127.0.0.1"
NEXT_PORTS = 200  # how far behind the preferred port the search goes
ANSWER_WITHIN = 1.0  # seconds; a loopback server that takes longer is not ready


@contextlib.contextmanager
def reserve(preferred: int) -> Iterator[int]:
    """Yield a free TCP port, the preferred one or the next, which no other `headrace up` takes meanwhile.

    A server binds its port seconds after it was chosen. Until then, the UDP port of the same number is held
    as the mark that the number is spoken for: that needs no file, and ends with this process at the latest.
    Leave the context when the server listens.
    """
    for port in range(preferred, min(preferred + NEXT_PORTS, 65536)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mark:
            try:
                mark.bind((HOST, port))
            except OSError:
                continue
            if _is_free(port):
                yield port
                return
    raise HeadraceError(
        f"No port is free from {preferred} on: end what holds them, or prefer another number."
    )


def _is_free(port: int) -> bool:
    # Asked first, because some systems let 127.0.0.1:port be bound beside a server on 0.0.0.0:port.
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), ANSWER_WITHIN):
        return False
    with socket.socket() as probe:
        # Connections that ended a moment ago do not keep a server from listening, so they are no reason here.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def exchange(port: int, request: bytes, size: int) -> bytes:
    """Send a request to a loopback port and return `size` bytes of the answer, or what came of them."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), ANSWER_WITHIN) as connection:
        connection.settimeout(ANSWER_WITHIN)
        connection.sendall(request)
        while len(answer) < size and (more := connection.recv(size - len(answer))):
            answer += more
    return answer
