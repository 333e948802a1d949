"""`make demo`: train, train on a mesh, export, read back, compare to the bit, write in three modes. Six minutes on two cores.

    python -m tools.demo [--seconds 240] [--out demo_out]

The second, shorter training is the first one over again on a mesh of eight devices, which the CPU makes believe it has: its
losses must lie on those of one device. The exit code is 0 only if they do, the loss fell, the logits came back the same to the
bit, and each mode wrote as it should. All of it fits a terminal of 80 columns and 50 lines.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import qwen3_jax
from qwen3_jax import Batch, Qwen3Config, Sampling
from qwen3_jax.host_memory import keep_freed_memory_on_cpu
from qwen3_jax.training.state import TrainState, trained_model
from tools.demo.corpus import batches, conversations, train_tokenizer
from tools.demo.report import (
    answer_panel,
    largest_difference,
    load_table,
    mesh_line,
    save_picture,
    terminal_curve,
    verdict_line,
)

VOCABULARY = 4096
PEAK_RATE = 2e-3
WARMUP = 60


@dataclasses.dataclass(frozen=True)
class Options:
    """How long and how large the demo is."""

    seconds: float = 240.0
    """Training stops after this many seconds."""
    steps: int = 400
    """Training stops after this many steps."""
    rows: int = 8
    """Rows of a batch."""
    length: int = 256
    """Tokens of a row."""
    mesh: str = "fsdp=2,expert=4"
    """Mesh of the second training, over eight devices."""
    mesh_seconds: float = 100.0
    """The second training stops after this many seconds."""
    mesh_steps: int = 40
    """The second training stops after this many steps."""
    out: Path = Path("demo_out")
    """Folder of the checkpoint and the picture."""


def schedule(steps: int) -> optax.Schedule:
    """Learning rate: up in sixty steps, or in a quarter of a shorter run, then down to a tenth along a cosine.

    A third of that makes the loss jump by a nat at the top, where weights 1e-7 apart end 0.2 nats apart: the mesh could not be
    held to one device's curve.
    """
    return optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(WARMUP, steps // 4), steps, PEAK_RATE / 10)


def demo_config(end_id: int, pad_id: int) -> Qwen3Config:
    """Six layers, the first and fourth dense, eight experts elsewhere, two chosen per token."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        mlp_only_layers=(0, 3),
        router_aux_loss_coef=0.01,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )


def begun(config: Qwen3Config, options: Options) -> tuple[TrainState, Callable[[TrainState, Batch], tuple[TrainState, dict]]]:
    """A new state, laid out on the mesh that is set if one is, and the step that trains it."""
    optimizer = qwen3_jax.adamw(schedule(options.steps))
    model = jax.jit(lambda: qwen3_jax.Qwen3(config, rngs=nnx.Rngs(0), dtype=jnp.float32))()
    step = qwen3_jax.make_train_step(config, optimizer, dtype=jnp.float32, remat="none")
    return qwen3_jax.init_train_state(model, optimizer), step


def train(config: Qwen3Config, documents: list[list[int]], options: Options, console: Console):
    """Train for the time given.

    Returns:
        The state, training losses, (step, held-out loss) pairs and the mean expert load of the last steps.
    """
    held, taught = documents[:64], documents[64:]
    state, step = begun(config, options)
    test = next(batches(held, options.rows, options.length, seed=1))

    @jax.jit
    def held_out_loss(state: TrainState):
        logits = trained_model(config, state, dtype=jnp.float32)(test.tokens, segment_ids=test.segment_ids).logits
        return qwen3_jax.cross_entropy(logits, test.labels, test.mask)

    losses, held_out, loads, start = [], [(0, float(held_out_loss(state)))], [], time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=options.steps, told="compiling")
        stream = batches(taught, options.rows, options.length, seed=0)
        for number in range(1, options.steps + 1):
            state, metrics = step(state, next(stream))
            losses.append(float(metrics["loss"]))
            loads.append(np.asarray(metrics["expert_load"]))
            spent = time.monotonic() - start
            rate = number * options.rows * options.length / spent
            told = f"step {number}  loss {losses[-1]:.3f}  {rate:,.0f} tokens/s"
            done = max(number, options.steps * spent / options.seconds)
            progress.update(task, completed=min(done, options.steps), told=told)
            last = spent > options.seconds or number == options.steps
            if number % 50 == 0 or last:
                held_out.append((number, float(held_out_loss(state))))
            if last:
                break
    console.print(
        f"{len(losses)} steps, {len(losses) * options.rows * options.length:,} tokens in {spent:.0f} s, {rate:,.0f} tokens/s"
    )
    return state, losses, held_out, np.mean(loads[-20:], axis=0)


def train_on_mesh(config: Qwen3Config, documents: list[list[int]], options: Options, console: Console) -> list[float]:
    """The beginning of `train` over again, on a mesh.

    Returns:
        Training losses.
    """
    with jax.set_mesh(qwen3_jax.make_mesh(options.mesh)):
        state, step = begun(config, options)
    losses, start = [], time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"training on {options.mesh}", total=options.mesh_steps, told="compiling")
        stream = batches(documents[64:], options.rows, options.length, seed=0)
        while len(losses) < options.mesh_steps and time.monotonic() - start < options.mesh_seconds:
            state, metrics = step(state, next(stream))
            losses.append(float(metrics["loss"]))
            progress.update(task, completed=len(losses), told=f"step {len(losses)}  loss {losses[-1]:.3f}")
    return losses


