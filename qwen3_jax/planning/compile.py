"""Candidates compiled side by side, each in a worker process with a time limit; whatever becomes of one, the others go on."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen3_jax.planning.candidates import Candidate
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.program import Collective, Program
from qwen3_jax.planning.topology import COMPILE_ONLY, Topology


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    Attributes:
        seconds: of its worker's tracing and compiling; of the worker's life where it did not get that far.
        arguments: category -> bytes of one device, from the shapes; empty where nothing was lowered.
        program: what the compiler says; None where there is no program.
        needed: bytes that a program which does not fit would take, and `available` those there are; else None.
        reason: why there is no program, where it is not its size.
    """

    seconds: float
    arguments: dict[str, int] = dataclasses.field(default_factory=dict)
    program: Program | None = None
    needed: int | None = None
    available: int | None = None
    reason: str | None = None


def compile_all(
    job: Job,
    topology: Topology,
    chosen: Sequence[Candidate],
    *,
    workers: int,
    time_limit: float,
    done: Callable[[Candidate, Outcome], None] = lambda candidate, outcome: None,
    command: Sequence[str] = (sys.executable, "-m", "qwen3_jax.planning.worker"),
) -> list[Outcome]:
    """Compile candidates in worker processes.

    Args:
        job: the job.
        topology: the chips.
        chosen: the candidates.
        workers: processes at a time; each takes some GB for a large model.
        time_limit: seconds that a worker may take.
        done: called as each candidate ends.
        command: a worker's; it is given the paths of a request and of the result that it shall write.

    Returns:
        The outcomes, in the order of the candidates.
    """
    outcomes: dict[int, Outcome] = {}
    waiting = list(range(len(chosen)))
    running: dict[int, _Worker] = {}
    with tempfile.TemporaryDirectory(prefix="qwen3-jax-plan-") as folder, contextlib.ExitStack() as stack:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    number = waiting.pop(0)
                    place = Path(folder, str(number))
                    running[number] = _Worker(place, _request(job, topology, chosen[number]), command, stack)
                for number, worker in list(running.items()):
                    outcome = worker.outcome(time_limit)
                    if outcome is not None:
                        del running[number]
                        outcomes[number] = outcome
                        done(chosen[number], outcome)
                time.sleep(0.05)
        finally:  # an interrupt leaves nothing behind
            for worker in running.values():
                worker.kill()
    return [outcomes[number] for number in range(len(chosen))]


def _request(job: Job, topology: Topology, candidate: Candidate) -> dict:
    return {
        "config": job.config.to_hf(),
        "mode": job.mode,
        "batch": job.batch,
        "seq": job.seq,
        "remat": job.remat,
        "rank": job.rank,
        "base": job.base,
        "adapter_dtype": job.adapter_dtype,
        "topology": topology.name,
        "slices": topology.slices,
        "mesh": candidate.wish,
        "rules": candidate.rules.rows,
    }


class _Worker:
    """A process that compiles one candidate."""

    def __init__(self, place: Path, request: dict, command: Sequence[str], stack: contextlib.ExitStack):
        place.mkdir()
        self.result, self.log = place / "result.json", place / "log"
        taken = place / "request.json"
        taken.write_text(json.dumps(request))
        log = stack.enter_context(self.log.open("wb"))
        self.start = time.monotonic()
        # A session of its own, so that what it starts (ptxas) ends with it.
        self.process = subprocess.Popen(
            [*command, str(taken), str(self.result)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **COMPILE_ONLY},
            start_new_session=True,
        )

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self, time_limit: float) -> Outcome | None:
        """What became of it; None while it runs within its time."""
        seconds = time.monotonic() - self.start
        code = self.process.poll()
        if code is None:
            if seconds < time_limit:
                return None
            self.kill()
            return Outcome(seconds, reason=f"stopped after its time limit of {time_limit:g} s")
        if code == 0 and self.result.exists():
            return _read(json.loads(self.result.read_text()))
        if code < 0:
            killed = signal.Signals(-code).name
            hint = ", as the system does when memory runs out" if killed == "SIGKILL" else ""
            return Outcome(seconds, reason=f"the worker was ended by {killed}{hint}; its last words: {self._last_words()}")
        return Outcome(seconds, reason=f"the worker failed: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][:300] if said else "none"


def _read(found: dict[str, Any]) -> Outcome:
    """An outcome out of a worker's JSON, where tuples are lists."""
    program: dict[str, Any] | None = found.pop("program", None)
    if program is None:
        return Outcome(**found)
    moves: list[dict[str, Any]] = program.pop("collectives")
    for move in moves:
        move["axes"] = tuple(move["axes"])
    program["unknown"] = tuple(program["unknown"])
    return Outcome(**found, program=Program(**program, collectives=tuple(Collective(**move) for move in moves)))
