"""What the cost model picks, what a run may say instead, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies

from qwen3_jax import make_mesh
from qwen3_jax.parallel.dispatch import GATHERED, Dispatch, Speeds, Work, choose, share_sent, transport_seconds
from qwen3_jax.parallel.experts import dispatch_for
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.presets import preset

V5P = Speeds(flops=459e12, memory=2765e9, link=100e9, ragged=True)
LAYER = Work(shards=8, tokens=16384, top_k=8, embed=2048, width=768, experts=16, itemsize=2)  # of 30B-A3B


def test_few_tokens_are_gathered_and_many_travel():
    assert choose(Dispatch(), dataclasses.replace(LAYER, tokens=8), V5P).transport == "gather"
    assert choose(Dispatch(), LAYER, V5P).transport in ("ring", "all_to_all")
    assert choose(Dispatch(), LAYER, dataclasses.replace(V5P, ragged=False)).transport == "ring"
    assert choose(Dispatch(), dataclasses.replace(LAYER, shards=1), V5P).transport is None


def test_a_slow_network_wants_fewer_bytes_and_a_fast_one_overlap():
    """all_to_all sends less than a ring of 4, but nothing hides it."""
    four = dataclasses.replace(LAYER, shards=4)
    assert choose(Dispatch(), four, dataclasses.replace(V5P, link=5e9)).transport == "all_to_all"
    assert choose(Dispatch(), four, V5P).transport == "ring"


@pytest.mark.parametrize("shards, part", [(4, 0.45), (8, 0.66), (16, 0.81)])
def test_once_per_shard_sends_less_than_once_per_expert(shards, part):
    work = dataclasses.replace(LAYER, shards=shards)
    assert shards * share_sent(work) / work.top_k == pytest.approx(part, abs=0.005)


def test_the_ring_s_seconds_by_hand():
    seconds = transport_seconds(LAYER, V5P)["ring"]
    step = 6 * 16384 * 2048 * 768 / 459e12  # a shard's eighth of 8 rows a token, flops for each of three matrices twice
    hop = 16384 * (2 * 2048 * 2 + 8 * 8) / 2 / 100e9 + 1e-6
    assert hop > step  # so each of eight steps takes a hop, and the way home of the sums one more
    assert seconds == pytest.approx(9 * hop)


@given(
    shards=st.integers(1, 64),
    tokens=st.integers(1, 1 << 18),
    top_k=st.integers(1, 8),
    experts=st.integers(1, 16),
    slack=st.floats(0.01, 4),
    transport=st.sampled_from(["auto", "ring", "all_to_all", "gather"]),
)
def test_buffers_are_bounded_and_never_empty(shards, tokens, top_k, experts, slack, transport):
    work = Work(shards, tokens, top_k, 64, 32, experts, 2)
    choice = choose(Dispatch(transport, slack=slack), work, V5P)
    rows = tokens * top_k
    if shards == 1:
        assert choice.transport is None and choice.capacity == rows
        return
    likely = rows / shards if choice.transport == "ring" else rows
    assert 0 < choice.capacity <= max(slack * likely + 8, 2048 * top_k)
    assert 0 < choice.quota <= tokens
    assert transport == "auto" or choice.transport == transport
    if transport == "auto" and choice.transport == "gather":
        assert shards * tokens * 64 * 2 <= GATHERED


def test_what_a_model_would_do_can_be_asked():
    """30B-A3B on sixteen v5p: training travels, decoding gathers; on a CPU nothing but filled blocks would have to travel."""
    chips = topologies.get_topology_desc("v5p:2x2x4", "tpu").devices
    config, mesh = preset("qwen3-30b-a3b"), make_mesh("fsdp=2,expert=8", devices=chips)
    training, decoding = dispatch_for(config, mesh, 64, 4096), dispatch_for(config, mesh, 64, 1)
    assert training.transport == min(training.seconds, key=lambda pair: pair[1])[0] == "ring"
    assert decoding.transport == "gather"
    assert {name for name, _ in training.seconds} == {"ring", "all_to_all"}
    here = dispatch_for(config, make_mesh("expert=8"), 64, 4096)
    assert [name for name, _ in here.seconds] == ["ring"]
    asked = dataclasses.replace(RULES, dispatch=Dispatch("all_to_all"))
    assert dispatch_for(config, mesh, 64, 4096, rules=asked).transport == "all_to_all"


@pytest.mark.parametrize("wrong", [dict(transport="mail"), dict(slack=0), dict(slack=-1.0), dict(rounds=0)])
def test_a_wrong_wish_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"dispatch: {next(iter(wrong))} is .*accepted"):
        Dispatch(**wrong)
