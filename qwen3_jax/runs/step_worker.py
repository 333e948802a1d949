"""A stage's step compiled in a process of its own: `python -m qwen3_jax.runs.step_worker REQUEST RESULT`, both JSON files.

Whoever starts it reads how the compiler has placed the buffers from XLA's dump, and may end it then (qwen3_jax.runs.compiled).
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from qwen3_jax.parallel.batches import Batch
from qwen3_jax.parallel.mesh import make_mesh
from qwen3_jax.planning.program import memory_of_failure
from qwen3_jax.planning.topology import devices_of, parse_topology
from qwen3_jax.runs.models import model_config
from qwen3_jax.runs.parts import lora_config, optimizer_of, rules_of, stage_step
from qwen3_jax.runs.resolve import resolve
from qwen3_jax.runs.schema import Run
from qwen3_jax.training.state import TrainState, abstract_train_state


def abstract_state(run: Run, mesh: Mesh) -> TrainState:
    """What a run trains, freezes and keeps of its optimizer, as shapes.

    Args:
        run: the run.
        mesh: of any devices.

    Returns:
        The state of its steps, with shardings.

    Raises:
        MeshError: the model does not fit the mesh, with the arithmetic.
    """
    return abstract_train_state(
        model_config(run.model),
        optimizer_of(run),
        mesh,
        rules=rules_of(run),
        param_dtype=jnp.dtype(run.model.param_dtype if run.lora is None else run.lora.float_dtype),
        adapt=lora_config(run),
        adapter_dtype="float32" if run.lora is None else run.lora.dtype,
        offload=run.optimizer.offload,
    )


def lowered(run: Run, name: str) -> jax.stages.Lowered:
    """A stage's step as `qwen3-jax train` makes it, lowered for the run's chips, which need not be here.

    Args:
        run: the run; it names a topology.
        name: one of its stages.

    Returns:
        What `.compile()` makes a program of.

    Raises:
        TopologyError: the compiler is missing, or does not know the shape.
        MeshError: the model or the batch does not fit the mesh, with the arithmetic.
    """
    stage, config = run.stages[name], model_config(run.model)
    chips = parse_topology(str(run.mesh.topology), run.mesh.slices)
    mesh = make_mesh(run.mesh.axes, slices=run.mesh.slices, devices=devices_of(chips))
    state, rules, optimizer = abstract_state(run, mesh), rules_of(run), optimizer_of(run)
    sharding = NamedSharding(mesh, rules.spec("batch", None, mesh=mesh))

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((stage.batch, stage.seq), dtype, sharding=sharding)

    batch = Batch(rows(jnp.int32), rows(jnp.int32), rows(jnp.float32), rows(jnp.int32))
    return stage_step(run, stage, config, rules, optimizer).lower(state, batch)


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """Compile a stage's step.

    Args:
        request: file, words (as `resolve` takes them), stage.

    Returns:
        Nothing where it compiles; else `refused`, what is wrong with the request; or `needed`, bytes of a program that does not
        fit; or `reason`, the compiler's.
    """
    try:
        made = lowered(resolve(request["file"], request["words"]).run, request["stage"])
    except ValueError as error:
        return {"refused": str(error)}
    try:
        made.compile()
    except jax.errors.JaxRuntimeError as error:
        full = memory_of_failure(error)
        reason = f"the compiler refused: {str(error).splitlines()[0][:300]}"
        return {"reason": reason} if full is None else {"needed": full.needed}
    return {}


if __name__ == "__main__":
    taken, given = map(Path, sys.argv[1:])
    given.write_text(json.dumps(compiled(json.loads(taken.read_text()))))
