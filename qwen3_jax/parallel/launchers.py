"""Which process this is among how many, and where process 0 listens: read from what started it.

jax detects clusters too, and is asked where it is right (TPU pods). The rest is read here, for jax takes one GPU of a node's
eight where Slurm starts one process a node, waits for a whole job in a shell of one task, takes mpirun's host for rank 0's,
needs mpi4py for Open MPI 5, and the Kubernetes API with rights to read pods for a JobSet.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping, Sequence

PORT = 8482  # where process 0 listens if nothing else is said; jax's own choice on TPU pods
SPARE = 8  # jax's coordinator takes the first free port of that many after it
_FIRST, _SLOTS = 61440, 255  # above the ports that Linux gives out; each job has 16 of them


class ProcessesError(RuntimeError):
    """Processes that cannot be started together: who is missing, or what the launcher left unsaid."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the others.

    Attributes:
        source: who said so.
        count: processes in all.
        id: this one's, from 0.
        coordinator: "host:port" where process 0 listens; empty for a process alone.
        hosts: the host of each process, as far as the launcher tells; empty where it does not.
        devices: which of its host's GPUs are this process's; None leaves it all that it sees.
    """

    source: str = "nothing: one process"
    count: int = 1
    id: int = 0
    coordinator: str = ""
    hosts: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = None


def find_place(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    tpu: bool = True,
) -> Place:
    """This process's place: by arguments, by JAX_* variables, by the launcher's variables, in that order for each of the three.

    Args:
        environ: the environment. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID stand for the arguments;
            JAX_COORDINATOR_PORT replaces a launcher's port.
        coordinator: "host" or "host:port" of process 0.
        num_processes: how many there are.
        process_id: which one this is.
        tpu: whether TPUs may be asked (on Google's machines that is a question to their metadata server).

    Returns:
        The place; of one process where nothing is said.

    Raises:
        ProcessesError: something is left unsaid, or is no number.
    """
    place = _open_mpi(environ) or _slurm(environ) or (_tpu(environ) if tpu else None) or _jobset(environ) or Place()
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(environ, "JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number(environ, "JAX_PROCESS_ID") if process_id is None else process_id
    said = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    if place.count == 1 and num_processes != 1 and None in said.values() and any(value is not None for value in said.values()):
        missing = ", ".join(name for name, value in said.items() if value is None)
        raise ProcessesError(f"{missing} not said: accepted are all of coordinator, num_processes and process_id, or none")
    if coordinator or num_processes not in (None, place.count) or process_id not in (None, place.id):
        # A launcher's host names and GPUs hold as long as its numbers do.
        kept = num_processes in (None, place.count) and process_id in (None, place.id)
        place = dataclasses.replace(
            place if kept else Place(),
            source="arguments" if place.count == 1 else f"{place.source} and arguments",
            count=place.count if num_processes is None else num_processes,
            id=place.id if process_id is None else process_id,
            coordinator=coordinator or place.coordinator,
        )
    if place.count < 1 or not 0 <= place.id < place.count:
        raise ProcessesError(f"process {place.id} of {place.count}: accepted are ids from 0 to one less than the number")
    if place.count == 1:
        return dataclasses.replace(place, coordinator="", devices=None)
    if not place.coordinator:
        raise ProcessesError(f"{place.source} does not say where process 0 is: accepted is coordinator=HOST:PORT")
    host, port = split_address(place.coordinator)
    return dataclasses.replace(place, coordinator=join_address(host, port or _number(environ, "JAX_COORDINATOR_PORT") or PORT))


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; the port is 0 where there is none.

    Raises:
        ProcessesError: no host, or a port that is none.
    """
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]+))(?::(\d+))?", address)
    if found is None or int(found[3] or 0) > 65535 - SPARE:
        raise ProcessesError(
            f"coordinator {address!r}: accepted is host:port, port up to {65535 - SPARE}, [..] around an IPv6 address"
        )
    return found[1] or found[2], int(found[3] or 0)


