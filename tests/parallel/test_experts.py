"""Tokens to experts and back by each transport, with buffers that overflow, and what is counted when they may not."""

import collections
import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels
from qwen3_jax import make_mesh
from qwen3_jax.parallel import expert_rows
from qwen3_jax.parallel.dispatch import TRANSPORTS, Dispatch
from qwen3_jax.parallel.expert_weights import Coded, array_axes
from qwen3_jax.parallel.experts import WEIGHT_AXES, apply_experts
from qwen3_jax.parallel.rules import RULES, placed, use_rules
from qwen3_jax.parallel.transports import exchange
from qwen3_jax.planning.program import overlaps

pytestmark = pytest.mark.usefixtures("quick")

EXPERTS, WIDTH, EMBED, TOP_K = 8, 16, 8, 4
ROWS, LENGTH = 8, 16


@functools.cache
def weights():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(EXPERTS, WIDTH, EMBED), (EXPERTS, WIDTH, EMBED), (EXPERTS, EMBED, WIDTH)]
    return tuple(jax.random.normal(key, shape) / 4 for key, shape in zip(keys, shapes, strict=True))


def tokens():
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(keys[0], (ROWS, LENGTH, EMBED)), jax.random.uniform(keys[1], (ROWS, LENGTH, TOP_K))


@functools.partial(jax.jit, static_argnums=0)
def run(dispatch, weights, x, routing, ids):
    """Sums, dropped rows, and the gradients of a function of the sums."""

    def loss(weights, x, routing):
        with use_rules(dataclasses.replace(RULES, dispatch=dispatch)):
            out, dropped = apply_experts(weights, x, routing, ids)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), (out, dropped)

    gradients, (out, dropped) = jax.grad(loss, (0, 1, 2), has_aux=True)(weights, x, routing)
    return out, dropped, gradients


def on_mesh(mesh, dispatch, ids):
    rows = NamedSharding(mesh, RULES.spec("batch", "seq", None, mesh=mesh))
    split = [NamedSharding(mesh, RULES.spec(*names, mesh=mesh)) for names in WEIGHT_AXES]
    args = tuple(map(jax.device_put, weights(), split)), *jax.device_put((*tokens(), ids), rows)
    with jax.set_mesh(mesh):
        return run(dispatch, *args)


def chosen(skew: float, seed: int) -> jax.Array:
    """Different experts for each token, the first of them the likelier the larger `skew`."""
    noise = np.random.default_rng(seed).gumbel(size=(ROWS, LENGTH, EXPERTS))
    return jnp.asarray(np.argsort(-(noise - skew * np.arange(EXPERTS)), axis=-1)[..., :TOP_K], jnp.int32)


@pytest.mark.parametrize("transport", TRANSPORTS)
@settings(max_examples=12, deadline=None)
@given(skew=st.sampled_from([0.0, 0.5, 50.0]), seed=st.integers(0, 99))
def test_nothing_is_dropped_however_experts_are_chosen(transport, skew, seed):
    """Buffers of a fifth of what evenly used experts would fill; with skew=50 all tokens pick the same four of two shards."""
    ids = chosen(skew, seed)
    found, dropped, gradients = on_mesh(make_mesh("data=2,expert=4"), Dispatch(transport, slack=0.2), ids)
    wanted, none, wanted_gradients = run(Dispatch(), weights(), *tokens(), ids)
    assert dropped == none == 0
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


def test_rows_are_added_piece_by_piece(monkeypatch):
    monkeypatch.setattr(expert_rows, "WIDENED", 0)
    ids = chosen(0.5, 7)
    found, _, gradients = on_mesh(make_mesh("data=2,expert=4"), Dispatch("gather", slack=0.75), ids)
    wanted, _, wanted_gradients = run(Dispatch(), weights(), *tokens(), ids)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("wish", ["", "fsdp=2,expert=2,tensor=2"])
def test_scales_are_refused_a_derivative(wish):
    """Of codes' scales none is made, and none is passed off as zeros, on one device and on a mesh."""
    gate, up, down = weights()
    coded = Coded(*pallas_kernels.quantize(down, "int8", block=4), "int8")

    def loss(gate, scales):
        matrices = gate, up, dataclasses.replace(coded, scales=scales)
        leaves = map(lambda leaf, names: placed(leaf, *names), jax.tree.leaves(matrices), array_axes(matrices))
        rows = [placed(array, "batch", "seq", None) for array in (*tokens(), chosen(0, 0))]
        return apply_experts(jax.tree.unflatten(jax.tree.structure(matrices), leaves), *rows)[0].sum()

    with jax.set_mesh(make_mesh(wish)) if wish else contextlib.nullcontext():
        assert jax.eval_shape(jax.grad(loss), gate, coded.scales).shape == gate.shape
        with pytest.raises(ValueError, match="scales are differentiated, and they are frozen as their codes are; accepted is"):
            jax.eval_shape(jax.grad(loss, argnums=1), gate, coded.scales)


