"""Two processes, one of which is told to end before any has asked; and whose programs are kept."""

from tests.parallel.launch import free_port, together


def test_a_signal_before_the_first_step_reaches_all(tmp_path):
    """jax's service waits for a number after the highest that was given: none yet, so not for a step that has long been."""
    common = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    programs = [["-m", "tests.training.stop_program", str(tmp_path / f"own-{at}"), str(tmp_path / "shared")] for at in range(2)]
    with together(programs, [common | {"JAX_PROCESS_ID": str(at)} for at in range(2)]) as processes:
        for process in processes:
            # jax's key of a program is another one for each process there: one would compile, and the other not.
            assert process.read_until("on cpu ") == "on cpu False None", process.errors()[-2000:]
            assert process.read_until("own ") == "own False None", process.errors()[-2000:]
            assert process.read_until("shared ") == "shared True True"
        ends = [process.read_until("asked ").split()[1] for process in processes]
        assert ends[0] == ends[1] != "None", ends
        assert [process.end() for process in processes] == [0, 0]
    assert not list(tmp_path.glob("*/*/qwen3-jax-shared*"))
