"""Qwen3, dense and mixture-of-experts, in JAX.

The names below are the public API; each is imported when it is first used, so that `import qwen3_jax` starts nothing
(jax.distributed must still be able to start) and `qwen3-jax --help` is quick. Everything else may change.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3_jax.chat.session import Chat as Chat
    from qwen3_jax.chat.tokenizer import load_tokenizer as load_tokenizer
    from qwen3_jax.checkpoint.pretrained import from_pretrained as from_pretrained
    from qwen3_jax.checkpoint.pretrained import save_pretrained as save_pretrained
    from qwen3_jax.config import Qwen3Config as Qwen3Config
    from qwen3_jax.generation.budget import ThinkingBudget as ThinkingBudget
    from qwen3_jax.generation.cache import init_cache as init_cache
    from qwen3_jax.generation.loop import Generated as Generated
    from qwen3_jax.generation.loop import generate as generate
    from qwen3_jax.generation.sample import Sampling as Sampling
    from qwen3_jax.generation.score import score as score
    from qwen3_jax.model.abstract import abstract_model as abstract_model
    from qwen3_jax.model.transformer import Qwen3 as Qwen3
    from qwen3_jax.parallel.batches import Batch as Batch
    from qwen3_jax.parallel.batches import global_batch as global_batch
    from qwen3_jax.parallel.batches import process_rows as process_rows
    from qwen3_jax.parallel.mesh import make_mesh as make_mesh
    from qwen3_jax.parallel.processes import initialize as initialize
    from qwen3_jax.training.losses import cross_entropy as cross_entropy
    from qwen3_jax.training.losses import load_balancing_loss as load_balancing_loss
    from qwen3_jax.training.optimizer import adamw as adamw
    from qwen3_jax.training.state import TrainState as TrainState
    from qwen3_jax.training.state import init_train_state as init_train_state
    from qwen3_jax.training.step import make_train_step as make_train_step

_HOMES = {
    "Batch": "parallel.batches",
    "Chat": "chat.session",
    "Generated": "generation.loop",
    "Qwen3": "model.transformer",
    "Qwen3Config": "config",
    "Sampling": "generation.sample",
    "ThinkingBudget": "generation.budget",
    "TrainState": "training.state",
    "abstract_model": "model.abstract",
    "adamw": "training.optimizer",
    "cross_entropy": "training.losses",
    "from_pretrained": "checkpoint.pretrained",
    "generate": "generation.loop",
    "global_batch": "parallel.batches",
    "init_cache": "generation.cache",
    "init_train_state": "training.state",
    "initialize": "parallel.processes",
    "load_balancing_loss": "training.losses",
    "load_tokenizer": "chat.tokenizer",
    "make_mesh": "parallel.mesh",
    "make_train_step": "training.step",
    "process_rows": "parallel.batches",
    "save_pretrained": "checkpoint.pretrained",
    "score": "generation.score",
}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen3_jax' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(f"qwen3_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
