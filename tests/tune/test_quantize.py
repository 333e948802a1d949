"""A base in codes: the model of what its codes stand for, with adapters beside it, on one device and on meshes."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from pallas_kernels.quantized import reference
from qwen3_jax import Qwen3, abstract_model, adamw, init_cache, init_train_state, make_mesh, make_train_step, save_pretrained
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.checks import ConfigError
from qwen3_jax.generation.unstack import unstack
from qwen3_jax.model.quantized import Quantized
from qwen3_jax.parallel.dispatch import Dispatch
from qwen3_jax.parallel.mesh import AXES, MeshError
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.training.state import trained_model
from qwen3_jax.tune.lora import LoraConfig, attach, config_of, merge
from qwen3_jax.tune.matrices import matrices, weight_of
from qwen3_jax.tune.pretrained import from_pretrained_in_codes
from qwen3_jax.tune.quantize import check_codes, dequantize, quantize
from tests.model.models import CONFIGS, QUICK, random_model, random_tokens
from tests.tune.test_lora import CLOSE, batch, loss_of, on_mesh

LORA = LoraConfig(rank=4, alpha=6, base="nf4", block=4)
FEW = LoraConfig(rank=4, targets=("attention.q",))


def adapted() -> Qwen3:
    """A random model of dense layers and experts in nf4, with adapters whose factors are both random."""
    return with_adapters(quantize(random_model("alternating"), "nf4", block=LORA.block), LORA)


def with_adapters(model: Qwen3, lora: LoraConfig) -> Qwen3:
    """The same factors for every base: those of abstract adapters, filled."""
    shapes = jax.eval_shape(lambda model: attach(model, lora, jax.random.key(1)), model)
    graph, factors, _ = nnx.split(shapes, nnx.LoRAParam, ...)
    draws = np.random.default_rng(2)
    factors = jax.tree.map(lambda leaf: jnp.asarray(draws.normal(0, 0.2, leaf.shape).astype(np.float32)), factors)
    return nnx.merge(graph, factors, nnx.state(model))


@functools.cache
def wanted():
    """The model of what codes of nf4 stand for; its loss and gradients."""
    plain = dequantize(adapted(), jnp.float32)
    return plain, quick_gradient(plain)


def quick_gradient(model: Qwen3):
    """Loss, and its gradients in the adapters' factors by their places, with remat."""
    graph, factors, base = nnx.split(model, nnx.LoRAParam, ...)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(factors, base):
        return jax.value_and_grad(lambda factors: loss_of(nnx.merge(graph, factors, base), batch()))(factors)

    loss, gradients = run(factors, base)
    return loss, {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradients)}


def assert_wanted(found) -> None:
    (loss, gradients), (_, (wanted_loss, wanted_gradients)) = found, wanted()
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


def test_gradients_are_those_of_what_the_codes_stand_for():
    assert config_of(adapted()) == LORA
    assert_wanted(quick_gradient(adapted()))


def test_logits_with_a_cache_and_layer_by_layer_are_those_of_what_the_codes_stand_for():
    tokens, (plain, _) = random_tokens(2, 5), wanted()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model):
        cached = model(tokens, cache=init_cache(model, 2, 8)).logits
        return cached, model(tokens, layers=unstack(model)).logits

    for found, like in zip(run(adapted()), run(plain), strict=True):
        np.testing.assert_allclose(found, like, rtol=0, atol=CLOSE * float(jnp.abs(like).max()))


@pytest.mark.parametrize("wish, transport", [("fsdp=2,expert=2,tensor=2", "all_to_all")])
def test_gradients_on_a_mesh(wish, transport):
    rules, mesh = dataclasses.replace(RULES, dispatch=Dispatch(transport, slack=0.6)), make_mesh(wish)
    model = on_mesh(adapted(), mesh, rules, LORA)
    with jax.set_mesh(mesh):
        found = quick_gradient(model)
    assert_wanted(found)  # made without the mesh, whichever test comes first


