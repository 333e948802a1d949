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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step reads and writes. A pytree, donated to the step.

    Attributes:
        step: int32 scalar, steps done.
        params: nnx.State of every nnx.Param of the model.
        opt_state: the optimizer's.
    """

    step: Any
    params: Any
    opt_state: Any


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


def init_train_state(model: Qwen3, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; its parameters are the model's own arrays, which the first step takes.

    A step donates its state: use `trained_model` afterwards, not the model given here. On a mesh the optimizer's state lies as
    the parameters do.

    Args:
        model: where training begins.
        optimizer: an optax transformation.

    Returns:
        The state.
    """
    params = nnx.state(model, nnx.Param)
    with on_mesh_of(params):
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=jax.jit(optimizer.init)(params))


def trained_model(config: Qwen3Config, state: TrainState, *, dtype: DTypeLike = jnp.bfloat16, rules: Rules = RULES) -> Qwen3:
    """The model that a state's parameters make.

    Args:
        config: the model's shape.
        state: the state.
        dtype: compute dtype.
        rules: which mesh axes split what; those of the model that was trained.

    Returns:
        The model; it shares the state's arrays.

    Raises:
        MeshError: the state lies otherwise than these rules say.
    """
    return nnx.merge(_graph_for(state.params, config, rules, jnp.dtype(dtype)), state.params)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """What `make_train_step` returns: call it to train, lower it to compile for devices that are not there.

    Attributes:
        jitted: the step as a jitted function of state, batch and graph.
        graph: all of the model but its parameters, for a state's.
    """

    jitted: Any
    graph: Callable[[Any], Any]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step: the next state, and metrics. The state given is donated.

        Args:
            state: before the step.
            batch: its rows.

        Returns:
            As `make_train_step` says.

        Raises:
            MeshError: the state lies otherwise than the step's rules say.
        """
        graph = self.graph(state.params)
        with on_mesh_of(state.params):
            return self.jitted(state, batch, graph)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The step's program, to be compiled.

        Args:
            state: jax.ShapeDtypeStructs with shardings are enough.
            batch: likewise.

        Returns:
            What `.compile()` makes a program of.

        Raises:
            MeshError: the state lies otherwise than the step's rules say.
        """
        graph = self.graph(state.params)
        with on_mesh_of(state.params):
            return self.jitted.lower(state, batch, graph)


@functools.cache
def _split(config: Qwen3Config, mesh: Mesh | None, rules: Rules, dtype: jnp.dtype) -> tuple[Any, dict[str, Any]]:
    """What a mesh and the rules make of the config: all of a model but its parameters, and their shardings by name."""
    graph, params = nnx.split(abstract_model(config, mesh, rules=rules, dtype=dtype), nnx.Param)
    return graph, {name: leaf.sharding for name, leaf in _named(params)}


def _named(params: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"), leaf) for path, leaf in leaves]


def _graph_for(params: Any, config: Qwen3Config, rules: Rules, dtype: jnp.dtype) -> Any:
    """All of the model but these parameters, which must lie as the rules say: no layer looks at how its weights do."""
    mesh = mesh_of(params)
    graph, wanted = _split(config, mesh, rules, dtype)
    if mesh is None:
        return graph
    for name, leaf in _named(params):
        rule = wanted.get(name)
        if rule is None or leaf.sharding == rule or leaf.sharding.is_equivalent_to(rule, leaf.ndim):
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
) -> TrainStep:
    """A jitted step of gradient descent, its state donated; it runs on the mesh that the state lies on.

    Args:
        config: the model's shape; `router_aux_loss_coef` weighs the load-balancing loss of MoE layers.
        optimizer: an optax transformation.
        dtype: compute dtype; parameters keep their own.
        remat: what the backward pass keeps (qwen3_jax.model.remat).
        z_loss: weight of the z-loss.
        rules: which mesh axes split what; the model's own.

    Returns:
        step(state, batch) -> (state, metrics); metrics are float32: loss (cross-entropy), balance_loss, grad_norm,
        expert_load [L_moe, E], the share of each layer's rows that each expert got; and int32 dropped_rows, rows sent to
        experts minus rows that came back.
    """

    def loss_fn(params: Any, batch: Batch, graph: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, params)
        out = model(batch.tokens, segment_ids=batch.segment_ids, labels=batch.labels, output="hidden", remat=remat)
        loss = mean_loss(out.losses, out.normaliser, batch.labels, batch.mask, z_loss)
        balance = balance_of_counts(out.counts, out.probabilities, config.num_experts_per_tok)
        load = shares(out.counts.sum(axis=1))
        metrics = dict(loss=loss, balance_loss=balance, expert_load=load, dropped_rows=out.dropped.sum())
        return loss + config.router_aux_loss_coef * balance, metrics

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
    def step(state: TrainState, batch: Batch, graph: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, graph)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return TrainStep(step, functools.partial(_graph_for, config=config, rules=rules, dtype=jnp.dtype(dtype)))


def shares(counts: Float[Array, "L E"]) -> Float[Array, "L E"]:
    """Share of each layer's routed rows that each expert gets.

    Args:
        counts: real tokens that chose each expert, by layer.

    Returns:
        Each row summing to 1; no rows for a dense model.
    """
    return counts / jnp.maximum(counts.sum(-1, keepdims=True), 1.0)
