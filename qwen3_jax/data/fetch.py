"""Prepared folders of a store, copied to a disk: ArrayRecord's reader opens no other files."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from qwen3_jax.data.files import DataError, file_system, store_errors

CACHE = Path("~/.cache/qwen3_jax/data")


def fetch(url: str, index_name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """A store's folder on this machine's disk; what is there already is not copied again.

    Several processes may do this at once: each file takes its name when it is whole.

    Args:
        url: of a folder that `prepare` has written.
        index_name: of the file that says what else there is.
        cache: folder on a disk; None: CACHE.

    Returns:
        The copy: a folder of its own for this address and index.

    Raises:
        DataError: what the store refuses, no index there, too small a disk, or a file of another size than the index says.
    """
    system, root = file_system(url.rstrip("/"))
    content = fetch_index(url, index_name)
    parts: list[dict[str, Any]] = [part for part in json.loads(content)["parts"] if part["documents"]]
    # Of the index too: what was prepared anew at the same address is another folder.
    told = hashlib.sha256(url.encode() + b"\0" + content).hexdigest()[:16]
    place = Path(CACHE if cache is None else cache).expanduser() / f"{root.rsplit('/', 1)[-1]}-{told}"
    with store_errors(str(place)):
        place.mkdir(parents=True, exist_ok=True)
        wanted = [part for part in parts if not _is_there(place, part)]
        needed, free = sum(part["bytes"] + 4 * part["documents"] for part in wanted), shutil.disk_usage(place).free
        if needed > free:
            raise DataError(
                f"{url} needs {decimal(needed)} in {place} and its disk has {decimal(free)} free: accepted is another folder "
                "for copies (data.cache in a run's file), or a mount of the store as the source's folder"
            )
    for part in wanted:
        for name in (f"{part['name']}.lengths.npy", f"{part['name']}.array_record"):
            new = place / f".{name}.{secrets.token_hex(4)}.tmp"
            try:
                with store_errors(f"{url}/{name}"):
                    system.get_file(f"{root}/{name}", str(new))
                os.replace(new, place / name)
            finally:
                new.unlink(missing_ok=True)
        if not _is_there(place, part):
            raise DataError(f"{url}/{part['name']}.array_record has not the {part['bytes']} bytes that {index_name} says")
    new = place / f".{index_name}.{secrets.token_hex(4)}.tmp"
    new.write_bytes(content)
    os.replace(new, place / index_name)
    return place


def fetch_index(url: str, index_name: str) -> bytes:
    """What a store's folder says of itself; nothing is copied.

    Args:
        url: of a folder that `prepare` has written.
        index_name: of the file that says what there is.

    Returns:
        The file's content.

    Raises:
        DataError: what the store refuses, or no such file there.
    """
    system, root = file_system(url.rstrip("/"))
    with store_errors(url):
        try:  # and do not ask first: an answer may come from a list of this process's that is older than the folder
            return system.cat_file(f"{root}/{index_name}")
        except FileNotFoundError as error:
            raise DataError(
                f"{url} has no {index_name}: accepted is a folder that `qwen3-jax data prepare` has written"
            ) from error


def _is_there(place: Path, part: dict[str, Any]) -> bool:
    documents, lengths = place / f"{part['name']}.array_record", place / f"{part['name']}.lengths.npy"
    return lengths.is_file() and documents.is_file() and documents.stat().st_size == part["bytes"]
