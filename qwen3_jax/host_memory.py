"""Host memory that a process on CPUs frees is kept for its next program, in place of being fetched from the kernel anew.

XLA:CPU asks for a program's temporaries each time it runs, and gives them back when it ends. glibc hands blocks of that size
to the kernel at once, so that every training step has all its pages made and zeroed again: a quarter of a small model's step.
"""

import ctypes
import importlib.util
import os

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")  # modules of jax's plugins


def keep_freed_memory() -> bool:
    """Have the C library keep all memory that this process frees, for what is asked for next.

    Call it before jax starts its devices: threads that have memory of their own by then go on giving it back. The process stays
    as large as it once was. With more than one thread at work on small blocks malloc waits more often, for all share one arena.

    Returns:
        Whether it is so; False where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none, Windows no library of that name
        return False
    # Blocks above 32 MB are mapped, whatever the threshold, unless nothing may be; arenas of threads end at 64 MB.
    return all(mallopt(name, value) == 1 for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))


def keep_freed_memory_on_cpu() -> bool:
    """The same where jax will run on CPUs: JAX_PLATFORMS says so, or no accelerator's plugin is installed.

    Returns:
        Whether it is so.
    """
    named = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    on_cpu = named == "cpu" or (not named and not any(map(importlib.util.find_spec, _ACCELERATORS)))
    return on_cpu and keep_freed_memory()
