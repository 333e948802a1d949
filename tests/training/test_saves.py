"""A save that fails on one of two real processes: both end, at the next save, by its reason."""

import re
import time

from tests.parallel.launch import free_port, together


def test_a_save_that_fails_on_one_process_ends_both(tmp_path):
    """Orbax alone lets the one wait for the other, and the other for its arrays, for twenty minutes."""
    common = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    program = ["-m", "tests.training.save_program", str(tmp_path / "checkpoints")]
    with together([program] * 2, [common | {"JAX_PROCESS_ID": str(at)} for at in range(2)]) as (first, second):
        told = second.read_until("refused")
        since = time.monotonic()
        assert (first.end(), second.end()) == (1, 1)
        assert time.monotonic() - since < 30
        assert re.search(r"checkpoint 2 cannot be written: .*No space left on device; whole ones there: 1$", told), told
        named = f"process 1 of 2 on .* \\(pid {second.pid}\\) ended with exit code 1: .*checkpoint 2 cannot be written"
        for process in (first, second):
            assert re.match(named, process.last_line()), process.errors()[-2000:]
        assert not any(line.startswith("refused") for line in first.printed)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["1"]
