"""The program of a job on a mesh, lowered from shapes alone, and how many bytes each of its arguments takes on a device."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen3_jax.generation.cache import init_cache
from qwen3_jax.model.abstract import abstract_model
from qwen3_jax.model.cache import Cache
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.batches import Batch
from qwen3_jax.parallel.rules import RULES, Rules
from qwen3_jax.planning.job import Job
from qwen3_jax.training.optimizer import adamw
from qwen3_jax.training.state import abstract_train_state
from qwen3_jax.training.step import make_train_step
from qwen3_jax.tune.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program that is not compiled yet.

    Attributes:
        program: what `.compile()` makes a program of.
        arguments: category -> bytes of one device: weights, optimizer, cache, batch.
    """

    program: jax.stages.Lowered
    arguments: dict[str, int]


def lowered(job: Job, mesh: Mesh, rules: Rules = RULES) -> Lowered:
    """A job's program on a mesh of compile-only devices.

    Args:
        job: the job.
        mesh: the mesh.
        rules: which of its axes split what.

    Returns:
        The program, and its arguments' bytes.

    Raises:
        MeshError: the model or the batch does not fit the mesh, with the arithmetic.
    """
    return _training(job, mesh, rules) if job.trains else _inference(job, mesh, rules)


def _training(job: Job, mesh: Mesh, rules: Rules) -> Lowered:
    adapt = LoraConfig(rank=job.rank, base=job.codes) if job.adapts else None
    optimizer = adamw(1e-4)
    param_dtype = job.float_dtype if job.adapts else "float32"
    options: dict[str, Any] = dict(rules=rules, param_dtype=param_dtype, adapt=adapt, adapter_dtype=job.adapter_dtype)
    state = abstract_train_state(job.config, optimizer, mesh, **options)
    shape = (job.batch, job.seq)
    batch = Batch(
        tokens=_rows(mesh, rules, shape, jnp.int32),
        labels=_rows(mesh, rules, shape, jnp.int32),
        mask=_rows(mesh, rules, shape, jnp.float32),
    )
    step = make_train_step(job.config, optimizer, remat=job.remat, rules=rules, adapt=adapt)
    weights = device_bytes((state.params, state.frozen))
    sizes = {"weights": weights, "optimizer": device_bytes(state.opt_state), "batch": device_bytes(batch)}
    return Lowered(step.lower(state, batch), sizes)


def _inference(job: Job, mesh: Mesh, rules: Rules) -> Lowered:
    model = abstract_model(job.config, mesh, rules=rules, param_dtype=jnp.bfloat16)
    # A cache is made on the mesh that its model lies on, which cannot be set while shapes are traced: it is set here instead.
    bare = abstract_model(job.config, param_dtype=jnp.bfloat16)
    bare.rules = model.rules
    with jax.set_mesh(mesh):
        cache = _on(mesh, jax.eval_shape(lambda: init_cache(bare, job.batch, job.seq)))
    tokens = _rows(mesh, rules, (job.batch, 1 if job.mode == "decode" else job.seq), jnp.int32)

    def decode(cache: Cache, model: Qwen3, tokens: Any) -> tuple[Cache, Any]:
        out = model(tokens, cache=cache)
        return out.cache, jnp.argmax(out.logits[:, -1], axis=-1)

    def prefill(cache: Cache, model: Qwen3, tokens: Any) -> tuple[Cache, Any]:
        out = model(tokens, cache=cache, output="hidden", fresh=True)
        return out.cache, model.logits(out.hidden[:, -1])

    with jax.set_mesh(mesh):
        program = jax.jit(decode if job.mode == "decode" else prefill, donate_argnums=0).lower(cache, model, tokens)
    sizes = {"weights": device_bytes(model), "cache": device_bytes(cache), "batch": device_bytes(tokens)}
    return Lowered(program, sizes)


def _on(mesh: Mesh, tree: Any) -> Any:
    """Shapes that name an abstract mesh, on these devices; those that name none are whole on each of them."""

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = getattr(leaf.sharding, "spec", PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, tree)


def _rows(mesh: Mesh, rules: Rules, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return _array(mesh, shape, dtype, rules.spec("batch", None, mesh=mesh))


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device.

    Args:
        tree: shapes or arrays with shardings.

    Returns:
        The sum over their shards.
    """
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
