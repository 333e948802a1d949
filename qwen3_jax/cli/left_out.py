"""What `qwen3-jax train` says of steps that were left out."""

from collections.abc import Mapping
from typing import Any


class LeftOut:
    """What the terminal says of steps that were not finite and so were left out: where each row of them begins and ends.

    After SAID rows only every row whose number is a power of two is said, with the count so far.
    """

    SAID = 16

    def __init__(self) -> None:
        self._rows, self._first, self._last, self._scale = 0, 0, {}, None

    def lines(self, step: int, figures: Mapping[str, Any]) -> list[str]:
        """What there is to say after a step.

        Args:
            step: its number.
            figures: of it: skipped, skipped_in_a_row, loss, grad_norm, and in float16 loss_scale.

        Returns:
            Lines, mostly none.
        """
        row, scale = int(figures["skipped_in_a_row"]), figures.get("loss_scale")
        told = []
        if row == 0:
            if self._last.get("skipped_in_a_row", 0) > 1 and self._wanted():
                last = self._last
                which, row = f"steps {self._first:,} to {step - 1:,}", last["skipped_in_a_row"]
                scales = self._scales(last.get("loss_scale"))
                told.append(f"{which} were left out, {row:,} in a row, {last['skipped']:,} in all{scales}")
        elif row == 1 or not self._last.get("skipped_in_a_row"):
            self._rows, self._first = self._rows + 1, step - row + 1
            self._scale = None if scale is None else scale * 2.0**row  # each of them has halved it
            if self._wanted():
                why = f"loss {figures['loss']:.4f}, gradient {figures['grad_norm']:.4g}"
                told.append(f"step {step:,} was left out: {why}, {figures['skipped']:,} in all{self._scales(scale)}")
        self._last = dict(figures)
        return told

    def _wanted(self) -> bool:
        return self._rows <= self.SAID or not self._rows & (self._rows - 1)

    def _scales(self, scale: float | None) -> str:
        return "" if scale is None or self._scale is None else f"; loss scale {self._scale:,g} -> {scale:,g}"
