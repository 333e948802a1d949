"""A hundred steps of a small MoE beside transformers': the same first weights, batches and settings; losses step by step.

    python -m tools.compare_training --peer-python PATH [--fixture tests/fixtures/training/losses.npz]

PATH is the python of an environment with torch and transformers. What is trained is tests/training/curve.py: the model is
written by save_pretrained and read by transformers, which trains it with its own balance loss and torch's AdamW.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, and what is kept of it."""

    peer_python: Path
    """Python of an environment with torch and transformers."""
    fixture: Path | None = None
    """transformers' losses are kept in this file, for the test of the suite."""


def losses_of_torch(folder: str, out: str) -> None:
    """What transformers makes of the model in a folder.

    Written: each step's cross-entropy and balance loss, the gradient's norm, and by how much in probability the closest choice
    of an expert was won.
    """
    import torch
    from transformers import Qwen3MoeForCausalLM

    from tests.training import curve

    torch.set_num_threads(1)
    options = dict(dtype=torch.float32, attn_implementation="eager", output_router_logits=True)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, **options).train()
    norms = [weight for name, weight in model.named_parameters() if "norm" in name]
    others = [weight for name, weight in model.named_parameters() if "norm" not in name]
    settings = curve.ADAMW
    optimizer = torch.optim.AdamW(
        [dict(params=others), dict(params=norms, weight_decay=0.0)],
        betas=(settings["b1"], settings["b2"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    kept = dict(loss=[], balance=[], norm=[], margin=[])
    chosen = curve.CONFIG["num_experts_per_tok"]
    for step in range(curve.STEPS):
        for group in optimizer.param_groups:
            group["lr"] = curve.rate(step)
        tokens = torch.from_numpy(curve.tokens(step)).long()
        given = model(input_ids=tokens, labels=tokens)
        optimizer.zero_grad()
        given.loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # torch's own clip_grad_norm_ divides by the norm and 1e-6 more.
        for gradient in gradients:
            gradient.mul_(torch.clamp(settings["max_grad_norm"] / norm, max=1.0))
        optimizer.step()
        kept["loss"].append(given.loss.item() - curve.CONFIG["router_aux_loss_coef"] * given.aux_loss.item())
        kept["balance"].append(given.aux_loss.item())
        kept["norm"].append(norm.item())
        best = torch.cat(given.router_logits).softmax(-1).topk(chosen + 1).values
        kept["margin"].append((best[:, chosen - 1] - best[:, chosen]).min().item())
    np.savez_compressed(out, **{name: np.asarray(values, np.float64) for name, values in kept.items()})


def losses_of_ours(folder: str) -> dict[str, np.ndarray]:
    """The same of this package's training but for the margins; the model's first weights are written to a folder."""
    import jax.numpy as jnp

    import qwen3_jax
    from qwen3_jax.training.schedule import Phase, schedule
    from tests.parity.build import filled_model
    from tests.training import curve

    model = filled_model(curve.CONFIG, curve.weight)
    qwen3_jax.save_pretrained(model, folder)
    rate = schedule([Phase(curve.STEPS, curve.PEAK_RATE, warmup=curve.WARMUP, end=curve.END)])
    optimizer = qwen3_jax.adamw(rate, **curve.ADAMW)
    state = qwen3_jax.init_train_state(model, optimizer)
    step = qwen3_jax.make_train_step(model.config, optimizer, dtype=jnp.float32, remat="none")
    kept = dict(loss=[], balance=[], norm=[])
    for number in range(curve.STEPS):
        tokens = curve.tokens(number)
        mask = np.ones(tokens.shape, np.float32)
        mask[:, -1] = 0  # nothing follows a row's last word
        batch = qwen3_jax.Batch(tokens=tokens, labels=np.roll(tokens, -1, 1), mask=mask)
        state, metrics = step(state, batch)
        for name, metric in (("loss", "loss"), ("balance", "balance_loss"), ("norm", "grad_norm")):
            kept[name].append(float(metrics[metric]))
    return {name: np.asarray(values) for name, values in kept.items()}


def main(options: Options) -> int:
    """Compare, and print the table.

    Returns:
        0 if the losses are equal to 1e-4 in every step and fell by 30 %, else 1.
    """
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory(prefix="compare-training-") as place:
        ours = losses_of_ours(f"{place}/model")
        out = options.fixture or Path(place) / "losses.npz"
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [str(options.peer_python), __file__, "torch", f"{place}/model", str(out)]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        with np.load(out) as file:
            theirs = {name: file[name] for name in file.files}
    table = Table("step", "loss", "transformers'", "apart", "balance loss", "apart", "gradient's norm", "apart, of it")
    steps = len(ours["loss"])
    apart = {name: np.abs(ours[name] - theirs[name]) for name in ours}
    for step in sorted({*range(5), *range(9, steps, 10), steps - 1}):
        cells = [f"{step + 1}", f"{ours['loss'][step]:.6f}", f"{theirs['loss'][step]:.6f}", f"{apart['loss'][step]:.1e}"]
        cells += [f"{ours['balance'][step]:.5f}", f"{apart['balance'][step]:.1e}"]
        cells += [f"{ours['norm'][step]:.4f}", f"{apart['norm'][step] / theirs['norm'][step]:.1e}"]
        table.add_row(*cells)
    console = Console(width=120, highlight=False)
    console.print(table)
    first, last = (theirs["loss"][part].mean() for part in (slice(5), slice(-5, None)))
    console.print(
        f"loss at most {apart['loss'].max():.1e} apart (step {apart['loss'].argmax() + 1}), balance loss "
        f"{apart['balance'].max():.1e}; mean of five steps {first:.3f} -> {last:.3f}, less by {1 - last / first:.0%}; "
        f"the closest choice of an expert won by {theirs['margin'].min():.1e}"
    )
    return 0 if apart["loss"].max() < 1e-4 and last < 0.7 * first else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["torch"]:
        sys.path.insert(0, str(ROOT))
        losses_of_torch(*sys.argv[2:])
    else:
        import tyro  # not in the peer's environment

        sys.exit(main(tyro.cli(Options)))
