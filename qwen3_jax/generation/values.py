"""What arguments hold: integers in any form that numpy reads, values where they are known, token ids within the vocabulary."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def known(given: Any) -> np.ndarray | None:
    """The values of an argument; None where they are traced, or lie on another host."""
    if isinstance(given, jax.core.Tracer):
        return None
    if isinstance(given, jax.Array) and not (given.is_fully_addressable or given.is_fully_replicated):
        return None
    try:
        return np.asarray(given)
    except jax.errors.TracerArrayConversionError:  # a sequence that holds traced numbers
        return None
    except ValueError:  # rows of different lengths: an array of no number type, which nothing accepts
        return np.asarray(None)


def integers(given: Any) -> jax.Array | np.ndarray | None:
    """The argument as an array of integers; None where it holds anything else, booleans too."""
    array = given if isinstance(given, jax.Array) else known(given)
    if array is None:
        array = jnp.asarray(given)
    if not array.size:
        array = array.astype(np.int32)
    return array if jnp.issubdtype(array.dtype, jnp.integer) else None


def count(name: str, given: Any, low: int, high: int | None = None) -> int:
    """An argument that is one integer, known when a program is traced.

    Args:
        name: the argument's.
        given: int, or what numpy and jax have for it.
        low: the least accepted.
        high: the largest accepted; None is any.

    Returns:
        It as an int.

    Raises:
        ValueError: anything else, or an integer out of bounds.
    """
    try:
        value = None if isinstance(given, bool) else operator.index(given)
    except TypeError:
        value = None
    if value is None or value < low or (high is not None and value > high):
        accepted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name} is {given!r}: accepted is {accepted}")
    return value


def check_ids(name: str, ids: Any, vocabulary: int, real: Any = True) -> None:
    """Refuse what is no token, where ids are known.

    Args:
        name: of the argument.
        ids: integers.
        vocabulary: how many tokens there are.
        real: which of the ids count.

    Raises:
        ValueError: an id outside of the vocabulary.
    """
    values = known(ids)
    if values is None:
        return
    wrong = values[((values < 0) | (values >= vocabulary)) & real]
    if wrong.size:
        raise ValueError(f"{name}: {wrong[0]} is no token of the model: accepted are 0 to {vocabulary - 1}")
