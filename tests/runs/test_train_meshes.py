"""A run on another mesh, and by several processes: the same data, the same curve."""

import json
import re
import signal

import numpy as np
import pytest

from qwen3_jax import from_pretrained
from tests.parallel.launch import free_port, together
from tests.runs.launch import QUICK, arrays_of, as_at_step_9, begin, curve, finish, signalling


def assert_same_weights(place, straight):
    """Parameters and the optimizer's state, within 1e-5."""
    found = arrays_of(place)
    assert found.keys() == straight[1].keys()
    for name, array in straight[1].items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_two_processes_and_one_make_the_same_run(straight, prepared, place):
    """Two are told to end, by a signal to each at its own moment, and one goes on: the same data, the curve within 1e-5.

    Both end with the exit code that was asked for, and neither takes the other's for a failure.
    """
    variables = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    exports = ["--checkpoint.export_every", "2", "--checkpoint.export_keep", "1", "--checkpoint.told_to_end", "75"]
    words = [place / "run.toml", "--mesh.processes", "2", *exports]
    commands = [signalling(step, signal.SIGTERM, *words)[1:] for step in (3, 4)]
    with together(commands, [variables | {"JAX_PROCESS_ID": str(at)} for at in range(2)]) as processes:
        codes = [process.end() for process in processes]
        said = "\n".join(processes[0].printed)
        assert codes == [75, 75], processes[0].errors()[-2000:] + processes[1].errors()[-2000:]
        assert not any(line.startswith("step ") for line in processes[1].printed)
    found = re.search(r"told to end: saved at step (\d+) of 14", said)
    assert found is not None, said
    assert 4 <= int(found[1]) < 14
    ((folder, saved),) = [(path, path.name) for path in (place / "runs/tiny/exports").iterdir()]
    assert saved == f"step-{int(found[1]) // 2 * 2}"  # written by both, and counted by one
    assert from_pretrained(folder).config.num_experts == 4
    code, out = finish(begin(prepared, place))
    assert code == 0 and f"goes on at step {found[1]}" in out, out
    for one, other in zip(curve(place), straight[0], strict=True):
        for name, value in other.items():
            if name in ("step", "stage", "tokens_seen"):
                assert one[name] == value
            else:
                np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} of step {one['step']}")
    assert_same_weights(place, straight)


def test_on_another_mesh_the_run_is_the_same(straight, watched, prepared, place):
    """The data to its last document, the curve within 1e-5."""
    as_at_step_9(watched, place)
    code, out = finish(begin(prepared, place, "--mesh.axes", "data=4"))
    assert code == 0, out
    assert "goes on at step 9" in out and "changed since it was saved: mesh.axes" in out
    for one, other in zip(curve(place), straight[0], strict=True):
        (name,) = {"loss", "held_out_loss"} & other.keys()
        assert one[name] == pytest.approx(other[name], rel=1e-5), other["step"]
    stands = [json.loads((at / "runs/tiny/checkpoints/14/run/metadata").read_text())["progress"] for at in (watched, place)]
    assert stands[0]["data"] == stands[1]["data"]
    assert_same_weights(place, straight)
