"""What tests/parallel/test_processes.py starts: join the other processes, train a small model on a mesh, print each loss.

    python -m tests.parallel.train_program MESH STEPS

Reads a line before it joins, so that all join at the same time. Without a last step it trains until it is killed.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qwen3_jax
from qwen3_jax import Batch, Qwen3, Qwen3Config, adamw, global_batch, init_train_state, make_train_step, process_rows

ROWS, LENGTH = 8, 32
CONFIG = Qwen3Config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    decoder_sparse_step=2,  # dense and mixture of experts in turn
)


def batch(step: int) -> Batch:
    """The rows of one step, all of them, the same on every process."""
    words = np.random.default_rng(step).zipf(1.3, (ROWS, LENGTH + 1)) % CONFIG.vocab_size
    return Batch(words[:, :-1], words[:, 1:], np.ones((ROWS, LENGTH), np.float32), np.ones((ROWS, LENGTH), np.int32))


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of what the test takes
    print("ready", flush=True)
    sys.stdin.readline()
    wish, steps = sys.argv[1], [int(text) for text in sys.argv[2:]]
    processes = qwen3_jax.initialize(mesh=wish, timeout=60)
    assert qwen3_jax.initialize().count == processes.count == jax.process_count()
    mesh = processes.mesh
    assert mesh is not None
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: Qwen3(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32))()
    optimizer = adamw(1e-2)
    state = init_train_state(model, optimizer)
    step = make_train_step(CONFIG, optimizer, dtype=jnp.float32, remat="none")
    mine = process_rows(mesh, ROWS)
    print("rows", *mine)
    for at in itertools.count():
        if steps and at == steps[0]:
            break
        read = jax.tree.map(lambda leaf: leaf[mine], batch(at))
        state, metrics = step(state, global_batch(read, mesh, ROWS))
        print("loss", *(float(metrics[name]) for name in ("loss", "balance_loss", "grad_norm")), flush=True)
    assert step.jitted._cache_size() == 1  # compiled once: nothing that a first trace imports makes for a second
    print("trained", flush=True)


if __name__ == "__main__":
    main()
