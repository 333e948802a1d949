"""Small models that the tests share: every kind of layer, heads x head_dim unlike the hidden size, every weight random."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from qwen3_jax import Qwen3, Qwen3Config

SHAPE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)

CONFIGS = {
    "dense": Qwen3Config(**SHAPE),
    "tied": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "moe": Qwen3Config(**SHAPE, **EXPERTS),
    "alternating": Qwen3Config(**SHAPE, **EXPERTS, decoder_sparse_step=2),
    "mixed": Qwen3Config(**SHAPE, **EXPERTS, mlp_only_layers=(1,)),
    "sliding": Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    "bias": Qwen3Config(**SHAPE, attention_bias=True),
}

# For meshes: a vocabulary that none divides, and heads for eight shards.
ODD = Qwen3Config(**{**SHAPE, "vocab_size": 93, "num_attention_heads": 8}, **EXPERTS)

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def random_model(name: str, seed: int = 0) -> Qwen3:
    """A float32 model of that config, norms and biases random too."""

    # One program, not optimised, that draws for all leaves at once: compilers take seconds over the draws of each shape.
    @functools.partial(jax.jit, compiler_options=QUICK)
    def make() -> Qwen3:
        model = Qwen3(ODD if name == "odd" else CONFIGS[name], rngs=nnx.Rngs(seed), dtype=jnp.float32)
        leaves, tree = jax.tree.flatten(model)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        largest = max(leaf.size for leaf in leaves)
        draws = jax.vmap(lambda key: jax.random.normal(key, (largest,)))(keys)
        noisy = [leaf + 0.2 * draw[: leaf.size].reshape(leaf.shape) for leaf, draw in zip(leaves, draws, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    return make()


def random_tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, SHAPE["vocab_size"])
