"""Analytic HBM bytes: by hand, and beside compiled steps of the reference case, whose order they must give."""

import pytest
from jax.sharding import AbstractMesh

from qwen3_jax import Qwen3Config
from qwen3_jax.parallel.mesh import AXES
from qwen3_jax.parallel.rules import TRAIN_RULES
from qwen3_jax.planning.candidates import candidates
from qwen3_jax.planning.efficiency import ASSUMED
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import parameters, shares
from qwen3_jax.planning.topology import devices_of, parse_topology
from qwen3_jax.planning.traffic import device_hbm_bytes, hbm_parts

REFERENCE = Job(Qwen3Config.preset("qwen3-30b-a3b"), "train", 64, 4096)
# Mesh of v5p:2x2x4 -> GB of HBM that are timed, and seconds of the step, of the compiled program, as `qwen3-jax plan --mesh`
# gives them. A compilation takes a minute and more.
COMPILED = {
    "fsdp=2,expert=8": (4565, 2.166),
    "data=2,expert=8": (4734, 2.234),
    "fsdp=4,expert=4": (4038, 2.265),
    "fsdp=16": (3201, 2.362),
    "fsdp=8,expert=2": (4103, 2.374),
    "expert=8,context=2": (4962, 2.385),
    "expert=16": (5663, 2.472),
}


def cut_of(given, **sizes):
    return shares(given, AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES), TRAIN_RULES)


def test_meshes_are_in_the_order_of_their_compiled_steps():
    topology = parse_topology("v5p:2x2x4", 1)
    all_of_them = candidates(REFERENCE, topology, devices_of(topology), ASSUMED)
    order = [each.wish for each in all_of_them if each.wish in COMPILED]
    # Both figures of a mesh may be 6 % apart, so of steps that are as long to 5 % either may come first.
    for place, wish in enumerate(order):
        assert all(COMPILED[wish][1] < 1.05 * COMPILED[later][1] for later in order[place + 1 :]), wish
    shortest = min(COMPILED, key=lambda wish: COMPILED[wish][1])
    assert order[0] == all_of_them[0].wish == shortest  # the first that a plan compiles
    found = {each.wish: each for each in all_of_them}
    for wish, (size, seconds) in COMPILED.items():
        assert found[wish].hbm_bytes == pytest.approx(size * 1e9, rel=0.06)
        assert found[wish].time.total == pytest.approx(seconds, rel=0.06)


def test_training_s_weights_by_hand():
    """A dense model on one device: every parameter is used whole where it is held."""
    given = Job(Qwen3Config.preset("qwen3-8b"), "train", 1, 4096)
    cut = cut_of(given)
    held = parameters(given, cut)
    layers = held.total - held.words
    # Four passes in bfloat16; twice taken from the stack and cast; gradients written, read and put into a stack.
    moved = layers * (4 * 2 + 2 * (4 + 4 + 4 + 2) + 2 * 4 + 2 * 4)
    assert hbm_parts(given, cut)["weights"] == 2 * held.words + moved + 8 * 4 * held.total
    assert hbm_parts(given, cut)["rows"] == hbm_parts(given, cut)["journeys"] == 0
    tokens = 4 * 2 * 4096
    assert hbm_parts(given, cut)["dense"] == 36 * tokens * (3 * 4096 + 6 * 12288)
    assert hbm_parts(given, cut)["attention"] == 36 * tokens * (10 * 4096 + 128 * (19 * 32 + 17 * 8))
    logits = 4096 * 151936
    assert hbm_parts(given, cut)["words"] == pytest.approx(16 * logits + 12 * 151936 * 4096 * 32)  # blocks of 128


def test_a_ring_pays_for_every_visit():
    """16,384 tokens of 8 experts each: 131,072 rows at once, or 16 times 10,240 and all tokens with each."""
    one, ring = cut_of(REFERENCE, fsdp=16), cut_of(REFERENCE, expert=16)
    assert ring.visits == 16 and ring.choice is not None and ring.choice.capacity == 10240
    there, back = 8 + 2 + 2 * (4 * 2 + 2 * 1 + 3), 8 + 2 + 2 * (4 * 3 + 2 * 2 + 3)
    journeys = 48 * 16 * 16384 * (2048 * (there + back) + 512 * (3 + 8))
    assert hbm_parts(REFERENCE, ring)["journeys"] == journeys
    assert hbm_parts(REFERENCE, one)["journeys"] == 48 * 16384 * (2048 * 2 * (8 + 2) + 512 * (3 + 8))
    # Eight pieces of 1,280 rows stay on the chip when widened, those of 16,384 do not.
    rows = 2048 * 2 * (8 + 17) + 768 * 2 * (7 + 19) + 2048 * 2 * (2 + 8)
    assert hbm_parts(REFERENCE, ring)["rows"] == 48 * 16 * 10240 * rows
    assert hbm_parts(REFERENCE, one)["rows"] == 48 * 131072 * (rows + 2048 * 2 * 8)


def test_each_tile_of_rows_reads_a_matrix_again():
    """The reference on a ring of 16: 20 tiles of 512 rows, eight experts: the first tile of each, and 19 more."""
    cut = cut_of(REFERENCE, expert=16)
    matrices = 48 * 3 * 2048 * 768
    reads = 16 * matrices * (8 + 19) * 2 * 8 / 3  # every expert is chosen by some token
    gradients = 8 * matrices * (4 + 16 * (2 + 2 + 4 + 4))
    held = parameters(REFERENCE, cut)
    assert held.experts == 8 * matrices
    stacks = (held.total - held.words) * (2 * (4 + 4 + 4 + 2) + 2 * 4) + 8 * 4 * held.total + 2 * held.words
    split = held.attention + held.router  # over the ring too, by the rules of training
    dense = (16 * split + held.norms) * (4 * 2 + 2 * 4) + 2 * 2 * (split + 16 * split) + 2 * 4 * held.norms
    assert hbm_parts(REFERENCE, cut)["weights"] == pytest.approx(reads + gradients + stacks + dense, rel=1e-9)
    assert device_hbm_bytes(REFERENCE, cut) == sum(hbm_parts(REFERENCE, cut).values())
