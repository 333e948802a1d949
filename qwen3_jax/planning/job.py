"""What is to be planned: a model, what is done with it, and how much of it at a time."""

import dataclasses
from typing import Literal, get_args

from qwen3_jax.config import Qwen3Config
from qwen3_jax.model.remat import check_policy
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.tune.quantize import BLOCK, check_codes

Mode = Literal["train", "lora", "prefill", "decode"]
Base = Literal["bfloat16", "float32", "int8", "int4", "nf4"]
Codes = Literal["int8", "int4", "nf4"]
AdapterDtype = Literal["float32", "bfloat16"]
CODED = ("attention", "dense", "experts")  # kinds of parameters that a base in codes has as codes
SCALE = 2  # bytes of a block's scale, in bfloat16


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
        base: in mode lora what the frozen model is kept in: bfloat16, float32, or codes of those matrices (int8, int4, nf4) and
            all else in bfloat16.
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
        if self.adapts and self.codes is not None:
            check_codes(self.config, RULES, None, self.codes)

    @property
    def trains(self) -> bool:
        """Whether there are gradients and an optimizer."""
        return self.mode in ("train", "lora")

    @property
    def adapts(self) -> bool:
        """Whether those are of adapters alone."""
        return self.mode == "lora"

    @property
    def codes(self) -> Codes | None:
        """What the frozen matrices are kept in, if not floats."""
        return None if self.base in ("bfloat16", "float32") else self.base

    @property
    def float_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of all of the frozen model that is kept in floats."""
        return "float32" if self.base == "float32" else "bfloat16"

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
            4 of float32, 2 of bfloat16; of codes theirs, and a share of their block's scale.
        """
        if self.codes is None or kind not in CODED:
            return 4.0 if self.float_dtype == "float32" else 2.0
        return (1.0 if self.codes == "int8" else 0.5) + SCALE / BLOCK

    def frozen_arrays(self, kind: str) -> int:
        """Arrays that a frozen parameter is kept as: 2 of codes, which have scales.

        Args:
            kind: as of `frozen_bytes`.
        """
        return 2 if self.adapts and self.codes is not None and kind in CODED else 1
