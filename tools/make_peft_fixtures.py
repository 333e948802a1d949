"""PEFT on either side of adapter folders: writes tests/fixtures/peft, and reads what `save_adapter` has written.

In an environment with PEFT and transformers on CPU torch, which the package itself never needs:

    pip install torch==2.13.0 transformers==4.57.6 peft==0.21.2      (or transformers==5.23.0)
    python tools/make_peft_fixtures.py                 # the fixtures of that transformers' major version
    python tools/make_peft_fixtures.py --check FOLDER  # the largest difference of logits for each adapter in FOLDER

FOLDER is written by this package's own environment:

    python tools/make_peft_fixtures.py --ours FOLDER
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.parity import cases  # noqa: E402
from tests.tune import peft_cases  # noqa: E402

CLOSE = 1e-5


def versions():
    """The pair that the numbers are of."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "peft", "torch"))


def logits(model):
    """Of the shared tokens, [LENGTH, V] in float32."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(peft_cases.words()).long()).logits[0].numpy()


def write_fixtures(folder):
    """PEFT's adapters with every factor drawn, and the logits of the model that has them."""
    import peft
    import torch
    import transformers

    from tools.make_parity_fixtures import build

    major = int(transformers.__version__.split(".")[0])
    for name, (content, told, written_by) in peft_cases.WRITTEN_BY_PEFT.items():
        if written_by != major:
            continue
        model = build(content)
        plain = logits(model)
        config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **told)
        model = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for place, parameter in model.named_parameters():
                if ".lora_" in place:
                    parameter.copy_(torch.from_numpy(cases.weight(place, tuple(parameter.shape))))
        kept = logits(model)
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        np.savez_compressed(folder / name / "expected.npz", logits=kept, versions=versions())
        print(name, versions(), f"moved by {np.abs(kept - plain).max():.2f}")


def check(folder):
    """Read every adapter that `write_ours` has written."""
    import peft

    from tools.make_parity_fixtures import build

    print(versions())
    failed = 0
    for name, (content, told) in peft_cases.WRITTEN_BY_US.items():
        wanted = np.load(folder / f"{name}.npy")
        try:
            model = peft.PeftModel.from_pretrained(build(content), folder / name).eval()
        except (ValueError, RuntimeError) as error:
            print(f"{name}: not read: {str(error).splitlines()[0][:160]}")
            failed += 1
            continue
        found = logits(model)
        difference, moved = np.abs(found - wanted).max(), np.abs(found - logits(build(content))).max()
        failed += not difference < CLOSE
        print(f"{name}: {difference:.2g} of logits up to {np.abs(wanted).max():.1f}, which adapters {told} move by {moved:.2f}")
    return failed


def write_ours(folder):
    """Our adapters with every factor drawn, and our logits, of the models that `check` builds."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from qwen3_jax.tune.lora import LoraConfig, attach
    from qwen3_jax.tune.peft import save_adapter
    from tests.parity.build import filled_model

    for name, (content, told) in peft_cases.WRITTEN_BY_US.items():
        model = attach(filled_model(content), LoraConfig(**told), jax.random.key(0))
        graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
        draws = np.random.default_rng(3)
        leaves, tree = jax.tree.flatten(factors)
        factors = jax.tree.unflatten(tree, [jnp.asarray(draws.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves])
        model = nnx.merge(graph, factors, rest)
        save_adapter(model, folder / name, overwrite=True)
        np.save(
            folder / f"{name}.npy", np.asarray(jax.jit(lambda model: model(jnp.asarray(peft_cases.words())).logits[0])(model))
        )
        print(name)


def main():
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="FOLDER")
    parser.add_argument("--ours", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    if given.ours:
        write_ours(given.ours)
    elif given.check:
        sys.exit(bool(check(given.check)))
    else:
        write_fixtures(ROOT / "tests" / "fixtures" / "peft")


if __name__ == "__main__":
    main()
