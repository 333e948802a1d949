"""What is left until it is needed: jax's own kernels, and functions that are traced only where a program is lowered for CUDA.

`jax.lax.platform_dependent` traces its branches wherever a program is made. What asks while it is traced for the GPU at hand,
or for cuDNN, would then fail on every other machine.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import sequential_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

_traced_late = Primitive("traced_late")
_traced_late.multiple_results = True


@_traced_late.def_abstract_eval
def _results(*args: Any, run: Callable[..., Any], like: tuple[jax.ShapeDtypeStruct, ...]) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in like]


mlir.register_lowering(
    _traced_late, mlir.lower_fun(lambda *args, run, like: run(*args), multiple_results=True), platform="cuda"
)


def load_kernels() -> None:
    """Import jax's own TPU kernels, a third of a second, before a program is traced that may use them.

    Importing them adds a setting to what jax's caches are keyed by: a program whose first trace imports them is traced, and
    compiled, a second time at its next call.
    """
    import jax.experimental.pallas.ops.tpu.megablox.gmm
    import jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel  # noqa: F401


def on_cuda(run: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """Gives a function of arrays that is run, for its results' shapes alone, when the program is lowered for CUDA.

    Args:
        run: a function of arrays to arrays; it is not differentiated. Under vmap it is done one after the other.
        like: jax.ShapeDtypeStruct of each result, in run's structure.

    Returns:
        The same function, for a branch of platform_dependent that other platforms do not take.
    """
    leaves, structure = jax.tree.flatten(like)

    def flat(*args: Array) -> list[Array]:
        return jax.tree.leaves(run(*args))

    @sequential_vmap
    def late(*args: Array) -> Any:
        return structure.unflatten(_traced_late.bind(*args, run=flat, like=tuple(leaves)))

    return late
