"""Write tests/fixtures/parity: what transformers computes for the cases of tests/parity/cases.py.

Runs in an environment with transformers 5.23 on CPU torch, which the package itself never needs:

    pip install torch==2.13.0 transformers==5.23.0 && python tools/make_parity_fixtures.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.parity import cases  # noqa: E402

CLASSES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}
NEW_TOKENS = 256


def build(content):
    """The model of a case, every weight drawn by its hub name."""
    values = {key: value for key, value in content.items() if key != "model_type"}
    config_class, model_class = CLASSES[content["model_type"]]
    if content["model_type"] == "qwen3_moe":
        values["output_router_logits"] = True
    model = model_class._from_config(config_class(**values), attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(hub_values(name, tuple(parameter.shape))))
    return model


def hub_values(name, shape):
    """A parameter as transformers 5 holds it: experts fused, each drawn by its own hub name."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return cases.weight(name, shape)
    prefix = name.rsplit(".", 1)[0]
    experts = []
    for expert in range(shape[0]):
        if name.endswith("down_proj"):
            experts.append(cases.weight(f"{prefix}.{expert}.down_proj.weight", shape[1:]))
        else:
            half = (shape[1] // 2, shape[2])
            experts.append(
                np.concatenate([cases.weight(f"{prefix}.{expert}.{part}_proj.weight", half) for part in ("gate", "up")])
            )
    return np.stack(experts)


def hub_gradients(model):
    """(hub name, gradient) pairs, fused experts taken apart."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        prefix = name.rsplit(".", 1)[0]
        if name.endswith("experts.down_proj"):
            yield from ((f"{prefix}.{e}.down_proj.weight", part) for e, part in enumerate(gradient))
        elif name.endswith("experts.gate_up_proj"):
            for e, part in enumerate(gradient):
                gate, up = np.split(part, 2)
                yield f"{prefix}.{e}.gate_proj.weight", gate
                yield f"{prefix}.{e}.up_proj.weight", up
        else:
            yield name, gradient


def fixture(name, content):
    """Every number that is kept of a case."""
    model, kept = build(content), {}
    tokens = torch.from_numpy(cases.tokens()).long()
    out = model(tokens, labels=tokens)
    kept["logits"] = out.logits[0].detach().numpy()
    kept["loss"] = out.loss.detach().numpy()
    if content["model_type"] == "qwen3_moe":
        kept["router"] = torch.stack(out.router_logits).detach().numpy()
        kept["balance"] = out.aux_loss.detach().numpy()
    if name in cases.GRADIENTS:
        out.loss.backward()
        for tensor, gradient in hub_gradients(model):
            kept[f"gradient.{tensor}"] = cases.probe(tensor, gradient)
    if name in cases.PADDED:
        batch, real = cases.padded()
        mask = torch.from_numpy(real)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(torch.from_numpy(batch).long(), attention_mask=mask, position_ids=positions)
            if content["model_type"] == "qwen3_moe":
                kept["padded_balance"] = out.aux_loss.numpy()
        kept["padded_logits"] = out.logits.numpy()
        kept |= greedy(model, tokens[:, :24])
    return kept


@torch.no_grad()
def greedy(model, prompt):
    """256 greedy tokens, and the least margin by which one led."""
    # Without a mask generate() takes every token 0 of the prompt for padding.
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    written = model.generate(prompt, max_new_tokens=NEW_TOKENS, **options)
    top = model(written).logits[0, prompt.shape[1] - 1 : -1].topk(2).values
    return {"greedy": written[0, prompt.shape[1] :].numpy(), "greedy_margin": (top[:, 0] - top[:, 1]).min().numpy()}


def main():
    """Write one file per case."""
    torch.set_num_threads(1)
    folder = ROOT / "tests" / "fixtures" / "parity"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in cases.CASES.items():
        kept = fixture(name, content)
        np.savez_compressed(folder / f"{name}.npz", **kept)
        print(name, f"|logit| <= {np.abs(kept['logits']).max():.1f}", "margin", kept.get("greedy_margin"))


if __name__ == "__main__":
    main()
