"""Kernels of a mixture-of-experts transformer as public functions on jax arrays; depends on jax alone.

Each op is a package: the public function with its checks, a definition in plain jax.numpy, and the implementations that
are chosen by the platform a program is lowered for.
"""

# The functions are bound plainly, not lazily: `attention` and `grouped_matmul` are also the names of the sub-packages,
# and the import of a sub-package would shadow a lazy attribute of the same name.
from pallas_kernels.attention import attention
from pallas_kernels.cast import cast
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.late import load_kernels
from pallas_kernels.norm_rope import rms_norm, rms_norm_rope
from pallas_kernels.quantized import dequantize, quantize
from pallas_kernels.rows import gradient_made_once, rows_matmul

__all__ = [
    "attention",
    "cast",
    "dequantize",
    "gradient_made_once",
    "grouped_matmul",
    "load_kernels",
    "quantize",
    "rms_norm",
    "rms_norm_rope",
    "rows_matmul",
]