def text_after_cut(written: list[int], budget: qwen3_jax.ThinkingBudget, tok) -> str | None:
    """What follows the words that end a thought when its budget is spent.

    Args:
        written: the generated ids.
        budget: one number of tokens.
        tok: decodes.

    Returns:
        The text behind the forced words without its end-of-turn token; None if those words do not stand where the budget ends.
    """
    forced = [int(token) for token in budget.early_stop_ids]
    if budget.think_id not in written[: budget.tokens]:
        forced = [int(token) for token in budget.open_ids] + forced
    end = budget.tokens + len(forced)
    if written[budget.tokens : end] != forced or budget.end_id in written[: budget.tokens]:
        return None
    return tok.decode([token for token in written[end:] if token not in tok.stop_token_ids]).strip()


def cut_row(rows: list[list[int]], budget: qwen3_jax.ThinkingBudget, tok) -> int | None:
    """Which of some answers was cut at the budget and wrote on.

    Args:
        rows: the generated ids of each.
        budget: one number of tokens.
        tok: decodes.

    Returns:
        The first that was; None if there is none, or if any row neither was cut nor ended its thought itself within the budget.
    """
    texts = [text_after_cut(row, budget, tok) for row in rows]
    if any(text is None and budget.end_id not in row[: budget.tokens] for text, row in zip(texts, rows, strict=True)):
        return None
    return next((number for number, text in enumerate(texts) if text), None)


def write_three_ways(model, tok, prompt: str, console: Console) -> bool:
    """Generate with thinking on, off, and cut at a budget.

    Returns:
        Whether each mode did what it should: thought, did not think, was cut exactly at its budget and then wrote on.
    """
    budget = tok.thinking_budget(3)
    # A third of what was taught has an empty thought: one answer may well end its own before the budget does, eight will not.
    modes = {
        "thinking": (True, None, 1),
        "not thinking": (False, None, 1),
        f"cut after {budget.tokens} tokens of thought": (True, budget, 8),
    }
    good = True
    for number, (name, (thinks, limit, answers)) in enumerate(modes.items()):
        ids = tok.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, enable_thinking=thinks)
        out = qwen3_jax.generate(
            model,
            jnp.asarray([ids] * answers, jnp.int32),
            max_new_tokens=128,
            sampling=Sampling(temperature=0.7, top_p=0.9, top_k=20),
            key=jax.random.key(number),
            stop_tokens=tok.stop_token_ids,
            thinking=limit,
        )
        rows = [[int(token) for token in row[:length]] for row, length in zip(out.tokens, out.lengths, strict=True)]
        if limit is None:
            shown = 0
            good &= ("<think>" in tok.decode(rows[0])) == thinks
        else:
            shown = cut_row(rows, limit, tok)
            good &= shown is not None
        console.print(answer_panel(name, tok.decode(rows[shown or 0])))
    return good


def main(options: Options) -> int:
    """Run the demo.

    Returns:
        0 if all of it held, 1 if not, 2 for options that make no sense.
    """
    least = {"steps": 1, "rows": 1, "length": 2, "mesh_steps": 1}
    if wrong := [name for name, value in least.items() if getattr(options, name) < value]:
        told = ", ".join(
            f"--{name.replace('_', '-')} is {getattr(options, name)}: accepted is at least {least[name]}" for name in wrong
        )
        print(told, file=sys.stderr)
        return 2
    keep_freed_memory_on_cpu()
    jax.config.update("jax_num_cpu_devices", 8)
    console, begin = Console(), time.monotonic()
    samples = conversations()
    train_tokenizer(samples, VOCABULARY, options.out / "tokenizer")
    tok = qwen3_jax.load_tokenizer(options.out / "tokenizer")
    documents = []
    for number, sample in enumerate(samples):
        if number % 3 == 0:
            sample = [sample[0], {"role": "assistant", "content": sample[1]["content"]}]
        documents.append(tok.apply_chat_template(sample))
    config = demo_config(*tok.encode("<|im_end|><|endoftext|>"))
    console.print(
        f"[bold]Qwen3-MoE[/], {config.num_params() / 1e6:.1f} M parameters ({config.num_active_params() / 1e6:.1f} M active), "
        f"on {jax.devices()[0].platform}; {len(documents):,} functions of the\nstandard library, "
        f"{sum(map(len, documents)):,} tokens"
    )
    state, losses, held_out, load = train(config, documents, options, console)
    console.print(terminal_curve(losses))
    console.print(f"held out: {held_out[0][1]:.3f} -> {held_out[-1][1]:.3f} nats per token")
    moe_layers = [layer for layer in range(config.num_hidden_layers) if layer not in config.mlp_only_layers]
    console.print(load_table(load, moe_layers))
    on_mesh = train_on_mesh(config, documents, options, console)
    console.print(mesh_line(options.mesh, losses, on_mesh))
    picture = options.out / "demo.png"
    save_picture(losses, on_mesh, held_out, load, picture)

    model = trained_model(config, state, dtype=jnp.float32)
    folder = options.out / "hf"
    qwen3_jax.save_pretrained(model, folder, tokenizer=tok, overwrite=True)
    again = qwen3_jax.from_pretrained(folder, dtype=jnp.float32)
    logits = jax.jit(lambda model, tokens: model(tokens).logits)
    tokens = jnp.asarray([documents[0][:64]], jnp.int32)
    same = np.array_equal(logits(model, tokens), logits(again, tokens))
    console.print(f"exported to {folder} and read back: logits {'the same to the bit' if same else '[red]DIFFER[/]'}")
    wrote = write_three_ways(again, qwen3_jax.load_tokenizer(folder), "def read_file(path, encoding='utf-8'):", console)
    fell = held_out[-1][1] < 0.75 * held_out[0][1]
    on_curve = largest_difference(losses, on_mesh) < 2e-3
    verdicts = {"loss fell": fell, "mesh as one device": on_curve, "round trip": same, "three modes": wrote}
    console.print(verdict_line(verdicts))
    console.print(f"picture: {picture}   all in {time.monotonic() - begin:.0f} s")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
