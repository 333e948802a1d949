"""What the model lowers to: programs that do not grow with depth, parameters with axes, abstract models without memory."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen3_jax import Qwen3, Qwen3Config, abstract_model, init_cache, make_mesh
from qwen3_jax.model.remat import NAMES, rematerialised
from qwen3_jax.parallel.rules import RULES
from tests.model.models import CONFIGS, EXPERTS, SHAPE, random_model, random_tokens

DEEP = {
    "dense": lambda layers: Qwen3Config(**{**SHAPE, "num_hidden_layers": layers}),
    "moe": lambda layers: Qwen3Config(**{**SHAPE, "num_hidden_layers": layers}, **EXPERTS),
    "alternating": lambda layers: Qwen3Config(**{**SHAPE, "num_hidden_layers": layers}, **EXPERTS, decoder_sparse_step=2),
}


def text_size(lowered: jax.stages.Lowered) -> int:
    text = lowered.compile().as_text()
    assert text is not None
    return len(text)


def compiled_size(config: Qwen3Config, program: str) -> int:
    model, tokens = abstract_model(config, dtype=jnp.float32), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    if program == "training":

        def loss(model, tokens):
            return model(tokens, remat="full").logits.sum()

        return text_size(jax.jit(jax.grad(loss)).lower(model, tokens))
    cache = jax.eval_shape(lambda: init_cache(model, 2, 16))
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    return text_size(step.lower(model, jax.ShapeDtypeStruct((2, 1), jnp.int32), cache))


@pytest.mark.parametrize("program", ["training", "decode"])
@pytest.mark.parametrize("kind", sorted(DEEP))
def test_94_layers_compile_to_the_program_of_two_repeats(kind, program):
    two = compiled_size(DEEP[kind](4 if kind == "alternating" else 2), program)
    assert compiled_size(DEEP[kind](94), program) <= 1.1 * two


@pytest.mark.parametrize(
    "policy", ["full", "offload:attention_out,mlp_gate", "save:attention_out,moe_gate", f"save:{','.join(NAMES)}"]
)
def test_every_remat_policy_has_the_same_gradient(policy):
    model, tokens = random_model("mixed"), random_tokens(1, 12)

    def gradient(policy):
        return jax.jit(jax.grad(lambda model: (model(tokens, remat=policy).logits ** 2).mean()))(model)

    for plain, kept in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(policy)), strict=True):
        np.testing.assert_allclose(plain, kept, rtol=1e-4, atol=1e-5)


def test_a_policy_decides_what_the_backward_pass_keeps():
    """Read off the scan of the forward pass: its stacked outputs are what is kept."""
    model, tokens = random_model("dense"), random_tokens(1, 12)

    def kept(policy):
        text = str(jax.make_jaxpr(lambda model: jax.vjp(lambda m: m(tokens, remat=policy).logits, model)[0])(model))
        return len(re.findall(r"f32\[4,1,12,48\]", text))

    assert kept("full") == 0
    assert kept("save:mlp_gate,mlp_up") > kept("save:mlp_gate") > 0


@pytest.mark.parametrize(
    "policy, says", [("save:moe_up,mlp_up", "experts keep nothing but their inputs: moe_up$"), ("save:mo", "unknown: mo$")]
)
def test_names_that_keep_nothing_on_a_mesh_are_refused(policy, says):
    """Experts have a backward pass of their own there; the message names what is left."""
    with jax.set_mesh(make_mesh("expert=8")), pytest.raises(ValueError, match=f"out of attention_q, .*, mlp_up; .*{says}"):
        rematerialised(lambda: None, policy)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_parameter_names_its_axes(name):
    known = {*RULES.table, None}
    for path, variable in nnx.to_flat_state(nnx.state(abstract_model(CONFIGS[name]), nnx.Param)):
        axes = variable.get_metadata("out_sharding")
        assert len(axes) == len(variable.shape), path
        assert set(axes) <= known, path
        assert (axes[0] == "layers") == (path[0] == "segments"), path


def test_the_layout_is_pinned():
    """One layout on every platform: a change of this list is a change of every native checkpoint."""
    shapes = {
        ".".join(map(str, path)): variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(abstract_model(CONFIGS["mixed"]), nnx.Param))
    }
    block = "segments.0.blocks.1."
    assert shapes[f"{block}mlp.gate.weight"] == (1, 48, 32)
    assert shapes[f"{block}mlp.down.weight"] == (1, 32, 48)
    block = "segments.1.blocks.0."
    assert {key.removeprefix(block): shape for key, shape in shapes.items() if key.startswith(block)} == {
        "attention.k.weight": (2, 2, 16, 32),
        "attention.k_norm.weight": (2, 16),
        "attention.o.weight": (2, 32, 4, 16),
        "attention.q.weight": (2, 4, 16, 32),
        "attention.q_norm.weight": (2, 16),
        "attention.v.weight": (2, 2, 16, 32),
        "attention_norm.weight": (2, 32),
        "mlp_norm.weight": (2, 32),
        "moe.down": (2, 8, 32, 24),
        "moe.gate": (2, 8, 24, 32),
        "moe.router.weight": (2, 8, 32),
        "moe.up": (2, 8, 24, 32),
    }
    rest = {key: shape for key, shape in shapes.items() if not key.startswith("segments")}
    assert rest == {"embed.weight": (96, 32), "lm_head.weight": (96, 32), "norm.weight": (32,)}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_parameter_counts_agree_with_the_config(name):
    state = nnx.state(abstract_model(CONFIGS[name]), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == CONFIGS[name].num_params()


def test_lowering_the_480b_model_takes_little_memory():
    program = """
import jax, jax.numpy as jnp
from qwen3_jax import Qwen3Config, abstract_model
model = abstract_model(Qwen3Config.preset("qwen3-coder-480b-a35b-instruct"), param_dtype=jnp.bfloat16)
text = jax.jit(lambda m, t: m(t).logits).lower(model, jax.ShapeDtypeStruct((1, 128), jnp.int32)).as_text()
assert "62x160x2560x6144xbf16" in text
print([line for line in open("/proc/self/status") if line.startswith("RssAnon")][0].split()[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 2e9


def test_initial_values_follow_the_config():
    model = jax.jit(lambda: Qwen3(CONFIGS["mixed"], rngs=nnx.Rngs(3)))()
    gate = model.segments[0].blocks[0].moe.gate[...]
    assert float(gate.std()) == pytest.approx(0.02, rel=0.05)
    assert gate.dtype == jnp.float32
    np.testing.assert_array_equal(model.norm.weight[...], np.ones(32))
    first, second = model.segments[1].blocks[0].moe.gate[...]
    assert not np.array_equal(first, second)
