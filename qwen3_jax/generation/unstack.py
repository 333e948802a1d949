"""The layers one by one: on a CPU a scan over stacked weights copies each layer's slice at every token."""

import jax
from flax import nnx

from qwen3_jax.model.param import ExpertParam
from qwen3_jax.model.transformer import Layer, Qwen3


def unstack(model: Qwen3) -> list[Layer]:
    """Each layer's own arrays, in the model's compute dtype, for the `layers` argument of a call.

    The one Python loop over layers. Weights of experts stay in their stacks, which the grouped matmul reads in place; all
    others are copied once, so the memory for them doubles.

    Args:
        model: any Qwen3.

    Returns:
        A Layer for each layer of the network, in order.
    """
    layers = []
    for unit, segment in zip(model.segments, model.config.segments(), strict=True):
        graph, experts, rest = nnx.split(unit, ExpertParam, ...)
        for repeat in range(segment.repeats):
            sliced = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat].astype(model.dtype), rest)
            # Without the barrier the compiler moves the slices back into the token loop.
            sliced = jax.lax.optimization_barrier(sliced)
            layers += [Layer(block, repeat) for block in nnx.merge(graph, experts, sliced).blocks]
    return layers