@pytest.mark.parametrize("wish", ["", "fsdp=2,expert=2,tensor=2"])
def test_merged_it_is_what_the_codes_stand_for_and_the_updates(wish):
    model, (plain, _) = adapted(), wanted()
    placed = on_mesh(model, make_mesh(wish), RULES, LORA) if wish else model
    merged, like = merge(placed), merge(plain)
    assert jax.tree.structure(like) == jax.tree.structure(random_model("alternating"))
    for (path, leaf), other in zip(matrices_of(merged).items(), matrices_of(like).values(), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-6, err_msg=path)
    few = merge(attach(quantize(random_model("alternating"), "int8", block=8), FEW, jax.random.key(0)), jnp.bfloat16)
    block = few.segments[0].blocks[1]
    assert block.attention.q.weight.dtype == block.moe.down.dtype == jnp.bfloat16  # with an adapter, and in codes alone


@pytest.mark.parametrize("base", [None, "nf4"])
def test_nothing_keeps_matrices_for_the_backward_pass(base):
    """Without remat too: no float of a matrix's size is kept by a model in codes, as those of a model in floats are."""
    config, shapes = CONFIGS["alternating"], set()
    model = abstract_model(config, dtype=jnp.float32, adapt=dataclasses.replace(LORA, base=base))
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors, rest):
        out = nnx.merge(graph, factors, rest)(batch().tokens, labels=batch().labels, output="hidden")
        return out.losses.mean()

    kept = jax.eval_shape(lambda factors, rest: jax.vjp(lambda factors: loss(factors, rest), factors)[1], factors, rest)
    shapes = {leaf.shape for leaf in jax.tree.leaves(kept) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    # Two repeats of a dense layer and one of experts: q and k, gate and up, their experts, the same of what follows them.
    matrices = {(2, *shape) for shape in ((64, 32), (32, 64), (48, 32), (32, 48), (8, 24, 32), (8, 32, 24))}
    assert bool(matrices & shapes) == (base is None)


def test_a_step_trains_beside_codes():
    lora = dataclasses.replace(FEW, base="int8", block=8)
    model = attach(random_model("tied"), lora, jax.random.key(0), param_dtype=jnp.bfloat16)
    optimizer = adamw(1e-2, weight_decay=0)
    state = init_train_state(model, optimizer, trainable=nnx.LoRAParam)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} == {jnp.dtype(jnp.bfloat16)}
    frozen = jax.tree.map(np.asarray, state.frozen)
    step = make_train_step(CONFIGS["tied"], optimizer, dtype=jnp.float32, adapt=lora)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)


def test_what_is_refused(tmp_path):
    model = random_model("dense")
    quantized = quantize(model, "nf4", block=4)
    with pytest.raises(ValueError, match="kind is 'fp4': accepted are int8, int4, nf4"):
        quantize(model, "fp4")
    with pytest.raises(
        ValueError, match="attention.q has 32 columns in blocks of 64: 32 / 64 leaves 32; accepted is a number that divides"
    ):
        quantize(model, "nf4")
    infinite = nnx.clone(model)
    infinite.segments[0].blocks[0].mlp.down.weight.set_value(
        model.segments[0].blocks[0].mlp.down.weight[...].at[1, 2, 3].set(jnp.inf)
    )
    with pytest.raises(ValueError, match="mlp.down has infinities or NaN, or what is infinite in bfloat16: accepted are"):
        quantize(infinite, "nf4", block=4)
    with pytest.raises(ValueError, match="the model is in nf4 already: accepted is one of floats"):
        quantize(quantized, "int8", block=4)
    with pytest.raises(ValueError, match="the model is in nf4 of blocks of 4, and base is 'int4', block 4: accepted are"):
        attach(quantized, dataclasses.replace(LORA, base="int4"), jax.random.key(0))
    with pytest.raises(
        ValueError, match="the model's matrices are codes, which are frozen: accepted is trainable=nnx.LoRAParam"
    ):
        init_train_state(quantized, adamw(1e-3))
    state = init_train_state(attach(quantized, LORA, jax.random.key(0)), adamw(1e-3), trainable=nnx.LoRAParam)
    with pytest.raises(ValueError, match="lacks the parameter .*weight.int4 with adapt="):  # whose codes look the same
        trained_model(CONFIGS["dense"], state, adapt=dataclasses.replace(LORA, base="int4"))
    with pytest.raises(CheckpointError, match="the model's matrices are codes, for which a checkpoint has no place"):
        save_pretrained(quantized, tmp_path / "out")
    with pytest.raises(MeshError, match="mlp.down has 48 columns in blocks of 16, over tensor=4: 3 / 4 leaves 3; accepted is"):
        abstract_model(CONFIGS["dense"], make_mesh("data=2,tensor=4"), adapt=dataclasses.replace(LORA, block=16))
    abstract_model(CONFIGS["dense"], make_mesh("data=2,tensor=4"), adapt=LORA)


