"""What each launcher says in its variables, and what is made of it."""

import os
import subprocess
import sys
from typing import Any

import pytest
from jax._src.clusters import cloud_tpu_cluster

from qwen3_jax.parallel.launchers import Place, ProcessesError, _nodes, find_place, split_address

SLURM = dict(
    SLURM_JOB_ID="4217",
    SLURM_STEP_ID="0",
    SLURM_NTASKS="8",
    SLURM_STEP_NUM_TASKS="4",
    SLURM_PROCID="2",
    SLURM_LOCALID="0",
    SLURM_NODEID="2",
    SLURM_STEP_NODELIST="gpu[08-10,12]",
    SLURM_STEP_TASKS_PER_NODE="1(x4)",
    SLURM_GPUS_ON_NODE="8",
)
# As mpirun of Open MPI 5.0.11 sets them, and of 4 according to its documentation.
OPEN_MPI = dict(
    OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2"
)
JOBSET = dict(
    JOBSET_NAME="train",
    REPLICATED_JOB_NAME="workers",
    REPLICATED_JOB_REPLICAS="2",
    JOB_INDEX="1",
    JOB_COMPLETION_INDEX="1",
    JAX_NUM_PROCESSES="4",
)


def test_slurm():
    """One process a node has all eight GPUs of it (jax would take one), of the step's four tasks, not of the job's eight."""
    place = find_place(SLURM)
    assert place.coordinator.startswith("gpu08:") and 61440 <= split_address(place.coordinator)[1] < 65520
    assert place == Place("Slurm", 4, 2, place.coordinator, ("gpu08", "gpu09", "gpu10", "gpu12"), None)
    others = {find_place({**SLURM, **other}).coordinator for other in (dict(SLURM_STEP_ID="1"), dict(SLURM_JOB_ID="4218"))}
    assert len(others | {place.coordinator}) == 3  # steps and jobs on one node do not meet
    assert find_place({**SLURM, "JAX_COORDINATOR_PORT": "7000"}).coordinator == "gpu08:7000"
    # A shell of one task within the job is a process alone; so is the batch script, which is no step.
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).count == 1
    assert find_place({name: value for name, value in SLURM.items() if "STEP" not in name}) == Place()


@pytest.mark.parametrize(
    "changes, devices",
    [
        (dict(SLURM_STEP_TASKS_PER_NODE="8,4(x3)", SLURM_NODEID="0", SLURM_LOCALID="5"), (5,)),
        (dict(SLURM_STEP_TASKS_PER_NODE="8,4(x3)", SLURM_NODEID="2", SLURM_LOCALID="3"), (6, 7)),
        (dict(SLURM_STEP_TASKS_PER_NODE="4(x4)", SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES="0,1,2,3"), (3,)),
        (dict(SLURM_STEP_TASKS_PER_NODE="4(x4)", SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES="3"), None),  # bound already
        (dict(SLURM_STEP_TASKS_PER_NODE="2(x4)", SLURM_LOCALID="1", SLURM_GPUS_PER_TASK="4"), None),
        (dict(SLURM_STEP_TASKS_PER_NODE="2(x4)", SLURM_LOCALID="1", SLURM_GPUS_ON_NODE=""), (1,)),
    ],
)
def test_the_gpus_of_one_task(changes, devices):
    assert find_place({**SLURM, **changes}).devices == devices


def test_names_as_slurm_writes_them():
    assert _nodes("node001") == ["node001"]
    assert _nodes("node001,host2") == ["node001", "host2"]
    assert _nodes("gpu[01-03,07]-ib,login1") == ["gpu01-ib", "gpu02-ib", "gpu03-ib", "gpu07-ib", "login1"]
    assert _nodes("rack[0-1]node[8-9]") == ["rack0node8", "rack0node9", "rack1node8", "rack1node9"]
    assert _nodes("") == []


