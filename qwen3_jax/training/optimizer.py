"""AdamW and Muon as language models are trained with them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from qwen3_jax.training.muon import is_matrix, scale_by_muon
from qwen3_jax.training.offload import OnHost, in_turn, names_of


def decayed(params: Any) -> Any:
    """Which parameters weight decay pulls on: matrices, not norms and biases.

    Args:
        params: the tree of parameters, keyed by names.

    Returns:
        A tree of the same form with a bool at each parameter.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not any(name == "bias" or name == "norm" or name.endswith("_norm") for name in names_of(path))

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_grad_norm: float | None = 1.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with gradient clipping by global norm and no decay of norms and biases.

    Args:
        learning_rate: a number, or a schedule from step to number.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: pull towards 0 per unit of learning rate.
        max_grad_norm: gradients longer than this are scaled to it; None never.
        mu_dtype: of the first moment; None: the parameters'. The second keeps theirs: of bfloat16's 8 bits a moment of b2 =
            0.95 and above would lose most steps.

    Returns:
        An optax transformation; see `by_step` for the rate's step.
    """
    scale = in_turn(optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype))
    return _finished(scale, learning_rate, weight_decay, max_grad_norm)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    adam_b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_grad_norm: float | None = 1.0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices of layers and experts, AdamW for words, router, norms and biases; one learning rate for both.

    Args:
        learning_rate: as of `adamw`.
        b1: decay of Muon's momentum.
        adam_b1: decay of AdamW's first moment.
        b2: decay of AdamW's second moment.
        eps: as of `adamw`.
        weight_decay: as of `adamw`.
        max_grad_norm: as of `adamw`.
        mu_dtype: of the momentum and the first moment.

    Returns:
        An optax transformation.
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: "muon" if is_matrix(path, leaf) else "adam", params)

    scale = optax.partition(
        {
            "muon": scale_by_muon(b1, mu_dtype=mu_dtype),
            "adam": in_turn(optax.scale_by_adam(b1=adam_b1, b2=b2, eps=eps, mu_dtype=mu_dtype)),
        },
        labels,
    )
    return _finished(scale, learning_rate, weight_decay, max_grad_norm)


def by_step(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Scale updates by minus the rate of the run's own step, where the caller hands one over as `step`.

    optax counts the updates that it makes, and one that is skipped would put a schedule behind the run's stages. Without
    `step` it counts too.

    Args:
        learning_rate: a number, or a schedule from step to number.

    Returns:
        A transformation; its state is the count.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, step: Any = None, **_: Any) -> tuple[Any, Any]:
        del params
        at = state.count if step is None else step
        rate = learning_rate(at) if callable(learning_rate) else learning_rate
        updates = jax.tree.map(lambda leaf: -jnp.asarray(rate, leaf.dtype) * leaf, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _finished(
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    max_grad_norm: float | None,
) -> optax.GradientTransformationExtraArgs:
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    return OnHost(*optax.chain(*clip, scale, optax.add_decayed_weights(weight_decay, decayed), by_step(learning_rate)))
