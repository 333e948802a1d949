"""Checks of arguments at a public op's door: a ValueError names the argument, what it is, and what is accepted."""

import jax.numpy as jnp
from jax import Array


def _found(value: Array) -> str:
    return f"{value.dtype}{list(value.shape)}"


def check_float(op: str, **values: Array) -> None:
    """Refuses arrays that are not of a float dtype.

    Args:
        op: name of the public op, for the message.
        **values: the arrays by argument name.

    Raises:
        ValueError: names the first array of another dtype.
    """
    for name, value in values.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{op}: {name} is {_found(value)}; accepted is a float dtype (float32, bfloat16, float16)")


def check_int32(op: str, **values: Array) -> None:
    """Refuses arrays that are not int32.

    Args:
        op: name of the public op, for the message.
        **values: the arrays by argument name.

    Raises:
        ValueError: names the first array of another dtype.
    """
    for name, value in values.items():
        if value.dtype != jnp.int32:
            raise ValueError(f"{op}: {name} is {_found(value)}; accepted is int32")


def check_rank(op: str, name: str, value: Array, axes: str) -> None:
    """Refuses an array whose rank is not that of the named axes.

    Args:
        op: name of the public op, for the message.
        name: the argument.
        value: the array.
        axes: names of the axes, separated by spaces.

    Raises:
        ValueError: names the argument, its shape and the axes.
    """
    if value.ndim != len(axes.split()):
        raise ValueError(f"{op}: {name} is {_found(value)}; accepted is [{', '.join(axes.split())}]")


def check_shape(op: str, name: str, value: Array, shape: tuple[int, ...], reason: str) -> None:
    """Refuses an array of another shape.

    Args:
        op: name of the public op, for the message.
        name: the argument.
        value: the array.
        shape: the one accepted.
        reason: where the accepted shape comes from, as "B, T of q".

    Raises:
        ValueError: names the argument, its shape and the one accepted.
    """
    if value.shape != shape:
        raise ValueError(f"{op}: {name} is {_found(value)}; accepted is {list(shape)} ({reason})")
