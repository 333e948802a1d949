"""What one device of a mesh holds of a model: how often each kind of axis is cut, and how many parameters that leaves."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from qwen3_jax.parallel.fit import check_batch, fitted
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.planning.job import Job


@dataclasses.dataclass(frozen=True)
class Shares:
    """Into how many parts a mesh cuts what, by the table of rules fitted to the model.

    Attributes:
        sizes: mesh axis -> size.
        batch, seq, heads, kv_heads, mlp, experts, embed, vocab: parts of each logical axis.
    """

    sizes: dict[str, int]
    batch: int
    seq: int
    heads: int
    kv_heads: int
    mlp: int
    experts: int
    embed: int
    vocab: int

    def tokens(self, job: Job) -> float:
        """Tokens of a step that one device works on."""
        return job.tokens / (self.batch * self.seq)


def shares(job: Job, mesh: Mesh | AbstractMesh) -> Shares:
    """How a mesh cuts a job.

    Args:
        job: the job.
        mesh: any mesh with the five axes.

    Returns:
        The shares.

    Raises:
        MeshError: the model or the batch does not fit the mesh, with the arithmetic.
    """
    rules = fitted(RULES, job.config, mesh)
    if not job.trains:  # a call with a cache keeps sequences whole
        rules = rules.replace(seq=None)
    check_batch(rules, mesh, job.batch, job.seq)
    names = ("batch", "seq", "heads", "kv_heads", "mlp", "experts", "embed", "vocab")
    return Shares(dict(mesh.shape), **{name: rules.shards(name, mesh) for name in names})


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of one device, by what is done with them.

    Attributes:
        attention: projections of all layers.
        dense: matrices of the dense MLPs.
        experts: matrices of the experts.
        router: of the MoE layers.
        norms: all of them; whole on every device.
        words: the embedding's table, and the head's where it has its own.
    """

    attention: float
    dense: float
    experts: float
    router: float
    norms: float
    words: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def parameters(job: Job, cut: Shares) -> Parameters:
    """Parameters that one device holds; the vocabulary padded to a multiple of its parts.

    With D, N, K, H, F, E, V as in the model: attention 2 D N H / (embed heads) + 2 D K H / (embed kv_heads) a layer, a dense
    MLP 3 D F / (embed mlp), experts 3 E D F / (experts embed mlp), the router E D / embed; a table ceil(V / vocab) D.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        The counts.
    """
    config = job.config
    d, h = config.hidden_size, config.head_dim
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    kinds = [kind.mlp for kind in config.block_kinds()]
    dense, moe = kinds.count("dense"), kinds.count("moe")
    layers = len(kinds)
    biases = heads * h / cut.heads + 2 * keys * h / cut.kv_heads + d if config.attention_bias else 0
    tables = 1 if config.tie_word_embeddings else 2
    return Parameters(
        attention=layers * (2 * d * heads * h / cut.heads / cut.embed + 2 * d * keys * h / cut.kv_heads / cut.embed + biases),
        dense=dense * 3 * d * config.intermediate_size / cut.mlp / cut.embed,
        experts=moe * 3 * config.num_experts * d * config.moe_intermediate_size / cut.experts / cut.mlp / cut.embed,
        router=moe * config.num_experts * d / cut.embed,
        norms=layers * (2 * d + 2 * h) + d,
        words=tables * -(-config.vocab_size // cut.vocab) * d,
    )
