"""Start a run of training in one process or several, and kill it once it says that it is at a place of tools/run_in_phases.py.

Of several processes one says so, and any of them are killed; the others have to end by themselves.
"""

import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900  # seconds after which a start is said to hang
SURVIVE = 60  # seconds after a kill in which all other processes have to end by themselves
DEVICES = 4  # of all processes together
# The compiler takes most of a start's time, and these programs run for a second.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Fault(AssertionError):
    """What the tool is there to find."""


@dataclasses.dataclass(frozen=True)
class Aim:
    """Which processes carry a run out, and which of them are killed.

    Attributes:
        processes: how many there are, with DEVICES devices in all.
        at: the one that has to be at the place.
        killed: those that are killed then.
        how: the signal; after another one than SIGKILL they have to end by themselves, too.
        then: further signals to them, each after so many seconds.
        heartbeat: seconds of silence after which a process counts as dead; None: the product's.
        survive: seconds after the signal in which all have to have ended.
    """

    processes: int = 1
    at: int = 0
    killed: tuple[int, ...] = (0,)
    how: int = signal.SIGKILL
    then: tuple[tuple[float, int], ...] = ()
    heartbeat: float | None = None
    survive: float = SURVIVE

    @property
    def dead(self) -> tuple[int, ...]:
        """Those that the signal itself ends."""
        return self.killed if self.how == signal.SIGKILL else ()


ALONE = Aim()


@dataclasses.dataclass
class Start:
    """How a start of the run ended.

    Attributes:
        codes: the exit code of each process.
        messages: what they told, each with its `process`, and whether that was heard `after` the kill.
        seconds: that it took.
        orphans: processes that outlived it.
        survived: seconds from the kill to the end of the last process that was not killed; None without one.
        last: the last line that each process wrote.
        pids: of the processes.
    """

    codes: list[int]
    messages: list[dict[str, Any]]
    seconds: float
    orphans: list[int]
    survived: float | None
    last: list[str]
    pids: list[int]

    @property
    def code(self) -> int:
        """The exit code of process 0."""
        return self.codes[0]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The messages of a kind."""
        return [message for message in self.messages if message["kind"] == kind]


def start(
    folder: Path, cache: Path, words: list[str], place: str = "none", step: int = -1, delay: float = 0.0, aim: Aim = ALONE
) -> Start:
    """Start the run, and kill it so many seconds after it has told that it is at a place.

    Args:
        folder: its output.
        cache: of compiled programs.
        words: of the command line.
        place: of PLACES, or none.
        step: from which on.
        delay: in seconds.
        aim: how many processes there are, and which are killed.

    Returns:
        How it ended.

    Raises:
        Fault: it hangs, or a process lives on when others are killed.
    """
    begun = time.monotonic()
    team = _Team(folder, cache, words, place, step, aim)
    try:
        survived = team.carry_out(delay)
    finally:
        team.close()
    said = [(folder / name_of("said.txt", i)).read_text("utf-8", errors="replace").split("\n") for i in range(aim.processes)]
    last = [next((line for line in reversed(lines) if line.strip()), "") for lines in said]
    orphans = [number for pid in team.pids for number in session(pid)]
    return Start(team.codes, team.messages, time.monotonic() - begun, orphans, survived, last, team.pids)


def name_of(file: str, process: int) -> str:
    """A process's own file: said.txt, said-1.txt."""
    name, _, ending = file.rpartition(".")
    return file if process == 0 else f"{name}-{process}.{ending}"


class _Team:
    """The processes of one start."""

    def __init__(self, folder: Path, cache: Path, words: list[str], place: str, step: int, aim: Aim):
        self.messages: list[dict[str, Any]] = []
        self._folder, self._place, self._aim, count = folder, place, aim, aim.processes
        self._told: queue.Queue[dict[str, Any] | None] = queue.Queue()  # None: one process says no more
        self._processes: list[subprocess.Popen[bytes]] = []
        environ = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} {FLAGS}",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        if aim.heartbeat is not None:
            environ["TOOLS_HEARTBEAT"] = str(aim.heartbeat)  # tools/more_phases.py
        if count > 1:
            environ |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
        for i in range(count):
            read, write = os.pipe()
            there, batches = place if i == aim.at else "none", folder / name_of("batches.jsonl", i)
            program = [sys.executable, "-m", "tools.run_in_phases", str(write), there, str(step), str(batches)]
            command = [*program, str(folder.parent / "run.toml"), "--output", str(folder), *words]
            with (folder / name_of("said.txt", i)).open("a") as said:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environ | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
                    pass_fds=(write,),
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
            os.close(write)
            self._processes.append(process)
            threading.Thread(target=self._listen, args=(i, read), daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def codes(self) -> list[int]:
        return [process.wait() for process in self._processes]

    def _listen(self, process: int, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8") as told:
            for line in told:
                if line.endswith("\n"):  # else a kill has cut it off
                    self._told.put(json.loads(line) | dict(process=process))
        self._told.put(None)

    def carry_out(self, delay: float) -> float | None:
        """Read what is told until all have ended; how long those that were not killed have lived on."""
        deadline, open_lines, killed_at = time.monotonic() + PATIENCE, len(self._processes), None
        while open_lines:
            try:
                message = self._told.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise Fault(f"{self._hanging(killed_at)}: see {self._folder}/said.txt") from None
            if message is None:
                open_lines -= 1
                continue
            self.messages.append(message | dict(after=killed_at is not None))
            if message["kind"] == "at" and killed_at is None:
                time.sleep(delay)
                killed_at = self._kill()
                deadline = time.monotonic() + self._aim.survive
        rest = [process for i, process in enumerate(self._processes) if i not in self._aim.dead or killed_at is None]
        for process in rest:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Fault(f"{self._hanging(killed_at)}: see {self._folder}/said.txt") from None
        return time.monotonic() - killed_at if killed_at is not None and rest else None

    def _kill(self) -> float:
        for i in self._aim.killed:
            self._processes[i].send_signal(self._aim.how)
        now = time.monotonic()
        for i in self._aim.dead:
            self._processes[i].wait()
        for process in self._processes:  # one that is held at its place has to end by itself
            if process.poll() is None and self._aim.how != signal.SIGSTOP:
                process.send_signal(signal.SIGCONT)
        for wait, how in self._aim.then:
            time.sleep(wait)
            for i in self._aim.killed:
                self._processes[i].send_signal(how)  # nothing, where it has ended
        return now

    def _hanging(self, killed_at: float | None) -> str:
        there = [i for i, process in enumerate(self._processes) if process.poll() is None]
        if killed_at is None:
            return f"processes {there} of a start hung for {PATIENCE} s, at {self._place}"
        return f"processes {there} outlived the kill of {list(self._aim.killed)} at {self._place} by {self._aim.survive:g} s"

    def close(self) -> None:
        """End what is left."""
        for process in self._processes:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nothing listens on, with room for those that follow it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return min(server.getsockname()[1], 65500)


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


def carried_out(name: str, run: Callable[[Path, Any, Console], int], options: Any) -> int:
    """A tool's whole work, in the folder that its options name, which stays, or in one that goes when it ends.

    Args:
        name: the tool's.
        run: given a folder, the options and a console it says how many things were wrong.
        options: with a `folder`.

    Returns:
        Exit code.
    """
    console = Console(width=150, highlight=False)
    try:
        if options.folder is not None:
            options.folder.mkdir(parents=True)
            return 1 if run(options.folder.absolute(), options, console) else 0
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            return 1 if run(Path(folder), options, console) else 0
    except Fault as fault:
        console.print(f"{name}: {fault}")
        return 1
