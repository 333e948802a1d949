"""What the cost model picks, what a run may say instead, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_jax.parallel.dispatch import GATHERED, Chip, Dispatch, Work, choose, share_sent, transport_seconds

V5P = Chip(flops=459e12, memory=2765e9, link=100e9, ragged=True)
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
    assert hop > step  # so each of seven steps takes a hop, and the last one's sums a hop more
    assert seconds == pytest.approx(7 * hop + step + hop)


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


@pytest.mark.parametrize("wrong", [dict(transport="mail"), dict(slack=0), dict(slack=-1.0), dict(rounds=0)])
def test_a_wrong_wish_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"dispatch: {next(iter(wrong))} is .*accepted"):
        Dispatch(**wrong)