def test_open_mpi():
    four = dict(OPEN_MPI, OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    five = dict(OPEN_MPI, OMPI_VERSION="5.0.11", PMIX_NAMESPACE="prterun-head-node-12264@1")
    for environ, host in ((four, "10.96.0.1"), (five, "head-node")):
        place = find_place(environ)
        assert (place.source, place.count, place.id, split_address(place.coordinator)[0]) == ("Open MPI", 4, 3, host)
    six = dict(OPEN_MPI, OMPI_MCA_orte_hnp_uri="1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370")
    assert split_address(find_place(six).coordinator)[0] == "fe80::b9b:ac5d"
    # Within a Slurm allocation rank 0 is on its first node, wherever mpirun is; on one node no name is needed.
    assert find_place({**five, "SLURM_JOB_NODELIST": "n[3-4]"}).coordinator.startswith("n3:")
    assert find_place({**five, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}).coordinator.startswith("127.0.0.1:")
    with pytest.raises(ProcessesError, match="Open MPI does not say where process 0 is: accepted is coordinator=HOST:PORT"):
        find_place(OPEN_MPI)
    assert find_place(OPEN_MPI, "head:5000") == Place("Open MPI and arguments", 4, 3, "head:5000", (), (1,))


def test_a_jobset():
    """Two jobs of two pods; the manifest of docs/pods.md says all but the last two, which Kubernetes sets."""
    place = find_place(JOBSET)
    hosts = ("train-workers-0-0", "train-workers-0-1", "train-workers-1-0", "train-workers-1-1")
    assert place == Place("JobSet", 4, 3, "train-workers-0-0.train:8482", hosts)
    with pytest.raises(ProcessesError, match="JobSet train: REPLICATED_JOB_NAME=workers, JAX_NUM_PROCESSES=None"):
        find_place({name: value for name, value in JOBSET.items() if name != "JAX_NUM_PROCESSES"})


def test_a_tpu_pod(monkeypatch):
    """jax reads these; the names are those that GKE gives its pods."""
    environ = dict(TPU_WORKER_HOSTNAMES="t-0.train,t-1.train,t-2.train,t-3.train", TPU_WORKER_ID="2")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", None)  # nobody is asked
    assert find_place(os.environ) == Place()  # no TPU in this machine
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", os.environ.get)
    place = find_place(os.environ)
    assert place == Place("TPU pod", 4, 2, "t-0.train:8482", ("t-0.train", "t-1.train", "t-2.train", "t-3.train"))
    assert find_place(os.environ, tpu=False) == Place()  # JAX_PLATFORMS=cpu on one host of a pod
    for name, value in dict(NUM_SLICES="2", SLICE_ID="1", COORDINATOR_ADDRESS="other-0.train:8080").items():
        monkeypatch.setenv(f"MEGASCALE_{name}", value)
    assert find_place(os.environ) == Place("TPU pod", 8, 6, "other-0.train:8482")


def test_arguments_and_their_variables():
    said = dict(JAX_COORDINATOR_ADDRESS="head:5000", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="0")
    assert find_place(said) == Place("arguments", 4, 0, "head:5000")
    assert find_place(said, "other", 2, 1) == Place("arguments", 2, 1, "other:8482")
    assert find_place({}, "[::1]:5000", 2, 1).coordinator == "[::1]:5000"
    assert find_place(SLURM, num_processes=2, process_id=1).hosts == ()  # Slurm's names are of other numbers
    assert find_place({}) == find_place({}, num_processes=1) == Place()
    wrong: list[tuple[Any, str]] = [
        (("head:5000",), "num_processes, process_id not said"),
        ((None, 2, 0), "coordinator not said"),
        (("head:5000", 2, 2), "process 2 of 2: accepted are ids from 0"),
        (("head:port", 2, 1), "coordinator 'head:port': accepted is host:port"),
        (("head:65535", 2, 1), "port up to 65527"),
    ]
    for arguments, says in wrong:
        with pytest.raises(ProcessesError, match=says):
            find_place({}, *arguments)
    with pytest.raises(ProcessesError, match="JAX_NUM_PROCESSES='four': accepted is a whole number"):
        find_place({**said, "JAX_NUM_PROCESSES": "four"})


def test_a_machine_with_libtpu_and_no_tpu_asks_nobody():
    """libtpu is installed here for compiling; Google's metadata server is not asked, which would take minutes."""
    code = (
        "import os, socket; socket.getaddrinfo = socket.create_connection = None;"
        "from qwen3_jax.parallel.launchers import find_place; assert find_place(os.environ).count == 1"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=300)
