"""Steps of training on this machine's CPU beside transformers on torch: same shapes, batches, two cores, float32, one run.

    python -m tools.bench_train --peer-python PATH [--models dense moe] [--rounds 8]

PATH is the python of an environment with torch and transformers. A step is forward, backward, clipping and AdamW, balance loss
on, nothing recomputed in either. The two are processes that stay and take turns of a few steps; a ratio is of two turns next to
each other, above 1 where this package is faster. transformers computes by its fastest attention and experts, tried first.
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
KEEPS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    peer_python: Path
    """Python of an environment with torch and transformers."""
    models: tuple[str, ...] = ("dense", "moe")
    """`moe` is the demo's shape, `dense` the same without experts."""
    rows: int = 8
    """Of a batch."""
    length: int = 256
    """Tokens of a row."""
    rounds: int = 8
    """Turns of each program."""
    steps: int = 3
    """Of a turn."""
    threads: int = 2
    """Of either; with 1, ours is bound to one processor."""
    keeps: Literal["ours", "both", "neither"] = "ours"
    """Whose process keeps the memory that it frees (qwen3_jax.host_memory); transformers' does by glibc's variables."""
    compile: bool = False
    """transformers' model under torch.compile."""


def tokens_of(step: int, rows: int, length: int, vocabulary: int) -> np.ndarray:
    """The batch of a step: [rows, length] words, each as likely as another."""
    draw = np.random.Generator(np.random.PCG64(step))
    return draw.integers(0, vocabulary, (rows, length)).astype(np.int32)


def ours(given: dict) -> tuple[Callable[[int], None], str]:
    """A function that makes so many steps, and what is to be said of it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given["threads"]])  # XLA makes a thread for each

    import jax
    import jax.numpy as jnp
    from flax import nnx

    import qwen3_jax
    from qwen3_jax.host_memory import keep_freed_memory

    if given["keeps"] != "neither":
        keep_freed_memory()
    config = qwen3_jax.Qwen3Config.from_hf(given["config"])
    optimizer = qwen3_jax.adamw(1e-4)
    model = jax.jit(lambda: qwen3_jax.Qwen3(config, rngs=nnx.Rngs(0), dtype=jnp.float32))()
    state = qwen3_jax.init_train_state(model, optimizer)
    step = qwen3_jax.make_train_step(config, optimizer, dtype=jnp.float32, remat="none")
    mask = np.ones((given["rows"], given["length"]), np.float32)
    mask[:, -1] = 0

    def run(count: int) -> None:
        nonlocal state
        metrics = None
        for _ in range(count):
            words = tokens_of(int(state.step), given["rows"], given["length"], config.vocab_size)
            state, metrics = step(state, qwen3_jax.Batch(tokens=words, labels=np.roll(words, -1, 1), mask=mask))
        jax.block_until_ready((state, metrics))

    run(2)
    return run, f"jax {jax.__version__}"


def torchs(given: dict) -> tuple[Callable[[int], None], str]:
    """The same of transformers, by the fastest of its ways."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    config = AutoConfig.for_model(**given["config"])
    experts = getattr(config, "num_experts", 0)
    if experts:
        config.output_router_logits = True
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    called = torch.compile(model) if given["compile"] else model
    done = 0

    def run(count: int) -> None:
        nonlocal done
        for _ in range(count):
            words = torch.from_numpy(tokens_of(done, given["rows"], given["length"], config.vocab_size)).long()
            called(input_ids=words, labels=words).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1

    found = {}
    for attention in ("sdpa", "eager"):
        for product in ("grouped_mm", "batched_mm", "eager") if experts else (None,):
            if product == "batched_mm" and given["rows"] * given["length"] > 512:
                continue  # it copies a matrix for each token and expert
            model.set_attn_implementation(attention)
            if product:
                model.set_experts_implementation(product)
            run(1)
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                run(1)
                seconds.append(time.perf_counter() - begin)
            found[attention, product] = min(seconds)
    attention, product = min(found, key=lambda way: found[way])
    model.set_attn_implementation(attention)
    if product:
        model.set_experts_implementation(product)
    told = ", ".join(f"{'+'.join(filter(None, way))} {seconds:.2f} s" for way, seconds in found.items())
    run(1)
    return run, f"torch {torch.__version__}: {told}"


