"""The side channel: JSON lines over TCP between every rank's watchdog and that of rank 0. Nothing waits unboundedly.

From a rank: hello (token, rank, host), beat, report (the answer to ask), leave, fail.
To a rank:   alive (the answer to hello and beat), ask, end (with the verdict), over (rank 0 leaves in good order).
"""

import contextlib
import json
import select
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_LINE_BYTES = 1 << 18  # a report has a number for each of the rank's groups
MAX_UNSENT_BYTES = 1 << 20
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Address:
    """Where rank 0's watchdog listens, and the word by which it knows its own ranks."""

    host: str
    port: int
    token: str


def listen(*, everywhere: bool) -> socket.socket:
    """A socket on a free port: of this machine alone, or of all its networks."""
    if not everywhere:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a kernel without IPv6
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=4096)


class Line:
    """One connection that carries JSON objects. Sending never blocks: what is not taken is kept, up to a bound."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._received, self._unsent = b"", b""

    def send(self, tree: Mapping[str, Any]) -> None:
        """Raises OSError where the connection is broken, or its other side takes nothing any more."""
        self._unsent += json.dumps(tree, separators=(",", ":")).encode() + b"\n"
        self.flush()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise OSError("the other side does not read")

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def receive(self) -> Iterator[dict[str, Any]]:
        """What has arrived. Raises OSError where the connection is broken or closed, or what comes is none of ours.

        The last words come before the error: a rank that ends with an answer unread breaks its connection.
        """
        end: OSError | None = None
        try:
            while len(self._received) <= MAX_LINE_BYTES:
                data = self.socket.recv(1 << 16)
                if not data:
                    end = ConnectionResetError("closed by the other side")
                    break
                self._received += data
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            end = error
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            try:
                tree = json.loads(line)
            except ValueError:
                raise OSError("not a line of JSON") from None
            if not isinstance(tree, dict):
                raise OSError("not a line of ours")
            yield tree
        if end is not None:
            raise end
        if len(self._received) > MAX_LINE_BYTES:
            raise OSError("a line without end")

    def wait(self, timeout_seconds: float) -> bool:
        """Whether something arrives within so many seconds."""
        poller = select.poll()  # select knows descriptors below 1024 only
        poller.register(self.socket, select.POLLIN)
        return bool(poller.poll(max(0.0, timeout_seconds) * 1000))

    def close(self) -> None:
        self.socket.close()


def connect(address: Address, rank: int, host: str, timeout_seconds: float = CONNECT_SECONDS) -> Line:
    """Raises OSError where nobody answers in time."""
    line = Line(socket.create_connection((address.host, address.port), timeout=timeout_seconds))
    line.send({"do": "hello", "token": address.token, "rank": rank, "host": host})
    return line
