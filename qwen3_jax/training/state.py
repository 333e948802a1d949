"""What a step of training reads and writes: parameters, the optimizer's state, what is remembered of bad steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.abstract import abstract_model
from qwen3_jax.model.quantized import QuantizedParam
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import MeshError, mesh_of, on_mesh_of, said
from qwen3_jax.parallel.rules import RULES, Rules
from qwen3_jax.training.guard import Guard, init_guard
from qwen3_jax.training.offload import to_host

Adapt = Callable[[Qwen3], Qwen3]  # hashable: a LoraConfig, which attaches adapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and writes. A pytree, donated to the step.

    Attributes:
        step: int32 scalar, steps done.
        params: nnx.State of the parameters that are trained: every nnx.Param of the model, or its adapters.
        opt_state: the optimizer's.
        guard: what is remembered of steps that were not finite, and the loss scale of float16.
        frozen: nnx.State of those that are not; None where all are trained. Never given away: they stay the model's own.
    """

    step: Any
    params: Any
    opt_state: Any
    guard: Guard
    frozen: Any = None


def init_train_state(
    model: Qwen3,
    optimizer: optax.GradientTransformation,
    *,
    trainable: type[nnx.Param] = nnx.Param,
    loss_scale: float = 2.0**15,
    offload: bool = False,
) -> TrainState:
    """The state before the first step; its parameters are the model's own arrays, and the first step takes those it trains.

    A step donates its state but for what is frozen: use `trained_model` afterwards, not the model given here. On a mesh the
    optimizer's state lies as the parameters do.

    Args:
        model: where training begins.
        optimizer: an optax transformation.
        trainable: the parameters that are trained: all, or nnx.LoRAParam for adapters alone. The others are frozen: they have
            no gradient and no optimizer state.
        loss_scale: where dynamic loss scaling begins, if the steps compute in float16.
        offload: keep the optimizer's state in host memory; each step fetches it, that of `adamw` and `muon` a layer at a time.

    Returns:
        The state.

    Raises:
        ValueError: the model has none of these parameters, or codes among them.
    """
    params, frozen = nnx.state(model, trainable, nnx.Param)
    if not jax.tree.leaves(params):
        raise ValueError(f"the model has no {trainable.__name__}: accepted is one that has what is to be trained")
    if jax.tree.leaves(nnx.state(params, QuantizedParam)):
        raise ValueError("the model's matrices are codes, which are frozen: accepted is trainable=nnx.LoRAParam")
    with on_mesh_of(params):
        opt_state = jax.jit(optimizer.init)(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=to_host(opt_state) if offload else opt_state,
            guard=init_guard(loss_scale),
            frozen=frozen if jax.tree.leaves(frozen) else None,
        )


def abstract_train_state(
    config: Qwen3Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    rules: Rules = RULES,
    param_dtype: DTypeLike = jnp.float32,
    adapt: Adapt | None = None,
    adapter_dtype: DTypeLike = jnp.float32,
    offload: bool = False,
) -> TrainState:
    """A state of shapes: to lower a step for devices that are not there, or to be restored into.

    Args:
        config: the model's shape.
        optimizer: an optax transformation.
        mesh: that the state lies on.
        rules: which mesh axes split what.
        param_dtype: of the model's parameters; of those that are frozen, where there are adapters.
        adapt: a LoraConfig: its adapters alone are trained.
        adapter_dtype: theirs.
        offload: the optimizer's state is in host memory.

    Returns:
        jax.ShapeDtypeStructs with shardings, as `init_train_state` lays a state out.

    Raises:
        MeshError: the model does not fit the mesh, with the arithmetic.
    """
    model = abstract_model(config, mesh, rules=rules, param_dtype=param_dtype, adapt=adapt)
    params, frozen = nnx.state(model, nnx.Param if adapt is None else nnx.LoRAParam, nnx.Param)
    if adapt is not None:
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(adapter_dtype), sharding=leaf.sharding), params
        )

    def on_mesh(tree: Any) -> Any:
        # Shapes name an abstract mesh; those that name none are whole on each device.
        specs = jax.tree.map(lambda leaf: getattr(leaf.sharding, "spec", PartitionSpec()), tree)
        return jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
        )

    with jax.set_mesh(mesh):
        opt_state = on_mesh(jax.eval_shape(optimizer.init, params))
        guard = on_mesh(jax.eval_shape(init_guard))
        step = on_mesh(jax.eval_shape(lambda: jnp.zeros((), jnp.int32)))
    opt_state = to_host(opt_state) if offload else opt_state
    return TrainState(step, params, opt_state, guard, frozen if jax.tree.leaves(frozen) else None)


def trained_model(
    config: Qwen3Config,
    state: TrainState,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    rules: Rules = RULES,
    adapt: Adapt | None = None,
) -> Qwen3:
    """The model that a state's parameters make.

    Args:
        config: the model's shape.
        state: the state.
        dtype: compute dtype.
        rules: which mesh axes split what; those of the model that was trained.
        adapt: the adapters that it has, a LoraConfig.

    Returns:
        The model; it shares the state's arrays.

    Raises:
        MeshError: the state lies otherwise than these rules say.
        ValueError: the state is of a model with other adapters.
    """
    parts = parts_of(state)
    return nnx.merge(graph_for(parts, config, rules, jnp.dtype(dtype), adapt), *parts)


def parts_of(state: TrainState) -> tuple[Any, ...]:
    """The states that make a model."""
    return (state.params,) if state.frozen is None else (state.params, state.frozen)


@functools.cache
def _split(
    config: Qwen3Config, mesh: Mesh | None, rules: Rules, dtype: jnp.dtype, adapt: Adapt | None
) -> tuple[Any, dict[str, Any]]:
    """What a mesh and the rules make of the config: all of a model but its parameters, and these as shapes by name."""
    graph, params = nnx.split(abstract_model(config, mesh, rules=rules, dtype=dtype, adapt=adapt), nnx.Param)
    return graph, dict(_named(params))


def _named(params: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), leaf) for path, leaf in leaves]


def graph_for(params: Any, config: Qwen3Config, rules: Rules, dtype: jnp.dtype, adapt: Adapt | None) -> Any:
    """All of the model but these parameters, which must lie as the rules say: no layer looks at how its weights do."""
    mesh, named = mesh_of(params), [pair for part in params for pair in _named(part)]
    graph, wanted = _split(config, mesh, rules, dtype, adapt)
    names = {name for name, _ in named}
    for name in sorted(names ^ wanted.keys()):
        which = f"has the parameter {name}, and the model has none" if name in names else f"lacks the parameter {name}"
        raise ValueError(f"the state {which} with adapt={adapt}: accepted are the adapters that the model was given")
    for name, leaf in named:
        if "lora." in name and leaf.shape != wanted[name].shape:
            raise ValueError(f"the state's {name} is {list(leaf.shape)}: with adapt={adapt} it is {list(wanted[name].shape)}")
    if mesh is None:
        return graph
    for name, leaf in named:
        rule = wanted[name].sharding
        if leaf.sharding == rule or leaf.sharding.is_equivalent_to(rule, leaf.ndim):
            continue
        found = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else leaf.sharding
        raise MeshError(
            f"parameter {name} lies as {found} on {said(mesh)}, and the rules say {rule.spec}: accepted are the rules "
            "that the model was made with"
        )
    return graph
