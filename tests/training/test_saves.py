"""Two real processes, one of which cannot read a checkpoint, and then not write it: both go on from one step, and both end.

Between the two a signal reaches both.
"""

import json
import re
import time

from tests.parallel.launch import free_port, together


def test_what_one_of_two_processes_cannot_read_or_write(tmp_path):
    """Else each would go on from a step of its own; and of a save Orbax lets the one wait for the other for twenty minutes."""
    common = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    program = ["-m", "tests.training.save_program", str(tmp_path / "checkpoints")]
    with together([program] * 2, [common | {"JAX_PROCESS_ID": str(at)} for at in range(2)]) as (first, second):
        for process in (first, second):
            told = process.read_until("apart")
            found = re.match(
                r"apart (.*): what process 0 writes there is not seen by process 1 on \S+: accepted as output", told
            )
            assert found is not None and found[1].endswith(f"-of-{0 if process is first else 1}/small/checkpoints"), told
            process.read_until("shared")
        assert list((tmp_path / "checkpoints-of-all/small/checkpoints").iterdir()) == []
        restored = [json.loads(process.read_until("restored").removeprefix("restored")) for process in (first, second)]
        assert restored[0] == restored[1]
        step, passed_over = restored[0]
        assert step == 1 and list(passed_over) == ["2"] and passed_over["2"].startswith("process 1 of 2: "), restored
        # Saves ask about a signal, too, by numbers of their own.
        ends = [process.read_until("told").split()[1:] for process in (first, second)]
        assert ends[0] == ends[1] and ends[0][0] == "0" and ends[0][1] != "None", ends
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
