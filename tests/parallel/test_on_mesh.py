"""The same numbers on any mesh: logits, router, loss and every gradient beside one device's."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen3_jax import Batch, Qwen3, abstract_model, adamw, init_cache, init_train_state, make_mesh, make_train_step
from qwen3_jax.parallel import word_losses
from qwen3_jax.parallel.dispatch import Dispatch
from qwen3_jax.parallel.mesh import MeshError
from qwen3_jax.parallel.rules import RULES, Rules
from qwen3_jax.training.guard import init_guard
from qwen3_jax.training.losses import load_balancing_loss, mean_loss
from qwen3_jax.training.state import TrainState, trained_model
from tests.model.models import CONFIGS, random_model

pytestmark = pytest.mark.usefixtures("quick")

ROWS, LENGTH = 8, 64  # 512 tokens
CLOSE = 1e-5  # of the largest value


def on_mesh(model: Qwen3, mesh: jax.sharding.Mesh, rules: Rules = RULES) -> Qwen3:
    """The model's parameters laid out on the mesh; rows that pad the vocabulary hold what must not be read."""
    shapes = abstract_model(model.config, mesh, rules=rules, dtype=model.dtype)

    def placed(leaf: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        more = [(0, wanted - found) for found, wanted in zip(leaf.shape, shape.shape, strict=True)]
        return jax.device_put(jnp.pad(leaf, more, constant_values=1e4), shape.sharding)

    leaves = [placed(*pair) for pair in zip(jax.tree.leaves(model), jax.tree.leaves(shapes), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@functools.cache
def skewed(name: str) -> Qwen3:
    """A random model whose experts are used unevenly, for its router's rows differ in size."""
    model = jax.tree.map(jnp.copy, random_model(name))  # the tests share that one
    for unit in model.segments:
        for block in unit.blocks:
            if block.is_moe:
                weight = block.moe.router.weight
                weight[...] = weight[...] * jnp.linspace(0.3, 3.0, weight.shape[1])[None, :, None]
    return model


def batch() -> Batch:
    """Rows of one document, of two packed ones, and padded on either side."""
    tokens = jax.random.randint(jax.random.key(0), (ROWS, LENGTH), 0, 93)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 23:] = 2
    segments[2, :9] = segments[3, 50:] = 0
    return Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.asarray(segments != 0, jnp.float32), jnp.asarray(segments))


def measured(model: Qwen3, batch: Batch):
    """Everything that is compared, as one program: logits, router, loss, and gradients of loss and router loss."""

    def loss(model):
        out = model(batch.tokens, segment_ids=batch.segment_ids, labels=batch.labels, remat="full")
        main = mean_loss(out.losses, out.normaliser, batch.labels, batch.mask, 1e-3)
        config = model.config
        balance = load_balancing_loss(out.router, config.num_experts, max(1, config.num_experts_per_tok), batch.mask)
        return main + balance, (out.logits, out.router, main, balance)

    (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    return found, gradients


@functools.cache
def alone(name: str):
    return jax.jit(measured)(skewed(name), batch())


def assert_close(found, wanted, what):
    found, wanted = np.asarray(found), np.asarray(wanted)
    found = found[tuple(slice(0, size) for size in wanted.shape)]  # without the vocabulary's padding
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * max(np.abs(wanted).max(initial=0), 1e-3), err_msg=what)


@pytest.mark.parametrize(
    "name, wish, transport, rows",
    [
        ("dense", "data=8", "auto", {}),
        ("tied", "fsdp=8", "auto", {}),
        ("dense", "context=8", "auto", {}),
        ("odd", "tensor=8", "auto", {}),
        ("sliding", "fsdp=2,context=2,tensor=2", "auto", {}),
        ("bias", "data=2,tensor=4", "auto", {}),
        ("moe", "expert=8", "ring", {}),
        ("moe", "expert=8", "all_to_all", {}),
        ("moe", "expert=8", "gather", {}),
        ("odd", "fsdp=4,tensor=2", "auto", dict(vocab=("tensor",))),
        ("moe", "fsdp=2,expert=2,tensor=2", "ring", {}),
        ("moe", "fsdp=2,expert=2,tensor=2", "all_to_all", {}),
        ("alternating", "data=2,fsdp=2,expert=2", "all_to_all", {}),
        ("alternating", "expert=4,context=2", "ring", {}),
        ("mixed", "expert=2,context=2,tensor=2", "gather", {}),
        ("moe", "fsdp=4,expert=2", "ring", dict(experts=("fsdp", "expert"))),
        ("moe", "fsdp=4,expert=2", "all_to_all", dict(experts=("fsdp", "expert"))),
        ("odd", "data=4,fsdp=2", "auto", dict(batch=("data",))),
        ("alternating", "fsdp=4,tensor=2", "auto", dict(mlp=None, embed=("fsdp", "tensor"))),
    ],
)
def test_equal_to_one_device(name, wish, transport, rows):
    # Buffers of less than what is sent, so that they are filled more than once.
    rules = dataclasses.replace(RULES.replace(**rows), dispatch=Dispatch(transport, slack=0.6))
    mesh = make_mesh(wish)
    model = on_mesh(skewed(name), mesh, rules)
    with jax.set_mesh(mesh):
        (logits, router, main, balance), gradients = jax.jit(measured)(model, batch())
    (wanted_logits, wanted_router, *wanted_losses), wanted_gradients = alone(name)
    real = np.asarray(batch().mask)[..., None]
    assert_close(logits * real, wanted_logits * real, "logits")
    assert_close(router * real, wanted_router * real, "router")
    np.testing.assert_allclose([main, balance], wanted_losses, rtol=CLOSE)
    found, wanted = (dict(jax.tree.leaves_with_path(tree)) for tree in (gradients, wanted_gradients))
    assert found.keys() == wanted.keys()
    for path, gradient in found.items():
        assert_close(gradient, wanted[path], jax.tree_util.keystr(path))
    for gradient, parameter in zip(jax.tree.leaves(gradients), jax.tree.leaves(model), strict=True):
        assert gradient.sharding.spec == parameter.sharding.spec
    for path, leaf in jax.tree.leaves_with_path(model):
        names = jax.tree_util.keystr(path)
        shards = leaf.size // leaf.addressable_shards[0].data.size
        # Matrices are split over every axis that splits parameters, expert weights over expert too; norms and router are not.
        if not any(word in names for word in ("norm", "bias", "router")) and not rows:
            width = mesh.shape["fsdp"] * (1 if ".k." in names or ".v." in names else mesh.shape["tensor"])
            assert shards >= width * (mesh.shape["expert"] if ".moe." in names else 1), names
        if ".moe." in names and "experts" in rows:
            assert leaf.sharding.spec[1] == rows["experts"] or "router" in names, names


@pytest.mark.parametrize("name, wish", [("alternating", "fsdp=2,expert=2,tensor=2"), ("tied", "fsdp=4,context=2")])
def test_training_follows_one_device(name, wish):
    model, optimizer = skewed(name), adamw(1e-2)
    step = make_train_step(CONFIGS[name], optimizer, dtype=jnp.float32)
    curves = []
    for start in (jax.tree.map(jnp.copy, model), on_mesh(model, make_mesh(wish))):
        state, losses = init_train_state(start, optimizer), []
        for _ in range(4):
            state, metrics = step(state, batch())
            losses.append([float(metrics["loss"]), float(metrics["balance_loss"]), float(metrics["grad_norm"])])
        curves.append(losses)
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-5)
    assert curves[0][-1][0] < 0.9 * curves[0][0][0]
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params)}
    assert len(specs) > 3
    moments = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert moments <= specs  # the optimizer's state lies as the parameters do


