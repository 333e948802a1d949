"""Dtypes that weights may have, and casts between them that lose no value to infinity."""

from typing import Any

import ml_dtypes
import numpy as np

from qwen3_jax.checkpoint.reading import CheckpointError


def float_dtype(argument: str, given: Any) -> np.dtype:
    """A dtype that weights may have.

    Args:
        argument: its name, for the message.
        given: what numpy understands as a dtype.

    Returns:
        bfloat16, float16 or float32.

    Raises:
        CheckpointError: anything else.
    """
    try:
        dtype = np.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in ("bfloat16", "float16", "float32"):
        raise CheckpointError(f"{argument} is {given if dtype is None else dtype}: accepted are bfloat16, float16 and float32")
    return dtype


def holding(first: np.dtype, second: np.dtype) -> np.dtype:
    """The narrowest of bfloat16, float16 and float32 that holds every value of two of them.

    Args:
        first: one of the three.
        second: one of the three.
    """
    return first if first == second else np.dtype(np.float32)


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The values in another dtype, none of them lost to infinity.

    Args:
        values: float64, float32, float16 or bfloat16.
        dtype: float32, float16 or bfloat16.
        name: the tensor, for the message.

    Returns:
        The values rounded to `dtype`; the array itself where it has that dtype.

    Raises:
        CheckpointError: a finite value that `dtype` cannot hold.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):  # said below, by name
        rounded = values.astype(dtype)
    if _largest(dtype) < _largest(values.dtype) and any_infinite(rounded):
        lost = np.isinf(rounded) & np.isfinite(values)
        if lost.any():
            largest = float(np.max(np.abs(values[lost].astype(np.float64))))
            raise CheckpointError(
                f"{name} has a value of {largest:.6g}, and {dtype.name} ends at {_largest(dtype):.6g}: "
                f"accepted is {'bfloat16 or float32' if dtype == np.float16 else 'float32'}"
            )
    return rounded


def _largest(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def any_infinite(values: np.ndarray) -> bool:
    """Whether an infinity or a NaN is there: their bits are the largest of either sign. On bfloat16 7 times as fast as isinf.

    Args:
        values: of any float dtype that has infinities.
    """
    if not values.size:
        return False
    unsigned, signed = np.dtype(f"u{values.itemsize}"), np.dtype(f"i{values.itemsize}")
    infinity = int(np.array(np.inf, values.dtype).view(unsigned))
    bits = np.ascontiguousarray(values).reshape(-1)
    sign = 2 ** (8 * values.itemsize - 1)
    return int(bits.view(signed).max()) >= infinity or int(bits.view(unsigned).max()) >= infinity + sign
