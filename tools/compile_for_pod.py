r"""Compile a model's training step, prefill or decode for a pod that is not here, and print what a chip would hold.

    .venv/bin/python tools/compile_for_pod.py qwen3-30b-a3b --topology v5p:2x2x4 --mesh expert=16 --batch 64 --seq 4096

Training, of adapters too, is compiled under TRAIN_RULES, prefill and decode under RULES; `--rule embed=fsdp` puts another row
in place.

`--buffers 20` lists the largest arrays at the moment when memory is fullest, with where they come from; `--memory-only` ends
when the compiler has placed all buffers, after about a tenth of the time of a whole compilation.
"""

import argparse
import contextlib
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen3_jax.planning.buffers import Memory, dumped, read_memory  # noqa: E402
from qwen3_jax.planning.topology import COMPILE_ONLY, devices_of, parse_topology  # noqa: E402


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a preset, or a folder with a config.json")
    parser.add_argument("--topology", default="v5p:2x2x4", help="CHIP:SHAPE, as v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--devices", type=int, help="the topology's first ones alone; 1 is a program of one device")
    parser.add_argument("--mesh", default="fsdp=-1")
    parser.add_argument("--mode", default="train", choices=("train", "lora", "prefill", "decode"))
    parser.add_argument("--rank", type=int, default=16, help="of the adapters in lora")
    parser.add_argument("--base", default="bfloat16", help="of the frozen model in lora: bfloat16, float32, int8, int4, nf4")
    parser.add_argument("--adapter-dtype", default="float32", help="of adapters and their moments in lora: float32, bfloat16")
    parser.add_argument("--batch", type=int, default=64, help="rows of the whole pod")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of a row; the cache's slots in decode")
    parser.add_argument("--layers", type=int, help="this many of the model's layers")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rule", action="append", default=[], help="a row of the rules, as embed=fsdp+expert")
    parser.add_argument("--transport", default="auto", help="of tokens to experts: auto, ring, all_to_all, gather")
    parser.add_argument("--slack", type=float, help="of the experts' buffers, in multiples of an even load")
    parser.add_argument("--yarn", type=float, help="stretch positions by this factor")
    parser.add_argument("--buffers", type=int, default=0, metavar="N", help="list the N largest buffers at the peak")
    parser.add_argument("--text", type=Path, metavar="FILE", help="write the compiled program's text, for tools/show_hbm.py")
    parser.add_argument("--memory-only", action="store_true", help="stop when buffers are placed")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Compile and print."""
    start, given = time.perf_counter(), options()
    if given.memory_only and given.dump is None:
        return _memory_of_child(given)
    with contextlib.ExitStack() as stack:
        folder = given.dump
        if folder is None and given.buffers:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compile-for-pod-")))
        os.environ.update(COMPILE_ONLY)
        if folder is not None:
            os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}"
        return _compile(given, folder, start)


def _memory_of_child(given: argparse.Namespace) -> int:
    """Let a process of its own compile, and end it once its buffers can be read."""
    with tempfile.TemporaryDirectory(prefix="compile-for-pod-") as folder:
        child = subprocess.Popen([sys.executable, *sys.argv, "--dump", folder])
        try:
            while (path := dumped(Path(folder))) is None and child.poll() is None:
                time.sleep(0.3)
            if path is None:
                return child.returncode or 0
        finally:
            child.kill()
            child.wait()
        _show_buffers(read_memory(path), given.buffers)
    return 0


def _compile(given: argparse.Namespace, folder: Path | None, start: float) -> int:
    import jax

    from qwen3_jax import Qwen3Config, make_mesh
    from qwen3_jax.config import RopeScaling
    from qwen3_jax.parallel.rules import RULES, TRAIN_RULES
    from qwen3_jax.planning.job import Job
    from qwen3_jax.planning.programs import lowered

    config = Qwen3Config.from_hf(given.model) if Path(given.model).is_dir() else Qwen3Config.preset(given.model)
    if given.layers:
        config = dataclasses.replace(config, num_hidden_layers=given.layers)
    if given.yarn:
        original = config.max_position_embeddings
        scaling = RopeScaling(kind="yarn", factor=given.yarn, original_max_position_embeddings=original)
        config = dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=int(original * given.yarn))
    rules = (TRAIN_RULES if given.mode in ("train", "lora") else RULES).replace_rows(given.rule)
    slack = {} if given.slack is None else {"slack": given.slack}
    rules = dataclasses.replace(rules, dispatch=dataclasses.replace(rules.dispatch, transport=given.transport, **slack))
    topology = parse_topology(given.topology, given.slices)
    mesh = make_mesh(given.mesh, slices=given.slices, devices=devices_of(topology)[: given.devices])
    job = Job(config, given.mode, given.batch, given.seq, given.remat, given.rank, given.base, given.adapter_dtype)

    tracing = time.perf_counter()
    made = lowered(job, mesh, rules)
    compiling = time.perf_counter()
    try:
        compiled = made.program.compile()
    except jax.errors.JaxRuntimeError as error:
        Console().print(f"[bold]does not compile[/bold]: {str(error).splitlines()[0][:300]}", soft_wrap=True)
        return 1
    end = time.perf_counter()

    if given.text is not None:
        given.text.write_text(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("this compiler does not say how much memory a program takes")
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    title = (
        f"{given.model}, {config.num_hidden_layers} layers, {given.mode}, {given.batch} x {given.seq}, {topology.name}, {shape}"
    )
    table = Table("of a chip", "GB", title=title)
    for name, size in made.arguments.items():
        table.add_row(f"  {name}", f"{size / 1e9:.2f}")
    for name in ("argument", "temp", "output", "alias"):
        table.add_row(f"{name} bytes", f"{getattr(memory, f'{name}_size_in_bytes') / 1e9:.2f}")
    hbm = topology.chip.hbm
    table.add_row(
        "in all", f"{total / 1e9:.2f} of {hbm / 1e9:.2f}" + ("" if total <= hbm else f", {(total - hbm) / 1e9:.2f} too many")
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = Table("seconds", "")
    seconds.add_row("start to lowered", f"{compiling - start:.1f}, of which tracing and lowering {compiling - tracing:.1f}")
    seconds.add_row("compiling", f"{end - compiling:.1f}")
    seconds.add_row("start to compiled", f"{end - start:.1f}")
    seconds.add_row("processor", f"{used.ru_utime + used.ru_stime:.1f}")
    seconds.add_row("load of the machine", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    seconds.add_row("peak memory, GB", f"{used.ru_maxrss / 1e6:.2f}")
    Console().print(table, seconds)
    if given.buffers and folder is not None and (path := dumped(folder)) is not None:
        _show_buffers(read_memory(path), given.buffers)
    return 0


def _show_buffers(memory: Memory, count: int) -> None:
    console = Console()
    console.print(f"arguments {memory.arguments / 1e9:.2f} GB, temporaries {memory.temporaries / 1e9:.2f} GB")
    console.print(f"of them {memory.live / 1e9:.2f} GB in use at {memory.peak}", soft_wrap=True)
    if not count:
        return
    table = Table("GB", "shape", title="in use at the peak")
    table.add_column("from", overflow="fold")
    for buffer in memory.buffers[:count]:
        table.add_row(f"{buffer.bytes / 1e9:.3f}", buffer.shape, buffer.operation)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
