"""Worker processes of `prepare`, started by a command: this file is both ends.

A run sends Work and folder, then a piece at a time; a worker answers with Progress, or the DataError that ends all. What passes
are pickles on the worker's standard input and output, so either end's death ends the other's wait.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.chat.tokenizer import load_tokenizer
from qwen3_jax.data.files import DataError
from qwen3_jax.data.sources import Piece
from qwen3_jax.data.worker import Progress, Work, write_part

_NAME = "qwen3_jax.data.processes"


def run_pieces(
    work: Work, folder: Path, parts: Sequence[Piece], left: list[int], workers: int, take: Callable[[Progress], None]
) -> None:
    """Hand out pieces to processes until none is left.

    Args:
        work: what is done with them.
        folder: where the parts go.
        parts: all pieces.
        left: numbers of those that are wanted.
        workers: processes.
        take: told of progress; what it raises ends all.

    Raises:
        DataError: of a worker, or one that died.
    """
    answers: queue.Queue[tuple[int, Progress | DataError | None]] = queue.Queue()
    waiting = left[::-1]
    with contextlib.ExitStack() as stack:
        processes = [_start(work, folder, stack) for _ in range(workers)]
        for number, process in enumerate(processes):
            threading.Thread(target=_listen, args=(number, process, answers), daemon=True).start()
            _hand(process, parts, waiting)
        busy = len(processes)
        while busy:
            number, answer = answers.get()
            if answer is None:
                code = processes[number].wait()
                raise DataError(
                    f"a worker died (exit code {code}; -9 is often a lack of memory); what is done stays: run it again"
                )
            if isinstance(answer, DataError):
                raise answer
            take(answer)
            if answer.done and not _hand(processes[number], parts, waiting):
                busy -= 1


def _start(work: Work, folder: Path, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    # By a command, not by multiprocessing: a caller's script needs no guard, and no thread of it is forked.
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
    }
    command = [sys.executable, "-m", _NAME]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    stack.callback(_stop, process)
    _send(process, (work, folder))
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # its files appear whole or not at all
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _send(process: subprocess.Popen[bytes], message: Any) -> None:
    assert process.stdin is not None  # asked for above
    with contextlib.suppress(BrokenPipeError):  # its listener says that it died
        pickle.dump(message, process.stdin)
        process.stdin.flush()


def _hand(process: subprocess.Popen[bytes], parts: Sequence[Piece], waiting: list[int]) -> bool:
    if not waiting:
        return False
    number = waiting.pop()
    _send(process, (number, parts[number]))
    return True


def _listen(number: int, process: subprocess.Popen[bytes], answers: queue.Queue[Any]) -> None:
    assert process.stdout is not None  # asked for above
    while True:
        try:
            answers.put((number, pickle.load(process.stdout)))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # it ended, or was stopped within an answer
            answers.put((number, None))
            return


def main() -> None:
    """Be a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to answer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to standard error
    work, folder = pickle.load(sys.stdin.buffer)

    def report(progress: Progress | DataError) -> None:
        pickle.dump(progress, answers)
        answers.flush()

    try:
        tokenizer = load_tokenizer(work.tokenizer, work.family)
        while True:
            number, piece = pickle.load(sys.stdin.buffer)
            write_part(work, piece, number, folder, tokenizer, report)
    except EOFError:  # nothing more to do
        return
    except BrokenPipeError:  # the run is gone
        os._exit(1)
    except (ValueError, OSError) as error:
        report(DataError(str(error)))


if __name__ == "__main__":
    main()
