"""Compiled programs kept on disk, so that the second start of a process compiles nothing."""

import importlib.metadata
import os
import tempfile
from pathlib import Path

# Who has a say in what a program is compiled to; those that are not installed are left out.
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "qwen3-jax")


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder, and take from it what an earlier process compiled.

    Call it before the first program is compiled. Within the folder there is one for each set of versions (PACKAGES): what no
    other than an old version would find can be deleted. In there jax has an entry for each program; its key holds the
    program with the mesh, its layouts, the devices it runs on, their kind, the features of a CPU, and the compiler's
    version and flags. Of several processes the first one writes.

    Whoever can write to the folder can run code in this process: it is made for its owner alone.

    Args:
        folder: None is the one that JAX_COMPILATION_CACHE_DIR or jax's config names, as it stands; without it,
            `qwen3-jax` in $XDG_CACHE_HOME, or in ~/.cache.

    Returns:
        Where the entries are.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    given = jax.config.jax_compilation_cache_dir
    if folder is None and given:
        return Path(given)
    place = _user_folder() if folder is None else Path(folder).absolute()
    place = place / "-".join(f"{name}_{version}" for name, version in _versions())
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"compilation cache {place}: {error.strerror}: accepted is a folder that can be made and written to"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(place))
    # Small programs too: a start compiles some fifty of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # jax keeps the first folder that it has used
    return place


def _user_folder() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    # By the XDG base directory specification a relative path counts for none.
    return (Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~/.cache"))) / "qwen3-jax"


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
