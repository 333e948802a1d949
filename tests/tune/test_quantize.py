"""A base in codes: the model of what its codes stand for, with adapters beside it, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.quantized import reference
from qwen3_jax import Qwen3, abstract_model, adamw, generate, init_train_state, make_mesh, make_train_step, save_pretrained
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.model.quantized import QuantizedParam
from qwen3_jax.parallel.dispatch import Dispatch
from qwen3_jax.parallel.mesh import MeshError
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.tune.lora import LoraConfig, attach, config_of, merge
from qwen3_jax.tune.quantize import dequantize, quantize
from tests.model.models import CONFIGS, random_model, random_tokens
from tests.tune.test_lora import CLOSE, batch, factors_gradient, on_mesh

LORA = LoraConfig(rank=4, alpha=6, base="nf4", block=4)


@functools.cache
def adapted(name: str, kind: str) -> Qwen3:
    """A random model in codes with adapters, both factors random."""
    model = attach(random_model(name), dataclasses.replace(LORA, base=kind), jax.random.key(1))
    graph, factors, base = nnx.split(model, nnx.LoRAParam, ...)
    draws = np.random.default_rng(2)
    factors = jax.tree.map(lambda leaf: leaf + draws.normal(0, 0.2, leaf.shape).astype(np.float32), factors)
    return nnx.merge(graph, factors, base)


@functools.cache
def wanted(name: str, kind: str):
    """Loss and gradients of the model whose matrices are what the codes stand for."""
    return factors_gradient(dequantize(adapted(name, kind), jnp.float32), batch())


def assert_wanted(found, name: str, kind: str) -> None:
    (loss, gradients), (wanted_loss, wanted_gradients) = found, wanted(name, kind)
    np.testing.assert_allclose(loss, wanted_loss, rtol=CLOSE)
    assert gradients.keys() == wanted_gradients.keys()
    for path, gradient in gradients.items():
        largest = float(jnp.abs(wanted_gradients[path]).max())
        assert largest > 0
        np.testing.assert_allclose(gradient, wanted_gradients[path], rtol=0, atol=CLOSE * largest, err_msg=path)


def matrices_of(model: Qwen3) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_codes_stand_where_matrices_stood_and_mean_what_the_kernel_says():
    model = random_model("alternating")
    quantized = quantize(model, "int4", block=8)
    before, plain = matrices_of(model), matrices_of(dequantize(quantized))
    changed = {path for path in before if not np.array_equal(before[path], plain[path])}
    assert {path.split(".", 4)[4] for path in changed} == (
        {f"attention.{name}.weight" for name in "qkvo"}
        | {f"mlp.{name}.weight" for name in ("gate", "up", "down")}
        | {f"moe.{name}" for name in ("gate", "up", "down")}
    )
    assert jax.tree.structure(dequantize(quantized)) == jax.tree.structure(model)
    weight = before["segments.0.blocks.0.attention.o.weight"]  # [layers, D, N, H]
    codes, scales = reference.quantize(weight.reshape(*weight.shape[:2], -1), "int4", 8)
    wanted = reference.dequantize(codes, scales, "int4", jnp.dtype(jnp.float32)).reshape(weight.shape)
    np.testing.assert_array_equal(plain["segments.0.blocks.0.attention.o.weight"], wanted)


@pytest.mark.parametrize("name, kind", [("dense", "int8"), ("alternating", "nf4")])
def test_logits_and_gradients_are_those_of_what_the_codes_stand_for(name, kind):
    model, tokens = adapted(name, kind), random_tokens(2, 9)
    assert config_of(model) == dataclasses.replace(LORA, base=kind, targets=config_of(model).targets)
    run = jax.jit(lambda model: model(tokens).logits)
    logits = run(model)
    plain = dequantize(model, jnp.float32)
    np.testing.assert_allclose(logits, run(plain), rtol=0, atol=CLOSE * float(jnp.abs(logits).max()))
    merged = merge(model)
    assert jax.tree.structure(merged) == jax.tree.structure(random_model(name))
    for path, leaf in matrices_of(merge(plain)).items():
        np.testing.assert_allclose(matrices_of(merged)[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    assert merge(model, jnp.bfloat16).segments[0].blocks[0].attention.q.weight.dtype == jnp.bfloat16
    assert_wanted(factors_gradient(model, batch()), name, kind)


@pytest.mark.parametrize(
    "name, kind, wish, transport",
    [
        ("dense", "int8", "data=2,tensor=4", "auto"),
        ("alternating", "nf4", "expert=8", "ring"),
        ("alternating", "nf4", "fsdp=2,expert=2,tensor=2", "all_to_all"),
    ],
)
def test_gradients_on_a_mesh(name, kind, wish, transport):
    rules, mesh = dataclasses.replace(RULES, dispatch=Dispatch(transport, slack=0.6)), make_mesh(wish)
    lora = dataclasses.replace(LORA, base=kind)
    model = on_mesh(adapted(name, kind), mesh, rules, lora)
    with jax.set_mesh(mesh):
        found = factors_gradient(model, batch())
    assert_wanted(found, name, kind)
    if transport == "all_to_all":  # quantised, written with and merged where it lies
        plain = on_mesh(random_model(name), mesh, rules, None)
        here = quantize(plain, kind, block=LORA.block)
        alone = nnx.state(adapted(name, kind), QuantizedParam)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(here, QuantizedParam), alone)
        for leaf, like in zip(*[jax.tree.leaves(nnx.state(tree, QuantizedParam)) for tree in (here, model)], strict=True):
            assert leaf.sharding.spec == like.sharding.spec
        for leaf, like in zip(jax.tree.leaves(merge(model)), jax.tree.leaves(plain), strict=True):
            assert leaf.sharding.spec == like.sharding.spec
        prompt = random_tokens(4, 5)
        tokens = generate(merge(adapted(name, kind)), prompt, max_new_tokens=4).tokens
        for one in (model, adapted(name, kind)):
            np.testing.assert_array_equal(generate(one, prompt, max_new_tokens=4).tokens, tokens)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_nothing_keeps_matrices_for_the_backward_pass(name):
    """Without remat too: no float of a matrix's size, of one layer or of all, is among what a scan hands back."""
    model = abstract_model(CONFIGS[name], dtype=jnp.float32, adapt=LORA)
    graph, factors, base = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors, base):
        out = nnx.merge(graph, factors, base)(batch().tokens, labels=batch().labels, output="hidden")
        return out.losses.mean()

    kept = jax.eval_shape(lambda factors, base: jax.vjp(lambda factors: loss(factors, base), factors)[1], factors, base)
    layers = CONFIGS[name].num_hidden_layers
    forms = [(layers, 8, 24, 32), (layers, 8, 32, 24), (layers, 48, 32), (layers, 32, 48), (layers, 64, 32), (layers, 32, 64)]
    floats = [leaf.shape for leaf in jax.tree.leaves(kept) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert not set(forms) & set(floats)


def test_a_step_trains_beside_codes():
    config, lora = CONFIGS["alternating"], LORA
    model = attach(random_model("alternating"), lora, jax.random.key(0), param_dtype=jnp.bfloat16)
    optimizer = adamw(1e-2, weight_decay=0)
    state = init_train_state(model, optimizer, trainable=nnx.LoRAParam)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.bfloat16)}
    frozen = jax.tree.map(np.asarray, state.frozen)
    step = make_train_step(config, optimizer, dtype=jnp.float32, adapt=lora)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


