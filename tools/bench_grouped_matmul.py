"""The grouped matmul on this machine beside jax.lax.ragged_dot: forward, and forward with both gradients.

    .venv/bin/python tools/bench_grouped_matmul.py

Rows are spread over the experts as a random router would. The candidates take turns; the table gives the best of all turns, in
milliseconds, and ragged_dot's time over ours.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels import grouped_matmul

# rows, experts, inner, outer; the last two are decode, and prefill of 32 tokens, of 30B-A3B's gate.
SHAPES = ((4096, 16, 256, 512), (8192, 64, 512, 256), (8, 128, 2048, 768), (256, 128, 2048, 768))


def candidates(backward: bool) -> dict[str, Callable]:
    """Jitted functions of (lhs, rhs [G, n, k], sizes)."""

    def ours(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, transpose_rhs=True)

    def ragged(lhs, rhs, sizes):
        return jax.lax.ragged_dot(lhs, rhs.swapaxes(1, 2), sizes)

    def with_gradients(run):
        return lambda lhs, rhs, sizes: jax.grad(lambda lhs, rhs: run(lhs, rhs, sizes).sum(), (0, 1))(lhs, rhs)

    plain = {"ours": ours, "ragged_dot": ragged}
    return {name: jax.jit(with_gradients(run) if backward else run) for name, run in plain.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    table = Table("rows", "experts", "inner x outer", "pass", "ours, ms", "ragged_dot, ms", "ratio")
    draw = np.random.default_rng(0)
    for rows, experts, inner, outer in SHAPES:
        lhs = jnp.asarray(draw.standard_normal((rows, inner)), jnp.float32)
        rhs = jnp.asarray(draw.standard_normal((experts, outer, inner)), jnp.float32)
        sizes = jnp.asarray(draw.multinomial(rows, draw.dirichlet(np.full(experts, 4.0))), jnp.int32)
        for backward in (False, True):
            best: dict[str, float] = {}
            runs = candidates(backward)
            for turn in range(options.turns + 1):
                for name, run in runs.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(run(lhs, rhs, sizes))
                    if turn:  # the first compiles
                        best[name] = min(best.get(name, np.inf), 1e3 * (time.perf_counter() - begin))
            figures = (f"{best['ours']:.1f}", f"{best['ragged_dot']:.1f}", f"{best['ragged_dot'] / best['ours']:.1f}")
            table.add_row(str(rows), str(experts), f"{inner} x {outer}", "both" if backward else "forward", *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
