"""Write tests/fixtures/config: what `to_hf` writes and two versions of transformers read, and what those save themselves.

    .venv/bin/python tools/make_config_fixtures.py write
    pip install torch==2.13.0 transformers==5.23.0
    python tools/make_config_fixtures.py read
    python tools/make_config_fixtures.py save

`read` and `save` run in an environment with transformers on CPU torch, which the package itself never needs; again with
4.57.6. hub.json beside them was not made by a program: each of its files says where its values are from.
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

SMALL = dict(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)
FACTORS = dict(short_factor=[1.0, 1.5] * 32, long_factor=[2.0, 4.0] * 32)
# name -> (class, what its config is made with): what each means is in tests/test_config_in_transformers.py.
SAVED = {
    "silent": ("Qwen3Config", {}),
    "dense": ("Qwen3Config", dict(SMALL, head_dim=32, attention_bias=True, tie_word_embeddings=True, dtype="float16")),
    "heads": ("Qwen3Config", dict(SMALL, num_key_value_heads=None)),
    "words": ("Qwen3Config", dict(SMALL, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0)),
    "sliding": ("Qwen3Config", dict(SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "silent_window": ("Qwen3Config", dict(SMALL, use_sliding_window=True, max_window_layers=3)),
    "linear": ("Qwen3Config", dict(SMALL, rope_theta=1e6, rope_scaling=dict(rope_type="linear", factor=2.0))),
    "dynamic": ("Qwen3Config", dict(SMALL, rope_theta=1e6, rope_scaling=dict(rope_type="dynamic", factor=2.0))),
    "yarn": (
        "Qwen3Config",
        dict(
            SMALL,
            rope_theta=1e6,
            rope_scaling=dict(
                rope_type="yarn", factor=4.0, original_max_position_embeddings=8192, beta_fast=16.0, beta_slow=2.0
            ),
        ),
    ),
    "llama3": (
        "Qwen3Config",
        dict(
            SMALL,
            rope_theta=5e5,
            rope_scaling=dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=4096,
            ),
        ),
    ),
    "longrope": (
        "Qwen3Config",
        dict(
            SMALL,
            rope_theta=1e6,
            rope_scaling=dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=8192, **FACTORS),
        ),
    ),
    "fp8": ("Qwen3Config", dict(SMALL, quantization_config=dict(modules_to_not_convert=["lm_head"]))),
    "fp8_silent": ("Qwen3Config", dict(SMALL, quantization_config={})),
    "moe_silent": ("Qwen3MoeConfig", {}),
    "moe": ("Qwen3MoeConfig", dict(SMALL, head_dim=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)),
    "moe_head_dim_of_width": ("Qwen3MoeConfig", dict(SMALL, num_experts=8, num_experts_per_tok=2)),
    "moe_mixed": (
        "Qwen3MoeConfig",
        dict(SMALL, head_dim=32, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=2, mlp_only_layers=[3]),
    ),
    "moe_sliding": (
        "Qwen3MoeConfig",
        dict(SMALL, num_experts=8, num_experts_per_tok=2, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    ),
    "moe_yarn": (
        "Qwen3MoeConfig",
        dict(
            SMALL,
            num_experts=8,
            num_experts_per_tok=2,
            rope_theta=1e7,
            rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=16384, attention_factor=0.9),
        ),
    ),
}


def save() -> None:
    """The config.json files that the transformers at hand saves."""
    import tempfile

    import transformers

    saved = {}
    for name, (kind, values) in SAVED.items():
        values = dict(values)
        if "quantization_config" in values:
            values["quantization_config"] = transformers.FineGrainedFP8Config(**values["quantization_config"])
        with tempfile.TemporaryDirectory() as folder:
            getattr(transformers, kind)(**values).save_pretrained(folder)
            saved[name] = json.loads((Path(folder) / "config.json").read_text())
    version = transformers.__version__
    (FOLDER / f"saved-{version.split('.')[0]}.json").write_text(json.dumps(saved, indent=1) + "\n")


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
    {"write": write, "read": read, "save": save}[sys.argv[1]]()
