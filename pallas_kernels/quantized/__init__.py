"""Matrices as codes of 8 or 4 bits and a scale for each block of them: the public ops and their checks."""

import functools
import warnings
from typing import Any, Literal, Never

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels.checks import check_float, check_shape
from pallas_kernels.quantized import reference, tpu
from pallas_kernels.quantized.formats import KINDS, bits

__all__ = ["FROZEN", "dequantize", "quantize"]

FROZEN = (
    "dequantize: scales are differentiated, and they are frozen as their codes are; accepted is a derivative in what is beside "
    "them, inputs or adapters"
)


def quantize(x: Float[Array, "*L out in_"], kind: str, *, block: int = 64) -> tuple[Integer[Array, "..."], Float[Array, "..."]]:
    """Codes of matrices, the nearest in blocks of their rows, and the blocks' scales.

    A scale is its block's largest magnitude over the largest value that a code stands for (127, 7 or 1), rounded to bfloat16.

    Args:
        x: matrices [..., out, in], any float dtype.
        kind: "int8", "int4" (from -7 to 7) or "nf4" (the 16 values of arXiv 2305.14314).
        block: values along `in` that share a scale.

    Returns:
        Codes: int8 [..., out, in], or of 4 bits uint8 [..., out / 2, in], where byte i has row 2i in its low half and row
        2i + 1 in its high one; scales: bfloat16 [..., in / block, out].

    Raises:
        ValueError: another kind; x has fewer than two axes, rows that are no whole blocks, or an odd number of them for 4 bits.
    """
    op = "quantize"
    check_float(op, x=x)
    _check_kind(op, kind)
    if x.ndim < 2:
        raise ValueError(f"{op}: x is {x.dtype}{list(x.shape)}; accepted is [..., out, in]")
    out, inner = x.shape[-2:]
    if block < 1 or inner % block:
        rest = f": {inner} / {block} leaves {inner % block}" if block > 0 else ""
        raise ValueError(f"{op}: rows of {inner} in blocks of {block}{rest}; accepted is a block that divides them")
    if bits(kind) == 4 and out % 2:
        raise ValueError(f"{op}: {out} rows in {kind}, two of which share bytes; accepted is an even number")
    return reference.quantize(x, kind, block)


def dequantize(
    codes: Integer[Array, "*L rows in_"],
    scales: Float[Array, "*L blocks out"],
    kind: str,
    dtype: DTypeLike,
    *,
    implementation: Literal["reference", "tpu"] | None = None,
) -> Float[Array, "*L out in_"]:
    """The matrices that codes and scales stand for, made at this point of the program on a TPU too.

    As with `cast`, the TPU compiler would move the plain operations out of a loop over layers and keep the matrices of all.

    Args:
        codes: as `quantize` makes them.
        scales: likewise; finite: the kernel multiplies each by zeros too, so one that is not spreads along its row.
        kind: likewise.
        dtype: of the result, float32 or a 16-bit float.
        implementation: "tpu" (a Pallas kernel) or "reference"; None is "tpu" where the program is lowered for a TPU, scales are
            bfloat16 and a block of the kernel needs 512 of them at most: blocks of 2, 4, 8 ... columns do, those of 1, or of
            25 in rows of 25,600, do not. On a TPU that is warned of. Inside shard_map "tpu" needs check_vma=False.

    Returns:
        [..., out, in], each code's value times its block's scale in float32, rounded once.

    Raises:
        ValueError: arrays that `quantize` does not make, a matrix that the implementation does not take; where it is
            differentiated in scales, of which it has no derivative.
    """
    op = "dequantize"
    _check_kind(op, kind)
    check_float(op, scales=scales)
    wanted = jnp.dtype(jnp.int8 if bits(kind) == 8 else jnp.uint8)
    if codes.dtype != wanted or codes.ndim < 2 or scales.ndim != codes.ndim:
        raise ValueError(
            f"{op}: codes are {codes.dtype}{list(codes.shape)} and scales {scales.dtype}{list(scales.shape)}; accepted of "
            f"{kind} are {wanted} [..., rows, in] and floats [..., in / block, out]"
        )
    *leading, rows, inner = codes.shape
    out, blocks = rows * 8 // bits(kind), scales.shape[-2]
    check_shape(op, "scales", scales, (*leading, blocks, out), f"the rows of codes of {bits(kind)} bits")
    if blocks == 0 or inner % blocks:
        raise ValueError(f"{op}: {blocks} scales of rows of {inner}; accepted is a divisor")
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f"{op}: dtype is {dtype}; accepted are float32, bfloat16 and float16")
    if implementation not in (None, "tpu", "reference"):
        raise ValueError(f"{op}: implementation is {implementation!r}; accepted are 'tpu', 'reference' and None")
    takes = codes.size > 0 and tpu.takes(inner, blocks) and scales.dtype == jnp.bfloat16
    said = f"{out} x {inner} by {blocks} scales a row of {scales.dtype}; 'tpu' accepts scales of bfloat16, {tpu.MOST} a block"
    if implementation == "tpu" and not takes:
        raise ValueError(f"{op}: {said}")
    scales = _frozen(scales)
    by_name = {
        name: functools.partial(module.dequantize, kind=kind, dtype=dtype)
        for name, module in (("tpu", tpu), ("reference", reference))
    }
    if implementation is None and not takes and codes.size and jax.default_backend() == "tpu":
        warnings.warn(f"{op}: {said}: in a loop over layers the compiler will keep the matrices of all", stacklevel=2)
    if implementation is not None or not takes:
        return by_name[implementation or "reference"](codes, scales)
    return jax.lax.platform_dependent(codes, scales, tpu=by_name["tpu"], default=by_name["reference"])


@jax.custom_jvp
def _frozen(scales: jax.Array) -> jax.Array:
    return scales


@_frozen.defjvp
def _differentiated(primals: Any, tangents: Any) -> Never:
    raise ValueError(FROZEN)


def _check_kind(op: str, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is {kind!r}; accepted are {', '.join(KINDS)}")
