"""One of two processes: told to end before it has asked, in a run that goes on at step 60.

Arguments: a folder of its own for compiled programs, and one that both share.
"""

import os
import signal
import sys
import time

import jax

from qwen3_jax import compilation
from qwen3_jax.compilation import share_compilation_cache, use_compilation_cache
from qwen3_jax.parallel.processes import initialize
from qwen3_jax.training.stopping import Stopping


def asked_until_told(stopping: Stopping, step: int) -> int | None:
    """Before which step it is told to end; None where a minute has not brought it.

    Twenty steps a second, as a run makes them: the others hear of a signal when jax's threads have come to it.
    """
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if stopping.asked(step):
            return step
        step += 1
        time.sleep(0.05)
    return None


def main() -> None:
    """What tests/training/test_stopping.py reads."""
    own, shared = sys.argv[1:]
    use_compilation_cache(shared)
    processes = initialize(mesh="data=-1")
    print("on cpu", share_compilation_cache(), jax.config.jax_compilation_cache_dir, flush=True)
    compilation._keys_differ = lambda: False  # as on chips
    use_compilation_cache(own)
    print("own", share_compilation_cache(), jax.config.jax_compilation_cache_dir, flush=True)
    place = use_compilation_cache(shared)
    print("shared", share_compilation_cache(), jax.config.jax_compilation_cache_dir == str(place), flush=True)
    with Stopping() as stopping:
        if processes.id == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        # jax looks for the signal once a second, so both have mostly heard of it when they begin to ask.
        time.sleep(1.5)
        print("asked", asked_until_told(stopping, 60), flush=True)


if __name__ == "__main__":
    main()
