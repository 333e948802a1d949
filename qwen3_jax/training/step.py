"""One step of training, as a pure function of a state and a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.abstract import abstract_model
from qwen3_jax.model.transformer import Qwen3
from qwen3_jax.parallel.mesh import MeshError, mesh_of, on_mesh_of, said
from qwen3_jax.parallel.rules import RULES, Rules
from qwen3_jax.training.losses import balance_of_counts, mean_loss

Adapt = Callable[[Qwen3], Qwen3]  # hashable: a LoraConfig, which attaches adapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and writes. A pytree, donated to the step.

    Attributes:
        step: int32 scalar, steps done.
        params: nnx.State of the parameters that are trained: every nnx.Param of the model, or its adapters.
        opt_state: the optimizer's.
        frozen: nnx.State of those that are not; None where all are trained. Never given away: they stay the model's own.
    """

    step: Any
    params: Any
    opt_state: Any
    frozen: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of rows, each a document or several packed ones.

    Attributes:
        tokens: [B, T] int32.
        labels: [B, T] int32, the word that follows each token.
        mask: [B, T], weight of each label in the loss; 0 leaves it out.
        segment_ids: [B, T] int32, the document of each token, 0 padding; None: each row is one document.
    """

    tokens: Any
    labels: Any
    mask: Any
    segment_ids: Any = None


def init_train_state(
    model: Qwen3, optimizer: optax.GradientTransformation, *, trainable: type[nnx.Param] = nnx.Param
) -> TrainState:
    """The state before the first step; its parameters are the model's own arrays, and the first step takes those it trains.

    A step donates its state but for what is frozen: use `trained_model` afterwards, not the model given here. On a mesh the
    optimizer's state lies as the parameters do.

    Args:
        model: where training begins.
        optimizer: an optax transformation.
        trainable: the parameters that are trained: all, or nnx.LoRAParam for adapters alone. The others are frozen: they have
            no gradient and no optimizer state.

    Returns:
        The state.

    Raises:
        ValueError: the model has none of these parameters.
    """
    params, frozen = nnx.state(model, trainable, nnx.Param)
    if not jax.tree.leaves(params):
        raise ValueError(f"the model has no {trainable.__name__}: accepted is one that has what is to be trained")
    with on_mesh_of(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=jax.jit(optimizer.init)(params),
            frozen=frozen if jax.tree.leaves(frozen) else None,
        )


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
    parts = _parts(state)
    return nnx.merge(_graph_for(parts, config, rules, jnp.dtype(dtype), adapt), *parts)


def _parts(state: TrainState) -> tuple[Any, ...]:
    """The states that make a model."""
    return (state.params,) if state.frozen is None else (state.params, state.frozen)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """What `make_train_step` returns: call it to train, lower it to compile for devices that are not there.

    Attributes:
        jitted: the step as a jitted function of a state without what is frozen, that, a batch and a graph.
        graph: all of the model but its parameters, for the parameters of a state.
    """

    jitted: Any
    graph: Callable[[Any], Any]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step: the next state, and metrics. The state given is donated, but for what is frozen.

        Args:
            state: before the step.
            batch: its rows.

        Returns:
            As `make_train_step` says.

        Raises:
            MeshError: the state lies otherwise than the step's rules say.
            ValueError: the state is of a model with other adapters.
        """
        graph = self.graph(_parts(state))
        with on_mesh_of(state.params):
            following, metrics = self.jitted(dataclasses.replace(state, frozen=None), state.frozen, batch, graph)
        return dataclasses.replace(following, frozen=state.frozen), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step's program, to be compiled.

        Args:
            state: jax.ShapeDtypeStructs with shardings are enough.
            batch: likewise.

        Returns:
            What `.compile()` makes a program of.

        Raises:
            MeshError: the state lies otherwise than the step's rules say.
            ValueError: the state is of a model with other adapters.
        """
        graph = self.graph(_parts(state))
        with on_mesh_of(state.params):
            return self.jitted.lower(dataclasses.replace(state, frozen=None), state.frozen, batch, graph)


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


def _graph_for(params: Any, config: Qwen3Config, rules: Rules, dtype: jnp.dtype, adapt: Adapt | None) -> Any:
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


def make_train_step(
    config: Qwen3Config,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    remat: str = "full",
    z_loss: float = 0.0,
    rules: Rules = RULES,
    adapt: Adapt | None = None,
) -> TrainStep:
    """A jitted step of gradient descent, its state donated; it runs on the mesh that the state lies on.

    Only `state.params` are differentiated: of what is frozen there is no gradient, nor of the experts' matrices in their own
    backward pass.

    Args:
        config: the model's shape; `router_aux_loss_coef` weighs the load-balancing loss of MoE layers.
        optimizer: an optax transformation.
        dtype: compute dtype; parameters keep their own.
        remat: what the backward pass keeps (qwen3_jax.model.remat).
        z_loss: weight of the z-loss.
        rules: which mesh axes split what; the model's own.
        adapt: the adapters that the model has, the LoraConfig that attached them.

    Returns:
        step(state, batch) -> (state, metrics); metrics are float32: loss (cross-entropy), balance_loss, grad_norm,
        expert_load [L_moe, E], the share of each layer's rows that each expert got; and int32 dropped_rows, rows sent to
        experts minus rows that came back.
    """

    def loss_fn(params: Any, frozen: Any, batch: Batch, graph: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, params) if frozen is None else nnx.merge(graph, params, frozen)
        out = model(batch.tokens, segment_ids=batch.segment_ids, labels=batch.labels, output="hidden", remat=remat)
        loss = mean_loss(out.losses, out.normaliser, batch.labels, batch.mask, z_loss)
        balance = balance_of_counts(out.counts, out.probabilities, config.num_experts_per_tok)
        load = shares(out.counts.sum(axis=1))
        metrics = dict(loss=loss, balance_loss=balance, expert_load=load, dropped_rows=out.dropped.sum())
        return loss + config.router_aux_loss_coef * balance, metrics

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def step(state: TrainState, frozen: Any, batch: Batch, graph: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, frozen, batch, graph)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return TrainStep(step, functools.partial(_graph_for, config=config, rules=rules, dtype=jnp.dtype(dtype), adapt=adapt))


def shares(counts: Float[Array, "L E"]) -> Float[Array, "L E"]:
    """Share of each layer's routed rows that each expert gets.

    Args:
        counts: real tokens that chose each expert, by layer.

    Returns:
        Each row summing to 1; no rows for a dense model.
    """
    return counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
