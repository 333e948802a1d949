"""Recorded cases of attention, which tests, benchmarks and compile checks share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of B rows of T queries over S key slots.

    Attributes:
        name: the model and use.
        batch: B.
        length: T.
        slots: S.
        heads: N.
        kv_heads: K.
        size: H.
    """

    name: str
    batch: int
    length: int
    slots: int
    heads: int
    kv_heads: int
    size: int


CASES = (
    Case("0.6B, decode", batch=1, length=1, slots=1024, heads=16, kv_heads=8, size=128),
    Case("0.6B, prefill", batch=1, length=128, slots=1024, heads=16, kv_heads=8, size=128),
    Case("30B-A3B, decode", batch=8, length=1, slots=4096, heads=32, kv_heads=4, size=128),
    Case("30B-A3B, training", batch=1, length=4096, slots=4096, heads=32, kv_heads=4, size=128),
    Case("235B-A22B, training", batch=1, length=4096, slots=4096, heads=64, kv_heads=4, size=128),
    Case("480B-A35B, training", batch=1, length=4096, slots=4096, heads=96, kv_heads=8, size=128),
)
