"""What tests/parallel/test_processes.py starts: join the other processes, write and score with a model on a mesh of all.

python -m tests.parallel.write_program MESH
"""

import json
import sys

import jax
import numpy as np

import qwen3_jax
from qwen3_jax import Qwen3, Sampling, generate, score
from tests.model.models import random_model, random_tokens
from tests.parallel.test_on_mesh import on_mesh


def written(model: Qwen3) -> list[list]:
    """Tokens, their log-probabilities, and the scores of the tokens as a text."""
    tokens = np.asarray(random_tokens(3, 5))
    out = generate(model, tokens, lengths=[5, 2, 4], max_new_tokens=6, sampling=Sampling(1.1, top_k=20), key=jax.random.key(0))
    return [out.tokens.tolist(), out.logprobs.tolist(), score(model, out.tokens).tolist()]


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of what the test takes
    mesh = qwen3_jax.initialize(mesh=sys.argv[1], timeout=60).mesh
    assert mesh is not None
    print("written", json.dumps(written(on_mesh(random_model("moe"), mesh))), flush=True)
