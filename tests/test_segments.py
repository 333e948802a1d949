"""Layers as segments: kinds by the file's rules, and the best split of them into repeated units."""

import dataclasses
import random
import time
from typing import Any

import pytest

from qwen3_jax import Qwen3Config
from qwen3_jax.config import BlockKind, Segment
from qwen3_jax.segments import split


def kinds(text):
    return tuple(BlockKind("moe" if letter in "mM" else "dense", letter.isupper()) for letter in text)


def exhaustive(layers):
    """The same choice by trying every unit and every number of repeats: cubic, and plain."""
    best: list[tuple[int, int, tuple[Any, ...]]] = [(0, 0, ())]
    for start in reversed(range(len(layers))):
        choices = []
        for size in range(1, len(layers) - start + 1):
            unit, repeats = layers[start : start + size], 0
            while layers[start + repeats * size : start + (repeats + 1) * size] == unit:
                repeats += 1
                cost, count, rest = best[len(layers) - start - repeats * size]
                choices.append((cost + size, count + 1, repeats, unit, rest))
        cost, count, repeats, unit, rest = min(choices, key=lambda choice: (choice[0], choice[1], -choice[2]))
        best.append((cost, count, (Segment(unit, repeats), *rest)))
    return best[-1][2]


@pytest.mark.parametrize(
    "values, expected",
    [
        (dict(num_hidden_layers=94), [("m", 94)]),
        (dict(num_hidden_layers=94, decoder_sparse_step=2), [("dm", 47)]),
        (dict(num_hidden_layers=5, mlp_only_layers=(0,)), [("d", 1), ("m", 4)]),
        (dict(num_hidden_layers=6, mlp_only_layers=(0, 1, 2, 3, 4, 5)), [("d", 6)]),
        (dict(num_hidden_layers=9, decoder_sparse_step=3), [("ddm", 3)]),
        # One mask serves every layer of transformers' Qwen3MoeModel, whatever max_window_layers says.
        (dict(num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=3), [("M", 6)]),
        (
            dict(num_hidden_layers=6, num_experts=0, use_sliding_window=True, sliding_window=8, max_window_layers=4),
            [("d", 4), ("D", 2)],
        ),
    ],
)
def test_segments(values, expected):
    config = dataclasses.replace(Qwen3Config(num_experts=8, num_experts_per_tok=2), **values)
    assert config.segments() == tuple(Segment(kinds(unit), repeats) for unit, repeats in expected)
    told = [kind for segment in config.segments() for _ in range(segment.repeats) for kind in segment.unit]
    assert told == list(config.block_kinds())


def test_the_split_is_the_best_one_for_any_stack():
    draw = random.Random(0)
    for number in range(600):
        letters = "dmDM"[: draw.randrange(1, 5)]
        if number % 2:
            layers = "".join(draw.choices(letters, k=draw.randrange(1, 21)))
        else:
            unit = "".join(draw.choices(letters, k=draw.randrange(1, 6)))
            layers = list((unit * 20)[: draw.randrange(1, 21)])
            for _ in range(draw.randrange(3)):
                layers[draw.randrange(len(layers))] = draw.choice("dmDM")
        layers = kinds(layers)
        assert split(layers) == exhaustive(layers)


@pytest.mark.parametrize(
    "values, count",
    [
        (dict(), 1),
        (dict(decoder_sparse_step=2), 1),
        (dict(decoder_sparse_step=3, mlp_only_layers=(2,)), 2),
        (dict(mlp_only_layers=(0, 1, 2, 20_000)), 4),
    ],
)
def test_a_very_deep_model_is_split_in_a_moment(values, count):
    config = Qwen3Config(num_hidden_layers=40_000, num_experts=8, num_experts_per_tok=2, **values)
    start = time.monotonic()
    segments = config.segments()
    assert len(segments) == count
    assert sum(len(segment.unit) * segment.repeats for segment in segments) == 40_000
    # A quadratic search takes a quarter of an hour here; this one 0.2 s.
    assert time.monotonic() - start < 20
