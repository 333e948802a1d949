"""Compiled programs of the commands that run or train a model: kept for the next start, unless the user has said no."""

import sys


def keep_programs(wanted: bool) -> None:
    """Use the user's compilation cache; where its folder cannot be written to, one line says so and the command goes on.

    Args:
        wanted: by the user.
    """
    if not wanted:
        return
    from qwen3_jax.compilation import use_compilation_cache

    try:
        use_compilation_cache()
    except ValueError as error:
        print(f"qwen3-jax: {error}; this start compiles everything", file=sys.stderr)
