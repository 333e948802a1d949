"""What one device of a mesh holds of a model: how often each kind of axis is cut, and how many parameters that leaves."""

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh

from qwen3_jax.parallel.dispatch import Choice
from qwen3_jax.parallel.experts import dispatch_for
from qwen3_jax.parallel.fit import check_batch, fitted
from qwen3_jax.parallel.rules import RULES, Rules
from qwen3_jax.planning.job import Job
from qwen3_jax.tune.quantize import check_codes

# How a kind of parameters (a field of Parameters) is laid out: the logical axes of its largest arrays.
_AXES = {
    "attention": ("heads", "head_dim", "embed"),
    "dense": ("mlp", "embed"),
    "experts": ("experts", "mlp", "embed"),
    "router": ("router", "embed"),
    "norms": ("norm",),
    "words": ("vocab", None),
}


@dataclasses.dataclass(frozen=True)
class Shares:
    """Into how many parts a mesh cuts what, by a table of rules fitted to the model. Mesh axes of size 1 are left out.

    Attributes:
        sizes: mesh axis -> size.
        batch, seq, heads, kv_heads, mlp, experts, vocab: parts of each logical axis.
        gathered: kind of parameters -> the mesh axes over which a device gathers, where it uses them, what it lacks of them.
        alike: kind of parameters -> the mesh axes whose devices hold the same ones and have other tokens: over these their
            gradients are summed.
        split: the mesh axes that experts are split over.
        travelling: mesh axes of the vocabulary that tokens are split over too, and travel over to the words.
        choice: how tokens travel to experts (qwen3_jax.parallel.dispatch); None in a model without.
    """

    sizes: dict[str, int]
    batch: int
    seq: int
    heads: int
    kv_heads: int
    mlp: int
    experts: int
    vocab: int
    gathered: dict[str, tuple[str, ...]]
    alike: dict[str, tuple[str, ...]]
    split: tuple[str, ...]
    travelling: tuple[str, ...]
    choice: Choice | None

    def tokens(self, job: Job) -> float:
        """Tokens of a step that one device works on."""
        return job.tokens / (self.batch * self.seq)

    def devices(self, axes: tuple[str, ...]) -> int:
        """Devices along mesh axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    @property
    def visits(self) -> int:
        """How often in a layer a device multiplies its experts, each time for other tokens: as often as a ring has steps."""
        return self.experts if self.choice is not None and self.choice.transport == "ring" else 1

    def chunk(self, job: Job) -> float:
        """Tokens that a device's experts serve at a time: one device's, or those of all that the experts are split over."""
        others = 1 if self.choice is None or self.choice.transport in (None, "ring") else self.experts
        return self.tokens(job) * others

    def present(self, job: Job) -> float:
        """Tokens that a device's buffers hold at a time, others' among them."""
        if self.choice is not None and self.choice.transport == "all_to_all":
            return self.experts * self.choice.quota
        return self.chunk(job)

    def filled(self, job: Job) -> float:
        """Share of the rows of the experts' buffers that evenly used experts fill."""
        if self.choice is None:
            return 1.0
        return min(1.0, self.tokens(job) * job.config.num_experts_per_tok / (self.visits * self.choice.capacity))


