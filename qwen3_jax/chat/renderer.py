"""Renders a folder's own template in a process of its own, which the system bounds in processor time and memory.

A template comes with a checkpoint, so it is somebody else's program. jinja2's sandbox keeps it from Python's objects but bounds
neither loops nor strings, and there are more ways to make something huge than one could count. Processes are started by exec
of a fresh interpreter, never by fork, and are kept: one serves one template, and one thread at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from qwen3_jax.chat.child import LENGTH, TEXT

# What a rendering may take: an allowance, and a multiple of the bytes of what it renders.
SECONDS, SECONDS_PER_BYTE = 2.0, 2e-6  # of processor time
MEMORY, MEMORY_PER_BYTE = 512 << 20, 24  # bytes of address space
CHARACTERS, CHARACTERS_PER_BYTE = 32_000_000, 4  # of the text
_PATIENCE = 5  # times the processor time may pass on the clock, on a machine that is busy
_KEPT = 4  # idle processes

_PROGRAM = "import sys; sys.path += sys.argv[1:]; from qwen3_jax.chat.child import serve; serve()"


class RenderingError(Exception):
    """A rendering that failed or was stopped; the message says why, and that it is the template."""


class _Process:
    """A process, and the template that it serves."""

    def __init__(self, source: str):
        self.source = source
        # Isolated and without site-packages it reads no start-up file; it is told where the three packages are.
        places = dict.fromkeys(str(Path(file).parents[1]) for file in (jinja2.__file__, markupsafe.__file__))
        places |= dict.fromkeys([str(Path(__file__).parents[2])])
        # In a session of its own: Ctrl-C at the terminal stops an answer, and not this.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes, as asked for
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._expired = False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, seconds: float) -> tuple[bytes, str]:
        """Send a request and wait for its answer; the clock's `seconds` bound it."""
        clock = threading.Timer(seconds, self._expire)
        clock.daemon = True
        clock.start()
        try:
            self._requests.write(len(request).to_bytes(LENGTH))
            self._requests.write(request)
            self._requests.flush()
            kind, length = self._read(1), int.from_bytes(self._read(LENGTH))
            return kind, self._read(length).decode("utf-8", "surrogatepass")
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            if self._expired or code == -getattr(signal, "SIGPROF", 0):
                raise RenderingError(f"the chat template runs on after {seconds / _PATIENCE:.1f} seconds") from None
            raise RenderingError(f"the chat template failed: the process that renders it ended with code {code}") from None
        finally:
            clock.cancel()

    def _read(self, count: int) -> bytes:
        content = self._answers.read(count)
        if len(content) < count:
            raise EOFError
        return content

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):  # what was not sent
            self._requests.close()


class _Pool:
    """The processes that wait for work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._foreign: list[_Process] = []

    def take(self, source: str) -> _Process:
        with self._lock:
            found = next((process for process in self._idle if process.source == source and process.alive), None)
            if found is not None:
                self._idle.remove(found)
                return found
        return _Process(source)

    def give_back(self, process: _Process) -> None:
        with self._lock:
            self._idle.append(process)
            spare = [self._idle.pop(0) for _ in range(len(self._idle) - _KEPT)]
        for old in spare:
            old.end()

    def end(self) -> None:
        while self._idle:
            self._idle.pop().end()

    def forget(self) -> None:
        """After a fork, in the new process: what waits is the parent's. The pipes stay open, so that nothing is ended."""
        self._foreign += self._idle
        self._idle, self._lock = [], threading.Lock()


_POOL = _Pool()
atexit.register(_POOL.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)


def render_apart(source: str, values: Mapping[str, Any]) -> str:
    """A template's text for these values, from a process that cannot run on or fill the memory.

    Args:
        source: jinja2.
        values: what the template reads, by name: plain JSON values.

    Returns:
        The text.

    Raises:
        RenderingError: the template failed, or took more than it may; or its process does not start.
    """
    packed = marshal.dumps(dict(values))
    size = len(packed)
    seconds = SECONDS + SECONDS_PER_BYTE * size
    limits = (seconds, MEMORY + MEMORY_PER_BYTE * size, CHARACTERS + CHARACTERS_PER_BYTE * size)
    try:
        process = _POOL.take(source)
    except OSError as error:
        raise RenderingError(f"the process that renders the chat template does not start: {error}") from error
    try:
        kind, text = process.ask(marshal.dumps((source, packed, *limits)), _PATIENCE * seconds)
    except BaseException:  # an interrupt too: what it answers next would be the answer to this
        process.end()
        raise
    if kind == TEXT:
        _POOL.give_back(process)
        return text
    process.end()  # what a failure left behind is not the next rendering's
    raise RenderingError(text)