def join_address(host: str, port: int) -> str:
    """The address "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    count, rank = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK")
    if count is None or rank is None:
        return None
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK") or 0
    here = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    # Version 4 tells its address (jobid.0;tcp://10.0.0.1,10.1.0.1:34911), version 5 its host (prterun-HOST-PID@1). Both are
    # mpirun's, which is rank 0's host too unless rank 0 was sent elsewhere: the coordinator is then to be said.
    uri, space = environ.get("OMPI_MCA_orte_hnp_uri", ""), environ.get("PMIX_NAMESPACE", "")
    found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri) or re.fullmatch(r"prterun-(.+)-\d+@\d+", space)
    nodes = _nodes(environ.get("SLURM_JOB_NODELIST", ""))
    if here == count:
        host = "127.0.0.1"
    elif nodes:
        host = nodes[0]
    else:
        host = next((name for name in found.groups() if name), "") if found else ""
    return _launched(
        "Open MPI", environ, count, rank, host, uri.partition(";")[0] or space, devices=_gpus(environ, local, here)
    )


def _slurm(environ: Mapping[str, str]) -> Place | None:
    rank, nodes = _number(environ, "SLURM_PROCID"), _nodes(environ.get("SLURM_STEP_NODELIST", ""))
    # Of the step, not of the job: a shell started by srun --pty is one task of a job that may have many.
    count = _number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS")
    if rank is None or count is None or not nodes:
        return None
    job = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    tasks = _repeated(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    hosts: tuple[str, ...] = ()
    block = environ.get("SLURM_DISTRIBUTION", "block").startswith("block")
    if len(tasks) == len(nodes) and sum(tasks) == count and (block or count == len(nodes)):
        hosts = tuple(node for node, number in zip(nodes, tasks, strict=True) for _ in range(number))
    at = _number(environ, "SLURM_NODEID") or 0
    here = tasks[at] if at < len(tasks) else 1
    devices = _gpus(environ, _number(environ, "SLURM_LOCALID") or 0, here)
    return _launched("Slurm", environ, count, rank, nodes[0], job, hosts, devices)


def _tpu(environ: Mapping[str, str]) -> Place | None:
    from jax._src.clusters import cloud_tpu_cluster as jax_clusters

    clusters = (jax_clusters.GkeTpuCluster, jax_clusters.GceTpuCluster)
    cluster = next((found for found in clusters if found.is_env_present()), None)
    if cluster is None:
        return None
    workers, count = cluster._get_worker_list_in_slice(), cluster.get_process_count()
    first = jax_clusters.get_tpu_env_value("MEGASCALE_COORDINATOR_ADDRESS") if count > len(workers) else None
    host = (first or workers[0]).partition(":")[0]
    hosts = tuple(worker.partition(":")[0] for worker in workers) if count == len(workers) else ()
    port = _number(environ, "JAX_COORDINATOR_PORT") or PORT
    return Place("TPU pod", count, cluster.get_process_id(), join_address(host, port), hosts)


def _jobset(environ: Mapping[str, str]) -> Place | None:
    """The manifest says the names (docs/pods.md); Kubernetes gives each pod of an indexed job its index."""
    index, name = _number(environ, "JOB_COMPLETION_INDEX"), environ.get("JOBSET_NAME")
    if index is None or not name:
        return None
    job, count = environ.get("REPLICATED_JOB_NAME"), _number(environ, "JAX_NUM_PROCESSES")
    replicas, replica = _number(environ, "REPLICATED_JOB_REPLICAS") or 1, _number(environ, "JOB_INDEX") or 0
    if not job or count is None or count % replicas:
        raise ProcessesError(
            f"JobSet {name}: REPLICATED_JOB_NAME={job}, JAX_NUM_PROCESSES={count}, REPLICATED_JOB_REPLICAS={replicas}: "
            "accepted are a name and a number of processes that the replicas divide"
        )
    pods = count // replicas
    hosts = tuple(f"{name}-{job}-{i // pods}-{i % pods}" for i in range(count))
    host = f"{hosts[0]}.{environ.get('JOBSET_SUBDOMAIN', name)}"
    port = _number(environ, "JAX_COORDINATOR_PORT") or PORT
    return Place("JobSet", count, replica * pods + index, join_address(host, port), hosts)


def _launched(
    source: str,
    environ: Mapping[str, str],
    count: int,
    rank: int,
    host: str,
    job: str,
    hosts: tuple[str, ...] = (),
    devices: tuple[int, ...] | None = None,
) -> Place:
    """A place whose port follows from the job's name, so that two jobs on one node do not meet."""
    port = _number(environ, "JAX_COORDINATOR_PORT") or _FIRST + 16 * (zlib.crc32(job.encode()) % _SLOTS)
    return Place(source, count, rank, host and join_address(host, port), hosts, devices)


def _gpus(environ: Mapping[str, str], local: int, here: int) -> tuple[int, ...] | None:
    """The share of a host's GPUs that is its local-th process's; None where it already sees no others."""
    if here == 1 or "SLURM_GPUS_PER_TASK" in environ:
        return None
    listed = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    seen = len(listed.split(",")) if listed else _number(environ, "SLURM_GPUS_ON_NODE")
    if seen is None or (seen >= here and seen % here):
        return (local,)
    share = seen // here
    return tuple(range(local * share, (local + 1) * share)) if share else None


def _nodes(listed: str) -> list[str]:
    """The names that Slurm writes as "gpu[01-03,07]-ib,login1"."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", listed):
        found = [""]
        for text, group in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            found = [start + end for start in found for end in (_numbered(group) if group else [text])]
        names += found
    return names


def _numbered(group: str) -> list[str]:
    ends = [part.partition("-") for part in group.split(",")]
    return [str(at).zfill(len(low)) for low, _, high in ends for at in range(int(low), int(high or low) + 1)]


def _repeated(listed: str) -> Sequence[int]:
    """The numbers that Slurm writes as "5,4(x3)"."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    return [int(number) for number, times in found for _ in range(int(times or 1))]


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise ProcessesError(f"{name}={value!r}: accepted is a whole number from 0")
    return int(value)
