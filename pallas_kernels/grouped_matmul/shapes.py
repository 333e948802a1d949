"""Recorded cases of the grouped matmul, which tests, benchmarks and compile checks share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """A product of M rows with G matrices of k by n.

    Attributes:
        name: the model and projection, or what the case is for.
        rows: M, tokens times experts a token.
        inner: k.
        outer: n.
        groups: G, the experts.
    """

    name: str
    rows: int
    inner: int
    outer: int
    groups: int


# Small enough to run anywhere, large enough for time to be the multiplication's.
SMALL = (
    Case("few wide experts", rows=4096, inner=256, outer=512, groups=16),
    Case("many experts", rows=4096, inner=512, outer=512, groups=64),
)

# One sequence's token: 8 experts of each model's (configs of the family), gate or up, then down.
DECODE = (
    Case("30B-A3B up, decode", rows=8, inner=2048, outer=768, groups=128),
    Case("30B-A3B down, decode", rows=8, inner=768, outer=2048, groups=128),
    Case("235B-A22B up, decode", rows=8, inner=4096, outer=1536, groups=128),
    Case("235B-A22B down, decode", rows=8, inner=1536, outer=4096, groups=128),
    Case("480B-A35B up, decode", rows=8, inner=6144, outer=2560, groups=160),
    Case("480B-A35B down, decode", rows=8, inner=2560, outer=6144, groups=160),
)

# 4,096 tokens on one device, each to 8 experts.
PREFILL = tuple(dataclasses.replace(case, name=case.name.replace("decode", "4096 tokens"), rows=8 * 4096) for case in DECODE)
