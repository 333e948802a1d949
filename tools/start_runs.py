"""Start a run of training in a process of its own, and kill it once it says that it is at a place of tools/run_in_phases.py."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900  # seconds after which a start is said to hang
# The compiler takes most of a start's time, and these programs run for a second.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Fault(AssertionError):
    """What the tool is there to find."""


@dataclasses.dataclass
class Start:
    """How a start of the run ended.

    Attributes:
        code: the exit code.
        messages: what it told.
        seconds: that it took.
        orphans: processes that outlived it.
    """

    code: int
    messages: list[dict[str, Any]]
    seconds: float
    orphans: list[int]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The messages of a kind."""
        return [message for message in self.messages if message["kind"] == kind]


def start(folder: Path, cache: Path, words: list[str], place: str = "none", step: int = -1, delay: float = 0.0) -> Start:
    """Start the run, and kill it so many seconds after it has told that it is at a place.

    Args:
        folder: its output.
        cache: of compiled programs.
        words: of the command line.
        place: of PLACES, or none.
        step: from which on.
        delay: in seconds.

    Returns:
        How it ended.

    Raises:
        Fault: it hangs.
    """
    read, write = os.pipe()
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    program = [sys.executable, "-m", "tools.run_in_phases", str(write), place, str(step), str(folder / "batches.jsonl")]
    command = [*program, str(folder.parent / "run.toml"), "--output", str(folder), *words]
    begun, messages, hangs = time.monotonic(), [], threading.Event()
    with (folder / "said.txt").open("a") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, pass_fds=(write,), stdout=said, stderr=said, start_new_session=True
        )
    os.close(write)

    def give_up() -> None:
        hangs.set()
        process.kill()

    limit = threading.Timer(PATIENCE, give_up)
    limit.start()
    try:
        with os.fdopen(read, encoding="utf-8") as told:
            for line in told:
                messages.append(json.loads(line))
                if messages[-1]["kind"] == "at":
                    time.sleep(delay)
                    process.kill()
                    process.wait()
                    messages += [json.loads(line) for line in told if line.endswith("\n")]
                    break
        code = process.wait()
    finally:
        limit.cancel()
    if hangs.is_set():
        raise Fault(f"a start hung for {PATIENCE} s, at {place}: see {folder}/said.txt")
    return Start(code, messages, time.monotonic() - begun, session(process.pid))


def session(number: int) -> list[int]:
    """Processes of a session that are not dead."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, _, _, there = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            if int(there) == number and state not in "ZX":
                found.append(int(folder.name))
    return found
