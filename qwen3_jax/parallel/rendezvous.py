"""Processes meet before jax starts, so that whoever is missing can be counted and named.

Process 0 listens; each other calls and says who it is. The connections stay, and become the watchdog's (watchdog.py).
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import time
from typing import Any

from qwen3_jax.parallel.launchers import SPARE, Place, ProcessesError, join_address, split_address

HELLO = "qwen3-jax"
_LONGEST = 2**22  # bytes of a message; the names of a thousand processes take a fiftieth
_SEND_SECONDS = 2.0  # a peer that takes no byte for so long is as good as gone


@dataclasses.dataclass(frozen=True)
class Peer:
    """One process, as messages name it."""

    id: int
    count: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.id} of {self.count} on {self.host} (pid {self.pid})"


class Line:
    """A TCP connection that carries JSON objects, one a line; an empty line is a heartbeat."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(_SEND_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._rest = b""

    def fileno(self) -> int:
        """The descriptor, for selectors."""
        return self._connection.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; nothing at all is a heartbeat.

        Raises:
            OSError: the other side is gone, or takes nothing.
        """
        self._connection.sendall((json.dumps(message) if message else "").encode() + b"\n")

    def try_send(self, **message: Any) -> None:
        """Send to whoever may be gone: that is noticed where its connection is read."""
        with contextlib.suppress(OSError):
            self.send(**message)

    def read(self) -> list[dict[str, Any]]:
        """Messages that have come; to be called when the descriptor is readable.

        Raises:
            OSError: the other side is gone, or speaks otherwise.
        """
        data = self._connection.recv(65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LONGEST:
            raise ConnectionResetError("closed")
        try:
            messages = [json.loads(line) for line in lines if line]
        except ValueError:
            raise ConnectionResetError("not a message") from None
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionResetError("not a message")
        return messages

    def close(self) -> None:
        """Close this side."""
        self._connection.close()


@dataclasses.dataclass(frozen=True)
class Met:
    """What a process knows once all have called.

    Attributes:
        me: this process's id.
        peers: all processes by id.
        lines: process 0's connections to all others; every other process's to process 0.
        coordinator: where jax's own service is to listen.
    """

    me: int
    peers: tuple[Peer, ...]
    lines: dict[int, Line]
    coordinator: str


def meet(place: Place, timeout: float) -> Met:
    """Wait until every process has called.

    Args:
        place: this process's, of several.
        timeout: seconds; a process that called waits for process 0 to say how it ended, which is at most as long again.

    Returns:
        Who is there, and the connections.

    Raises:
        ProcessesError: not all have called, with their number and the names of the missing; two say that they are the same.
    """
    return _receive(place, timeout) if place.id == 0 else _call(place, timeout)


def _this(place: Place) -> Peer:
    return Peer(place.id, place.count, socket.gethostname(), os.getpid())


def _receive(place: Place, timeout: float) -> Met:
    host, port = split_address(place.coordinator)
    deadline = time.monotonic() + timeout
    peers, lines = {0: _this(place)}, {}
    waiting: dict[Line, int | None] = {}  # every connection, and who it said it is
    with contextlib.ExitStack() as to_close:
        listener = to_close.enter_context(_listen(host, port))
        selector = to_close.enter_context(selectors.DefaultSelector())
        selector.register(listener, selectors.EVENT_READ)
        while len(peers) < place.count and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    line = to_close.enter_context(contextlib.closing(Line(listener.accept()[0])))
                    waiting[line] = None
                    selector.register(line, selectors.EVENT_READ)
                    continue
                line: Any = key.fileobj
                try:
                    for message in line.read():
                        peer = _introduced(message, place, peers)
                        waiting[line], peers[peer.id], lines[peer.id] = peer.id, peer, line
                        line.send(left=max(0.0, deadline - time.monotonic()))
                except OSError as error:
                    # Not one of us, or one that ended while it waited; it may call again.
                    if isinstance(error, _Refused):
                        line.try_send(end=str(error))
                    selector.unregister(line)
                    line.close()
                    if (known := waiting.pop(line)) is not None:
                        del peers[known], lines[known]
        if len(peers) < place.count:
            message = _missing(place, peers, timeout)
            for line in lines.values():
                line.try_send(end=message)
            raise ProcessesError(message)
        coordinator = join_address(host, _free_port(host, port))
        everyone = tuple(peers[i] for i in range(place.count))
        for line in lines.values():
            line.try_send(go=[dataclasses.astuple(peer) for peer in everyone], coordinator=coordinator)
        # The lines of those who belong here stay open.
        to_close.pop_all()
        selector.close()
        listener.close()
        for line in waiting.keys() - lines.values():
            line.close()
    return Met(0, everyone, lines, coordinator)


class _Refused(OSError):
    """A caller that does not belong to these processes."""


def _introduced(message: dict[str, Any], place: Place, peers: dict[int, Peer]) -> Peer:
    said: list[Any] = [message.get(field.name) for field in dataclasses.fields(Peer)]
    if message.get("hello") != HELLO or [type(value) for value in said] != [int, int, str, int]:
        raise ConnectionResetError("not one of us")
    peer = Peer(*said)
    if peer.count != place.count:
        raise _Refused(f"{peer} called process 0 of {place.count}: the number of processes differs")
    if not 0 < peer.id < place.count or peer.id in peers:
        raise _Refused(f"{peer} called, and so had {peers.get(peer.id, peers[0])}: accepted is one process for each id")
    return peer


def _missing(place: Place, peers: dict[int, Peer], timeout: float) -> str:
    absent = [i for i in range(place.count) if i not in peers]
    names = [f"process {i}" + (f" ({place.hosts[i]})" if place.hosts else "") for i in absent[:16]]
    more = f" and {len(absent) - 16} more" if len(absent) > 16 else ""
    return f"{len(peers)} of {place.count} hosts called within {timeout:g} s; missing: {', '.join(names)}{more}"


def _call(place: Place, timeout: float) -> Met:
    address = split_address(place.coordinator)
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection(address, timeout=min(left, 5.0)))
        except OSError:  # not there yet
            time.sleep(min(0.2, left))
            continue
        with contextlib.ExitStack() as to_close:
            to_close.callback(line.close)
            try:
                met = _wait(place, line, deadline)
            except OSError:  # something else listens there, or process 0 starts anew
                time.sleep(0.2)
                continue
            if met is not None:
                to_close.pop_all()
                return met
    raise ProcessesError(
        f"process 0 of {place.count} did not answer at {place.coordinator} within {timeout:g} s: process {place.id} called, "
        "and of the others only process 0 knows"
    )


def _wait(place: Place, line: Line, until: float) -> Met | None:
    """What process 0 answers; None where it does not."""
    line.send(hello=HELLO, **dataclasses.asdict(_this(place)))
    while (left := until - time.monotonic()) > 0:
        for message in _next(line, left):
            if "left" in message:
                until = time.monotonic() + message["left"] + 10.0
            if "end" in message:
                raise ProcessesError(message["end"])
            if "go" in message:
                peers = tuple(Peer(*peer) for peer in message["go"])
                return Met(place.id, peers, {0: line}, message["coordinator"])
    return None


def _next(line: Line, seconds: float) -> list[dict[str, Any]]:
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        return line.read() if selector.select(seconds) else []


def _loopback(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", "::1")


def bind_address(coordinator: str) -> str | None:
    """Where jax's service binds: to the loopback interface alone where all processes are on one host; None is jax's default."""
    return coordinator if _loopback(split_address(coordinator)[0]) else None


def _listen(host: str, port: int) -> socket.socket:
    try:
        if _loopback(host):
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise ProcessesError(
            f"process 0 cannot listen on port {port} of {socket.gethostname()} ({error.strerror}): accepted is a free one, "
            "said by coordinator=HOST:PORT or JAX_COORDINATOR_PORT to every process"
        ) from error


def _free_port(host: str, port: int) -> int:
    for candidate in range(port + 1, port + 1 + SPARE):
        try:
            _listen(host, candidate).close()
        except ProcessesError:
            continue
        return candidate
    raise ProcessesError(f"ports {port + 1} to {port + SPARE} of {socket.gethostname()} are all taken: jax's service needs one")
