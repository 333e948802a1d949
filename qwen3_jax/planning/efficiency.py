"""The factors by which a program is taken to fall short of a chip's figures."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """How much of a chip's figures a program is taken to reach. Assumed, not measured: shares between 0 and 1."""

    flops: float = 0.75
    """Of the peak in bfloat16."""
    hbm: float = 0.85
    """Of the memory's bandwidth."""
    links: float = 0.9
    """Of a link's bandwidth ("How to scale your model" reckons with 90 of 100 GB/s)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) <= 1:
                raise ValueError(
                    f"efficiency.{field.name} is {getattr(self, field.name)}: accepted is a share above 0, up to 1"
                )


ASSUMED = Efficiency()
