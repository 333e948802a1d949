r"""A step of adapters beside the forward and backward pass of the frozen base alone, which goes back to the embedded words.

    .venv/bin/python tools/bench_lora.py --base nf4
    .venv/bin/python tools/bench_lora.py --topology v5p:2x2x1 --model qwen3-30b-a3b --batch 4 --seq 4096 --base nf4

The first runs both programs on this machine's CPU, in turns, with small models of the published widths, and prints medians of
processor time, which other programs beside it hardly change. The second compiles both for one device of a chip that is not
here, and prints what `qwen3-jax plan` would say of them. The base alone has the same codes, loss and remat, and no adapters.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qwen3_jax.planning.topology import COMPILE_ONLY, devices_of, parse_topology  # noqa: E402

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3-0.6b", dict(num_hidden_layers=4, vocab_size=8192)),
    "experts": ("qwen3-30b-a3b", dict(num_hidden_layers=2, vocab_size=8192, num_experts=8, num_experts_per_tok=2)),
}


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", help="compile for one device of it, in place of running here")
    parser.add_argument("--model", help="a preset to compile")
    parser.add_argument("--layers", type=int, help="this many of its layers")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--base", default="bfloat16", help="of the frozen matrices: bfloat16 (here float32), int8, int4, nf4")
    parser.add_argument("--adapter-dtype", default="float32")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each program")
    parser.add_argument("--only", choices=list(SMALL), help="one of the small models")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two programs and their arguments, shapes or arrays.

    Attributes:
        state, batch: of the step.
        step: of adapters.
        embedded: [B, T, D], what the base alone is differentiated by.
        frozen: its parameters.
        base: a jitted function of embedded, frozen and batch.
    """

    state: Any
    batch: Any
    step: Any
    embedded: Any
    frozen: Any
    base: Any


def pair(config: Any, given: argparse.Namespace, mesh: Any, dtype: Any, param_dtype: Any) -> Pair:
    """Both programs of a model."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding

    from qwen3_jax.model.abstract import abstract_model
    from qwen3_jax.parallel.batches import Batch
    from qwen3_jax.parallel.rules import TRAIN_RULES
    from qwen3_jax.training.objective import Objective, gradient
    from qwen3_jax.training.optimizer import adamw
    from qwen3_jax.training.state import abstract_train_state
    from qwen3_jax.training.step import make_train_step
    from qwen3_jax.tune.lora import LoraConfig
    from qwen3_jax.tune.quantize import quantize

    rules, optimizer, kind = TRAIN_RULES, adamw(1e-4), None if given.base == "bfloat16" else given.base
    lora = LoraConfig(rank=given.rank, base=kind)
    state = abstract_train_state(
        config, optimizer, mesh, rules=rules, param_dtype=param_dtype, adapt=lora, adapter_dtype=given.adapter_dtype
    )
    step = make_train_step(config, optimizer, dtype=dtype, remat=given.remat, rules=rules, adapt=lora)

    def array(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        spec = rules.spec("batch", None, mesh=mesh) if len(shape) == 2 else rules.spec("batch", "seq", None, mesh=mesh)
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))

    rows = (given.batch, given.seq)
    batch = Batch(array(rows, jnp.int32), array(rows, jnp.int32), array(rows, jnp.float32), array(rows, jnp.int32))

    adapt = None if kind is None else lambda model: quantize(model, kind)
    model = abstract_model(config, mesh, rules=rules, dtype=dtype, param_dtype=param_dtype, adapt=adapt)
    graph, frozen = nnx.split(model, nnx.Param)
    objective = Objective(balance=config.router_aux_loss_coef, top_k=config.num_experts_per_tok)

    @jax.jit
    def base(embedded: Any, frozen: Any, batch: Any) -> Any:
        def run(embedded: Any, rows: Any, **loss: Any) -> Any:
            model = nnx.merge(graph, frozen)
            setattr(model, "embed", Embedded(model.embed, embedded))  # noqa: B010  # in an Embed's place, which it is not
            return model(rows.tokens, segment_ids=rows.segment_ids, output="hidden", remat=given.remat, **loss)

        return gradient(objective, run, embedded, batch)

    return Pair(state, batch, step, array((*rows, config.hidden_size), dtype), frozen, base)


class Embedded:
    """In place of the table of words going in: the words as embedded already; coming out it is the table."""

    def __init__(self, table: Any, embedded: Any):
        self.table, self.embedded = table, embedded

    def __call__(self, tokens: Any, dtype: Any) -> Any:
        """What stands for the words."""
        return self.embedded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)


def measured(config: Any, given: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Processor seconds of both programs, turn by turn."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen3_jax import make_mesh

    draws = np.random.default_rng(0)

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype in (np.int8, np.uint8):
            return jnp.asarray(draws.integers(0, 100, leaf.shape, np.uint8).astype(leaf.dtype))
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.ones(leaf.shape, leaf.dtype)
        block = draws.normal(0, 0.02, 1 << 16).astype(np.float32)
        return jnp.asarray(np.resize(block, leaf.shape).astype(leaf.dtype))

    mesh = make_mesh("", devices=jax.devices()[:1])
    found = pair(config, given, mesh, jnp.float32, jnp.float32)
    words = draws.integers(0, config.vocab_size, (given.batch, given.seq)).astype(np.int32)
    # Everything is given its place on the mesh, which programs ask for.
    state = jax.tree.map(lambda leaf: jax.device_put(filled(leaf), leaf.sharding), found.state)
    batch = jax.tree.map(lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding), found.batch)
    batch = dataclasses.replace(
        batch, tokens=jax.device_put(words, batch.tokens.sharding), labels=jax.device_put(words, batch.labels.sharding)
    )
    frozen = jax.tree.map(lambda leaf: jax.device_put(filled(leaf), leaf.sharding), found.frozen)
    embedded = jax.device_put(filled(found.embedded), found.embedded.sharding)
    holder = [state]

    def step() -> Any:
        holder[0], metrics = found.step(holder[0], batch)
        return metrics

    def base() -> Any:
        with jax.set_mesh(mesh):
            return found.base(embedded, frozen, batch)

    def timed(run: Callable[[], Any]) -> float:
        begin = time.process_time()
        jax.block_until_ready(run())
        return time.process_time() - begin

    timed(step), timed(base)
    turns = [(timed(step), timed(base)) for _ in range(given.rounds)]
    return [turn[0] for turn in turns], [turn[1] for turn in turns]


def run_here(given: argparse.Namespace) -> None:
    """Time small models on the CPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from qwen3_jax import Qwen3Config

    title = f"{given.batch} x {given.seq} tokens, rank {given.rank}, base {given.base}, remat {given.remat}, processor seconds"
    table = Table("model", "step of adapters", "base alone", "ratio", "of the turns", title=title)
    for name, (preset, changes) in SMALL.items():
        if given.only in (None, name):
            whole: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, **changes)
            config = dataclasses.replace(Qwen3Config.preset(preset), **whole)
            steps, bases = measured(config, given)
            ratios = sorted(step / base for step, base in zip(steps, bases, strict=True))
            medians = [statistics.median(values) for values in (steps, bases, ratios)]
            table.add_row(
                name, f"{medians[0]:.2f}", f"{medians[1]:.2f}", f"{medians[2]:.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
            )
    Console(width=130).print(table)


