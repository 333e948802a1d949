"""Compile for eight H100s, without one, what the library runs on them: the kernels, and a model's training step and prefill.

    python -m venv cuda && cuda/bin/pip install -e '.[cuda13]' && cuda/bin/python tools/compile_for_gpu.py

Prints for each case the kernels that its program calls, its temporaries beside its arguments, and the time it took. Fails where
a program does not call the kernels that it should. Machine code is made; nothing is run, and cuDNN chooses its kernels only
on a card.
"""

import collections
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from pallas_kernels import attention, grouped_matmul
from pallas_kernels.attention.shapes import CASES as ATTENTIONS
from pallas_kernels.grouped_matmul.shapes import DECODE, PREFILL
from qwen3_jax import Qwen3Config, abstract_model, init_cache
from qwen3_jax.parallel.mesh import AXES
from qwen3_jax.planning.topology import H100

# What a kernel's call is named in the compiled text.
KERNELS = {
    "mosaic_gpu": "Mosaic",
    "__cudnn$fmhaScaleBiasSoftmax": "cuDNN",
    "__cudnn$fmhaScaleBiasSoftmaxBackward": "cuDNN backward",
}

Program = tuple[str, Callable[..., Any], tuple[Any, ...], set[str]]


def kernels(device: jax.Device) -> Iterator[Program]:
    """Name, function, arguments and expected kernels of each op at its recorded shapes, on one card."""
    place = SingleDeviceSharding(device)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def product(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=True)

    for case in (PREFILL[0], PREFILL[3], PREFILL[4]):
        args = shape(case.rows, case.inner), shape(case.groups, case.outer, case.inner), shape(case.groups, dtype=jnp.int32)

        def with_gradients(lhs, rhs, sizes):
            out, pull = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
            return pull(out)

        yield f"{case.name}, and gradients", with_gradients, args, {"Mosaic"}
    case = DECODE[0]
    args = shape(case.rows, case.inner), shape(case.groups, case.outer, case.inner), shape(case.groups, dtype=jnp.int32)
    yield case.name, product, args, {"Mosaic"}
    for case in ATTENTIONS[3:]:
        keys = shape(case.batch, case.kv_heads, case.slots, case.size)
        tokens = shape(case.batch, case.length, dtype=jnp.int32)

        def with_gradients(q, k, v, segments, slots):
            def op(q, k, v):
                return attention(q, k, v, q_segments=segments, k_segments=segments, q_slots=slots)

            out, pull = jax.vjp(op, q, k, v)
            return pull(out)

        args = shape(case.batch, case.length, case.heads, case.size), keys, keys, tokens, tokens
        yield f"{case.name}, attention and gradients", with_gradients, args, {"cuDNN", "cuDNN backward"}


def models(devices: list[jax.Device]) -> Iterator[Program]:
    """Four layers of 30B-A3B's widths: a gradient on a mesh of all cards, and the prefill of a new cache on one."""
    config = Qwen3Config.from_hf({**Qwen3Config.preset("qwen3-30b-a3b").to_hf(), "num_hidden_layers": 4})
    sizes = [{"fsdp": 2, "expert": 4}.get(axis, 1) for axis in AXES]
    mesh = Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    model = abstract_model(config, mesh)

    def gradient(model, tokens):
        def loss(model):
            weights = jnp.ones(tokens.shape, jnp.float32)
            out = model(tokens, segment_ids=tokens, labels=tokens, weights=weights, remat="full", output="hidden")
            return out.weighted.objective / tokens.size

        return jax.grad(loss)(model)

    tokens = jax.ShapeDtypeStruct((8, 4096), jnp.int32)
    yield "30B-A3B, 4 layers, gradient, fsdp=2,expert=4", gradient, (model, tokens), {"Mosaic", "cuDNN", "cuDNN backward"}

    def placed(tree: Any) -> Any:
        place = SingleDeviceSharding(devices[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    model = placed(abstract_model(config, param_dtype=jnp.bfloat16))
    cache = placed(jax.eval_shape(lambda: init_cache(model, 4, 4096)))

    def prefill(model, tokens, cache):
        out = model(tokens, cache=cache, fresh=True, output="hidden")
        return model.logits(out.hidden[:, -1]), out.cache

    tokens = placed(jax.ShapeDtypeStruct((4, 2048), jnp.int32))
    yield "30B-A3B, 4 layers, prefill of 4 x 2048", prefill, (model, tokens, cache), {"Mosaic", "cuDNN"}


def main() -> int:
    """Compile and print.

    Returns:
        1 where a program does not call the kernels that it should.
    """
    devices = get_topology_desc("h100", "cuda", target_config=H100, topology="1x8x1").devices
    table, wrong = Table("program", "kernels called", "arguments, GB", "temporaries, GB", "seconds"), 0
    for name, run, args, expected in (*kernels(devices[0]), *models(devices)):
        begin = time.perf_counter()
        leaves = [leaf.sharding for leaf in jax.tree.leaves(args)]
        mesh: Any = next((sharding.mesh for sharding in leaves if isinstance(sharding, NamedSharding)), None)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            compiled = jax.jit(run).lower(*args).compile()
        targets = re.findall(r'custom_call_target="([^"]*?)(?:_v\d+)?"', compiled.as_text() or "")
        found = collections.Counter(KERNELS[target] for target in targets if target in KERNELS)
        memory: Any = compiled.memory_analysis()
        figures = [f"{size / 1e9:.2f}" for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
        calls = ", ".join(f"{count} {kernel}" for kernel, count in sorted(found.items())) or "none"
        if set(found) != expected:
            wrong += 1
            calls += f" (wanted: {', '.join(sorted(expected))})"
        table.add_row(name, calls, *figures, f"{time.perf_counter() - begin:.0f}")
    Console(width=150).print(table)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
