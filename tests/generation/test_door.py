"""What generate refuses at the door, and what it takes in other forms than its own."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax import Sampling, ThinkingBudget, generate
from qwen3_jax.generation import loop
from qwen3_jax.generation.budget import budget_rule, budget_tokens
from qwen3_jax.generation.sample import broadcast
from tests.model.models import random_model, random_tokens

HOT = Sampling(temperature=1.2, top_k=30)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0: accepted is an integer >= 1"),
        (dict(lengths=[9, 0]), "lengths is .* accepted are 2 integers from 1 to 9"),
        (dict(lengths=[9]), "accepted are 2 integers from 1 to 9"),
        (dict(sampling=HOT), "key is missing"),
        (dict(key=jax.random.split(jax.random.key(0), 3)), r"key has shape \[3\]: accepted is one key or \[2\]"),
        (dict(logprobs=-1), "logprobs is -1"),
        (dict(samples=0), "samples is 0"),
        (dict(cache_len=10), "cache_len is 10 slots per row: 0 in use, 9 tokens and 4 new ones need 13"),
        (dict(thinking=ThinkingBudget(-1, 3, (3,))), "thinking: tokens is -1: accepted is an integer >= 0"),
        (dict(thinking=ThinkingBudget(1, 3, ())), "thinking: early_stop_ids is empty"),
        (dict(thinking=ThinkingBudget(np.zeros(3, int), 3, (3,))), r"thinking: tokens has shape \[3\]"),
        (dict(cache="another"), "cache has 1 rows, tokens 2"),
        (
            dict(cache="moe's"),
            r"cache is another model's: layers, heads and head_dim are \(2, 2, 16\): accepted are \(4, 2, 16\)",
        ),
        (dict(cache=3), "cache is a int: accepted is a Cache"),
        (dict(cache_len=64.0), "cache_len is 64.0: accepted is an integer >= 1"),
        (dict(cache_len=-1), "cache_len is -1: accepted is an integer >= 1"),
        (dict(max_new_tokens=True), "max_new_tokens is True: accepted is an integer >= 1"),
        (dict(max_new_tokens=2.0), "max_new_tokens is 2.0"),
        (dict(logprobs=97), "logprobs is 97: accepted is an integer from 0 to 96"),
        (dict(lengths=[2.0, 3.0]), "lengths is .* accepted are 2 integers from 1 to 9"),
        (dict(lengths=5), "lengths is 5: accepted are 2 integers from 1 to 9"),
        (dict(logits_hook=5), "logits_hook is 5: accepted is a function"),
        (
            dict(logits_hook=lambda logits, written, step: logits[:, :3]),
            r"logits_hook returned float32\[2, 3\]: .*float32\[2, 96\]",
        ),
        (
            dict(logits_hook=lambda logits, written, step: logits.astype(jnp.bfloat16)),
            r"logits_hook returned bfloat16\[2, 96\]",
        ),
        (dict(logits_hook=lambda logits, written, step: None), "logits_hook returned a NoneType"),
    ],
)
def test_arguments_that_are_refused(options, words):
    model, tokens = random_model("dense"), random_tokens(2, 9)
    if options.get("cache") == "another":
        options = dict(cache=loop.init_cache(model, 1, 64))
    if options.get("cache") == "moe's":
        whole = loop.init_cache(model, 2, 64)
        options = dict(cache=dataclasses.replace(whole, k=whole.k[:2], v=whole.v[:2]))
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(loop.generate)(model, tokens, **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(key=jax.random.PRNGKey(0)), "key is uint32.*accepted is a typed key"),
        (dict(key=0), "key is 0: accepted is a typed key"),
        (dict(key=np.zeros(2, np.uint32)), r"key is uint32\[2\]: accepted is a typed key"),
        (dict(stop_tokens=[1.5]), r"stop_tokens is \[1.5\]: accepted is a sequence of token ids"),
        (dict(stop_tokens=5), "stop_tokens is 5: accepted is a sequence of token ids"),
        (dict(stop_tokens=None), "stop_tokens is None: accepted is a sequence of token ids"),
        (dict(stop_tokens={5, 6}), "stop_tokens is {5, 6}: accepted is a sequence of token ids"),
        (dict(stop_tokens=[96]), "stop_tokens: 96 is no token of the model: accepted are 0 to 95"),
        (dict(stop_tokens=jnp.asarray([1, -1])), "stop_tokens: -1 is no token"),
        (dict(thinking=5), "thinking is 5: accepted is a ThinkingBudget"),
        (dict(thinking=ThinkingBudget(True, 3, (3,))), "thinking: tokens is True: accepted is an integer >= 0"),
        (dict(thinking=ThinkingBudget(1, 500, (3,))), "thinking: end_id: 500 is no token of the model: accepted are 0 to 95"),
        (dict(thinking=ThinkingBudget(1, -1, (3,))), "thinking: end_id: -1 is no token"),
        (dict(thinking=ThinkingBudget(1, 3, (3, 500))), "thinking: early_stop_ids: 500 is no token"),
        (dict(thinking=ThinkingBudget(1, 3, (3,), (96,))), "thinking: open_ids: 96 is no token"),
        (dict(thinking=ThinkingBudget(1, 3, (3,), (), -2)), "thinking: think_id: -2 is no token"),
        (dict(thinking=ThinkingBudget(1, 3, (3,), (), 1, 96)), "thinking: turn_id: 96 is no token"),
        (dict(thinking=ThinkingBudget(1, 3.5, (3,))), "thinking: end_id is 3.5: accepted is a token id"),
        (dict(thinking=ThinkingBudget(1, 3, 3)), "thinking: early_stop_ids is 3: accepted is a sequence of token ids"),
        (dict(sampling={"temperature": 0}), "sampling is {'temperature': 0}: accepted is a Sampling"),
        (dict(sampling=Sampling(None)), "sampling: temperature is None: accepted is a number >= 0"),
        (dict(sampling=Sampling("a")), "sampling: temperature is a: accepted"),
        (dict(sampling=Sampling([[1.0], [1.0, 2.0]])), "sampling: temperature is .*: accepted"),
        (dict(sampling=Sampling(1.0, 2**40)), "sampling: top_k is 1099511627776: accepted is an integer >= 0"),
        (dict(sampling=Sampling(1.0, -1)), "sampling: top_k is -1"),
    ],
)
def test_settings_that_are_refused(options, words):
    arguments = dict(sampling=HOT, key=jax.random.key(0), stop_tokens=(), thinking=None) | options
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(loop.make_settings)(random_model("dense"), 2, **arguments, logits_hook=None, max_new_tokens=4)


@pytest.mark.parametrize(
    "tokens, words",
    [
        (jnp.zeros((2, 0), jnp.int32), r"tokens are int32\[2, 0\]: accepted are integers \[B, T\]"),
        (jnp.zeros((9,), jnp.int32), r"tokens are int32\[9\]"),
        (jnp.zeros((2, 9), jnp.float32), r"tokens are float32\[2, 9\]"),
        ([5, 6], r"tokens are \[5, 6\]"),
        ([[1, 2], [3]], r"tokens are \[\[1, 2\], \[3\]\]: accepted are integers \[B, T\]"),
        ([], r"tokens are \[\]"),
        ("text", "tokens are 'text'"),
        (None, "tokens are None"),
        ([[5, 96]], "tokens: 96 is no token of the model: accepted are 0 to 95"),
        ([[5, -1]], "tokens: -1 is no token"),
        (np.asarray([[5, 2**40]]), "tokens: 1099511627776 is no token"),
    ],
)
def test_prompts_that_are_refused(tokens, words):
    with pytest.raises(ValueError, match=words):
        inspect.unwrap(loop.generate)(random_model("dense"), tokens, max_new_tokens=4)


def test_numbers_of_other_kinds_are_taken():
    """Lists, numpy's integers of any width, padding that is no token; stop tokens and a budget in arrays."""
    model, tokens = random_model("dense"), np.asarray([[5, 6, 7], [8, 9, 0]])
    wanted = generate(model, jnp.asarray(tokens), lengths=[3, 2], max_new_tokens=4)
    padded = np.where(tokens == 0, -100, tokens)
    kinds: list[Any] = [tokens.tolist(), tokens.astype(np.uint8), padded, padded.tolist(), tokens.astype(np.int64)]
    for given in kinds:
        out = generate(model, given, lengths=np.asarray([3, 2]), max_new_tokens=np.int64(4), cache_len=np.int32(30))
        np.testing.assert_array_equal(out.tokens, wanted.tokens)
        np.testing.assert_array_equal(out.logprobs, wanted.logprobs)
    broadcast(Sampling(np.float64(0.5), np.int64(5), np.float32(0.5)), 2)
    budget = ThinkingBudget(np.int64(3), np.int32(3), jnp.asarray([4, 3]), np.asarray([], int))
    assert list(budget_tokens(budget, 2)) == [3, 3] and int(budget_rule(budget, 96).total) == 2


def test_traced_numbers_in_sequences_are_taken():
    model = random_model("dense")
    free = generate(model, [[5, 6]], max_new_tokens=6)

    @jax.jit
    def run(token, stop, temperature):
        go_on = inspect.unwrap(generate)
        return go_on(model, [[5, token]], max_new_tokens=6, stop_tokens=[1, stop], sampling=Sampling([temperature]), key=KEY)

    out = run(6, free.tokens[0, 2], 0.0)
    length = int(out.lengths[0])
    assert length <= 3 and int(out.finish_reason[0]) == 1
    np.testing.assert_array_equal(out.tokens[0, :length], free.tokens[0, :length])


KEY = jax.random.key(0)
