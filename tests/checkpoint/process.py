"""One process of several that share a mesh; test_processes starts them: INDEX COUNT PORT DEVICES PLACE DUTY.

What it has seen is printed as one JSON object.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax

_INDEX, _COUNT, _PORT, _DEVICES, _PLACE, _DUTY = sys.argv[1:]
INDEX, COUNT, PLACE = int(_INDEX), int(_COUNT), Path(_PLACE)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={_DEVICES}"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
# Whom the other has left waits for it at its own end: not long where a kill is the test, longer where none should come.
jax.distributed.initialize(f"localhost:{_PORT}", COUNT, INDEX, heartbeat_timeout_seconds=15 if _DUTY == "killed" else 100)

import numpy as np  # noqa: E402  # jax.distributed comes first
import orbax.checkpoint as ocp  # noqa: E402

from qwen3_jax import Qwen3, adamw, from_pretrained, init_train_state, make_mesh, save_pretrained  # noqa: E402
from qwen3_jax.checkpoint import tensor  # noqa: E402
from qwen3_jax.checkpoint.reading import CheckpointError  # noqa: E402
from qwen3_jax.tune.peft import load_adapter, save_adapter  # noqa: E402
from tests.checkpoint.state import flat, loaded, stepped  # noqa: E402


def read(folder: Path, mesh: Any) -> tuple[Qwen3, int]:
    """A model, and how many bytes of tensors this process has read for it."""
    counted, fill = [], tensor._fill
    tensor._fill = lambda handle, view: counted.append(len(view)) or fill(handle, view)
    model = from_pretrained(folder, mesh=mesh)
    tensor._fill = fill
    return model, sum(counted)


def held(model: Qwen3) -> int:
    """Bytes of what this process's devices hold, each piece once."""
    pieces = {}
    for number, leaf in enumerate(jax.tree.leaves(model)):
        pieces |= {(number, str(shard.index)): shard.data.nbytes for shard in leaf.addressable_shards}
    return sum(pieces.values())


def refused(work: Any) -> str:
    """What is said in refusing."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return ""


def at_write(number: int, act: Any) -> None:
    """Before this process's write of that number, counted from now, act."""
    count, write = [], tensor.write_all

    def counting(handle: Any, data: Any) -> None:
        count.append(data)
        if len(count) == number:
            tensor.write_all = write
            act()
        write(handle, data)

    tensor.write_all = counting


def full() -> None:
    raise OSError(28, "No space left on device", "file")


def first() -> dict[str, Any]:
    """Two processes: read, write both forms and a training state, and let a disk fail under one of them."""
    mesh = make_mesh("fsdp=2,tensor=2")
    model, count = read(PLACE / "in", mesh)
    save_pretrained(model, PLACE / "by2-hf", max_shard_bytes=40_000)
    with jax.set_mesh(mesh):  # whether one is set makes no difference
        save_pretrained(model, PLACE / "by2-orbax", to="orbax")
    found: dict[str, Any] = {"read": count, "held": held(model)}
    if INDEX == 1:
        at_write(9, full)
    found["save"] = refused(lambda: save_pretrained(model, PLACE / "failed"))
    (PLACE / f"mine-{INDEX}").mkdir()
    found["apart"] = refused(lambda: save_pretrained(model, PLACE / f"mine-{INDEX}" / "out"))
    found["missing"] = refused(lambda: from_pretrained(PLACE / ("in" if INDEX == 0 else "nowhere"), mesh=mesh))
    fill = tensor._fill
    if INDEX == 1:
        tensor._fill = lambda handle, view: 0  # as of a file that has been cut off meanwhile
    found["load"] = refused(lambda: from_pretrained(PLACE / "in", mesh=mesh))
    tensor._fill = fill
    save_adapter(load_adapter(model, PLACE / "by1-adapter"), PLACE / "by2-adapter")
    found["adapter"] = refused(lambda: load_adapter(model, PLACE / ("by1-adapter" if INDEX == 0 else "nowhere")))
    found["occupied"] = refused(lambda: save_pretrained(model, PLACE / "by2-hf"))
    with ocp.StandardCheckpointer() as writer:
        writer.save(PLACE / "state", flat(stepped(init_train_state(model, adamw(1e-2)))))
    return found


def second() -> dict[str, Any]:
    """Four processes: what two have written, read and written again; each holds its part of the state against the whole."""
    mesh = make_mesh("fsdp=4")
    model, count = read(PLACE / "by2-orbax", mesh)
    save_pretrained(model, PLACE / "by4-hf", max_shard_bytes=40_000, overwrite=True)
    state = flat(loaded(PLACE / "state", init_train_state(model, adamw(1e-2))))
    wanted = np.load(PLACE / "state.npz")
    equal = [
        np.array_equal(shard.data, wanted[path][shard.index])
        for path, leaf in state.items()
        for shard in leaf.addressable_shards
    ]
    return {
        "read": count,
        "held": held(model),
        "equal": all(equal),
        "parts": len(equal),
        "left": sorted(state.keys() ^ wanted.keys()),
    }


def killed() -> dict[str, Any]:
    """Two processes, one of which kills itself in the middle of writing."""
    model = from_pretrained(PLACE / "in", mesh=make_mesh("fsdp=2"))
    if INDEX == 1:
        at_write(30, lambda: os.kill(os.getpid(), signal.SIGKILL))
    save_pretrained(model, PLACE / "killed", overwrite=True)
    return {"ended": True}


print(json.dumps({"first": first, "second": second, "killed": killed}[_DUTY]()), flush=True)
