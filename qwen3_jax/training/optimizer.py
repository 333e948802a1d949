"""AdamW as language models are trained with it."""

from typing import Any

import jax
import optax


def decayed(params: Any) -> Any:
    """Which parameters weight decay pulls on: matrices, not norms and biases.

    Args:
        params: the tree of parameters, keyed by names.

    Returns:
        A tree of the same form with a bool at each parameter.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return not any(name == "bias" or name == "norm" or name.endswith("_norm") for name in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with gradient clipping by global norm and no decay of norms and biases.

    Args:
        learning_rate: a number, or a schedule from step to number.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: pull towards 0 per unit of learning rate.
        max_grad_norm: gradients longer than this are scaled to it; None never.

    Returns:
        An optax transformation.
    """
    adam = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
    return adam if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), adam)
