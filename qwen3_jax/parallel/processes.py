"""Start many processes as one program: find the others, start jax.distributed, watch over all until the end."""

import dataclasses
import os
import socket
from collections.abc import Sequence

import jax
from jax._src import xla_bridge
from jax.sharding import Mesh

from qwen3_jax.parallel.launchers import Place, ProcessesError, find_place
from qwen3_jax.parallel.mesh import make_mesh
from qwen3_jax.parallel.rendezvous import Met, bind_address, meet
from qwen3_jax.parallel.watchdog import Watchdog, patient_abort

_SHOWN = 16  # processes that the printout lists


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, as this one sees them.

    Attributes:
        id: this process, from 0.
        count: processes in all.
        hosts: the host of each.
        source: who said so.
        mesh: over the devices of all, where one was wished for.
    """

    id: int
    count: int
    hosts: tuple[str, ...]
    source: str
    mesh: Mesh | None = None


_started: Processes | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    mesh: str = "",
    slices: int = 1,
    timeout: float = 300.0,
    heartbeat: float = 60.0,
) -> Processes:
    """Join the other processes of this run, before anything else asks jax for devices.

    The launcher's variables say who there is: Open MPI, Slurm, a TPU pod, a JobSet; arguments override them, and so do
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A process alone starts nothing, and a second call neither.
    Prints which process this is, its devices and the mesh. From here on the death or uncaught exception of one process ends all
    others with exit code 1, and their last line names it.

    Args:
        coordinator: "host:port" where process 0 listens; jax's service takes one of the eight ports after it.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        mesh: a wish as make_mesh takes it; empty makes no mesh.
        slices: of that mesh, likewise.
        timeout: seconds to wait for all processes to call.
        heartbeat: seconds of silence after which a process counts as dead, where its connection still stands.

    Returns:
        The processes, and the mesh.

    Raises:
        ProcessesError: not all called in time ("3 of 4 hosts called"), numbers that contradict or miss, or jax has devices.
        MeshError: the wish is no mesh over all devices, or not of so many slices.
    """
    global _started
    if _started is None:
        asked = (jax.config.jax_platforms or "tpu").split(",")
        place = find_place(os.environ, coordinator, num_processes, process_id, tpu="tpu" in asked)
        met = _join(place, timeout, heartbeat) if place.count > 1 else None
        hosts = tuple(peer.host for peer in met.peers) if met else (socket.gethostname(),)
        _started = Processes(place.id, place.count, hosts, place.source)
        said = [_line(_started)]
        if met:
            jax.devices()  # brings up the backend, whose libraries bring their own way to abort
            patient_abort()
        if place.id == 0 and met:
            said += [f"  {_line(_started, i)}" for i in range(1, min(place.count, _SHOWN))]
            said += [f"  and {place.count - _SHOWN} more"] if place.count > _SHOWN else []
            said[0] += f"; {place.source}, called at {place.coordinator}, jax at {met.coordinator}"
        print("\n".join(said), flush=True)
    elif (num_processes or _started.count, _started.id if process_id is None else process_id) != (_started.count, _started.id):
        raise ProcessesError(f"process {process_id} of {num_processes}: started already as {_started.id} of {_started.count}")
    if not mesh:
        return _started
    made = make_mesh(mesh, slices=slices)
    if _started.id == 0:
        print("mesh " + " ".join(f"{axis}={size}" for axis, size in made.shape.items()) + f", {made.size} devices", flush=True)
    return dataclasses.replace(_started, mesh=made)


def _join(place: Place, timeout: float, heartbeat: float) -> Met:
    if jax.distributed.is_initialized():
        raise ProcessesError("jax.distributed is started already: accepted is qwen3_jax.initialize in its place")
    if xla_bridge.backends_are_initialized():
        raise ProcessesError("jax has devices already: initialize comes before jax.devices(), any array and any jitted call")
    met = meet(place, timeout)
    Watchdog(met, heartbeat).start()
    patient_abort()
    try:
        jax.distributed.initialize(
            met.coordinator,
            place.count,
            place.id,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(60, int(timeout)),
            # The watchdog is first: jax's own heartbeat is for the day on which it fails.
            heartbeat_timeout_seconds=max(600, int(10 * heartbeat)),
            coordinator_bind_address=bind_address(met.coordinator),
        )
    except RuntimeError as error:
        proxies = sorted(name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))
        hint = f"; {', '.join(proxies)} may lead it astray" if proxies else ""
        reason = str(error).splitlines()[0]
        raise ProcessesError(
            f"jax's service at {met.coordinator} did not take in process {place.id}: {reason}{hint}"
        ) from error
    return met


def _line(processes: Processes, i: int | None = None) -> str:
    i = processes.id if i is None else i
    devices: Sequence[jax.Device] = [device for device in jax.devices() if device.process_index == i]
    ids = f"{devices[0].id} to {devices[-1].id}" if devices else "none"
    kind = devices[0].device_kind if devices else "no"
    return f"process {i} of {processes.count} on {processes.hosts[i]}: {len(devices)} {kind} devices (ids {ids})"
