"""What all readers and writers share: the one error, in one line; strict JSON; a config that the weights can fill."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from qwen3_jax.config import Qwen3Config

TIMES_TOO_LARGE = 4  # a config that asks for so many times what is there is not this model's


class CheckpointError(ValueError):
    """A checkpoint that is refused: which file and tensor, what was found, what is accepted."""


@contextlib.contextmanager
def system_errors(where: object) -> Iterator[None]:
    """Turn whatever the system refuses in the block into one line: the file, or `where`, and the reason.

    Args:
        where: named when the system names no file.

    Raises:
        CheckpointError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        name = where if error.filename is None else error.filename
        raise CheckpointError(f"{name}: {error.strerror or error}") from error


def parse_json(text: bytes, where: object) -> dict[str, Any]:
    """A JSON object in UTF-8 in which no name stands twice.

    Args:
        text: the JSON.
        where: the file, for messages.

    Returns:
        Its content.

    Raises:
        CheckpointError: it is none; an integer of more digits than Python reads is one reason.
    """
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON object: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} is no JSON object but {type(content).__name__}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise CheckpointError(f"{name!r} stands twice")
        content[name] = value
    return content


def check_size(config: Qwen3Config, where: object, tensors: int, elements: int) -> None:
    """Refuse a config far larger than the weights before anything of its size is built.

    Args:
        config: the model's.
        where: the folder, for messages.
        tensors: how many there are; a layer has several.
        elements: of all of them.

    Raises:
        CheckpointError: both figures. Up to four times, the caller can name what is missing.
    """
    if config.num_hidden_layers > TIMES_TOO_LARGE * tensors:
        raise CheckpointError(
            f"{where}: config.json makes {config.num_hidden_layers:,} layers; the weights hold {tensors:,} tensors"
        )
    needed = config.num_params()
    if needed > TIMES_TOO_LARGE * elements:
        raise CheckpointError(f"{where}: config.json makes {needed:,} parameters; the weights hold {elements:,}")
