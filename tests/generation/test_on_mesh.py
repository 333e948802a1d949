"""Models on a mesh write and score what they do on one device, whatever calls them and whatever else is in the process."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from qwen3_jax import Chat, Qwen3, Qwen3Config, Sampling, ThinkingBudget, generate, init_cache, load_tokenizer, make_mesh, score
from qwen3_jax.generation.rows import early_copies, padded_rows
from qwen3_jax.parallel.mesh import MeshError
from tests.chat.tiny import write_checkpoint
from tests.model.models import random_model, random_tokens
from tests.parallel.test_on_mesh import on_mesh

pytestmark = pytest.mark.usefixtures("quick")

END = 3
# Row 0 is greedy, row 1 drawn with every filter and penalty, row 2 greedy with a thought that is cut.
SAMPLING = Sampling(
    temperature=np.asarray([0.0, 1.3, 0.0]),
    top_k=np.asarray([0, 40, 0]),
    top_p=np.asarray([1.0, 0.9, 1.0]),
    min_p=np.asarray([0.0, 0.01, 0.0]),
    presence_penalty=np.asarray([0.0, 0.2, 0.0]),
    frequency_penalty=np.asarray([0.0, 0.1, 0.0]),
    repetition_penalty=np.asarray([1.0, 1.1, 1.3]),
)
THINKING = ThinkingBudget(np.asarray([99, 99, 2]), END, (8, 9, END))


def written(model, stop_tokens):
    """All that generate offers, in one program: three rows, which no mesh here divides."""
    return generate(
        model,
        random_tokens(3, 9),
        lengths=[9, 4, 6],
        max_new_tokens=11,
        sampling=SAMPLING,
        key=jax.random.key(5),
        stop_tokens=stop_tokens,
        thinking=THINKING,
        logprobs=2,
    )


@functools.cache
def alone(name):
    """What one device writes, and a stop token that ends the second row's answer early."""
    stop = [int(written(random_model(name), [95]).tokens[1, 5])]
    return written(random_model(name), stop), stop


def assert_same(found, wanted):
    for name in ("tokens", "lengths", "finish_reason", "top_tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    for name in ("logprobs", "top_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=5e-5, err_msg=name)


@pytest.mark.parametrize(
    "name, wish",
    [
        ("dense", "data=8"),
        ("dense", "fsdp=2,tensor=4"),  # two key heads
        ("moe", "fsdp=2,expert=2,tensor=2"),
        ("alternating", "expert=4,context=2"),
    ],
)
def test_generate_writes_what_one_device_does(name, wish):
    (wanted, stop), mesh = alone(name), make_mesh(wish)
    found = written(on_mesh(random_model(name), mesh), stop)
    assert_same(found, wanted)
    assert int(wanted.finish_reason[1]) == 1 and list(wanted.tokens[2, 2:5]) == [8, 9, END]
    assert found.tokens.sharding.is_fully_replicated
    heads = "tensor" if mesh.shape["tensor"] < 4 else None
    assert found.cache.k.sharding.spec == PartitionSpec(None, ("data", "fsdp", "expert"), heads, None, None)
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    assert found.cache.k.shape[1] == -(-3 // rows) * rows
    np.testing.assert_array_equal(np.asarray(found.cache.lengths)[:3], wanted.cache.lengths)
    np.testing.assert_array_equal(np.asarray(found.cache.tokens)[:3], wanted.cache.tokens)


def test_rows_are_padded_to_the_shards_and_samples_share_what_they_can():
    assert (padded_rows(3), early_copies(3, 4)) == (3, 1)
    with jax.set_mesh(make_mesh("data=4,tensor=2")):
        assert [padded_rows(rows) for rows in (1, 4, 5)] == [4, 4, 8]
        assert [early_copies(*pair) for pair in ((4, 6), (1, 8), (2, 6), (3, 2), (1, 1), (3, 1))] == [1, 4, 2, 2, 1, 1]


def test_turns_and_samples():
    """One prompt whose eight answers four shards share; three in a cache of the caller's; each answer's next turn."""
    model = random_model("dense")
    draw = functools.partial(generate, max_new_tokens=6, sampling=Sampling(1.1, top_k=20), key=jax.random.key(0))

    def turns(model):
        first = draw(model, random_tokens(1, 5), samples=8)
        second = draw(model, random_tokens(3, 5), lengths=[5, 2, 4], samples=2, cache=init_cache(model, 3, 64))
        third = draw(model, random_tokens(6, 3, seed=1), lengths=[3, 2] * 3, cache=second.cache)
        return first, second, third

    for found, wanted in zip(turns(on_mesh(model, make_mesh("data=4,tensor=2"))), turns(model), strict=True):
        assert_same(found, wanted)
        assert len({tuple(row) for row in np.asarray(wanted.tokens)}) == wanted.tokens.shape[0]


def banned(rows, logits, written, step):
    """A hook with a value per row, which sees what was written: no token twice, and none of these."""
    columns = jnp.arange(written.shape[1])
    taken = jnp.where(columns < step, written, logits.shape[1])
    logits = logits.at[jnp.arange(logits.shape[0])[:, None], taken].set(-jnp.inf, mode="drop")
    return jnp.where(jnp.arange(logits.shape[1]) == rows[:, None], -jnp.inf, logits)


def test_a_hook_sees_the_rows_that_the_caller_gave():
    model, tokens = random_model("dense"), random_tokens(3, 5)
    rows = generate(model, tokens, max_new_tokens=1).tokens[:, 0]
    hook = jax.tree_util.Partial(banned, rows)
    wanted = generate(model, tokens, max_new_tokens=9, logits_hook=hook)
    found = generate(on_mesh(model, make_mesh("data=2,fsdp=4")), tokens, max_new_tokens=9, logits_hook=hook)
    assert_same(found, wanted)
    assert not np.any(np.asarray(found.tokens) == np.asarray(rows)[:, None])


def test_inside_jit_the_mesh_is_the_parameters():
    """An argument brings its mesh; what is closed over wants it set, and another one is refused."""
    model, tokens = random_model("dense"), random_tokens(3, 9)
    mesh = make_mesh("data=4,tensor=2")
    placed = on_mesh(model, mesh)

    def run(model, tokens):
        out = generate(model, tokens, max_new_tokens=4)
        return out.tokens, score(model, tokens), init_cache(model, 3, 8).lengths

    wanted = run(model, tokens)
    for found in (jax.jit(run)(placed, tokens), within(mesh, jax.jit(functools.partial(run, placed)), tokens)):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=1e-5)
        assert found[2].shape == (4,)
    with pytest.raises(ValueError, match="jax.set_mesh"):
        jax.jit(functools.partial(run, placed))(tokens)
    with pytest.raises(MeshError, match="lie on a mesh of data=4 x tensor=2, and a mesh of data=8 is set: accepted under jit"):
        within(make_mesh("data=8"), jax.jit(functools.partial(run, placed)), tokens)


