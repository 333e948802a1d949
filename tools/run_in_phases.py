"""A run of training that says what it is in the midst of, and waits there to be killed: the child of tools/kill_runs.py.

    python -m tools.run_in_phases DESCRIPTOR PLACE[+SECONDS] STEP BATCHES RUN.toml [--section.key value ...]

The product has no hooks for this. Functions that a run goes through are replaced, before it starts, by ones that stop at a
named place once the run has come to a step, write a line of JSON to an open descriptor, and never go on, or after so many
seconds (tools/end_anywhere.py, whose places are in tools/more_phases.py). Where the machine's own code is at work (a step, a
compilation) nothing waits: a line is written as it begins and another one if it ends.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tools.more_phases import install_more

PLACES: dict[str, tuple[str, int, str]] = {
    "save.begun": ("save", 4, "the temporary folder is made, no array is written"),
    "save.writing": ("save", 10, "some of the arrays are written, in files that nothing joins yet"),
    "finalise.written": ("finalise", 4, "all arrays are written, nothing is finalised"),
    "finalise.merged": ("finalise", 4, "all is finalised but for the rename"),
    "renamed.kept": ("renamed", 2, "renamed, the oldest checkpoint is still there"),
    "renamed.deleting": ("renamed", 2, "renamed, half of the oldest checkpoint is deleted"),
    "prefetch.begun": ("prefetch", 4, "the loader's thread is about to read documents ahead"),
    "prefetch.read": ("prefetch", 4, "it has read them and not yet handed them over"),
    "step.running": ("step", 8, "a step is on the devices"),
    "restore.begun": ("restore", 2, "no array is read"),
    "restore.read": ("restore", 3, "the arrays are read, the state is not made"),
    "compile.running": ("compile", 3, "the step is being compiled"),
    "compile.cached": ("compile", 2, "half of the compiled step is in the cache"),
    "journal.line": ("journal", 2, "half a line of metrics.jsonl is written"),
    "journal.anew": ("journal", 1, "metrics.jsonl is written anew beside the old one"),
    "start.noted": ("start", 2, "half of under_way.json is written"),
}
"""Where a run can be killed: the phase that it counts for, how often of fifty-seven kills, and what it is in the midst of."""

EXPORTS: dict[str, tuple[str, int, str]] = {
    "export.begun": ("export", 3, "its files are laid out, this process has written nothing"),
    "export.writing": ("export", 6, "some of this process's shares are written"),
    "export.written": ("export", 4, "all of this process's shares are written, the folder is not in its place"),
    "export.placed": ("export", 2, "in its place, the oldest is still there"),
    "export.removing": ("export", 2, "in its place, half of the oldest is deleted"),
}
"""The same where the run writes exports on the way."""

LEADERS = ("finalise", "renamed", "compile.cached", "journal", "start", "export.placed", "export.removing")
"""Phases and places that process 0 alone comes to."""

EXPORT = re.compile(r"\.step-\d+\.[0-9a-f]{8}\.part")
SHARES = 3  # of an export that are written when it counts as begun

AT_START = ("restore", "compile", "start", "journal.anew")
"""Phases and places that come before the first step."""


class Phases:
    """Stops a run at one place, once."""

    def __init__(self, descriptor: int, place: str, step: int):
        """Wait for a place.

        Args:
            descriptor: open for writing; lines of JSON go there.
            place: of PLACES; "none": nothing is waited for; "save.begun+1.5": it goes on after 1.5 seconds.
            step: from which on.
        """
        self._descriptor, self._from = descriptor, step
        self._place, _, hold = place.partition("+")
        self._hold = float(hold) if hold else None
        self._lock = threading.Lock()
        self._met = False
        self.step = -1  # the one being made
        self.last = -1  # of the run, once it is known

    def tell(self, kind: str, **more: Any) -> None:
        """Write a line."""
        os.write(self._descriptor, (json.dumps(dict(kind=kind, **more)) + "\n").encode())

    def met(self, place: str, **more: Any) -> bool:
        """Whether this is the place and the time; the first time that it is, it is told."""
        with self._lock:
            if self._met or place != self._place or self.step < self._from:
                return False
            self._met = True
        self.tell("at", place=place, step=self.step, thread=threading.current_thread().name, **more)
        return True

    def wants(self, place: str) -> bool:
        """Whether this is the place, now or later."""
        return place == self._place and not self._met

    def stop(self, place: str) -> None:
        """Wait here, if this is the place and the time."""
        if self.met(place):
            _wait(self._hold)


def install(phases: Phases, batches: Path) -> None:
    """Replace what a run goes through.

    Args:
        phases: what it tells.
        batches: file to which each step's number and the digest of its batch are appended.
    """
    _saves(phases)
    _data(phases)
    _steps(phases, batches)
    _restores(phases)
    _files(phases)
    _exports(phases)
    install_more(phases)


def _saves(phases: Phases) -> None:
    """Checkpoints: their arrays are written by other threads, put together, and renamed; then an old one is deleted."""
    import orbax.checkpoint as ocp

    handler = ocp.type_handlers.ArrayHandler
    serialize, finalize = handler.serialize, ocp.PyTreeCheckpointHandler.finalize
    rename, rmtree = os.rename, shutil.rmtree
    written = threading.Event()

    async def serialize_in_phases(self: Any, values: Any, infos: Any, args: Any = None) -> Any:
        written.clear()
        phases.met("save.told")  # and goes on, for tools/end_runs.py
        if phases.wants("save.begun"):
            await infos[0].await_path_creation()
            phases.stop("save.begun")
        if phases.wants("save.writing"):
            threading.Thread(target=freeze, args=(Path(infos[0].parent_dir),), daemon=True).start()
        return await serialize(self, values, infos, args)

    def freeze(folder: Path) -> None:
        """Hold the whole process, in whatever instruction it is, once the first file of arrays is there."""
        while not written.is_set():
            if any(folder.rglob("d/*")):
                if phases.met("save.writing"):
                    os.kill(os.getpid(), signal.SIGSTOP)
                return
            time.sleep(1e-4)

    def finalize_in_phases(self: Any, directory: Any) -> None:
        written.set()
        phases.stop("finalise.written")
        finalize(self, directory)

    def rename_in_phases(source: Any, target: Any, **options: Any) -> None:
        number, _, rest = Path(source).name.partition(".")
        checkpoint = number.isdigit() and rest == "orbax-checkpoint-tmp"
        if checkpoint:
            phases.stop("finalise.merged")
        rename(source, target, **options)
        if checkpoint:
            phases.stop("renamed.kept")
        elif EXPORT.fullmatch(Path(source).name):
            phases.stop("export.placed")

    def rmtree_in_phases(path: Any, *args: Any, **options: Any) -> None:
        name = Path(path).name
        removing = "renamed.deleting" if name.isdigit() else "export.removing" if name.endswith(".removed") else None
        if removing is not None and phases.met(removing):
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
            for file in files[: len(files) // 2]:
                file.unlink()
            _wait()
        rmtree(path, *args, **options)

    _put(handler, serialize=serialize_in_phases)
    _put(ocp.PyTreeCheckpointHandler, finalize=finalize_in_phases)
    _put(os, rename=rename_in_phases)
    _put(shutil, rmtree=rmtree_in_phases)


def _exports(phases: Phases) -> None:
    """Exports: each process writes its shares into one folder, and process 0 puts it in its place."""
    from qwen3_jax.checkpoint import folder, tensor

    write, sync = tensor.write_all, folder._sync
    count = 0  # writes of this process into the export at hand

    def write_in_phases(*args: Any, **options: Any) -> Any:
        nonlocal count
        if count == 0:
            phases.met("export.told")  # and goes on, for tools/end_runs.py
            phases.stop("export.begun")
        if count == SHARES:
            phases.stop("export.writing")
        count += 1
        return write(*args, **options)

    def sync_in_phases(place: Path) -> None:
        nonlocal count
        count = 0
        sync(place)
        phases.stop("export.written")

    _put(tensor, write_all=write_in_phases)
    _put(folder, _sync=sync_in_phases)


def _data(phases: Phases) -> None:
    """The loader reads documents on a thread of its own."""
    from qwen3_jax.data.prepared import Prepared

    read = Prepared.read

    def read_in_phases(self: Any, documents: Any) -> Any:
        ahead = threading.current_thread() is not threading.main_thread()
        if ahead:
            phases.stop("prefetch.begun")
        found = read(self, documents)
        if ahead:
            phases.stop("prefetch.read")
        return found

    _put(Prepared, read=read_in_phases)


def _steps(phases: Phases, batches: Path) -> None:
    """Steps, the first of a stage with its compilation."""
    import jax
    from jax._src import compiler
    from jax._src.lru_cache import LRUCache

    from qwen3_jax.runs import train

    stage_step, put, compile_ = train.stage_step, LRUCache.put, compiler.compile_or_get_cached
    compiling = threading.Event()

    def stage_step_in_phases(*args: Any, **options: Any) -> Any:
        step, fresh = stage_step(*args, **options), True

        def step_in_phases(state: Any, batch: Any) -> Any:
            nonlocal fresh
            phases.step = int(state.step) if phases.step < 0 else phases.step + 1
            with batches.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(step=phases.step, digest=_digest(batch))) + "\n")
            if fresh:
                compiling.set()
            if phases.step == phases.last:
                phases.stop("step.last")
            met = not fresh and phases.met("step.running")
            found = step(state, batch)
            if fresh:
                compiling.clear()
                phases.tell("left", place="compile.running")
            if met:
                jax.block_until_ready(found)
                phases.tell("left", place="step.running")
            fresh = False
            return found

        return step_in_phases

    def compile_in_phases(*args: Any, **options: Any) -> Any:
        if compiling.is_set():
            phases.met("compile.running")
        return compile_(*args, **options)

    def put_in_phases(self: Any, key: str, value: bytes) -> None:
        if compiling.is_set() and phases.met("compile.cached"):
            (Path(self.path) / f"{key}-cache").write_bytes(value[: len(value) // 2])
            _wait()
        put(self, key, value)

    _put(train, stage_step=stage_step_in_phases)
    _put(LRUCache, put=put_in_phases)
    _put(compiler, compile_or_get_cached=compile_in_phases)


def _restores(phases: Phases) -> None:
    """Restores: what the run goes on from is told too."""
    import orbax.checkpoint as ocp

    from qwen3_jax.training.checkpoints import Checkpoints

    handler = ocp.type_handlers.ArrayHandler
    deserialize, restore = handler.deserialize, Checkpoints.restore

    async def deserialize_in_phases(self: Any, infos: Any, args: Any = None) -> Any:
        phases.stop("restore.begun")
        found = await deserialize(self, infos, args)
        phases.stop("restore.read")
        return found

    def restore_and_tell(self: Any, like: Any) -> Any:
        found, again = restore(self, like), phases.step >= 0
        if found is not None:
            phases.tell("rewound" if again else "resumed", step=found.step, passed_over=sorted(found.passed_over))
            phases.step = found.step - 1 if again else phases.step
        return found

    _put(handler, deserialize=deserialize_in_phases)
    _put(Checkpoints, restore=restore_and_tell)


def _files(phases: Phases) -> None:
    """The run's own small files."""
    from qwen3_jax.training.journal import Journal

    init, write_text, replace = Journal.__init__, Path.write_text, os.replace

    class Lines:
        """A file that can be stopped within a line."""

        def __init__(self, file: Any):
            self._file = file

        def write(self, line: bytes) -> int:
            if phases.met("journal.line"):
                self._file.write(line[: len(line) // 2])
                _wait()
            return self._file.write(line)

        def close(self) -> None:
            self._file.close()

    def init_in_phases(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        if self._file is not None:  # process 0 writes
            self._file = Lines(self._file)

    def replace_in_phases(source: Any, target: Any, **options: Any) -> None:
        if Path(target).name == "metrics.jsonl":
            phases.stop("journal.anew")
        replace(source, target, **options)

    def write_text_in_phases(self: Path, data: str, *args: Any, **options: Any) -> int:
        if self.name.startswith("under_way.json") and phases.met("start.noted"):
            write_text(self, data[: len(data) // 2], *args, **options)
            _wait()
        return write_text(self, data, *args, **options)

    _put(Journal, __init__=init_in_phases)
    _put(os, replace=replace_in_phases)
    _put(Path, write_text=write_text_in_phases)


def _put(owner: Any, **functions: Any) -> None:
    """Functions in place of a module's or a class's own."""
    for name, function in functions.items():
        setattr(owner, name, functools.wraps(getattr(owner, name))(function))


def _digest(batch: Any) -> str:
    """Of all of a batch's arrays, whatever devices hold them; of several processes, of what this one holds."""
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(batch):
        if leaf.is_fully_addressable:
            arrays = [np.asarray(leaf)]
        else:
            arrays = [np.asarray(shard.data) for shard in sorted(leaf.addressable_shards, key=lambda shard: shard.device.id)]
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def _wait(seconds: float | None = None) -> None:
    """Until the kill, or so long."""
    if seconds is not None:
        time.sleep(seconds)
        return
    while True:
        time.sleep(60)


def main() -> int:
    """Run `qwen3-jax train` in phases."""
    descriptor, place, step, batches, *words = sys.argv[1:]
    phases = Phases(int(descriptor), place, int(step))
    install(phases, Path(batches))
    from qwen3_jax.cli.main import main as command

    code = command(["train", *words])
    phases.stop("last.exit")
    return code


if __name__ == "__main__":
    sys.exit(main())
