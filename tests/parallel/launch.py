"""Processes on this machine, for tests: started together, told to go on by a line, read to their end."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
PATIENCE = 1200  # seconds until a process that hangs is killed; busy machines take minutes to compile in four at a time


class Process:
    """A Python program with its output in a file."""

    def __init__(self, arguments: Sequence[str], environ: dict[str, str]):
        self._file: IO[str] = tempfile.TemporaryFile("w+")
        # What this machine's own launcher says is not for them; and what they print waits in a buffer on every machine.
        foreign = ("SLURM_", "OMPI_", "JAX_", "PMIX_", "PYTHONUNBUFFERED")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environ},
        )
        self._limit = threading.Timer(PATIENCE, self._process.kill)
        self._limit.daemon = True
        self._limit.start()
        self.pid = self._process.pid
        self.printed: list[str] = []

    def tell(self, word: str = "") -> None:
        """Give it a line to read."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")

    def read_until(self, start: str) -> str:
        """Its output up to a line that begins so, and that line."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.printed.append(line.rstrip("\n"))
            if line.startswith(start):
                return self.printed[-1]
        raise AssertionError(f"ended without {start!r}: {self.errors()[-3000:]}")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def end(self) -> int:
        """Wait for its end; its exit code."""
        assert self._process.stdout is not None
        code = self._process.wait()
        self.printed += self._process.stdout.read().splitlines()
        return code

    def errors(self) -> str:
        """What it wrote to standard error."""
        self._file.seek(0)
        return self._file.read()

    def last_line(self) -> str:
        """The last line of its standard error."""
        return self.errors().splitlines()[-1]

    def close(self) -> None:
        """End it, however it is."""
        self._limit.cancel()
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._file):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


@contextlib.contextmanager
def together(arguments: Sequence[Sequence[str]], environ: Sequence[dict[str, str]] | None = None) -> Iterator[list[Process]]:
    """One process for each list of arguments, all of them ended with the block."""
    environ = environ or [{}] * len(arguments)
    with contextlib.ExitStack() as stack:
        processes = []
        for one, variables in zip(arguments, environ, strict=True):
            processes.append(Process(one, variables))
            stack.callback(processes[-1].close)
        yield processes


def free_port() -> int:
    """A port that nothing listens on, nor on the next one, where jax's service will.

    Below those that systems give to sockets which ask for none: of these one may be taken before it is listened on.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)  # drawn anew in each of pytest's workers
        with contextlib.suppress(OSError), contextlib.ExitStack() as servers:
            for number in (port, port + 1):
                servers.enter_context(socket.create_server(("127.0.0.1", number)))
            return port
