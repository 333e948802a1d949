"""`qwen3-jax train RUN.toml [--section.key value ...]`: a run of training, or what it would be."""

import atexit
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

    from qwen3_jax.runs.schema import Run

logger = logging.getLogger(__name__)

WIDEST = 160
USAGE = """usage: qwen3-jax train RUN.toml [--print-config] [--dry-run] [--help-config] [--no-compilation-cache]
                       [--section.key value ...]

Train by a run's file. --print-config shows every value and where it came from; --dry-run the mesh, the memory of a chip and
the tokens, and starts nothing; --help-config every key with its unit. Compiled programs are kept for the next start, in
$XDG_CACHE_HOME or ~/.cache, but with --no-compilation-cache. `--stages.general.batch 64` gives another value."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk's, not ours
DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_CACHE = "--no-compilation-cache"
SWITCHES = ("--print-config", "--dry-run", "--help-config", NO_CACHE)


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `qwen3-jax train`.

    Returns:
        Exit code.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    switches = [word for word in argv if word in SWITCHES]
    words = [word for word in argv if word not in SWITCHES]

    from qwen3_jax.cli.text import table_console
    from qwen3_jax.runs.resolve import resolve
    from qwen3_jax.runs.show import config_table, keys_table

    console = table_console(WIDEST)
    if "--help-config" in switches:
        console.print(keys_table())
        return 0
    if not words or words[0].startswith("--"):
        print(
            f"qwen3-jax train: no run is named: accepted is a TOML file first, found {' '.join(words) or 'nothing'}",
            file=sys.stderr,
        )
        return 2
    resolved = resolve(words[0], words[1:])
    if "--print-config" in switches:
        console.print(config_table(resolved))
    if "--dry-run" in switches:
        from qwen3_jax.runs.dry_run import dry_run, need_tables

        need = dry_run(resolved.run)
        for table in need_tables(resolved.run, need):
            console.print(table)
        return 0 if need.hbm is None or need.bytes <= need.hbm else 1
    if set(switches) - {NO_CACHE}:
        return 0
    return _train(resolved.run, console, keep=NO_CACHE not in switches)


def _train(run: "Run", console: "Console", *, keep: bool) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from qwen3_jax.cli.left_out import LeftOut
    from qwen3_jax.cli.programs import keep_programs
    from qwen3_jax.host_memory import keep_freed_memory_on_cpu
    from qwen3_jax.runs.train import train
    from qwen3_jax.training.checkpoints import TrainingCheckpointError
    from qwen3_jax.training.loop import TrainingError

    keep_programs(keep)
    keep_freed_memory_on_cpu()  # a small model's step takes three quarters of the time
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    left_out = LeftOut()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(run.name, total=run.steps)

        def told(step: int, figures: Mapping[str, Any]) -> None:
            loss, rate = figures["loss"], figures["tokens_per_second"]
            line = f"step {step:,}  {figures['stage']}  loss {loss:.4f}  {rate:,.0f} tokens/s"
            if figures["mfu"] is not None:
                line += f"  MFU {figures['mfu']:.1%}"
            for skipped in left_out.lines(step, figures):
                console.print(skipped)
            progress.update(task, completed=step + 1, description=line)
            if not console.is_terminal and (step + 1) % run.watch.every == 0:
                console.print(line)

        try:
            with _one_error(), contextlib.redirect_stdout(cast(TextIO, _Spoken(sys.stdout))):
                ended = train(run, told, progress.console.print)
                _deaf_from_here_on()
        except (TrainingError, TrainingCheckpointError) as error:
            cause = error.__cause__
            if isinstance(error, TrainingError) and cause is not None and not isinstance(cause, OSError) and not _ours(cause):
                traceback.print_exception(cause)  # a fault of the code, whose message does not say where it is
            return _failed(f"qwen3-jax train: {error}")
        except OSError as error:
            places = [run.output, *([run.checkpoint.folder] if run.checkpoint.folder else [])]
            ours = any(_within(error.filename, place) for place in places)
            if error.errno not in FULL and not (error.errno in DENIED and ours):
                raise
            where, accepted = error.filename or run.output, "accepted is a folder with room, and the right to write there"
            return _failed(f"qwen3-jax train: {where} cannot be written: {error.strerror}: {accepted}")
    if not ended.done and run.checkpoint.told_to_end:
        # Not returned: of several processes all end so, and a code that is returned tells the others that one has failed.
        sys.exit(run.checkpoint.told_to_end)
    return 0


def _deaf_from_here_on() -> None:
    """All is written: a second SIGTERM while the process ends, seconds of a busy host, must not make it look killed."""
    if threading.current_thread() is not threading.main_thread():
        return
    # Not SIG_IGN yet, which children of a caller that goes on would inherit; handlers of Python's go before its own end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)


def _failed(reason: str) -> int:
    """Say why a run has ended, to the other processes too."""
    from qwen3_jax.parallel.watchdog import leave

    print(reason, file=sys.stderr)
    leave(1, reason)
    return 1


class _Spoken:
    """The standard output, which may end: its disk is full, or what read it is gone. That is told once, and the run goes on."""

    def __init__(self, file: Any):
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with self._may_end():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._may_end():
            self._file.flush()

    @contextlib.contextmanager
    def _may_end(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("the standard output takes no more lines, and the run goes on without: %s", error)
            # Also of what is still to be flushed, at the end of the process at the latest.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)


def _ours(error: BaseException) -> bool:
    """Whether an error is of a kind of this package's own, whose message says all."""
    return type(error).__module__.partition(".")[0] in ("qwen3_jax", "pallas_kernels")


def _within(file: Any, folder: str) -> bool:
    """Whether a file that was refused is one that a run writes."""
    return file is not None and Path(file).absolute().is_relative_to(Path(folder).absolute())


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """A checkpoint that fails is told once, as the run's end; Orbax tells it too, several times, each with a traceback."""
    import orbax.checkpoint

    orbax = Path(orbax.checkpoint.__file__).parent

    def wanted(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not Path(record.pathname).is_relative_to(orbax)

    # Arrays that were still being written when the first one failed have nobody to tell any more: their failures are logged as
    # those of tasks that nobody waits for, or raised where the loop that they ran on is closed.
    def awaited(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not _through(record.exc_info[2], "orbax.checkpoint")

    def unraisable(told: "sys.UnraisableHookArgs") -> None:
        closed = isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"
        if not (closed and _through(told.exc_traceback, "asyncio")):
            hook(told)

    logger, tasks, hook = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook
    logger.addFilter(wanted)
    tasks.addFilter(awaited)
    sys.unraisablehook = unraisable
    try:
        yield
        # Where the run has failed both stay, for such writes end after the run.
        tasks.removeFilter(awaited)
        sys.unraisablehook = hook
    finally:
        logger.removeFilter(wanted)


def _through(trace: TracebackType | None, package: str) -> bool:
    """Whether an error went through a function of a package."""
    modules = (str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(trace))
    return any(module == package or module.startswith(f"{package}.") for module in modules)
