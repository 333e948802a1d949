"""Real processes under jax.distributed: the same curve as one process, and an end for all when one ends."""

import json
import signal
import socket
import time
from typing import Any

import jax
import numpy as np
import pytest

from qwen3_jax import global_batch, initialize, make_mesh, process_rows
from qwen3_jax.parallel import processes as started
from qwen3_jax.parallel.launchers import ProcessesError
from qwen3_jax.parallel.mesh import MeshError
from tests.model.models import random_model
from tests.parallel.launch import Process, free_port, together
from tests.parallel.write_program import written

HOST = socket.gethostname()
MESH, STEPS = "data=2,fsdp=2,expert=2", 3
PROGRAM = ["-m", "tests.parallel.train_program", MESH]


def environ(count: int, me: int, devices: int, port: int) -> dict[str, str]:
    named = dict(JAX_COORDINATOR_ADDRESS=f"localhost:{port}", JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(me))
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as `quick` of conftest
    return {**named, **quick, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def curve(process: Process) -> list[list[float]]:
    """Loss, router loss and gradient norm of the first steps."""
    lines = [process.read_until("loss") for _ in range(STEPS)]
    return [[float(text) for text in line.split()[1:]] for line in lines]


def test_two_and_four_processes_follow_one_and_a_killed_one_is_named():
    """One process of eight devices that ends well; two of four, the second of which is killed; four of two, the first."""
    port = free_port()
    with together([[*PROGRAM, str(STEPS)]], [environ(1, 0, 8, port)]) as (alone,):
        alone.tell()
        wanted = curve(alone)
        assert alone.end() == 0 and alone.printed[-1] == "trained"
    assert f"process 0 of 1 on {HOST}: 8 cpu devices (ids 0 to 7)" in alone.printed
    assert "mesh data=2 fsdp=2 expert=2 context=1 tensor=1, 8 devices" in alone.printed
    assert wanted[-1][0] < wanted[0][0]
    for count, victim in ((2, 1), (4, 0)):
        port = free_port()
        with together([PROGRAM] * count, [environ(count, i, 8 // count, port) for i in range(count)]) as many:
            for process in many:
                process.read_until("ready")
            for process in many:
                process.tell()
            for process in many:
                np.testing.assert_allclose(curve(process), wanted, rtol=1e-5)
            since = time.monotonic()
            many[victim].signal(signal.SIGKILL)
            rest = [process for process in many if process is not many[victim]]
            assert [process.end() for process in rest] == [1] * (count - 1)
            assert time.monotonic() - since < 30
            named = f"process {victim} of {count} on {HOST} (pid {many[victim].pid}) died: its connection closed without a word"
            assert [process.last_line() for process in rest] == [named] * (count - 1)
        shown = [[line for line in process.printed if " devices (ids " in line] for process in many]
        assert len(shown[0]) == count and [len(lines) for lines in shown[1:]] == [1] * (count - 1)
        assert shown[0][0].endswith(f"; arguments, called at localhost:{port}, jax at localhost:{port + 1}")
        rows = [line.split()[1:] for process in many for line in process.printed if line.startswith("rows")]
        assert sorted(sum(rows, [])) == [str(row) for row in range(8)]  # each row is read by one process


def test_three_of_four_call():
    code = "import jax, qwen3_jax; qwen3_jax.initialize; print('ready', flush=True); input(); qwen3_jax.initialize(timeout=3)"
    port = free_port()
    with together([["-c", code]] * 3, [environ(4, i, 1, port) for i in (0, 1, 3)]) as three:
        for process in three:
            process.read_until("ready")
        for process in three:
            process.tell()
        assert [process.end() for process in three] == [1, 1, 1]
        for process in three:
            assert process.last_line().endswith("ProcessesError: 3 of 4 hosts called within 3 s; missing: process 2")


def test_one_process_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(started, "_started", None)
    first = initialize()
    assert (first.id, first.count, first.hosts, first.mesh) == (0, 1, (HOST,), None)
    assert capsys.readouterr().out == f"process 0 of 1 on {HOST}: 8 cpu devices (ids 0 to 7)\n"
    again = initialize(mesh="fsdp=8")
    assert again.mesh == make_mesh("fsdp=8")
    assert capsys.readouterr().out == "mesh data=1 fsdp=8 expert=1 context=1 tensor=1, 8 devices\n"
    assert not jax.distributed.is_initialized()
    with pytest.raises(ProcessesError, match="process 1 of 2: started already as 0 of 1"):
        initialize("localhost:1234", 2, 1)


def test_devices_come_after(monkeypatch):
    monkeypatch.setattr(started, "_started", None)
    jax.devices()
    with pytest.raises(ProcessesError, match="jax has devices already: initialize comes before"):
        initialize("localhost:1234", 2, 1)


def test_batches_of_one_process():
    mesh = make_mesh("data=2,fsdp=2,context=2")
    np.testing.assert_array_equal(process_rows(mesh, 8), np.arange(8))
    tokens = np.arange(8 * 6).reshape(8, 6)
    placed: Any = global_batch({"tokens": tokens}, mesh, 8)["tokens"]
    np.testing.assert_array_equal(placed, tokens)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 6)}
    with pytest.raises(MeshError, match="6 rows over data=2 x fsdp=2 = 4 shards"):
        process_rows(mesh, 6)
    with pytest.raises(ValueError, match="4 rows from this process: accepted are its 8 of 8"):
        global_batch(tokens[:4], mesh, 8)


def test_two_processes_write_and_score_what_one_device_does():
    """Both have all of it: three rows, which are padded to the mesh's."""
    port = free_port()
    program = ["-m", "tests.parallel.write_program", "data=2,tensor=2"]
    with together([program] * 2, [environ(2, i, 2, port) for i in range(2)]) as both:
        lines = [process.read_until("written") for process in both]
        assert [process.end() for process in both] == [0, 0]
    wanted = written(random_model("moe"))
    for line in lines:
        tokens, logprobs, scores = json.loads(line.removeprefix("written"))
        np.testing.assert_array_equal(tokens, wanted[0])
        np.testing.assert_allclose(logprobs, wanted[1], rtol=0, atol=5e-5)
        np.testing.assert_allclose(scores, wanted[2], rtol=0, atol=5e-5)
