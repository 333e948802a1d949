"""A thinking budget, enforced inside the jitted loop: when it is spent, words that end the thought are written for the model.

Source: Qwen3 technical report section 4.3, and the form of words in the Qwen documentation's page on the thinking budget.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qwen3_jax.generation.values import check_ids, integers, known

UNLIMITED = np.iinfo(np.int32).max
_FORCED = 64  # forced tokens get a multiple of so many slots, so that their number seldom makes a program be traced again


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
    """How long a row may think. `Tokenizer.thinking_budget` makes it.

    A row thinks while neither its output nor its prompt, from the last `turn_id` on, holds `end_id`; the prompt begins with
    what the cache of an earlier turn holds. The budget counts the generated tokens of that turn, from the first one. When it is
    spent, `early_stop_ids` are written whatever the model says, `open_ids` before them if no `think_id` has been seen; they
    count as new tokens. Then the model goes on freely.

    Attributes:
        tokens: budget in tokens, a number >= 0 or one per row [B].
        end_id: the token `</think>`.
        early_stop_ids: tokens that end the thought, `end_id` among them.
        open_ids: tokens of `<think>` and a line break; () where thoughts need no opening.
        think_id: the token `<think>`; -1 where there is none.
        turn_id: the token `<|im_start|>` that opens a turn; -1: the whole prompt is the turn.
    """

    tokens: Any
    end_id: Any
    early_stop_ids: Any
    open_ids: Any = ()
    think_id: Any = -1
    turn_id: Any = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetRule:
    """What all rows share of a budget, in the fixed form that the loop reads.

    Attributes:
        end_id, think_id, turn_id: int32 scalars.
        forced: [F] int32, open_ids and then early_stop_ids.
        opening, total: int32 scalars, how many of `forced` are open_ids, and how many there are.
    """

    end_id: Any
    think_id: Any
    turn_id: Any
    forced: Any
    opening: Any
    total: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetState:
    """Where each row stands.

    Attributes:
        thinking: [B] bool, no end_id yet.
        opened: [B] bool, think_id was seen.
        next_forced: [B] int32, index of the next forced token; -1 while none is forced.
        earlier: [B] int32, tokens that earlier calls generated in this turn.
    """

    thinking: Any
    opened: Any
    next_forced: Any
    earlier: Any


def budget_tokens(budget: ThinkingBudget | None, batch: int) -> Int[Array, " B"]:
    """How many tokens each row's thought may take; UNLIMITED without a budget.

    Args:
        budget: the caller's.
        batch: rows.

    Returns:
        [B] int32.

    Raises:
        ValueError: a negative budget, or one that is neither a number nor [B].
    """
    given = UNLIMITED if budget is None else budget.tokens
    tokens, values = given, known(given)
    if values is not None:
        if not np.issubdtype(values.dtype, np.integer) or np.any(values < 0):
            raise ValueError(f"thinking: tokens is {given}: accepted is an integer >= 0, or one per row")
        tokens = np.minimum(values, UNLIMITED)
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.shape not in ((), (batch,)):
        raise ValueError(f"thinking: tokens has shape {list(tokens.shape)}: accepted is a number or [{batch}], one per row")
    return jnp.broadcast_to(tokens, (batch,))


def budget_rule(budget: ThinkingBudget | None, vocabulary: int) -> BudgetRule:
    """The rule of a budget; None has one too, which nothing makes use of, so that both are the same program.

    Args:
        budget: the caller's.
        vocabulary: how many tokens there are.

    Returns:
        The rule.

    Raises:
        ValueError: no early_stop_ids, or ids that are no tokens.
    """
    none = budget is None
    if budget is None:
        budget = ThinkingBudget(tokens=UNLIMITED, end_id=-1, early_stop_ids=(0,))
    opening, closing = (_ids(budget, name, 1, vocabulary) for name in ("open_ids", "early_stop_ids"))
    if closing.shape[0] == 0:
        raise ValueError("thinking: early_stop_ids is empty: accepted is at least one token")
    total = opening.shape[0] + closing.shape[0]
    return BudgetRule(
        end_id=_ids(budget, "end_id", 0, vocabulary, optional=none),
        think_id=_ids(budget, "think_id", 0, vocabulary, optional=True),
        turn_id=_ids(budget, "turn_id", 0, vocabulary, optional=True),
        forced=jnp.concatenate([opening, closing, jnp.zeros((-total % _FORCED,), jnp.int32)]),
        opening=jnp.int32(opening.shape[0]),
        total=jnp.int32(total),
    )


def _ids(budget: ThinkingBudget, name: str, ndim: int, vocabulary: int, optional: bool = False) -> Int[Array, "..."]:
    """A field of the budget as int32; an optional one may be -1."""
    given = getattr(budget, name)
    ids = integers(given)
    if ids is None or ids.ndim != ndim:
        raise ValueError(f"thinking: {name} is {given!r}: accepted is {'a sequence of token ids' if ndim else 'a token id'}")
    values = known(ids)
    check_ids(f"thinking: {name}", ids, vocabulary, real=not optional or values is None or values != -1)
    return jnp.asarray(ids, jnp.int32)


def begin(
    rule: BudgetRule,
    tokens: Int[Array, "B S"],
    generated: Bool[Array, "B S"],
    given: Bool[Array, "B S"],
    next_forced: Int[Array, " B"],
) -> BudgetState:
    """Where rows stand after their prompts.

    Args:
        rule: the budget.
        tokens: the text of each row, prompt and all that the cache held before it; -1 where there is none.
        generated: which of them earlier calls generated.
        given: which of them are this call's prompt.
        next_forced: where earlier calls stood among the forced tokens.

    Returns:
        The state: whether the turn that the prompt opens or goes on with is thinking, whether the thought was opened, and how
        long it has been.
    """
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    there = tokens >= 0
    turns, ends = there & (tokens == rule.turn_id), there & (tokens == rule.end_id)
    here = there & (index >= jnp.max(jnp.where(turns, index, 0), axis=1, keepdims=True))
    # What was being forced is over where the caller ends the thought or begins another turn.
    next_forced = jnp.where(jnp.any(given & (turns | ends), axis=1), -1, next_forced)
    return BudgetState(
        thinking=~jnp.any(here & ends, axis=1) & (next_forced < rule.total),
        opened=jnp.any(here & (tokens == rule.think_id), axis=1),
        next_forced=next_forced,
        earlier=jnp.sum(here & generated, axis=1, dtype=jnp.int32),
    )


def enforce(
    rule: BudgetRule, most: Int[Array, " B"], state: BudgetState, step: Int[Array, ""], tokens: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Bool[Array, " B"], BudgetState]:
    """Replace the model's tokens where a budget is spent.

    Args:
        rule: the budget.
        most: how many tokens each row's thought may take.
        state: before this step.
        step: tokens that every running row has generated so far in this call.
        tokens: what the model drew.

    Returns:
        The tokens to be written, which of them were forced, and the state after them.
    """
    spent = state.thinking & (state.next_forced < 0) & (step + state.earlier >= most)
    first = jnp.where(state.opened, rule.opening, 0)
    at = jnp.where(spent, first, state.next_forced)
    forced = (at >= 0) & (at < rule.total)
    tokens = jnp.where(forced, rule.forced[jnp.clip(at, 0, rule.forced.shape[0] - 1)], tokens)
    ended = (tokens == rule.end_id) | (forced & (at + 1 == rule.total))
    state = BudgetState(
        thinking=state.thinking & ~ended,
        opened=state.opened | (tokens == rule.think_id),
        next_forced=jnp.where(forced, at + 1, state.next_forced),
        earlier=state.earlier,
    )
    return tokens, forced, state
