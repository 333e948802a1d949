"""Keys and values that a call of the model continues from; made by qwen3_jax.generation.cache."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and where each row stands. A pytree; a call returns a new one.

    Attributes:
        k: [L, B, K, S, H] keys, normed and rotated.
        v: [L, B, K, S, H] values.
        segments: [B, S] int32, the document of every slot; 0 is empty or padding, and never attended to.
        lengths: [B] int32, the slot that the row's next token is written to.
        positions: [B] int32, the position of the row's next token within its document.
    """

    k: Any
    v: Any
    segments: Any
    lengths: Any
    positions: Any

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.segments.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """The two large arrays of a Cache, as they are carried through the scan over layers and written in place."""

    k: Any
    v: Any