def serve(which: str, given: dict) -> None:
    """Make a turn of steps for each line of stdin, and tell its seconds."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    run, told = (ours if which == "ours" else torchs)(given)
    print(json.dumps(told), file=out, flush=True)
    for line in sys.stdin:
        begin, used, faults = time.perf_counter(), time.process_time(), page_faults()
        run(int(line))
        found = time.perf_counter() - begin, time.process_time() - used, page_faults() - faults
        print(json.dumps(found), file=out, flush=True)


def page_faults() -> int:
    """Pages that the kernel has made for this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@dataclasses.dataclass(frozen=True)
class Worker:
    """A process that makes steps when it is told to."""

    process: subprocess.Popen[str]
    told: str

    @staticmethod
    def start(python: Path | str, which: str, given: dict, more: dict[str, str]) -> "Worker":
        """Start it, with more of an environment, and wait until it has made its first steps."""
        command = [str(python), str(Path(__file__)), which, json.dumps(given)]
        # An installed libtpu would look for its host's metadata for half a minute.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        return Worker(process, _answer(process))

    def turn(self, steps: int) -> tuple[float, float, float]:
        """Seconds of so many steps, processor seconds, and page faults."""
        given: IO[str] | None = self.process.stdin
        assert given is not None
        print(steps, file=given, flush=True)
        return _answer(self.process)

    def end(self) -> None:
        """Until it is gone."""
        self.process.communicate()


def _answer(process: subprocess.Popen[str]):
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a process ended with code {process.wait()}: run it by hand to see why: {process.args}")
    return json.loads(line)


def shape_of(name: str) -> dict:
    """The config of that name, as transformers has it."""
    from tools.demo.__main__ import demo_config

    config = demo_config(1, 0)
    if name == "dense":
        config = dataclasses.replace(config, num_experts=0, mlp_only_layers=())
    elif name != "moe":
        raise SystemExit(f"--models {name}: accepted are dense and moe")
    return config.to_hf()


def main(options: Options) -> None:
    """Compare, and print the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=170, highlight=False)
    names = (
        "model",
        "ours, s a step",
        "transformers', s",
        "ratio",
        "its quarters",
        "of processor seconds",
        "ours, page faults",
        "transformers'",
        "tokens/s",
        "load before, after",
    )
    table = Table(*names, title=f"a step of {options.rows} x {options.length} tokens, medians of {options.rounds} turns")
    for name in options.models:
        given = dict(config=shape_of(name), rows=options.rows, length=options.length)
        given |= dict(threads=options.threads, compile=options.compile, keeps=options.keeps)
        more = KEEPS if options.keeps == "both" else {}
        workers = [Worker.start(options.peer_python, "torch", given, more), Worker.start(sys.executable, "ours", given, {})]
        console.print(f"{name}: {workers[0].told}")
        before = os.getloadavg()[0]
        seconds, used, faults = np.zeros((3, options.rounds, 2))
        for turn in range(options.rounds):
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds[turn, which], used[turn, which], faults[turn, which] = workers[which].turn(options.steps)
        for worker in workers:
            worker.end()
        theirs, mine = np.median(seconds, axis=0) / options.steps
        low, middle, high = np.quantile(seconds[:, 0] / seconds[:, 1], (0.25, 0.5, 0.75))
        cells = [f"{mine:.3f}", f"{theirs:.3f}", f"{middle:.2f}", f"{low:.2f} - {high:.2f}"]
        cells += [
            f"{np.median(used[:, 0] / used[:, 1]):.2f}",
            *(f"{count:,.0f}" for count in np.median(faults[:, ::-1], axis=0) / options.steps),
            f"{options.rows * options.length / mine:,.0f}",
            f"{before:.1f}, {os.getloadavg()[0]:.1f}",
        ]
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["torch"]):
        sys.path.insert(0, str(ROOT))
        serve(sys.argv[1], json.loads(sys.argv[2]))
    else:
        import tyro  # not in the peer's environment

        main(tyro.cli(Options))
