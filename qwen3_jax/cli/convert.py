"""`qwen3-jax convert SRC DST --to hf|orbax`: from one form of a model to another."""

import ctypes
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """Convert a model between Hugging Face's form and the native one (Orbax on TensorStore), or to another dtype."""

    src: tyro.conf.Positional[str]
    """Folder of the model, of either form; or its name on the hub."""
    dst: tyro.conf.Positional[Path]
    """Folder to write; it appears whole or not at all."""
    to: Literal["hf", "orbax"]
    """hf: safetensors as the hub lays them out. orbax: a chunk for each layer and expert."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the weights; None keeps each tensor's own (FP8 becomes bfloat16)."""
    verify: bool = False
    """Read everything back and compare checksums before the folder appears."""
    overwrite: bool = False
    """Replace what stands at DST."""
    max_shard_bytes: float = 5e9
    """Of one safetensors file."""


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: the words after `qwen3-jax convert`.

    Returns:
        Exit code.
    """
    options = tyro.cli(Options, args=argv, prog="qwen3-jax convert")

    from rich.console import Console
    from rich.filesize import decimal

    from qwen3_jax.checkpoint.convert import plan_conversion
    from qwen3_jax.checkpoint.hub import local_folder

    _give_freed_memory_back()
    console = Console(highlight=False, soft_wrap=True, markup=False)
    plan = plan_conversion(
        local_folder(options.src),
        options.dst,
        options.to,
        options.dtype,
        overwrite=options.overwrite,
        max_shard_bytes=options.max_shard_bytes,
    )
    weights = plan.weights
    console.print(f"reads   {decimal(plan.bytes_read)}: {options.src} ({weights.form}, {len(weights.dtypes)} tensors)")
    console.print(f"writes  {decimal(plan.bytes_written)}: {options.dst} ({options.to})")
    console.print(f"memory  {decimal(plan.bytes_in_memory)} at most")
    for note in weights.notes:
        console.print(f"note    {note}")
    start = time.perf_counter()
    plan.run(verify=options.verify)
    seconds = time.perf_counter() - start
    verified = ", read back and compared" if options.verify else ""
    console.print(f"done    {seconds:.1f} s, {plan.bytes_written / seconds / 1e6:.0f} MB/s{verified}")
    return 0


def _give_freed_memory_back() -> None:
    """Let what a block took go back to the system when it is freed, so that memory does not depend on a model's depth.

    glibc keeps freed blocks of up to 32 MB, in an arena for each thread: 235B-A22B's shapes then peaked at 0.41 GB with 2
    layers and at 0.50 with 8; so at 0.18 with either. Elsewhere there is no mallopt, and nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, arena_max = -3, -8  # names and numbers of malloc.h
        mallopt(mmap_threshold, 2**20)
        mallopt(arena_max, 1)