SHARED = RULES.replace(embed=("fsdp", "tensor"))  # and heads and mlp are over tensor as well


@pytest.mark.parametrize(
    "rules, sizes, block, says",
    [
        (RULES, (1, 4, 1, 1, 1), 8, None),
        (RULES, (1, 8, 1, 1, 1), 8, "attention.q has 32 columns in blocks of 8, over fsdp=8: 4 / 8 leaves 4; accepted is"),
        (RULES, (1, 1, 1, 1, 4), 8, "mlp.down has 48 columns in blocks of 8, over tensor=4: 6 / 4 leaves 2"),
        # q lies over tensor and fsdp; down is kept over both along embed, and multiplies over tensor along mlp.
        (SHARED, (1, 4, 1, 1, 2), 8, None),
        (SHARED, (1, 2, 1, 1, 2), 16, "mlp.down has 48 columns in blocks of 16, over tensor=2: 3 / 2 leaves 1"),
        (RULES, (1, 1, 1, 1, 3), 8, "4 query heads over tensor=3"),
    ],
)
def test_a_mesh_is_told_before_anything_is_made(rules, sizes, block, says):
    mesh = AbstractMesh(sizes, AXES)
    with pytest.raises(MeshError, match=says) if says else contextlib.nullcontext():
        check_codes(CONFIGS["dense"], rules, mesh, "nf4", block)


def test_what_no_mesh_mends_is_told_by_the_matrix():
    with pytest.raises(
        ConfigError, match="attention.q has 32 columns in blocks of 64: 32 / 64 leaves 32; accepted is a number"
    ):
        check_codes(CONFIGS["dense"], RULES, None, "int8")
    odd = dataclasses.replace(CONFIGS["moe"], moe_intermediate_size=21)
    with pytest.raises(ConfigError, match="moe.gate has 21 rows in nf4, where two rows share bytes; accepted is an even"):
        check_codes(odd, RULES, AbstractMesh((1,) * 5, AXES), "nf4", 1)
    check_codes(odd, RULES, None, "int8", 1)
    with pytest.raises(MeshError, match="moe.gate has 24 rows in int4, by 2 in a byte, over tensor=8: 12 / 8 leaves 4"):
        rules = RULES.replace(heads=None, kv_heads=None)
        check_codes(CONFIGS["moe"], rules, AbstractMesh((1, 1, 1, 1, 8), AXES), "int4", 1)
    with pytest.raises(ConfigError, match="block is 0: accepted is a whole number from 1"):
        check_codes(CONFIGS["dense"], RULES, None, "int8", 0)


def test_scales_lie_as_their_codes_do():
    """Where two axes of a matrix share a mesh axis, the order of the scales' own axes would give it to the other of them."""
    model = abstract_model(
        CONFIGS["dense"], make_mesh("fsdp=4,tensor=2"), rules=SHARED, adapt=lambda model: quantize(model, "nf4", block=8)
    )
    for module, _, name in matrices(model):
        weight, _ = weight_of(module, name)
        assert isinstance(weight, Quantized)
        layers, out, inner = weight.codes.sharding.spec
        assert weight.scales.sharding.spec == PartitionSpec(layers, inner, out), name


@pytest.mark.parametrize("wish", ["", "fsdp=2,expert=2,tensor=2"])
def test_a_folder_is_read_into_codes(tmp_path, wish):
    save_pretrained(random_model("alternating"), tmp_path / "base")
    mesh = make_mesh(wish) if wish else None
    found = from_pretrained_in_codes(tmp_path / "base", "nf4", block=4, param_dtype=jnp.float32, mesh=mesh)
    wanted = quantize(random_model("alternating"), "nf4", block=4)
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(leaf, like)
        assert leaf.dtype == like.dtype
    if mesh is not None:
        for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(abstract_of(mesh)), strict=True):
            assert leaf.sharding == like.sharding
    with pytest.raises(ValueError, match="attention.q has 32 columns in blocks of 64"):
        from_pretrained_in_codes(tmp_path / "base", "nf4", mesh=mesh)


def abstract_of(mesh) -> Qwen3:
    return abstract_model(CONFIGS["alternating"], mesh, adapt=lambda model: quantize(model, "nf4", block=4))
