"""The thinking budget against its definition in plain Python, inside the jitted loop, and over several turns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_jax import ThinkingBudget, generate
from qwen3_jax.generation.budget import begin, budget_rule, budget_tokens, enforce
from qwen3_jax.model.cache import Cache
from tests.model.models import random_model

pytestmark = pytest.mark.usefixtures("quick")

THINK, END, TURN, STOP, NEWLINE = 1, 2, 3, 4, 5
OPEN, EARLY = (THINK, NEWLINE), (6, 7, END, NEWLINE)
STEPS = 16


def budget(tokens):
    return ThinkingBudget(tokens, END, EARLY, OPEN, THINK, TURN)


def by_definition(prompt, drawn, tokens):
    """What a row writes when the model would draw these tokens, as the issue of a budget says it in words."""
    turn = prompt[len(prompt) - prompt[::-1].index(TURN) - 1 :] if TURN in prompt else prompt
    written, forced = [], []
    for step, token in enumerate(drawn):
        if not forced and END not in turn + written and step >= tokens:
            forced = [*(() if THINK in turn + written else OPEN), *EARLY]
            written += forced
        if step >= len(written):
            written.append(token)
            if token == STOP:
                break
    return written[: len(drawn)]


@jax.jit
def begun(rule, tokens, given):
    return begin(rule, tokens, jnp.zeros_like(given), given, jnp.full(3, -1))


@jax.jit
def enforced(rule, most, state, step, tokens):
    return enforce(rule, most, state, step, tokens)


# Few tokens, so that every special one is common.
WORDS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.tuples(WORDS, WORDS, WORDS),
    drawn=st.lists(st.lists(st.integers(1, 9), min_size=STEPS, max_size=STEPS), min_size=3, max_size=3),
    tokens=st.lists(st.integers(0, STEPS + 2), min_size=3, max_size=3),
)
def test_rows_with_budgets_of_their_own(prompts, drawn, tokens):
    given = budget(np.asarray(tokens))
    rule, most = budget_rule(given, 96), budget_tokens(given, 3)
    padded = np.full((3, 8), -1, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    state, written, running = begun(rule, padded, padded >= 0), [[], [], []], [True] * 3
    for step in range(STEPS):
        chosen, forced, state = enforced(
            rule, most, state, jnp.int32(step), jnp.asarray([row[step] for row in drawn], jnp.int32)
        )
        for row in range(3):
            if running[row]:
                written[row].append(int(chosen[row]))
                running[row] = bool(forced[row]) or int(chosen[row]) != STOP
    for row in range(3):
        assert written[row] == by_definition(list(prompts[row]), drawn[row], tokens[row])


def script(tokens, logits, written, step):
    """A hook: row b draws tokens[b, step]."""
    return jnp.where(jnp.arange(logits.shape[1]) == tokens[:, step][:, None], 1e4, -1e4)


@pytest.mark.parametrize(
    "prompt, drawn, tokens, wanted",
    [
        # Spent before a thought was opened: it is opened and closed.
        ([TURN, 8], [9] * 12, 0, [*OPEN, *EARLY, 9, 9, 9, 9, 9, 9]),
        # Spent within a thought.
        ([TURN, 8], [THINK, *[9] * 11], 3, [THINK, 9, 9, *EARLY, 9, 9, 9, 9, 9]),
        # The prompt opened the thought.
        ([TURN, 8, THINK], [9] * 12, 2, [9, 9, *EARLY, 9, 9, 9, 9, 9, 9]),
        # The thought ended in time.
        ([TURN, 8], [THINK, 9, END, *[9] * 9], 4, [THINK, 9, END, *[9] * 9]),
        # Thinking is off: the prompt closed it.
        ([TURN, 8, THINK, END], [9] * 12, 0, [9] * 12),
        # An earlier turn's thought does not count.
        ([TURN, THINK, END, TURN, 8], [9] * 12, 1, [9, *OPEN, *EARLY, 9, 9, 9, 9, 9]),
        # The end of the turn while thinking ends the row.
        ([TURN, 8], [THINK, 9, STOP, *[9] * 9], 6, [THINK, 9, STOP]),
        # Forced tokens count towards max_new_tokens.
        ([TURN, 8], [THINK, *[9] * 11], 10, [THINK, *[9] * 9, *EARLY[:2]]),
    ],
)
def test_inside_the_loop(prompt, drawn, tokens, wanted):
    """A second row without pressure runs beside it."""
    prompts = jnp.asarray([prompt + [0] * (6 - len(prompt)), [TURN, 8, 8, 8, 8, 8]], jnp.int32)
    scripted = jnp.asarray([drawn, [9] * 12], jnp.int32)
    out = generate(
        random_model("dense"),
        prompts,
        lengths=[len(prompt), 6],
        max_new_tokens=12,
        stop_tokens=[STOP],
        thinking=budget(np.asarray([tokens, 12])),
        logits_hook=jax.tree_util.Partial(script, jnp.pad(scripted, ((0, 0), (0, 4)))),
    )
    assert list(out.tokens[0, : out.lengths[0]]) == wanted
    assert list(out.tokens[1]) == [9] * 12
    assert int(out.finish_reason[0]) == (wanted[-1] == STOP)


def test_a_budget_of_three_fields():
    """Without the other ids the whole prompt is the turn, and no thought needs opening."""
    out = generate(random_model("dense"), jnp.asarray([[8, 8]]), max_new_tokens=6, thinking=ThinkingBudget(2, END, (6, END)))
    assert list(out.tokens[0, 2:4]) == [6, END]
    closed = generate(
        random_model("dense"), jnp.asarray([[END, 8]]), max_new_tokens=6, thinking=ThinkingBudget(0, END, (6, END))
    )
    free = generate(random_model("dense"), jnp.asarray([[END, 8]]), max_new_tokens=6)
    np.testing.assert_array_equal(closed.tokens, free.tokens)


def continued(out, tokens, drawn, most):
    """A next turn after `out`: its tokens, then what the model draws, which a budget may replace."""
    prompt = jnp.asarray([tokens], jnp.int32)
    hook = jax.tree_util.Partial(script, jnp.pad(jnp.asarray([drawn], jnp.int32), ((0, 0), (0, 16 - len(drawn)))))
    cache = None if out is None else out.cache
    return generate(
        random_model("dense"),
        prompt,
        max_new_tokens=len(drawn),
        thinking=None if most is None else budget(most),
        stop_tokens=[STOP],
        logits_hook=hook,
        cache=cache,
        cache_len=64,
    )


@pytest.mark.parametrize(
    "calls, wanted",
    [
        # The thought was closed in an earlier call: nothing is forced.
        ([([TURN, 9, THINK, 9, END, 9], 2, 0), ([9], 6, 0)], [9] * 6),
        ([([TURN, 9, THINK], 12, 2), ([9], 6, 0)], [9] * 6),
        # Cut by max_new_tokens, a thought goes on counting in the next call, and knows that it was opened.
        ([([TURN, 9, THINK], 3, 5), ([9], 9, 5)], [9, 9, *EARLY, 9, 9, 9]),
        ([([TURN, 9, THINK], 3, None), ([9], 9, 5)], [9, 9, *EARLY, 9, 9, 9]),
        # So it does without an opening; and in words that are being forced.
        ([([TURN, 9], 3, 3), ([9], 9, 3)], [*OPEN, *EARLY, 9, 9, 9]),
        ([([TURN, 9, THINK], 5, 3), ([9], 6, 3)], [*EARLY[2:], 9, 9, 9, 9]),
        # Three calls.
        ([([TURN, 9, THINK], 2, 6), ([8], 2, 6), ([8, 8], 9, 6)], [9, 9, *EARLY, 9, 9, 9]),
        # Another turn begins anew, whatever was being forced; so does a thought that the caller ends.
        ([([TURN, 9, THINK], 5, 3), ([TURN, 9, THINK], 9, 4)], [9, 9, 9, 9, *EARLY, 9]),
        ([([TURN, 9, THINK], 5, 3), ([END, 9], 4, 3)], [9] * 4),
    ],
)
def test_a_next_turn_goes_on_with_the_thought_that_the_cache_holds(calls, wanted):
    out = None
    for tokens, new, most in calls:
        out = continued(out, tokens, [9] * new, most)
    assert out is not None
    assert list(out.tokens[0]) == wanted


def test_the_budget_of_a_row_that_has_ended_stands_still():
    """The first row stops within its thought while the second runs past the budget; in the next call it has some left."""
    prompts = jnp.asarray([[TURN, THINK]] * 2)
    go_on = functools.partial(generate, random_model("dense"), thinking=budget(4), stop_tokens=[STOP])
    drawn = jax.tree_util.Partial(script, jnp.asarray([[9, STOP, *[9] * 14], [9] * 16], jnp.int32))
    first = go_on(prompts, max_new_tokens=10, cache_len=48, logits_hook=drawn)
    assert list(first.lengths) == [2, 10]
    nines = jax.tree_util.Partial(script, jnp.full((2, 16), 9))
    second = go_on(jnp.asarray([[8], [8]]), max_new_tokens=8, cache=first.cache, logits_hook=nines)
    assert list(second.tokens[0]) == [9, 9, *EARLY, 9, 9]
    assert list(second.tokens[1]) == [9] * 8


def test_a_bare_cache_knows_of_no_earlier_turn():
    first = continued(None, [TURN, 9, THINK, 9, END, 9], [9, 9], 0)
    bare = Cache(**{field.name: getattr(first.cache, field.name) for field in dataclasses.fields(Cache)})
    second = continued(dataclasses.replace(first, cache=bare), [9], [9] * 8, 0)
    assert list(second.tokens[0]) == [*OPEN, *EARLY, 9, 9]