def test_what_is_refused(tmp_path):
    model = random_model("dense")
    quantized = quantize(model, "nf4", block=4)
    with pytest.raises(ValueError, match="kind is 'fp4': accepted are int8, int4, nf4"):
        quantize(model, "fp4")
    with pytest.raises(
        ValueError, match="attention.q has 32 columns, and a block 64 values: accepted is a number that divides"
    ):
        quantize(model, "nf4")
    with pytest.raises(ValueError, match="the model is in nf4 already: accepted is one of floats"):
        quantize(quantized, "int8", block=4)
    with pytest.raises(ValueError, match="the model is in nf4 of blocks of 4, and base is 'int4', block 4: accepted are"):
        attach(quantized, dataclasses.replace(LORA, base="int4"), jax.random.key(0))
    with pytest.raises(
        ValueError, match="the model's matrices are codes, which are frozen: accepted is trainable=nnx.LoRAParam"
    ):
        init_train_state(quantized, adamw(1e-3))
    with pytest.raises(CheckpointError, match="the model's matrices are codes, for which a checkpoint has no place"):
        save_pretrained(quantized, tmp_path / "out")
    for block, says in ((16, "48 columns in blocks of 16 over 4 shards: 48 / 4 / 16 is no whole number"), (4, None)):
        lora = dataclasses.replace(LORA, block=block)
        with pytest.raises(MeshError, match=says) if says else jax.set_mesh(None):
            abstract_model(CONFIGS["dense"], make_mesh("data=2,tensor=4"), adapt=lora)
