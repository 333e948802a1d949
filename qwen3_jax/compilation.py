"""Compiled programs kept on disk, so that the second start of a process compiles nothing."""

import contextlib
import importlib.metadata
import logging
import os
import secrets
import tempfile
import zlib
from pathlib import Path
from typing import Any

try:
    from compression import zstd  # pyrefly: ignore[missing-import]  # of Python 3.14
except ImportError:
    try:
        import zstandard as zstd
    except ImportError:
        zstd = None

logger = logging.getLogger(__name__)

# Who has a say in what a program is compiled to; those that are not installed are left out.
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "qwen3-jax")
CHECKED = "qwen3-jax-checked"  # its time is that of the last look at the entries
SHARED = "qwen3-jax-shared"  # begins the name of a file that is there while processes look whether they share the folder
ZSTD, ZLIB = b"\x28\xb5\x2f\xfd", b"\x78"  # what jax's entries begin with
PIECE = 2**20  # bytes read at once


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
        mend_compilation_cache()
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
    mend_compilation_cache()
    return place


def mend_compilation_cache() -> list[Path]:
    """Remove entries of jax's compilation cache that a kill or a full disk has cut off, so that they are written anew.

    jax cannot read such an entry, and does not write one that is there: every start would compile its program again. Only
    entries written since the last look are read; a folder in a store, where objects appear whole, is left alone.

    Returns:
        What was removed; each is told as a warning.
    """
    import jax

    given = jax.config.jax_compilation_cache_dir
    if not given or "://" in given or not os.path.isdir(given):
        return []
    removed: list[Path] = []
    try:
        checked = Path(given) / CHECKED
        last = checked.stat().st_mtime_ns if checked.exists() else 0
        # Before the look, so that what is written meanwhile is looked at next time; by the clock of the file system.
        with tempfile.NamedTemporaryFile(prefix=CHECKED, dir=given, delete=False) as now:
            pass
        for entry in Path(given).glob("*-cache"):
            if entry.stat().st_mtime_ns >= last and not _whole(entry):
                entry.unlink(missing_ok=True)
                removed.append(entry)
                logger.warning("%s was cut off, by a kill or a full disk: removed, and compiled anew where it is wanted", entry)
        os.replace(now.name, checked)
    except OSError as error:  # a cache that may only be read, or that others clear up
        logger.warning("%s cannot be looked through for entries that were cut off: %s", given, error)
    return removed


def share_compilation_cache() -> bool:
    """Let go of jax's compilation cache where process 0 alone would find its programs; every process calls it.

    Process 0 alone writes entries. Where each process has a folder of its own, the others would compile as ever. On GPUs they
    would wait for its part in the search for the fastest kernels, which compilers of several processes divide among
    themselves. On CPUs they never find one, for jax's key holds what each process's own devices are, and process 0, who need
    not compile, would come to the first collective that much earlier: Gloo waits 30 seconds, and ends the run.

    Returns:
        Whether the cache is still used, or there is none.
    """
    import jax

    from qwen3_jax.checkpoint.together import all_processes

    if jax.process_count() == 1:
        return True
    if _keys_differ():
        used = bool(jax.config.jax_compilation_cache_dir)
        _let_go()
        return not used
    team, given = all_processes(), jax.config.jax_compilation_cache_dir or ""
    name = f"{SHARED}-{team.texts(secrets.token_hex(8))[0]}"
    mark = Path(given) / name
    local = bool(given) and "://" not in given
    with contextlib.suppress(OSError):  # then nobody finds it
        if team.leads and local:
            mark.touch()
    team.told("")  # it is there
    found = team.texts(given if not local else "shared" if mark.exists() else "own")
    with contextlib.suppress(OSError):
        if team.leads and local:
            mark.unlink()
    if len(set(found)) == 1 and found[0] != "own":
        return True
    _let_go()
    return False


def _keys_differ() -> bool:
    """Whether each process has a key of its own for one and the same program."""
    import jax

    return jax.default_backend() == "cpu"


def _let_go() -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def _whole(entry: Path) -> bool:
    """Whether an entry decompresses to its end; what is of no form that is known counts as whole."""
    with entry.open("rb") as file:
        piece = file.read(PIECE)
        if len(piece) < len(ZSTD):
            return False
        if piece.startswith(ZSTD) and zstd is not None:
            decompressor: Any = zstd.ZstdDecompressor()
            if hasattr(decompressor, "decompressobj"):  # zstandard's
                decompressor = decompressor.decompressobj()
            broken: type[Exception] = zstd.ZstdError
        elif piece.startswith(ZLIB):
            decompressor, broken = zlib.decompressobj(), zlib.error
        else:
            return True
        try:
            while piece:
                decompressor.decompress(piece)
                if decompressor.eof:
                    return True
                piece = file.read(PIECE)
        except broken:
            return False
    return False


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
