"""One step of training, as a pure function of a state and a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.transformer import Output
from qwen3_jax.parallel.batches import Batch
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import RULES, Rules
from qwen3_jax.training.guard import all_finite, chosen
from qwen3_jax.training.objective import BalanceOver, Objective, gradient
from qwen3_jax.training.offload import OnHost, fetched, put_back
from qwen3_jax.training.router import router_metrics
from qwen3_jax.training.state import Adapt, TrainState, graph_for, parts_of


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """What `make_train_step` returns: call it to train, lower it to compile for devices that are not there.

    Attributes:
        jitted: the step as a jitted function of a state without what is frozen, that, a batch and a graph.
        graph: all of the model but its parameters, for the parameters of a state.
        parts: that a batch's rows are worked on in.
    """

    jitted: Any
    graph: Callable[[Any], Any]
    parts: int = 1

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step: the next state, and metrics. The state given is donated, but for what is frozen.

        Args:
            state: before the step.
            batch: its rows.

        Returns:
            As `make_train_step` says.

        Raises:
            MeshError: the state lies otherwise than the step's rules say.
            ValueError: the state is of a model with other adapters; rows that do not go into parts.
        """
        graph = self._checked(state, batch)
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
            ValueError: the state is of a model with other adapters; rows that do not go into parts.
        """
        graph = self._checked(state, batch)
        with on_mesh_of(state.params):
            return self.jitted.lower(dataclasses.replace(state, frozen=None), state.frozen, batch, graph)

    def _checked(self, state: TrainState, batch: Batch) -> Any:
        rows = batch.tokens.shape[0]
        if rows % self.parts:
            raise ValueError(f"{rows} rows in {self.parts} parts: {rows} / {self.parts} leaves {rows % self.parts}")
        return self.graph(parts_of(state))


def make_train_step(
    config: Qwen3Config,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    remat: str = "full",
    z_loss: float = 0.0,
    rules: Rules = RULES,
    adapt: Adapt | None = None,
    parts: int = 1,
    balance: float | None = None,
    balance_over: BalanceOver = "running",
    router_z_loss: float = 0.0,
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
        parts: that the rows are worked on in, one after another; the gradient is that of all rows at once.
        balance: weight of the load-balancing loss; None: the config's router_aux_loss_coef.
        balance_over: the rows whose shares of experts it takes where there are parts (qwen3_jax.training.objective).
        router_z_loss: weight of the router's z-loss.

    Returns:
        step(state, batch) -> (state, metrics); metrics are float32: loss (cross-entropy), balance_loss, router_z_loss,
        grad_norm, tokens (the labels' weights), in float16 the next step's loss_scale, and by MoE layer expert_load [L_moe, E],
        the share of rows that each expert got, max_violation [L_moe], how much more the busiest one got than its even share,
        and router_entropy [L_moe] in nats; and int32 dead_experts [L_moe], that got no row, dropped_rows, rows sent to experts
        minus rows that came back, skipped and skipped_in_a_row, steps that changed nothing, for their loss or gradient was not
        finite.
    """
    if parts < 1:
        raise ValueError(f"parts is {parts}: accepted is a whole number from 1")

    objective = Objective(
        z_loss=z_loss,
        balance=config.router_aux_loss_coef if balance is None else balance,
        router_z_loss=router_z_loss,
        top_k=config.num_experts_per_tok,
        parts=parts,
        balance_over=balance_over,
    )
    scaling = jnp.dtype(dtype) == jnp.float16
    update = optax.with_extra_args_support(optimizer).update
    in_place = isinstance(optimizer, OnHost)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
    def step(state: TrainState, frozen: Any, batch: Batch, graph: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        def run(params: Any, rows: Batch, **loss: Any) -> Output:
            model = nnx.merge(graph, params) if frozen is None else nnx.merge(graph, params, frozen)
            return model(rows.tokens, segment_ids=rows.segment_ids, output="hidden", remat=remat, **loss)

        grads, metrics = gradient(objective, run, state.params, batch, state.guard.scale if scaling else 1.0)
        metrics["grad_norm"] = norm = optax.tree.norm(grads)
        metrics |= router_metrics(metrics.pop("counts"))
        finite = all_finite(metrics["loss"], norm)
        before = state.opt_state if in_place else fetched(state.opt_state)
        updates, opt_state = update(grads, before, state.params, step=state.step, finite=finite)
        params = optax.apply_updates(state.params, updates)
        # A gradient that is not finite would be one for good in the moments: nothing of it is kept.
        params, opt_state = chosen(finite, (params, opt_state), (state.params, before))
        opt_state = put_back(opt_state, state.opt_state)
        guard = state.guard.after(finite, scaling=scaling)
        metrics |= dict(skipped=guard.skipped, skipped_in_a_row=guard.in_a_row)
        if scaling:
            metrics["loss_scale"] = guard.scale
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, guard=guard), metrics

    return TrainStep(step, functools.partial(graph_for, config=config, rules=rules, dtype=jnp.dtype(dtype), adapt=adapt), parts)
