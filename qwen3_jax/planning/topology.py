"""Compile-only devices by a name: "v5p:4x4x4" is 64 chips in a torus, "h100:2x8" two nodes of 8. None of them is there."""

import dataclasses
import math
import re
from typing import Any

from qwen3_jax.chips import Chip, load_chips

# Before jax is imported: one process may load libtpu beside others, and asks nobody who it is. What it is told of the machine
# keeps it from complaining; programs are compiled for the topology that is named.
COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1, h100:8, h100:2x8"

# What the CUDA compiler is told of an H100 SXM5: xla's GpuTargetConfigProto.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


class TopologyError(ValueError):
    """A topology that is none, with what is accepted."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Which chips, and how they are joined.

    Attributes:
        name: as it was given.
        chip: the chip.
        shape: chips along each dimension of the torus; nodes and devices of a node where a switch joins them.
        slices: how many such groups a slower network joins.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips in all."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Devices in all, as jax counts them."""
        return self.chips * self.chip.devices_per_chip


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Read a topology's name; neither jax nor a compiler is asked.

    Args:
        name: "CHIP:AxB" or "CHIP:AxBxC"; for H100 the devices of one node, or NODESx8.
        slices: groups of such chips that a slower network joins.

    Returns:
        The topology.

    Raises:
        TopologyError: an unknown chip, a shape that is none or more than there is of a chip.
    """
    chips = load_chips()
    kind, _, layout = name.partition(":")
    if kind not in chips:
        raise TopologyError(f"topology {name!r}: accepted are {', '.join(chips)}, then a shape, as in {EXAMPLES}")
    chip = chips[kind]
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", layout):
        raise TopologyError(f"topology {name!r}: accepted is a shape of whole numbers from 1, as in {EXAMPLES}")
    shape = tuple(map(int, layout.split("x")))
    if slices < 1:
        raise TopologyError(f"slices is {slices}: accepted is a whole number from 1")
    if chip.platform == "cuda":
        shape = (1, *shape) if len(shape) == 1 else shape
        if len(shape) != 2 or shape[1] > chip.node or (shape[0] > 1 and shape[1] != chip.node) or slices > 1:
            raise TopologyError(
                f"topology {name!r} in {slices} slice(s): accepted are up to {chip.node} devices of one node, or whole nodes, "
                f"NODESx{chip.node}, in one slice"
            )
    elif len(shape) > chip.torus or len(shape) < 2:
        raise TopologyError(f"topology {name!r}: {kind} is a torus of {chip.torus} dimensions, accepted are 2 to {chip.torus}")
    if math.prod(shape) > chip.pod:
        raise TopologyError(f"topology {name!r} is {math.prod(shape)} chips: the largest slice of {kind} has {chip.pod}")
    return Topology(name, chip, shape, slices)


def devices_of(topology: Topology) -> list[Any]:
    """The topology's devices, for meshes and compilers. The environment should be COMPILE_ONLY's before jax is imported.

    Args:
        topology: from `parse_topology`.

    Returns:
        jax devices that programs compile for.

    Raises:
        TopologyError: the compiler is not installed, or does not know the shape.
    """
    import jax
    from jax.experimental import topologies

    chip = topology.chip
    try:
        if chip.platform == "cuda":
            hosts, devices = topology.shape
            found = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology=f"1x{hosts}x{devices}")
        else:
            options = {"num_slices": topology.slices} if topology.slices > 1 else {}
            found = topologies.get_topology_desc(topology.name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise TopologyError(f"topology {topology.name!r}: libtpu says: {reason}; accepted are shapes as {EXAMPLES}") from error
    except (NotImplementedError, RuntimeError) as error:  # no plugin, no library
        extra, what = ("cuda13", "jax's CUDA plugin") if chip.platform == "cuda" else ("tpu", "libtpu")
        raise TopologyError(
            f"topology {topology.name!r} needs {what}, which is not installed: pip install 'qwen3-jax[{extra}]'"
        ) from error
    return list(found.devices)
