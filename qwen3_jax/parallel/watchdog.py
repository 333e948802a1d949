"""When one process dies, the others end, and their last line names it.

jax notices a death late, by a heartbeat, and aborts with a C++ trace; that of process 0 at once, with the same trace. Here each
process keeps the connection on which it called process 0 (rendezvous.py): the system closes it when a process dies.
One that is only stopped, or whose host is gone, is noticed by its silence. Process 0 judges and tells all others; its own death
they see themselves. The thread sleeps in select, without the interpreter's lock.
"""

import atexit
import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any, NoReturn

from qwen3_jax.parallel.rendezvous import Met

# A death makes the collectives of others fail: an error is blamed only if no death has shown for so long.
GRACE = 2.0
# Who has finished waits so long for the others, who may be writing a checkpoint.
FINISH = 1800.0
EXIT_CODE = 1


class Watchdog:
    """Watches over all processes from one thread, from `start` until they have all finished."""

    def __init__(self, met: Met, heartbeat: float):
        """Take over the connections.

        Args:
            met: who there is.
            heartbeat: seconds of silence after which a process counts as dead.
        """
        self._me, self._peers, self._lines = met.me, met.peers, met.lines
        self._heartbeat = heartbeat
        self._pulse = min(heartbeat / 4, 5.0)
        self._heard = dict.fromkeys(self._lines, time.monotonic())
        self._finished: set[int] = set()
        self._error: tuple[float, str] | None = None
        self._said: deque[dict[str, Any]] = deque()  # by this process's own threads
        self._wake, self._woken = socket.socketpair()
        self._all_finished = threading.Event()
        self._last_words, self._flushed = threading.Event(), threading.Event()
        self._pid = os.getpid()
        self._hook = sys.excepthook
        self._leaving: str | None = None
        self._code = EXIT_CODE

    def start(self) -> None:
        """Begin to watch, and to tell the others how this process ends."""
        global _watchdog
        _watchdog = self
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        sys.excepthook = self._uncaught
        atexit.register(self._finish)
        os.register_at_fork(after_in_child=self._forget)
        # Both now: at the interpreter's end, when a process may still be waiting for others, no thread can be started.
        threading.Thread(target=self._flush, name="watchdog's flush", daemon=True).start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ, None)
            for peer, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, peer)
            turned = beaten = time.monotonic()
            while True:
                wait = self._pulse if self._error is None else GRACE / 10
                for key, _ in selector.select(wait):
                    if key.data is None:
                        self._woken.recv(4096)
                    elif not self._read(key.data):
                        selector.unregister(key.fileobj)
                while self._said:
                    self._tell(self._said.popleft())
                now = time.monotonic()
                if now - turned > self._heartbeat / 2:
                    # This process itself did not run: what others sent meanwhile has yet to be read.
                    self._heard = dict.fromkeys(self._heard, now)
                turned = now
                if now - beaten >= self._pulse:
                    beaten = now
                    for line in list(self._lines.values()):
                        line.try_send()
                self._judge(now)

    def _read(self, sender: int) -> bool:
        """Take in what a process sent; False once its connection is closed."""
        try:
            messages = self._lines[sender].read()
        except OSError:
            del self._lines[sender], self._heard[sender]
            if not self._all_finished.is_set():
                self._end(f"{self._peers[sender]} died: its connection closed without a word")
            return False
        self._heard[sender] = time.monotonic()
        for message in messages:
            self._take(sender, message)
        return True

    def _tell(self, message: dict[str, Any]) -> None:
        """What this process says of itself: process 0 takes it in as it does the others' words."""
        if self._me == 0:
            self._take(0, message)
        else:
            self._lines[0].try_send(**message)

    def _take(self, sender: int, message: dict[str, Any]) -> None:
        if "end" in message and sender == 0:
            self._end(message["end"])
        if "error" in message and self._error is None:
            gone = sorted(self._finished)
            after = f", after {', '.join(str(self._peers[i]) for i in gone[:4])} had finished" if gone else ""
            self._error = (time.monotonic(), f"{self._peers[sender]} {message['error']}{after}")
        if "finished" in message:
            self._finished.add(sender)
            if len(self._finished) == len(self._peers):
                self._send_all(all_finished=True)
                self._all_finished.set()
        if "all_finished" in message:
            self._all_finished.set()

    def _judge(self, now: float) -> None:
        if self._all_finished.is_set():
            return
        for peer, heard in self._heard.items():
            if now - heard > self._heartbeat:
                self._end(f"{self._peers[peer]} has not been heard of for {self._heartbeat:g} s")
        if self._error is not None and now - self._error[0] > GRACE:
            self._end(self._error[1])

    def _send_all(self, **message: Any) -> None:
        for line in self._lines.values():
            line.try_send(**message)

    def _end(self, verdict: str) -> NoReturn:
        if self._me == 0:
            self._send_all(end=verdict)
        self._end_process(verdict)

    def _end_process(self, last: str) -> NoReturn:
        """End this process at once, whatever its other threads do; nothing is written to its standard error after this line."""
        self._last_words.set()
        self._flushed.wait(1.0)
        error, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.write(error, f"{last}\n".encode())
        os._exit(self._code)

    def _flush(self) -> None:
        """Write out what was printed: in a thread of its own, for another one may hold a stream's lock for ever."""
        self._last_words.wait()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._flushed.set()

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """The interpreter's hook for exceptions that nobody caught: print as ever, and wait for the verdict."""
        self._hook(kind, error, trace)
        if os.getpid() == self._pid:
            self._end_with(error)

    def leave(self, code: int, reason: str) -> None:
        """As the function of this name."""
        if os.getpid() == self._pid and self._leaving is None:
            self._code, self._leaving = (
                code,
                f"exit code {code}" + (f": {_short(reason)}" if reason else ", its own log says why"),
            )

    def _end_with(self, error: BaseException) -> NoReturn:
        text = _short(str(error))
        self._end_early(type(error).__name__, f": {text}" if text else "")

    def _end_early(self, what: str, more: str = "") -> NoReturn:
        self._say(error=f"ended with {what}{more}")
        time.sleep(self._heartbeat + 2 * GRACE)  # the thread ends the process before
        self._end_process(f"{self._peers[self._me]} ended with {what}, and process 0 did not answer")

    def _finish(self) -> None:
        """At the interpreter's end, before jax leaves its service: wait until all processes are here."""
        if os.getpid() != self._pid:
            return
        # Kept by the interpreter of an exception that nobody caught, also where another hook took the place of ours.
        if (error := getattr(sys, "last_exc", None)) is not None:
            self._end_with(error)
        if self._leaving is not None:
            self._end_early(self._leaving)
        self._say(finished=True)
        if not self._all_finished.wait(FINISH):
            self._say(error=f"finished {FINISH:g} s ago and others did not: does one of them wait for it?")
            self._all_finished.wait(2 * GRACE)

    def _say(self, **message: Any) -> None:
        self._said.append(message)
        self._wake.send(b"\0")

    def _forget(self) -> None:
        """In a fork: a copy of a connection would hold it open when this process dies."""
        for line in self._lines.values():
            line.close()
        sys.excepthook = self._hook


_watchdog: Watchdog | None = None  # of this process, once it watches


def leave(code: int, reason: str = "") -> None:
    """Say that this process is about to end without having done its part, by an exit code and not by an exception.

    Without this it would count as finished, and the others would wait for it. At the interpreter's end all of them end, and
    their last line is the reason; of several calls the first one counts. Does nothing where there is one process.

    Args:
        code: that it exits with, not 0; the others exit with 1.
        reason: why, in a line.
    """
    if _watchdog is not None:
        _watchdog.leave(code, reason)


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def patient_abort() -> None:
    """Let SIGABRT wait for six seconds before it ends the process, time enough for the watchdog's last words.

    jax's client aborts in the milliseconds in which process 0's service goes away. A handler in Python would not run, for
    abort() does not return to the interpreter. So the handler is the C library's sleep(seconds), called with the signal's
    number, 6; it sleeps in the thread that aborts, and when it returns the process aborts as it would have.
    """
    if sys.platform != "win32":
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
