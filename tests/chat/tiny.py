"""A small checkpoint with a tokenizer of its own, for tests of what talks to a model."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from qwen3_jax import Qwen3, Qwen3Config, load_tokenizer, save_pretrained
from tools.demo.corpus import train_tokenizer

SAMPLE = [{"role": "user", "content": "def read(path): return open(path).read()"}]


def write_checkpoint(folder: Path) -> None:
    """A random dense model of 400 words."""
    train_tokenizer([SAMPLE] * 20, 400, folder / "tokenizer")
    tok = load_tokenizer(folder / "tokenizer")
    end, pad = tok.encode("<|im_end|><|endoftext|>")
    shape = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    config = Qwen3Config(
        **shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, eos_token_id=end, pad_token_id=pad
    )
    save_pretrained(Qwen3(config, rngs=nnx.Rngs(0), dtype=jnp.float32), folder / "model", tokenizer=tok)