def test_what_a_forbidden_round_drops_is_counted():
    ids = chosen(0.5, 3)
    mesh = make_mesh("data=2,expert=4")
    per_shard = np.asarray(ids).reshape(8, -1) // 2  # of each shard's tokens, the shard of experts that their rows go to
    counts = np.stack([np.bincount(part, minlength=4) for part in per_shard])
    _, dropped, _ = on_mesh(mesh, Dispatch("ring", slack=0.5, rounds=1), ids)
    capacity = LENGTH * TOP_K // 4 // 2  # a chunk's rows for one shard, halved
    assert dropped == np.maximum(counts - capacity, 0).sum() > 0
    # Every pair of shards may swap 8 tokens: what a token has to do on a shard is lost with it.
    _, dropped, _ = on_mesh(mesh, Dispatch("all_to_all", slack=0.5, rounds=1), ids)
    goes = (np.asarray(ids).reshape(8, LENGTH, TOP_K)[..., None] // 2 == np.arange(4)).sum(axis=2)
    late = np.where(np.cumsum(goes > 0, axis=1) > 8, goes, 0).sum(axis=(1,))
    kept = goes.sum(axis=1) - late
    arrived = kept.reshape(2, 4, 4).sum(axis=1)  # rows on each shard of experts of each half of the data
    assert dropped == late.sum() + np.maximum(arrived - LENGTH * TOP_K // 2, 0).sum() > 0


def test_an_exchange_swaps_what_is_filled():
    mesh = make_mesh(expert=8)
    filled = np.random.default_rng(0).integers(0, 4, (8, 8)).astype(np.int32)  # [sender, receiver]
    blocks = np.arange(1, 8 * 8 * 3 + 1, dtype=np.int32).reshape(8, 8, 3)
    spec = PartitionSpec("expert")

    def swap(x, sent, received):
        return exchange(x, sent, received, ("expert",), 3)

    with jax.set_mesh(mesh):
        args = [jax.device_put(a.reshape(-1), NamedSharding(mesh, spec)) for a in (blocks, filled, filled.T)]
        found = jax.jit(jax.shard_map(swap, in_specs=(spec,) * 3, out_specs=spec, check_vma=False))(*args)
    wanted = np.where(np.arange(3) < filled[..., None], blocks, 0).swapaxes(0, 1)
    np.testing.assert_array_equal(np.asarray(found).reshape(8, 8, 3), wanted)


def test_the_ring_moves_while_it_works():
    """The TPU's schedule has, forward and backward, chunks and sums under way in both directions behind a loop of products."""
    hidden = collections.Counter()
    for overlap in overlaps(compiled("ring")):
        if overlap.kind == "collective-permute" and any("while" in name for name in overlap.work):
            hidden[overlap.computation] += 1
    bodies = [count for body, count in hidden.items() if "main" not in body]
    assert len(bodies) == 2 and min(bodies) >= 4


def test_all_to_all_sends_what_is_filled_on_a_tpu():
    """It may come in two halves in the schedule, but no loop of products stands between them: the cost model says so."""
    text = compiled("all_to_all")
    sent = [overlap for overlap in overlaps(text) if overlap.kind == "ragged-all-to-all"]
    assert re.search(r"= .*ragged-all-to-all(-start)?\(", text)
    assert not any("while" in name for overlap in sent for name in overlap.work)


def test_all_to_all_over_two_axes_beside_a_third_on_a_tpu():
    """Experts over fsdp and expert, their width over tensor: tokens go to the four chips that differ in the first two."""
    mesh = make_mesh("fsdp=2,expert=2,tensor=2", devices=topologies.get_topology_desc("v5p:2x2x2", "tpu").devices)
    rules = dataclasses.replace(RULES.replace(experts=("fsdp", "expert")), dispatch=Dispatch("all_to_all"))

    def layer(*given):
        with use_rules(rules):
            return apply_experts(*given)

    with jax.set_mesh(mesh):
        text = jax.jit(layer).lower(*shapes(mesh, rules)).compile().as_text()
    assert text is not None
    sent = re.findall(r"= .*ragged-all-to-all(?:-start)?\(.*replica_groups=\{([^ ]*)\}", text)
    assert sent and set(sent) == {"{0,2,4,6},{1,3,5,7}"}


def shapes(mesh, rules=RULES):
    """Arguments of `apply_experts`, on chips that are not there."""

    def shape(*sizes, names, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, rules.spec(*names, mesh=mesh)))

    rows = ("batch", "seq", None)
    return (
        (*[shape(8, 256, 512, names=("experts", "mlp", "embed"))] * 2, shape(8, 512, 256, names=("experts", "embed", "mlp"))),
        shape(4, 2048, 512, names=rows),
        shape(4, 2048, 4, names=rows, dtype=jnp.float32),
        shape(4, 2048, 4, names=rows, dtype=jnp.int32),
    )


def compiled(transport: str) -> str:
    """The text of a layer's experts and their gradients for four chips."""
    mesh = make_mesh(expert=4, devices=topologies.get_topology_desc("v5p:2x2x1", "tpu").devices)
    with jax.set_mesh(mesh):
        text = run.lower(Dispatch(transport), *shapes(mesh)).compile().as_text()
    assert text is not None
    return text
