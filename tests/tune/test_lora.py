"""Adapters beside the model that they make: its logits, the gradients of their factors on any mesh, and a base that stays."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.grouped_matmul import batching
from qwen3_jax import (
    Batch,
    Qwen3,
    abstract_model,
    adamw,
    generate,
    init_train_state,
    make_mesh,
    make_train_step,
    save_pretrained,
)
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checks import ConfigError
from qwen3_jax.parallel.dispatch import Dispatch
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.training.state import trained_model
from qwen3_jax.tune.lora import LoraConfig, attach, merge
from tests.model.models import CONFIGS, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("quick")

LORA = LoraConfig(rank=4, alpha=6)
ROWS, LENGTH = 8, 32
CLOSE = 1e-5  # of the largest value


@functools.cache
def fresh(name: str) -> Qwen3:
    """A random model with new adapters."""
    return attach(random_model(name), LORA, jax.random.key(1))


@functools.cache
def adapted(name: str) -> Qwen3:
    """A random model with adapters, both factors random."""
    graph, factors, base = nnx.split(fresh(name), nnx.LoRAParam, ...)
    draws = np.random.default_rng(2)
    factors = jax.tree.map(lambda leaf: leaf + draws.normal(0, 0.2, leaf.shape).astype(np.float32), factors)
    return nnx.merge(graph, factors, base)


def batch() -> Batch:
    tokens = random_tokens(ROWS, LENGTH)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[1, 13:] = 2
    segments[2, :9] = 0
    return Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.asarray(segments != 0, jnp.float32), jnp.asarray(segments))


def plain(model: Qwen3) -> Qwen3:
    """The model with every update made: what adapters are defined by, written for each kind of matrix."""
    model = jax.tree.map(lambda leaf: leaf, model)

    def projection(module):
        if module.lora is not None:
            a, b = module.lora.a[...], module.lora.b[...]
            update = jax.vmap(lambda a, b: jnp.tensordot(b, a, 1))(a, b)
            module.weight[...] = module.weight[...] + module.lora.scale * update
            module.lora = None

    for unit in model.segments:
        for block in unit.blocks:
            for name in "qkvo":
                projection(getattr(block.attention, name))
            for name in ("gate", "up", "down"):
                if not block.is_moe:
                    projection(getattr(block.mlp, name))
                elif (pair := getattr(block.moe, f"{name}_lora")) is not None:
                    weight = getattr(block.moe, name)
                    weight[...] = weight[...] + pair.scale * jnp.einsum("leor,leri->leoi", pair.b[...], pair.a[...])
                    setattr(block.moe, f"{name}_lora", None)
    return model


def loss_of(model: Qwen3, batch: Batch) -> jax.Array:
    out = model(batch.tokens, segment_ids=batch.segment_ids, labels=batch.labels, remat="full", output="hidden")
    return (out.losses * batch.mask).sum() / batch.mask.sum()


def factors_gradient(model: Qwen3, batch: Batch, made=lambda model: model):
    """Loss, and its gradients in the adapters' factors by their places."""
    graph, factors, base = nnx.split(model, nnx.LoRAParam, ...)
    run = jax.jit(jax.value_and_grad(lambda factors, base: loss_of(made(nnx.merge(graph, factors, base)), batch)))
    loss, gradients = run(factors, base)
    return loss, {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradients)}


@functools.cache
def wanted(name: str):
    return factors_gradient(adapted(name), batch(), plain)


def assert_wanted(found, name):
    (loss, gradients), (wanted_loss, wanted_gradients) = found, wanted(name)
    np.testing.assert_allclose(loss, wanted_loss, rtol=CLOSE)
    assert gradients.keys() == wanted_gradients.keys()
    for path, gradient in gradients.items():
        largest = float(jnp.abs(wanted_gradients[path]).max())
        assert largest > 0
        np.testing.assert_allclose(gradient, wanted_gradients[path], rtol=0, atol=CLOSE * largest, err_msg=path)


