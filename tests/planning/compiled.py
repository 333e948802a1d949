"""Small programs compiled for a pod that is not there, with their loops and without."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import Batch, Qwen3, Qwen3Config, TrainState, abstract_model, adamw, init_cache, make_mesh, make_train_step
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.training.guard import init_guard

CONFIG = Qwen3Config(
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
)
# Arrays stay in HBM: the compiler's own count tells no memory from another, and counts a copy between two of them four times.
OPTIONS = {"xla_vf_vmem_memory_space_assignment": "false"}


@functools.cache
def pod() -> jax.sharding.Mesh:
    """Four v5p chips, fsdp=2 and tensor=2."""
    return make_mesh("fsdp=2,tensor=2", devices=topologies.get_topology_desc("v5p:2x2x1", "tpu").devices)


def array(shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(pod(), PartitionSpec(*axes)))


def placed(tree: Any) -> Any:
    """Shapes on the pod, as they are split."""
    return jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype, *getattr(leaf.sharding, "spec", ())), tree)


def training() -> jax.stages.Lowered:
    params, optimizer = nnx.state(abstract_model(CONFIG, pod()), nnx.Param), adamw(1e-3)
    with jax.set_mesh(pod()):
        opt_state = placed(jax.eval_shape(optimizer.init, params))
    guard = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), jax.eval_shape(init_guard))
    state = TrainState(array((), jnp.int32), params, opt_state, guard)
    rows = RULES.spec("batch", None, mesh=pod())
    # Rows too short for the attention kernel, whose FLOPs the compiler does not count.
    tokens = array((16, 64), jnp.int32, *rows)
    # Without rematerialisation: what a loop makes anew, a compiler that sees two layers at once does not.
    step = make_train_step(CONFIG, optimizer, remat="none")
    return step.lower(state, Batch(tokens, tokens, array((16, 64), jnp.float32, *rows)))


def decoding() -> jax.stages.Lowered:
    model = abstract_model(CONFIG, pod(), param_dtype=jnp.bfloat16)
    bare = abstract_model(CONFIG, param_dtype=jnp.bfloat16)
    bare.rules = model.rules
    tokens = array((64, 1), jnp.int32, *RULES.spec("batch", None, mesh=pod()))

    def decode(cache: Any, model: Qwen3, tokens: Any) -> Any:
        out = model(tokens, cache=cache)
        return out.cache, jnp.argmax(out.logits[:, -1], axis=-1)

    with jax.set_mesh(pod()):
        cache = placed(jax.eval_shape(lambda: init_cache(bare, 64, 1024)))
        return jax.jit(decode, donate_argnums=0).lower(cache, model, tokens)


def layers() -> jax.stages.Lowered:
    """Two layers, each a loop over two blocks: weights gathered over fsdp before it, a sum over tensor after it."""

    def layer(x: Any, up: Any, down: Any) -> Any:
        up = jax.lax.all_gather(up, "fsdp", axis=1, tiled=True)
        down = jax.lax.all_gather(down, "fsdp", axis=2, tiled=True)

        def block(x: Any, weights: Any) -> Any:
            up, down = weights
            return jax.nn.silu(x @ up) @ down, None

        return jax.lax.psum(jax.lax.scan(block, x, (up, down))[0], "tensor")

    over = jax.shard_map(
        layer,
        in_specs=(PartitionSpec("fsdp"), PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")),
        out_specs=PartitionSpec("fsdp"),
        check_vma=False,
    )

    def network(x: Any, first: Any, weights: Any) -> Any:
        # A product first: the state of a loop is then no argument, which would be copied.
        return jax.lax.scan(lambda x, pair: (over(x, *pair), None), x @ first, weights)[0]

    weights = (
        array((2, 2, 2048, 4096), jnp.bfloat16, None, None, "fsdp", "tensor"),
        array((2, 2, 4096, 2048), jnp.bfloat16, None, None, "tensor", "fsdp"),
    )
    with jax.set_mesh(pod()):
        return jax.jit(network).lower(array((8192, 2048), jnp.bfloat16, "fsdp"), array((2048, 2048), jnp.bfloat16), weights)


def ring(steps: int) -> jax.stages.Lowered:
    """Rows travel around fsdp while each chip multiplies those that it has."""

    def local(x: Any, weight: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            x, total = carry
            return (jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), total + x @ weight), None

        return jax.lax.scan(step, (x, jnp.zeros_like(x)), None, length=steps)[0][1]

    over = jax.shard_map(
        local, in_specs=(PartitionSpec("fsdp"), PartitionSpec()), out_specs=PartitionSpec("fsdp"), check_vma=False
    )
    with jax.set_mesh(pod()):
        return jax.jit(over).lower(array((2048, 1024), jnp.bfloat16, "fsdp"), array((1024, 1024), jnp.bfloat16))


def unrolled(lower: Callable[[], jax.stages.Lowered], monkeypatch: Any) -> jax.stages.Lowered:
    """The same program without a loop, of which the compiler's own count is right."""
    scan = jax.lax.scan
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "scan", lambda *given, **options: scan(*given, **options | dict(unroll=True)))
        return lower()
