"""The layers one by one: on a CPU a scan over stacked weights copies each layer's slice at every token."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from qwen3_jax.model.param import ExpertParam
from qwen3_jax.model.quantized import QuantizedParam
from qwen3_jax.model.transformer import Layer, Qwen3
from qwen3_jax.parallel.mesh import mesh_of
from qwen3_jax.parallel.rules import meshless


def unstack(model: Qwen3) -> list[Layer]:
    """Each layer's own arrays, in the model's compute dtype, for the `layers` argument of a call; for use under jit.

    The one Python loop over layers. Weights of experts stay in their stacks, which the grouped matmul reads in place; all
    others are copied once, so the memory for them doubles: `views` does without.

    Args:
        model: any Qwen3.

    Returns:
        A Layer for each layer of the network, in order.
    """

    def slice_of(leaf: jax.Array, repeat: int, coded: bool) -> jax.Array:
        # Without the barrier the compiler moves the slices back into the token loop.
        return jax.lax.optimization_barrier(leaf[repeat] if coded else leaf[repeat].astype(model.dtype))

    return _layers(model, slice_of)


def views(model: Qwen3) -> list[Layer] | None:
    """As `unstack`, outside of jit and without a copy: each layer's arrays lie within the model's own, which they keep alive.

    While they live, a donation of the model's arrays copies them.

    Args:
        model: any Qwen3.

    Returns:
        A Layer for each layer of the network; None where this can't be done: under jit, and where weights are stored in another
        dtype than is computed in.
    """
    stacked = [leaf for unit in model.segments for leaf in jax.tree.leaves(nnx.split(unit, ExpertParam, ...)[2])]
    for leaf in stacked:
        if isinstance(leaf, jax.core.Tracer) or leaf.dtype != model.dtype:
            return None

    slices = [np.asarray(leaf)[i] for leaf in stacked for i in range(leaf.shape[0])]
    # Through dlpack it would be a view too, but a process that ends right after a call then aborts: XLA's threads free
    # such an array, and want the interpreter for it. All at once: one by one it takes three times as long.
    placed = iter(jax.device_put(slices, next(iter(stacked[0].devices())), may_alias=True))
    by_leaf = {id(leaf): [next(placed) for _ in range(leaf.shape[0])] for leaf in stacked}
    return _layers(model, lambda leaf, repeat, coded: by_leaf[id(leaf)][repeat])


def on_cpu(model: Qwen3) -> bool:
    """Whether the weights are on one CPU, where layers run faster one by one; in a caller's jit, the default backend decides.

    On a mesh the stacks stay: its CPUs are there to try a program, and the scan is compiled faster.
    """
    weight = model.embed.weight[...]
    if isinstance(weight, jax.core.Tracer):
        return meshless() and jax.default_backend() == "cpu"
    return mesh_of(model) is None and all(device.platform == "cpu" for device in weight.devices())


def _layers(model: Qwen3, slice_of: Callable[[jax.Array, int, bool], jax.Array]) -> list[Layer]:
    layers = []
    for unit, segment in zip(model.segments, model.config.segments(), strict=True):
        graph, experts, coded, rest = nnx.split(unit, ExpertParam, QuantizedParam, ...)
        for repeat in range(segment.repeats):
            sliced = jax.tree.map(lambda leaf, repeat=repeat: slice_of(leaf, repeat, False), rest)
            codes = jax.tree.map(lambda leaf, repeat=repeat: slice_of(leaf, repeat, True), coded)
            layers += [Layer(block, repeat) for block in nnx.merge(graph, experts, codes, sliced).blocks]
    return layers
