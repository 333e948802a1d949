"""Write tests/fixtures/config: config.json files as `to_hf` writes them, and what two versions of transformers read in each.

    .venv/bin/python tools/make_config_fixtures.py write
    pip install torch==2.13.0 transformers==5.23.0 && python tools/make_config_fixtures.py read

`read` runs in an environment with transformers on CPU torch, which the package itself never needs; again with 4.57.6.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "fixtures" / "config"
PRESETS = ("qwen3-0.6b", "qwen3-30b-a3b", "qwen3-coder-480b-a35b-instruct")
POSITIONS = (0, 3, 200, 500)  # all below 512: longrope_short keeps its short factors
KEPT = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "tie_word_embeddings attention_bias max_position_embeddings rms_norm_eps hidden_act bos_token_id eos_token_id pad_token_id"
)
KEPT_MOE = "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob router_aux_loss_coef"


def write() -> None:
    """The files of the parity cases and of some presets."""
    sys.path.insert(0, str(ROOT))
    from qwen3_jax import Qwen3Config
    from tests.parity.cases import CASES

    configs = {name: Qwen3Config.from_hf(content) for name, content in CASES.items()}
    configs |= {name: Qwen3Config.preset(name) for name in PRESETS}
    FOLDER.mkdir(parents=True, exist_ok=True)
    content = {name: config.to_hf() for name, config in configs.items()}
    (FOLDER / "written.json").write_text(json.dumps(content, indent=1) + "\n")


def read() -> None:
    """What the transformers at hand makes of each file: its model, on no device, and the rotation of its queries."""
    import tempfile

    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for name, content in json.loads((FOLDER / "written.json").read_text()).items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(content))
            config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        rotary = type(model.model.rotary_emb)(config=config)
        cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor([POSITIONS]))
        every = max(1, cos.shape[-1] // 16)
        keys = KEPT.split() + (KEPT_MOE.split() if content["model_type"] == "qwen3_moe" else [])
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": [
                {
                    "moe": hasattr(layer.mlp, "experts"),
                    "window": layer.self_attn.sliding_window,
                    "biases": layer.self_attn.q_proj.bias is not None,
                }
                for layer in model.model.layers
            ],
            "dtype": str(config.dtype).removeprefix("torch."),
            "keys": {key: getattr(config, key) for key in keys},
            "cos": [[round(value, 6) for value in row] for row in cos[0, :, ::every].tolist()],
            "sin": [[round(value, 6) for value in row] for row in sin[0, :, ::every].tolist()],
        }
    version = transformers.__version__
    content = {"transformers": version, "positions": POSITIONS, "models": found}
    (FOLDER / f"transformers-{version.split('.')[0]}.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]]()
