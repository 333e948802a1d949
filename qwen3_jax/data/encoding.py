"""A document's bytes in an ArrayRecord file: little-endian uint32, one a token.

The low 31 bits are the token's id. The highest bit says that the token is no target: it is read, and no loss is taken on its
being predicted. A plain document has none of them set, so its bytes are its ids.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int32

NO_TARGET = np.uint32(1 << 31)


def record_bytes(ids: Iterable[int], targets: Iterable[bool] | None = None) -> bytes:
    """A document as it is stored.

    Args:
        ids: its tokens, 0 <= id < 2^31.
        targets: whether each one's prediction counts; None: all do.

    Returns:
        4 bytes a token.
    """
    words = np.fromiter(ids, np.uint32)
    if targets is not None:
        words[~np.fromiter(targets, bool, len(words))] |= NO_TARGET
    return words.astype("<u4", copy=False).tobytes()


def record_tokens(record: bytes) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """A stored document's tokens.

    Args:
        record: as record_bytes gives it.

    Returns:
        Ids, and whether each is a target.
    """
    words = np.frombuffer(record, "<u4")
    return (words & ~NO_TARGET).astype(np.int32), words < NO_TARGET
