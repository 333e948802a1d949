"""The process that renders a folder's own template: reads requests, writes texts, bounded by the system.

It is a fresh interpreter and imports nothing but jinja2 and the standard library. `renderer` is its other end.
"""

from __future__ import annotations

import contextlib
import marshal
import signal
import sys

from qwen3_jax.chat.environment import failure, text_of

LENGTH = 8  # bytes of the number that goes before each message
TEXT, FAILED = b"T", b"F"  # what an answer begins with


def serve() -> None:
    """Answer requests on standard input until it ends.

    A request is its length, then (source, values, seconds, memory in bytes, characters) as marshal writes them, the values
    written by themselves before; an answer is TEXT or FAILED, its length, and UTF-8. A rendering that takes more processor time
    ends the process.
    """
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    _end_at_once_when_time_is_up()
    while header := stdin.read(LENGTH):
        source, values, seconds, memory, characters = marshal.loads(stdin.read(int.from_bytes(header)))
        _limit(seconds, memory)
        kind, text = _answer(source, marshal.loads(values), memory, characters)
        _limit(0, 0)
        content = text.encode("utf-8", "surrogatepass")
        stdout.write(kind + len(content).to_bytes(LENGTH) + content)
        stdout.flush()
        del source, values, text, content  # the next request may need their room


def _answer(source: str, values: dict[str, object], memory: int, characters: int) -> tuple[bytes, str]:
    try:
        text = text_of(source, values)
        if len(text) > characters:
            return FAILED, f"the chat template makes more than {characters:,} characters"
        return TEXT, text
    except MemoryError:
        return FAILED, f"the chat template needs more than {memory >> 20:,} MiB of memory"
    except Exception as error:  # told to the other end, which raises it
        return FAILED, failure(error)


def _end_at_once_when_time_is_up() -> None:
    with contextlib.suppress(AttributeError):  # not on Windows
        signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _limit(seconds: float, memory: int) -> None:
    """Bound this process: processor time from now on, and address space; 0 is no bound."""
    with contextlib.suppress(AttributeError):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows, and macOS takes none
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (memory or most, most))