def compile_both(given: argparse.Namespace) -> None:
    """Compile for one device of a chip, and print what a plan would say."""
    os.environ.update(COMPILE_ONLY)
    import jax
    import jax.numpy as jnp

    from qwen3_jax import Qwen3Config, make_mesh
    from qwen3_jax.planning.efficiency import ASSUMED
    from qwen3_jax.planning.program import read_program
    from qwen3_jax.planning.roofline import step_time

    config = Qwen3Config.preset(given.model)
    config = dataclasses.replace(config, num_hidden_layers=given.layers) if given.layers else config
    topology = parse_topology(given.topology)
    mesh = make_mesh("", devices=devices_of(topology)[:1])
    found = pair(config, given, mesh, jnp.bfloat16, jnp.bfloat16)
    title = f"{given.model}, {config.num_hidden_layers} layers, {given.batch} x {given.seq}, rank {given.rank} in "
    title += f"{given.adapter_dtype}, base {given.base}, remat {given.remat}, one {topology.chip.device_kind}"
    columns = ("arguments GB", "temporaries GB", "in all GB", "TFLOP", "HBM GB", "products s", "HBM s", "step s")
    table = Table("program", *columns, title=title)
    totals = []
    for name in ("step of adapters", "base alone"):
        with jax.set_mesh(mesh):
            if name == "base alone":
                lowered = found.base.lower(found.embedded, found.frozen, found.batch)
            else:
                lowered = found.step.lower(found.state, found.batch)
            program = read_program(lowered.compile(), mesh)
        told = step_time(program.flops, program.timed_hbm_bytes, [], topology.chip, ASSUMED)
        totals.append(told.total)
        whole = program.arguments + program.temporaries + program.output - program.aliased
        sizes = [program.arguments, program.temporaries, whole, program.flops / 1000, program.timed_hbm_bytes]
        figures = [f"{size / 1e9:.2f}" for size in sizes]
        table.add_row(name, *figures, f"{told.compute:.3f}", f"{told.hbm:.3f}", f"{told.total:.3f}")
        print(f"{name}: {', '.join(figures)}", *program.unknown, sep="; ", flush=True)
    Console(width=170).print(table, f"ratio {totals[0] / totals[1]:.3f}")


def main() -> int:
    """Run or compile, and print."""
    given = options()
    run_here(given) if given.topology is None else compile_both(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