def test_vmap_over_keys():
    """Of a model that is closed over, outside of any jit; rows that the mesh does not divide."""
    model, tokens, keys = random_model("dense"), random_tokens(3, 5), jax.random.split(jax.random.key(1), 2)
    options = dict(max_new_tokens=6, sampling=Sampling(1.2, top_k=30), logprobs=1)

    def one(model, key):
        return dataclasses.replace(generate(model, tokens, key=key, **options), cache=None)

    found = jax.vmap(functools.partial(one, on_mesh(model, make_mesh("fsdp=2,tensor=4"))))(keys)
    for number, key in enumerate(keys):
        assert_same(jax.tree.map(lambda x, number=number: x[number], found), one(model, key))


def within(mesh, run, *args):
    with jax.set_mesh(mesh):
        return run(*args)


def test_models_on_several_meshes_and_on_one_device_take_turns():
    """Each on devices of its own, inside and outside of another's mesh, with arrays that another returned."""
    devices = jax.devices()
    model = random_model("dense")
    apart = jax.device_put(random_model("moe"), devices[7])
    meshes = [make_mesh("tensor=2", devices=devices[:2]), make_mesh("data=4", devices=devices[2:6])]
    placed = [on_mesh(model, mesh) for mesh in meshes]
    tokens = random_tokens(3, 5)
    wanted = generate(model, tokens, max_new_tokens=4)
    others = generate(random_model("moe"), wanted.tokens, max_new_tokens=4)
    found = wanted
    for _ in range(2):
        for each in placed:
            found = generate(each, tokens, max_new_tokens=4)
            assert_same(found, wanted)
            assert_same(generate(apart, found.tokens, lengths=found.lengths, max_new_tokens=4), others)
    with jax.set_mesh(meshes[0]):
        assert_same(generate(placed[1], tokens, max_new_tokens=4), wanted)
        assert_same(generate(apart, found.tokens, max_new_tokens=4), others)
    np.testing.assert_allclose(score(placed[0], found.tokens), score(model, wanted.tokens), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cache lies on a mesh of data=4 and the model on a mesh of tensor=2: accepted is one"):
        generate(placed[0], tokens, max_new_tokens=4, cache=found.cache, cache_len=64)
    with pytest.raises(ValueError, match="cache has 4 rows, tokens 5"):
        generate(placed[1], random_tokens(5, 2), max_new_tokens=4, cache=found.cache, cache_len=64)
    assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize("name, wish", [("moe", "expert=2,context=2,tensor=2"), ("dense", "data=8")])
def test_score(name, wish):
    """Rows and a length that the mesh does not divide; two documents and padding."""
    model, tokens = random_model(name), random_tokens(3, 10)
    placed = on_mesh(model, make_mesh(wish))
    segments = jnp.asarray([[1] * 10, [1] * 4 + [2] * 6, [0] * 2 + [1] * 7 + [0]])
    for given in (None, segments):
        found, wanted = (score(each, tokens, segment_ids=given) for each in (placed, model))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"segment_ids is \[3, 9\], tokens are \[3, 10\]: accepted are equal shapes"):
        inspect.unwrap(score)(placed, tokens, segment_ids=segments[:, :9])


def test_a_chat_on_a_mesh_says_the_same(tmp_path):
    """One row on eight shards: thought and budget, sampling, a stop string, several turns."""
    write_checkpoint(tmp_path)
    tok = load_tokenizer(tmp_path / "model")
    model = Qwen3(Qwen3Config.from_hf(tmp_path / "model"), rngs=nnx.Rngs(0), dtype=jnp.float32)
    sessions = [Chat(each, tok) for each in (model, on_mesh(model, make_mesh("data=4,fsdp=2")))]
    messages = [{"role": "user", "content": "read"}]
    stop = None
    for thinking, temperature in ((3, 0.0), (False, 1.1)):
        said = []
        for chat in sessions:
            deltas = chat.stream(messages, thinking, Sampling(temperature), stop=stop or (), max_new_tokens=40, seed=4)
            said.append([(delta.thinking, delta.content) for delta in deltas])
            assert jax.sharding.get_abstract_mesh().empty
        assert said[0] == said[1] and len(said[0]) > 3
        content = "".join(content for _, content in said[0])
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "return"}]
        stop = [content[5:8]]
