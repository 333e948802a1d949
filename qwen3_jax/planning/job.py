"""What is to be planned: a model, what is done with it, and how much of it at a time."""

import dataclasses
from typing import Literal, get_args

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.remat import check_policy

Mode = Literal["train", "lora", "prefill", "decode"]
Base = Literal["bfloat16", "int8", "int4", "nf4"]
AdapterDtype = Literal["float32", "bfloat16"]


class PlanError(ValueError):
    """A plan that cannot be made, with what is accepted."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One step's work.

    Attributes:
        config: the model's shape.
        mode: `train` is a step of AdamW in float32 with bfloat16 products; `lora` is one that trains adapters on every matrix
            of attention, MLPs and experts, the model itself frozen; `prefill` reads prompts into a new cache; `decode` is one
            more token for every row. Both have bfloat16 weights and cache.
        batch: rows of the whole pod.
        seq: tokens of a row; in decode the cache's slots.
        remat: what the backward pass keeps (qwen3_jax.model.remat).
        rank: of the adapters, in mode lora.
        base: in mode lora what those matrices are kept in: bfloat16, as all else of the model is, or codes: int8, int4, nf4.
        adapter_dtype: of adapters, their gradients and moments: float32 or bfloat16.
    """

    config: Qwen3Config
    mode: Mode
    batch: int
    seq: int
    remat: str = "full"
    rank: int = 16
    base: Base = "bfloat16"
    adapter_dtype: AdapterDtype = "float32"

    def __post_init__(self) -> None:
        for name, accepted in (("mode", Mode), ("base", Base), ("adapter_dtype", AdapterDtype)):
            if getattr(self, name) not in get_args(accepted):
                raise PlanError(f"{name} is {getattr(self, name)!r}: accepted are {', '.join(get_args(accepted))}")
        for name in ("batch", "seq", "rank"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}: accepted is a whole number from 1")
        check_policy(self.remat, on_mesh=True)

    @property
    def trains(self) -> bool:
        """Whether there are gradients and an optimizer."""
        return self.mode in ("train", "lora")

    @property
    def adapts(self) -> bool:
        """Whether those are of adapters alone."""
        return self.mode == "lora"

    @property
    def tokens(self) -> int:
        """Tokens that a step takes in over the whole pod."""
        return self.batch if self.mode == "decode" else self.batch * self.seq

    @property
    def adapter_bytes(self) -> int:
        """Of a parameter of the adapters, and of each of its moments."""
        return 4 if self.adapter_dtype == "float32" else 2

    def frozen_bytes(self, kind: str) -> float:
        """Bytes that a frozen parameter takes, in mode lora.

        Args:
            kind: attention, dense or experts, the matrices that may be codes, or any other.

        Returns:
            2 of bfloat16; of codes theirs, and a share of a scale of 2 bytes for each 64.
        """
        if self.base == "bfloat16" or kind not in ("attention", "dense", "experts"):
            return 2.0
        return (1.0 if self.base == "int8" else 0.5) + 2 / 64
