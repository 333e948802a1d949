"""Chip facts, out of chips.toml."""

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a chip can do; chips.toml says what each figure means and where it is from.

    Attributes:
        name: as in a topology, "v5p".
        platform: whose compiler makes its programs.
        device_kind: what jax calls its devices.
        devices_per_chip: devices that jax shows for one chip.
        hbm: bytes that a program may use.
        hbm_bandwidth: bytes per second.
        bf16_flops, fp8_flops, int8_flops: dense operations per second; None where the chip has none of that kind.
        link: bytes per second of one link, one way.
        die_link: bytes per second, one way, between devices of one chip.
        torus: dimensions with links; 0 is a switch.
        wrap: when a dimension closes to a ring.
        hop_seconds: latency from one chip to the next.
        node: devices that a switch joins.
        dcn: bytes per second that a device sends to other nodes or slices.
        pod: chips of the largest slice.
        source: where the figures are from.
        uncertain: what of it is not certain, and why.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    device_kind: str
    devices_per_chip: int
    hbm: int
    hbm_bandwidth: float
    bf16_flops: float
    link: float
    torus: int
    hop_seconds: float
    node: int
    dcn: float
    pod: int
    source: str
    uncertain: tuple[str, ...]
    wrap: Literal["cube", "whole"] | None = None
    die_link: float | None = None
    fp8_flops: float | None = None
    int8_flops: float | None = None


@functools.cache
def load_chips() -> dict[str, Chip]:
    """All chips, by name."""
    rows: dict[str, dict[str, Any]] = tomllib.loads(resources.files("qwen3_jax").joinpath("chips.toml").read_text("utf-8"))
    chips = {}
    for name, row in rows.items():
        uncertain: list[str] = row.pop("uncertain")
        chips[name] = Chip(name=name, uncertain=tuple(uncertain), **row)
    return chips


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose devices jax calls so; None where it is not in the list."""
    return next((chip for chip in load_chips().values() if chip.device_kind.lower() == device_kind.lower()), None)