def test_a_trained_model_keeps_the_rules_of_its_run():
    rules, mesh = RULES.replace(experts=("fsdp", "expert")), make_mesh("fsdp=4,expert=2")
    state = init_train_state(on_mesh(skewed("moe"), mesh, rules), adamw(1e-2))
    model = trained_model(CONFIGS["moe"], state, dtype=jnp.float32, rules=rules)
    assert model.rules == rules
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda model: model(batch().tokens).logits)(model)
    np.testing.assert_allclose(logits, jax.jit(lambda model: model(batch().tokens).logits)(skewed("moe")), rtol=0, atol=1e-4)
    says = r"parameter segments\.0\.blocks\.0\.moe\.down lies as P\(None, \('fsdp', 'expert'\), None, 'tensor'\) on a mesh of "
    says += r"fsdp=4 x expert=2, and the rules say P\(None, 'expert', 'fsdp', 'tensor'\): accepted are the rules"
    step = make_train_step(CONFIGS["moe"], adamw(1e-2), dtype=jnp.float32)
    for call in (
        lambda: step(state, batch()),
        lambda: step.lower(state, batch()),
        lambda: trained_model(CONFIGS["moe"], state),
    ):
        with pytest.raises(MeshError, match=says):
            call()


def test_a_cache_on_a_mesh():
    """A prompt whole and then token by token, rows and key heads split, context shards idle."""
    model, tokens = skewed("moe"), batch().tokens[:4, :12]
    whole = model(tokens).logits
    mesh = make_mesh("fsdp=2,context=2,tensor=2")
    placed = on_mesh(model, mesh)
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    with jax.set_mesh(mesh):
        out = step(placed, tokens[:, :9], init_cache(placed, 4, 16))
        np.testing.assert_allclose(out.logits, whole[:, :9], rtol=0, atol=2e-5)
        for at in range(9, 12):
            out = step(placed, tokens[:, at : at + 1], out.cache)
            np.testing.assert_allclose(out.logits[:, 0], whole[:, at], rtol=0, atol=2e-5)
        assert out.cache.k.sharding.spec == PartitionSpec(None, ("data", "fsdp", "expert"), "tensor", None, None)
        np.testing.assert_array_equal(out.cache.lengths, [12] * 4)


