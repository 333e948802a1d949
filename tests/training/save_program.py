"""What tests/training/test_saves.py starts: two processes that save a small state; one of them cannot read, and cannot write.

    python -m tests.training.save_program FOLDER

First they look for a file of process 0, in folders that they do not share and in one that they do. Of the second checkpoint
what process 1 has written is cut off; both restore. Process 1 is told to end between two steps, later ones than those saved.
Then its save of the second checkpoint fails once it is under way, as a disk that is full makes it fail.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import qwen3_jax
from qwen3_jax.parallel.watchdog import leave
from qwen3_jax.runs import places
from qwen3_jax.runs.schema import Run
from qwen3_jax.runs.toml import RunError
from qwen3_jax.training.checkpoints import Checkpoints, TrainingCheckpointError
from qwen3_jax.training.guard import Guard
from qwen3_jax.training.state import TrainState
from qwen3_jax.training.stopping import Stopping
from tests.training.stop_program import asked_until_told


class Full:
    """A write that has been begun and fails."""

    def result(self, timeout: float | None = None) -> None:
        raise OSError(28, "No space left on device")


def fail() -> None:
    """Let the next save of this process fail in the background."""
    handler: Any = ocp.type_handlers.ArrayHandler
    serialize = handler.serialize

    async def serialize_and_fail(*args: Any, **options: Any) -> Any:
        return [*await serialize(*args, **options), Full()]

    handler.serialize = serialize_and_fail


def main() -> int:
    signal.alarm(200)  # a save that waits for ever
    processes = qwen3_jax.initialize(mesh="fsdp=-1", timeout=60)
    assert processes.mesh is not None
    shape = (2, 2**16)  # smaller values would lie in the checkpoint's index
    weight, scalar = np.random.default_rng(0).standard_normal(shape, np.float32), np.zeros((), np.int32)
    split, whole = (NamedSharding(processes.mesh, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
    placed = jax.make_array_from_callback(shape, split, lambda index: weight[index])
    at = jax.make_array_from_callback((), whole, lambda index: scalar[index])
    state = TrainState(step=at, params={"weight": placed}, opt_state={}, guard=Guard(at, at, at, at))
    # Each process's own folder, then one for all.
    places.PATIENCE = 0.5
    for output in (f"{sys.argv[1]}-of-{processes.id}", f"{sys.argv[1]}-of-all"):
        try:
            places.check_shared(Run(name="small", output=output))
            print("shared", flush=True)
        except RunError as error:
            print(f"apart {error}", flush=True)
    try:
        with Checkpoints(sys.argv[1]) as checkpoints, Stopping() as stopping:
            early = [stopping.asked(step) for step in range(10)]
            checkpoints.save(1, state, {})
            checkpoints.save(2, state, {})
            checkpoints.wait()
            if processes.id == 1:
                for file in Path(sys.argv[1]).glob("2/state/ocdbt.process_1/d/*"):
                    os.truncate(file, file.stat().st_size // 2)
            multihost_utils.sync_global_devices("cut off")
            found = checkpoints.restore(state)
            assert found is not None
            print("restored", json.dumps([found.step, found.passed_over]), flush=True)
            if processes.id == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.5)  # as stop_program
            print("told", early.count(True), asked_until_told(stopping, 10), flush=True)
            if processes.id == 1:
                fail()
            for step in (2, 3, 4):
                checkpoints.save(step, state, {})
    except TrainingCheckpointError as error:
        print(f"refused {error}", flush=True)
        leave(1, str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