def shares(job: Job, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Shares:
    """How a mesh cuts a job.

    Args:
        job: the job.
        mesh: any mesh with the five axes.
        rules: which of its axes split what.

    Returns:
        The shares.

    Raises:
        MeshError: the model or the batch does not fit the mesh, or a shard would hold a part of a block of codes, with the
            arithmetic.
    """
    config, length = job.config, 1 if job.mode == "decode" else job.seq
    rules = fitted(rules, config, mesh)
    if not job.trains:  # a call with a cache keeps sequences whole
        rules = rules.replace(seq=None)
    check_batch(rules, mesh, job.batch, length)
    if job.adapts and job.codes is not None:
        check_codes(config, rules, mesh, job.codes)
    names = ("batch", "seq", "heads", "kv_heads", "mlp", "experts", "vocab")
    parts = {name: rules.shards(name, mesh) for name in names}

    def axes(name: str | None) -> tuple[str, ...]:
        return tuple(axis for axis in rules.axes(name, mesh) if mesh.shape[axis] > 1)

    tokens = (*axes("batch"), *axes("seq"))
    gathered, alike = {}, {}
    for kind, logical in _AXES.items():
        # A mesh axis splits one axis of an array, the first that asks for it.
        taken = {axis for name in logical[: logical.index("embed")] for axis in axes(name)} if "embed" in logical else set()
        gathered[kind] = tuple(axis for axis in axes("embed") if axis not in taken) if "embed" in logical else ()
        split = {axis for name in logical for axis in axes(name)}
        alike[kind] = tuple(axis for axis in tokens if axis not in split)
    moe = "moe" in {kind.mlp for kind in config.block_kinds()}
    choice = dispatch_for(config, mesh, job.batch, length, rules=rules) if moe else None
    travelling = tuple(axis for axis in axes("vocab") if axis in tokens)
    return Shares(
        dict(mesh.shape),
        **parts,
        gathered=gathered,
        alike=alike,
        split=axes("experts"),
        travelling=travelling,
        choice=choice,
    )


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

    def whole(self, cut: Shares) -> "Parameters":
        """Those of the layers as they are used, with what is gathered of them; of words those that are held."""
        return Parameters(**{kind: count * cut.devices(cut.gathered[kind]) for kind, count in vars(self).items()})


@dataclasses.dataclass(frozen=True)
class Factors:
    """Parameters of one device's adapters on one kind of matrices.

    Attributes:
        embed: of the factors with the embed axis: a [r, D] of what reads the residual stream, b [D, r] of what writes to it.
        inner: of the others, which have the heads or the width in its place.
    """

    embed: float
    inner: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.embed + self.inner


def adapters(job: Job, cut: Shares) -> dict[str, Factors]:
    """The adapters that one device holds: of each matrix of `parameters`, in + out rows of r instead of in x out, cut likewise.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        Kind of parameters -> its factors: attention, dense, experts; none where the job trains no adapters.
    """
    config, r = job.config, job.rank
    if not job.adapts:
        return {}
    d, h = config.hidden_size, config.head_dim
    kinds = [kind.mlp for kind in config.block_kinds()]
    dense, moe = kinds.count("dense"), kinds.count("moe") * config.num_experts / cut.experts
    g = {kind: cut.devices(axes) for kind, axes in cut.gathered.items()}
    heads = 2 * h * (config.num_attention_heads / cut.heads + config.num_key_value_heads / cut.kv_heads)
    return {
        "attention": Factors(len(kinds) * 4 * r * d / g["attention"], len(kinds) * r * heads),
        "dense": Factors(dense * 3 * r * d / g["dense"], dense * 3 * r * config.intermediate_size / cut.mlp),
        "experts": Factors(moe * 3 * r * d / g["experts"], moe * 3 * r * config.moe_intermediate_size / cut.mlp),
    }


def parameters(job: Job, cut: Shares) -> Parameters:
    """Parameters that one device holds; the vocabulary padded to a multiple of its parts.

    With D, N, K, H, F, E, V as in the model, and g the devices that a kind is gathered from: attention 2 D N H / (g heads) +
    2 D K H / (g kv_heads) a layer, a dense MLP 3 D F / (g mlp), experts 3 E D F / (g experts mlp), the router E D / g; a table
    ceil(V / vocab) D.

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
    g = {kind: cut.devices(axes) for kind, axes in cut.gathered.items()}
    biases = heads * h / cut.heads + 2 * keys * h / cut.kv_heads + d if config.attention_bias else 0
    tables = 1 if config.tie_word_embeddings else 2
    projections = (2 * d * heads * h / cut.heads + 2 * d * keys * h / cut.kv_heads) / g["attention"]
    return Parameters(
        attention=layers * (projections + biases),
        dense=dense * 3 * d * config.intermediate_size / cut.mlp / g["dense"],
        experts=moe * 3 * config.num_experts * d * config.moe_intermediate_size / cut.experts / cut.mlp / g["experts"],
        router=moe * config.num_experts * d / g["router"],
        norms=layers * (2 * d + 2 * h) + d,
        words=tables * -(-config.vocab_size // cut.vocab) * d,
    )
