"""What a run looks at every so often: its loss on held-out documents, and what it writes after prompts."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwen3_jax.chat.files import TokenizerError
from qwen3_jax.chat.tokenizer import Tokenizer, load_tokenizer
from qwen3_jax.checkpoint.reading import CheckpointError
from qwen3_jax.config import Qwen3Config
from qwen3_jax.data.loader import LoaderConfig, make_loader
from qwen3_jax.data.mixture import Source
from qwen3_jax.data.prepare import tokenizer_hash
from qwen3_jax.data.prepared import read_index
from qwen3_jax.generation.loop import generate
from qwen3_jax.parallel.batches import global_batch, process_rows
from qwen3_jax.parallel.mesh import on_mesh_of
from qwen3_jax.parallel.rules import Rules
from qwen3_jax.runs.models import check_words
from qwen3_jax.runs.parts import lora_config, stage_config
from qwen3_jax.runs.schema import Run, StageSection
from qwen3_jax.runs.toml import RunError
from qwen3_jax.training.losses import label_weights
from qwen3_jax.training.state import graph_for, parts_of, trained_model

WRITTEN = 64  # tokens of a completion, at most


class Look:
    """Measures a state. Every process of the mesh calls it, for they all compute."""

    def __init__(self, run: Run, config: Qwen3Config, mesh: Mesh, rules: Rules):
        """Make ready, and refuse what cannot be looked at.

        Args:
            run: the run; its `watch` names held-out documents, prompts, or both.
            config: the model's.
            mesh: that the state lies on.
            rules: which mesh axes split what.

        Raises:
            RunError: prompts without a tokenizer, or without tokens; held-out documents of another tokenizer than the sources',
                or of more words than the model's.
            DataError: held-out documents that cannot be read.
            MeshError: rows that the mesh does not divide.
        """
        self._run, self._config, self._mesh, self._rules = run, config, mesh, rules
        self._tokenizer = None
        if run.watch.prompts:
            self._tokenizer = find_tokenizer(run)
            if self._tokenizer is None:
                raise RunError(
                    "watch.prompts needs a tokenizer: accepted is one in model.folder, or sources whose tokenizer is where "
                    "`qwen3-jax data prepare` found it still"
                )
            if empty := [prompt for prompt in run.watch.prompts if not self._tokenizer.encode(prompt)]:
                raise RunError(f"watch.prompts has {empty[0]!r}, which has no tokens: accepted is text")
            self._stop = stop_tokens(run, config, self._tokenizer)
        first = next(iter(run.stages.values()))
        self._rows, self._seq = first.batch // first.accumulation, first.seq
        if run.watch.held_out is not None:
            check_words("watch.held_out", run.watch.held_out, config)
            self._loader().close()
            self._check_tokenizers(run.watch.held_out)

    def __call__(self, step: int, state: Any) -> dict[str, Any]:
        """Look at a state.

        Args:
            step: steps that have been made.
            state: the TrainState after them.

        Returns:
            held_out_loss in nats per token, and completions: prompt -> text; each where the run asks for it.
        """
        config = stage_config(self._config, stage_at(self._run, step - 1))
        found: dict[str, Any] = {}
        if self._run.watch.held_out is not None:
            found["held_out_loss"] = self._held_out(config, state)
        if self._tokenizer is not None:
            found["completions"] = self._completions(config, state, self._tokenizer)
        return found

    def _held_out(self, config: Qwen3Config, state: Any) -> float:
        """Mean over all tokens of the same batches each time; rows and length are those of a part of the first stage."""
        parts = parts_of(state)
        graph = graph_for(parts, config, self._rules, jnp.dtype(self._run.model.compute_dtype), lora_config(self._run))
        loader = self._loader()
        losses, tokens = 0.0, 0.0
        try:
            for _ in range(self._run.watch.held_out_batches):
                batch = global_batch(next(loader), self._mesh, self._rows, self._rules)
                with on_mesh_of(state.params):
                    sums = jax.device_get(_sums(parts, batch, graph))
                losses, tokens = losses + float(sums[0]), tokens + float(sums[1])
        finally:
            loader.close()
        return losses / max(tokens, 1.0)

    def _completions(self, config: Qwen3Config, state: Any, tokenizer: Tokenizer) -> dict[str, str]:
        dtype = jnp.dtype(self._run.model.compute_dtype)
        model = trained_model(config, state, dtype=dtype, rules=self._rules, adapt=lora_config(self._run))
        prompts = self._run.watch.prompts
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
        for row, given in zip(tokens, ids, strict=True):
            row[: len(given)] = given
        out = generate(model, tokens, lengths=list(map(len, ids)), max_new_tokens=WRITTEN, stop_tokens=self._stop)
        written, lengths = jax.device_get((out.tokens, out.lengths))
        texts = [tokenizer.decode(row[:length]) for row, length in zip(written, lengths, strict=True)]
        return dict(zip(prompts, texts, strict=True))

    def _loader(self) -> Any:
        run = self._run
        source = Source("held_out", str(run.watch.held_out))
        config = LoaderConfig((source,), seed=run.seed, waiting=run.data.waiting, cache=run.data.cache)
        rows = process_rows(self._mesh, self._rows, self._rules)
        return make_loader(config, batch=self._rows, seq=self._seq, rows=rows, prefetch=run.data.prefetch)

    def _check_tokenizers(self, folder: str) -> None:
        wanted = read_index(folder)["tokenizer"]
        for name, source in self._run.data.sources.items():
            if read_index(source.folder)["tokenizer"] != wanted:
                raise RunError(
                    f"watch.held_out {folder} has been tokenised otherwise than data.sources.{name}: accepted is one tokenizer "
                    "for both"
                )


def stage_at(run: Run, step: int) -> StageSection:
    """The stage that a step is of; after the last step, the last.

    Args:
        run: the run.
        step: from 0.

    Returns:
        The stage.
    """
    for stage in run.stages.values():
        if step < stage.steps:
            break
        step -= stage.steps
    return stage


def find_tokenizer(run: Run) -> Tokenizer | None:
    """The tokenizer of a run.

    Args:
        run: the run.

    Returns:
        That of the model's folder; else the one that a source's folder names, if it is the one still that made its tokens; else
        None.
    """
    if run.model.folder is not None:
        found = _tokenizer_in(run.model.folder)
        if found is not None:
            return found
    for source in run.data.sources.values():
        index: Mapping[str, Any] = read_index(source.folder)
        named = index.get("tokenizer_folder")
        found = None if named is None else _tokenizer_in(named)
        if found is not None and tokenizer_hash(found) == index["tokenizer"]:
            return found
    return None


def stop_tokens(run: Run, config: Qwen3Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end what a run's model writes.

    Args:
        run: the run.
        config: the model's.
        tokenizer: the run's.

    Returns:
        Those of the generation config beside the tokenizer, else of the model's config, else of the tokenizer; before them,
        where a stage learns conversations, the end of a turn: a base model's own config knows the end of a text alone.
    """
    given = tokenizer.generation_config.get("eos_token_id", config.eos_token_id)
    given = tokenizer.eos_token_id if given is None else given
    found = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if tokenizer.end_of_turn_id is not None and _learns_conversations(run):
        found = [tokenizer.end_of_turn_id, *found]
    return tuple(token for token in dict.fromkeys(found) if token < config.vocab_size)


def _learns_conversations(run: Run) -> bool:
    names = {name for stage in run.stages.values() for name in stage.mixture or run.data.sources}
    return any(read_index(run.data.sources[name].folder)["conversations"] for name in names)


def _tokenizer_in(folder: str | Path) -> Tokenizer | None:
    try:
        return load_tokenizer(folder)
    except (TokenizerError, CheckpointError):  # weights without one, a folder that is gone: the caller looks elsewhere
        return None


@functools.partial(jax.jit, static_argnums=2)
def _sums(parts: tuple[Any, ...], batch: Any, graph: Any) -> tuple[jax.Array, jax.Array]:
    """Summed losses of a batch's labels, and the weights that they were summed by."""
    model = nnx.merge(graph, *parts)
    out = model(batch.tokens, segment_ids=batch.segment_ids, labels=batch.labels, output="hidden")
    weights = label_weights(batch.labels, batch.mask)
    return (out.losses * weights).sum(), weights.sum()
