"""What is to be planned: a model, what is done with it, and how much of it at a time."""

import dataclasses
from typing import Literal, get_args

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.remat import check_policy

Mode = Literal["train", "lora", "prefill", "decode"]


class PlanError(ValueError):
    """A plan that cannot be made, with what is accepted."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One step's work.

    Attributes:
        config: the model's shape.
        mode: `train` is a step of AdamW in float32 with bfloat16 products; `prefill` reads prompts into a new cache; `decode`
            is one more token for every row. Both have bfloat16 weights and cache.
        batch: rows of the whole pod.
        seq: tokens of a row; in decode the cache's slots.
        remat: what the backward pass keeps (qwen3_jax.model.remat).
    """

    config: Qwen3Config
    mode: Mode
    batch: int
    seq: int
    remat: str = "full"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise PlanError(f"mode is {self.mode!r}: accepted are {', '.join(get_args(Mode))}")
        if self.mode == "lora":
            raise PlanError("mode lora: adapters are not built yet; accepted are train, prefill and decode")
        for name in ("batch", "seq"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}: accepted is a whole number from 1")
        check_policy(self.remat, on_mesh=True)

    @property
    def trains(self) -> bool:
        """Whether there are gradients and an optimizer."""
        return self.mode == "train"

    @property
    def tokens(self) -> int:
        """Tokens that a step takes in over the whole pod."""
        return self.batch if self.mode == "decode" else self.batch * self.seq
