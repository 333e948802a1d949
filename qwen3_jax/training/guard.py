"""What becomes of a step whose loss or gradient is not finite: it is left out, counted, and said."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

GROWS_AFTER = 2000  # finite steps, after which a loss scale is doubled (arXiv 1710.03740, section 3.2)
LARGEST_SCALE = 2.0**24


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What a state remembers of its bad steps. A pytree of scalars, saved with the state.

    Attributes:
        skipped: int32, steps left out so far.
        in_a_row: int32, those of them since the last good one.
        good: int32, good steps since the loss scale last changed.
        scale: float32, what a loss is multiplied by before it is differentiated; 1 unless computing is in float16.
    """

    skipped: Any
    in_a_row: Any
    good: Any
    scale: Any

    def after(self, finite: Bool[Array, ""], *, scaling: bool) -> "Guard":
        """What is remembered after one more step.

        Args:
            finite: whether its loss and gradient were.
            scaling: whether the scale is halved by a step that was not, and doubled after GROWS_AFTER that were.

        Returns:
            The next guard.
        """
        good = jnp.where(finite, self.good + 1, 0)
        scale = self.scale
        if scaling:
            grown = good >= GROWS_AFTER
            scale = jnp.where(finite, jnp.where(grown, jnp.minimum(scale * 2, LARGEST_SCALE), scale), scale / 2)
            good = jnp.where(grown, 0, good)
        bad = 1 - finite.astype(jnp.int32)
        return Guard(self.skipped + bad, jnp.where(finite, 0, self.in_a_row + 1), good, scale)


def init_guard(scale: float = 1.0) -> Guard:
    """Nothing to remember yet.

    Args:
        scale: of the loss; 2 ** 15 is usual for float16.

    Returns:
        The guard.
    """
    zero = jnp.zeros((), jnp.int32)
    return Guard(zero, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.float32(scale))


def chosen(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree where a step was finite, else the old one, leaf by leaf: as part of the update, it costs no pass of its own.

    Args:
        finite: whether.
        new: tree. What of it lies in host memory was chosen before it was put there (qwen3_jax.training.offload).
        old: tree of the same form.

    Returns:
        One of the two.
    """

    def one(after: Any, before: Any) -> Any:
        return after if jax.typeof(after).memory_space == jax.memory.Space.Host else jnp.where(finite, after, before)

    return jax.tree.map(one, new, old)


def all_finite(loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether a loss and a gradient's norm are; a gradient that is not has a norm that is not."""
    return jnp.isfinite(loss) & jnp.isfinite(norm)
