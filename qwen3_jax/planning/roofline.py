"""From FLOPs, bytes and collectives to seconds; the same for what was compiled and for what was estimated."""

import dataclasses
from collections.abc import Iterable

from qwen3_jax.chips import Chip
from qwen3_jax.planning.efficiency import Efficiency


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Where a step's time goes, in seconds.

    Attributes:
        compute: products at the assumed share of the peak.
        hbm: memory traffic at the assumed share of the bandwidth.
        waiting: collectives that nothing runs beside.
        overlapped: collectives that run beside computation.
    """

    compute: float
    hbm: float
    waiting: float
    overlapped: float

    @property
    def exposed(self) -> float:
        """Collectives that are waited for: those that nothing hides, and of the others what exceeds the work beside them."""
        return self.waiting + max(0.0, self.overlapped - max(self.compute, self.hbm))

    @property
    def total(self) -> float:
        """The longer of compute and memory traffic, and the exposed collectives."""
        return max(self.compute, self.hbm) + self.exposed


def step_time(
    flops: float, hbm_bytes: float, collectives: Iterable[tuple[float, bool]], chip: Chip, efficiency: Efficiency
) -> StepTime:
    """A step's time by a roofline over the whole program.

    Args:
        flops: of one device.
        hbm_bytes: of one device.
        collectives: seconds of each, and whether it runs beside computation.
        chip: the chip.
        efficiency: shares of its figures that are reached.

    Returns:
        The parts and the total.
    """
    moves = list(collectives)
    return StepTime(
        compute=flops / (chip.bf16_flops * efficiency.flops),
        hbm=hbm_bytes / (chip.hbm_bandwidth * efficiency.hbm),
        waiting=sum(seconds for seconds, overlapped in moves if not overlapped),
        overlapped=sum(seconds for seconds, overlapped in moves if overlapped),
    )