@pytest.mark.parametrize("name", ["dense", "alternating"])
def test_new_adapters_change_nothing_and_trained_ones_are_their_merged_model(name):
    tokens = random_tokens(2, 9)
    run = jax.jit(lambda model: model(tokens).logits)
    base = run(random_model(name))
    np.testing.assert_array_equal(run(fresh(name)), base)
    trained = adapted(name)
    logits, merged = run(trained), merge(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(random_model(name))
    np.testing.assert_allclose(logits, run(merged), rtol=0, atol=CLOSE * float(jnp.abs(logits).max()))
    assert float(jnp.abs(logits - base).max()) > 1
    np.testing.assert_array_equal(run(random_model(name)), base)  # neither touches the model it was given


@pytest.mark.parametrize("name", ["dense", "alternating"])
def test_gradients_are_those_of_the_update_written_out(name):
    assert_wanted(factors_gradient(adapted(name), batch()), name)


def on_mesh(model: Qwen3, mesh, rules, adapt: LoraConfig | None = LORA) -> Qwen3:
    shapes = abstract_model(model.config, mesh, rules=rules, dtype=model.dtype, adapt=adapt)
    leaves = [
        jax.device_put(leaf, shape.sharding)
        for leaf, shape in zip(jax.tree.leaves(model), jax.tree.leaves(shapes), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@pytest.mark.parametrize(
    "name, wish, transport, rows",
    [
        ("dense", "data=2,tensor=4", "auto", {}),
        ("dense", "fsdp=8", "auto", {}),
        ("alternating", "expert=8", "ring", {}),
        ("alternating", "fsdp=2,expert=2,tensor=2", "all_to_all", {}),
        ("alternating", "fsdp=4,tensor=2", "auto", dict(mlp=None, embed=("fsdp", "tensor"))),
    ],
)
def test_gradients_on_a_mesh(name, wish, transport, rows):
    rules = dataclasses.replace(RULES.replace(**rows), dispatch=Dispatch(transport, slack=0.6))
    mesh = make_mesh(wish)
    model = on_mesh(adapted(name), mesh, rules)
    with jax.set_mesh(mesh):
        found = factors_gradient(model, batch())
    assert_wanted(found, name)
    parameters = nnx.state(model, nnx.LoRAParam)
    for gradient, leaf in zip(found[1].values(), jax.tree.leaves(parameters), strict=True):
        assert gradient.sharding.spec == leaf.sharding.spec


@pytest.mark.parametrize("wish", ["", "expert=8"])
@pytest.mark.parametrize("targets", [("attention",), ("moe",), ("moe.down",)])
def test_experts_without_adapters_have_no_gradient(targets, wish, monkeypatch):
    """Told by the products that gradients are traced with: those of factors have the rank on one side."""
    made = []

    def grouped_outer(left, right, sizes, dtype, implementation):
        made.append((left.shape[1], right.shape[1]))
        return jnp.zeros((sizes.shape[0], *made[-1]), dtype)

    monkeypatch.setattr(batching, "grouped_outer", grouped_outer)
    lora, mesh = LoraConfig(rank=4, targets=targets), make_mesh(wish) if wish else None
    graph, factors, base = nnx.split(abstract_model(CONFIGS["moe"], mesh, dtype=jnp.float32, adapt=lora), nnx.LoRAParam, ...)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        jax.eval_shape(jax.grad(lambda factors, base: loss_of(nnx.merge(graph, factors, base), batch())), factors, base)
    assert set(made) == (set() if targets == ("attention",) else {(4, 24), (4, 32)})


def test_a_step_trains_the_adapters_alone():
    config, lora = CONFIGS["alternating"], LoraConfig(rank=4, targets=("attention", "mlp", "moe.gate", "moe.down"))
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_model("alternating"))
    start = attach(base, lora, jax.random.key(0))
    optimizer = adamw(1e-2, weight_decay=0)
    state = init_train_state(start, optimizer, trainable=nnx.LoRAParam)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(start, nnx.LoRAParam))]
    assert sorted(leaf.size for leaf in moments) == sorted(2 * sizes)
    frozen = jax.tree.map(np.asarray, state.frozen)
    step = make_train_step(config, optimizer, dtype=jnp.float32, adapt=lora)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
    model = trained_model(config, state, dtype=jnp.float32, adapt=lora)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))} == {jnp.dtype(jnp.float32)}
    run = jax.jit(loss_of)
    assert float(run(model, batch())) < losses[-1] < float(run(base, batch()))  # the model given is still there
    says = r"lacks the parameter segments\.0\.blocks\.0\.attention\.k\.lora\.a with adapt=LoraConfig"
    with pytest.raises(ValueError, match=says):
        step(init_train_state(base, optimizer), batch())
    with pytest.raises(ValueError, match=r"lora\.a is \[2, 4, 32\]: with adapt=LoraConfig\(rank=2, .* it is \[2, 2, 32\]"):
        trained_model(config, state, adapt=dataclasses.replace(lora, rank=2))
    with pytest.raises(ValueError, match=r"has the parameter segments.*and the model has none with adapt=None"):
        trained_model(config, state)
    with pytest.raises(ValueError, match="the model has no LoRAParam"):
        init_train_state(base, optimizer, trainable=nnx.LoRAParam)


@pytest.mark.parametrize("wish", ["", "fsdp=2,expert=2,tensor=2"])
def test_generation_reads_adapters_beside_the_stacks(wish):
    """With a cache experts are read from the stacks of all layers, layer by layer: as the merged model writes, so do they."""
    model, prompt = adapted("alternating"), random_tokens(4, 5)
    merged = merge(model)
    wanted = generate(merged, prompt, max_new_tokens=6).tokens
    placed = on_mesh(model, make_mesh(wish), RULES) if wish else model
    np.testing.assert_array_equal(generate(placed, prompt, max_new_tokens=6).tokens, wanted)
    if wish:  # merged where it lies
        leaves = zip(*map(jax.tree.leaves, (merge(placed), merged, nnx.split(placed, nnx.LoRAParam, ...)[2])), strict=True)
        for found, alone, base in leaves:
            assert found.sharding.spec == base.sharding.spec
            np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)


def test_what_is_refused(tmp_path):
    refused: list[tuple[dict[str, Any], str]] = [
        (dict(rank=0), "rank is 0: accepted is a number of at least 1"),
        (dict(alpha=-1.0), r"alpha is -1.0: accepted is a number above 0"),
        (dict(targets=("attention.z",)), "targets: found 'attention.z'; accepted are attention, mlp, moe, attention.q"),
        (dict(targets=()), "targets: found none; accepted are"),
    ]
    for change, says in refused:
        with pytest.raises(ConfigError, match=says):
            LoraConfig(**change)
    with pytest.raises(ValueError, match="the model has none of the targets moe: accepted are attention, mlp"):
        attach(random_model("dense"), LoraConfig(targets=("moe",)), jax.random.key(0))
    with pytest.raises(ValueError, match="the model has adapters already"):
        attach(adapted("dense"), LORA, jax.random.key(0))
    with pytest.raises(ValueError, match="the model has no adapters"):
        merge(random_model("dense"))
    with pytest.raises(CheckpointError, match="the model has adapters, for which a checkpoint has no place"):
        save_pretrained(fresh("dense"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