@pytest.mark.parametrize("wish", ["fsdp=2,expert=2,tensor=2", "data=2,context=2,tensor=2"])
def test_no_buffer_holds_the_logits_of_a_shard_s_tokens(monkeypatch, wish):
    """In a compiled training step whatever has the words, all or a shard's, has not the tokens of a shard."""
    mesh, words = make_mesh(wish), 181
    table = mesh.shape["fsdp"] * mesh.shape["tensor"]
    padded = -(-words // table) * table
    monkeypatch.setattr(word_losses, "LOGITS", padded // table * 16)
    config = dataclasses.replace(CONFIGS["moe"], vocab_size=words)
    with jax.set_mesh(mesh):
        params = nnx.state(abstract_model(config, mesh, dtype=jnp.float32), nnx.Param)
        rows = NamedSharding(mesh, RULES.spec("batch", None, mesh=mesh))
        tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=rows)
        optimizer = optax.sgd(0.1)
        state = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params), jax.eval_shape(init_guard)
        )
        step = make_train_step(config, optimizer, dtype=jnp.float32)
        text = step.lower(state, Batch(tokens, tokens, tokens)).compile().as_text()
    assert text is not None
    of_a_shard = ROWS * LENGTH // 4
    found = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"f32\[([\d,]+)\]", text)}
    with_words = [sizes for sizes in found if {words, padded, padded // table} & set(sizes)]
    others = {math.prod(sizes) // next(n for n in sizes if n in (words, padded, padded // table)) for sizes in with_words}
    assert {16, config.hidden_size} <= others  # a block's logits, and the table's own width
    assert max(others) < of_a_shard
    # Between shards of a sequence nothing is exchanged to bring the loss into the text's order.
    assert "collective-permute(" not in text
