"""With jax_enable_x64 integers are int64 by default: the same model gives the same float32 values."""

import subprocess
import sys

import numpy as np

from tests.model.models import random_model, random_tokens

PROGRAM = """
import sys, jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np
from pallas_kernels import grouped_matmul
from qwen3_jax import abstract_model, init_cache
from tests.model.models import CONFIGS, QUICK
kept = dict(np.load(sys.argv[1]))
model = abstract_model(CONFIGS["mixed"], dtype=jnp.float32)
model = jax.tree.unflatten(jax.tree.structure(model), [jnp.asarray(kept[f"leaf{i}"]) for i in range(len(kept) - 2)])
tokens = jnp.asarray(kept["tokens"], jnp.int64)
run = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache), compiler_options=QUICK)
for cache in (None, init_cache(model, 2, 16)):
    logits = run(model, tokens, cache).logits
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, kept["logits"], rtol=0, atol=1e-5)
jax.jit(jax.grad(lambda model: model(tokens, remat="full").logits.sum()), compiler_options=QUICK)(model)
left, right = jnp.ones((6, 3), jnp.float64), jnp.arange(24, dtype=jnp.float64).reshape(2, 4, 3)
out = grouped_matmul(left, right, jnp.asarray([2, 4], jnp.int32), transpose_rhs=True)
assert out.dtype == jnp.float64
np.testing.assert_array_equal(out, np.repeat(np.asarray(right.sum(-1)), [2, 4], axis=0))
"""


def test_the_model_and_the_kernels_run_under_x64(tmp_path):
    import jax

    model, tokens = random_model("mixed"), random_tokens(2, 9)
    kept: dict = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(model))}
    kept |= dict(tokens=tokens, logits=jax.jit(lambda model: model(tokens).logits)(model))
    np.savez(tmp_path / "kept.npz", **kept)
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "kept.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
