r"""Compile the steps of a run's file for the pod that it names, which is not here, and print what a chip would hold.

    .venv/bin/python tools/compile_run.py configs/three_stages_30b_a3b.toml --layers 2

For a TPU it ends when the compiler has placed all buffers, after about a tenth of the time of a whole compilation; for H100s
(with the extra cuda13) machine code is made too.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen3_jax.planning.topology import COMPILE_ONLY  # noqa: E402
from tools.buffers import Memory, dumped, read_memory  # noqa: E402


def main() -> int:
    """Compile each stage in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's TOML file")
    parser.add_argument("--layers", type=int, help="this many of the model's layers")
    parser.add_argument("--stage", help="this one alone")
    parser.add_argument("--topology", help="in place of the run's own")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dump is not None:
        os.environ.update(COMPILE_ONLY)
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={given.dump}"
        lowered(given.run, given.stage, given.layers, given.topology).compile()
        return 0

    from qwen3_jax.runs.resolve import resolve

    run = resolve(given.run).run
    table = Table("stage", "arguments", "temporaries", title=f"{run.name} on {given.topology or run.mesh.topology}: GB a chip")
    for stage in [given.stage] if given.stage else run.stages:
        memory = placed(given.run, stage, given.layers, given.topology)
        table.add_row(stage, f"{memory.arguments / 1e9:.2f}", f"{memory.temporaries / 1e9:.2f}")
    Console().print(table)
    return 0


def placed(run: str | Path, stage: str, layers: int | None = None, topology: str | None = None) -> Memory:
    """The memory of a stage's step, of a compiler that is ended once it has placed all buffers.

    Args:
        run: the run's file.
        stage: its name.
        layers: in place of the model's.
        topology: in place of the run's.

    Returns:
        Bytes of one device.

    Raises:
        RuntimeError: it does not compile; the compiler's last words.
    """
    with tempfile.TemporaryDirectory(prefix="compile-run-") as folder:
        words = [sys.executable, __file__, str(Path(run).absolute()), "--stage", stage, "--dump", folder]
        words += ["--layers", str(layers)] if layers else []
        words += ["--topology", topology] if topology else []
        with open(f"{folder}/log", "wb") as log:
            child = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)
        try:
            while (path := dumped(Path(folder))) is None and child.poll() is None:
                time.sleep(0.2)
        finally:
            child.kill()
            child.wait()
        if path is None and child.returncode == 0:
            path = dumped(Path(folder), ended=True)
        if path is None:
            raise RuntimeError(f"{run}, {stage}: {Path(folder, 'log').read_text()[-2000:]}")
        return read_memory(path)


def lowered(path: str, name: str, layers: int | None, topology: str | None) -> Any:
    """A stage's step, lowered for the run's pod."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from qwen3_jax import make_mesh
    from qwen3_jax.planning.topology import devices_of, parse_topology
    from qwen3_jax.runs.models import model_config
    from qwen3_jax.runs.parts import lora_config, optimizer_of, rules_of, stage_step
    from qwen3_jax.runs.resolve import resolve
    from qwen3_jax.training.state import Batch, abstract_train_state

    run = resolve(path).run
    stage, config = run.stages[name], model_config(run.model)
    config = dataclasses.replace(config, num_hidden_layers=layers) if layers else config
    chips = parse_topology(topology or str(run.mesh.topology), run.mesh.slices)
    mesh = make_mesh(run.mesh.axes, slices=run.mesh.slices, devices=devices_of(chips))
    rules, optimizer = rules_of(run), optimizer_of(run)
    state = abstract_train_state(
        config,
        optimizer,
        mesh,
        rules=rules,
        param_dtype=jnp.dtype(run.model.param_dtype if run.lora is None else run.lora.float_dtype),
        adapt=lora_config(run),
        adapter_dtype="float32" if run.lora is None else run.lora.dtype,
        offload=run.optimizer.offload,
    )
    sharding = NamedSharding(mesh, rules.spec("batch", None, mesh=mesh))

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((stage.batch, stage.seq), dtype, sharding=sharding)

    batch = Batch(rows(jnp.int32), rows(jnp.int32), rows(jnp.float32), rows(jnp.int32))
    return stage_step(run, stage, config, rules, optimizer).lower(state, batch)


if __name__ == "__main__":
    sys.exit(main())
