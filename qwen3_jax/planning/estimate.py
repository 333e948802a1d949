"""The analytic model that decides which meshes are worth compiling; what is ranked is compiled, and nothing of it is from here.

All figures are of one device and one step. The letters: t tokens of a device, b its rows, L layers, D embed, N and K query
and key heads, H head_dim, F width, E experts, k of them per token, V words, S keys that a query sees on average. Products are
in bfloat16, weights, gradients and optimizer of training in float32. A forward product of m parameters with t tokens is 2 m t
FLOPs and its backward pass twice that. With remat a layer's forward pass is made twice; experts and the head make theirs
again by themselves.
"""

import dataclasses

from qwen3_jax.parallel.word_losses import LOGITS
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import Shares, parameters

FLOAT, HALF = 4, 2  # bytes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device sends in one kind of collective.

    Attributes:
        kind: the collective, by XLA's name.
        axes: mesh axes of its groups.
        bytes: sent over all executions.
        count: executions.
        overlapped: taken to run beside computation.
        what: the arrays.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: int
    overlapped: bool
    what: str


def seen(job: Job) -> float:
    """Keys that a query attends to, on average over layers: half a row in a causal pass, a cache's slots in decode."""
    full = job.seq if job.mode == "decode" else job.seq / 2
    window = job.config.sliding_window
    kinds = job.config.block_kinds()
    return sum(min(full, window) if kind.sliding and window is not None else full for kind in kinds) / len(kinds)


def passes(job: Job) -> int:
    """Forward passes that a layer's products cost: 1; in training 3, and 4 where remat makes the forward one again."""
    return 1 if not job.trains else 3 if job.remat == "none" else 4


def device_flops(job: Job, cut: Shares) -> float:
    """FLOPs of a step.

    Per layer and forward pass: attention's projections 2 t (2 D N H / heads + 2 D K H / kv_heads), its scores and sums
    4 t S H N / heads, a dense MLP 6 t D F / mlp, experts 6 t k D F / mlp (tokens shared evenly) and the router 2 t D E. The
    head: 2 t D V over the shards of the vocabulary that tokens are not split over; in prefill of one token a row.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        FLOPs of one device.
    """
    config, t = job.config, cut.tokens(job)
    d, h = config.hidden_size, config.head_dim
    heads, keys = config.num_attention_heads / cut.heads, config.num_key_value_heads / cut.kv_heads
    per_token = {
        "dense": 6 * d * config.intermediate_size / cut.mlp,
        "moe": 6 * config.num_experts_per_tok * d * config.moe_intermediate_size / cut.mlp + 2 * d * config.num_experts,
    }
    attention = 4 * d * h * (heads + keys) + 4 * seen(job) * h * heads
    layers = sum(attention + per_token[kind.mlp] for kind in config.block_kinds())
    headed = job.batch / cut.batch if job.mode == "prefill" else t
    head = 2 * headed * d * config.vocab_size / cut.sizes["tensor"]
    return passes(job) * layers * t + (4 if job.trains else 1) * head


def device_hbm_bytes(job: Job, cut: Shares) -> float:
    """Bytes that pass through HBM in a step.

    Weights: each of the passes reads a layer's in bfloat16, whole along embed. Of experts each chunk of the ring reads those
    that its t tokens chose: experts E (1 - (1 - k / E)^t). In training weights are first read in float32 and written in
    bfloat16, twice; the gradient is written and read in float32; the optimizer reads and writes weight and two moments and
    reads the gradient (8 float32 a parameter with the norm of all gradients). Activations: each product reads its input and
    writes its output in bfloat16, in every pass; norms, residuals and the sort of rows add 8 D a token, and 4 k D for
    experts. Attention's scores stay on the chip. The cache is read once.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        Bytes of one device.
    """
    config, t = job.config, cut.tokens(job)
    d, h, k = config.hidden_size, config.head_dim, config.num_experts_per_tok
    heads, keys = config.num_attention_heads / cut.heads, config.num_key_value_heads / cut.kv_heads
    held = parameters(job, cut)
    whole = (held.attention + held.dense + held.router + held.experts) * cut.embed
    # An expert that no token of a chunk chose is not read for it.
    chosen = 1 - (1 - k / config.num_experts) ** t if config.num_experts else 0.0
    read = (held.attention + held.dense + held.router + held.experts * chosen * cut.experts) * cut.embed
    weights = HALF * passes(job) * read + HALF * held.words
    if job.trains:
        weights += 2 * (FLOAT * whole / cut.embed + HALF * whole) + 2 * FLOAT * whole + (8 + 2) * FLOAT * held.total
    wide = {
        "dense": 2 * d + 6 * config.intermediate_size / cut.mlp,
        "moe": k * (4 * d + 2 * d + 6 * config.moe_intermediate_size / cut.mlp),
    }
    attention = 2 * d + h * (4 * heads + 6 * keys) + 8 * d
    layers = sum(attention + wide[kind.mlp] for kind in config.block_kinds())
    return weights + passes(job) * HALF * layers * t + _cache(job, cut) * (1 if job.mode == "decode" else 0)


def _cache(job: Job, cut: Shares) -> float:
    """Bytes of keys and values: 2 L b K S H in bfloat16; none in training."""
    config = job.config
    if job.trains:
        return 0.0
    heads = config.num_key_value_heads / cut.kv_heads
    return 2 * HALF * config.num_hidden_layers * job.batch / cut.batch * heads * job.seq * config.head_dim


def device_traffic(job: Job, cut: Shares) -> tuple[Traffic, ...]:
    """What a device sends in a step.

    A gather or scatter of an array of n bytes over p devices sends n (p - 1) / p, a reduction twice that. Only the ring of
    experts is taken to run beside computation: compiled schedules show it so, and the others waited for.

    - fsdp: a layer's weights in bfloat16, gathered for the forward pass and again for the backward one; gradients scattered
      in float32; hidden states to the vocabulary's shards and back, (p - 1) t D, and their lookup.
    - data, and every axis that tokens are split over and a weight is not: float32 gradients reduced.
    - tensor: t D in bfloat16 reduced after attention and after the MLP, in each pass but that of the weights' gradients.
    - expert: chunks of t tokens with their sums; forward p - 1 chunks and p sums, backward 2 (p - 1) and 2 p, of D in bfloat16.
    - context: keys and values gathered in each pass, their gradients scattered.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        The collectives over axes larger than 1.
    """
    config, t, size = job.config, cut.tokens(job), cut.sizes
    d, layers = config.hidden_size, config.num_hidden_layers
    held = parameters(job, cut)
    moe = sum(kind.mlp == "moe" for kind in config.block_kinds())
    fetched = (held.attention + held.dense + held.experts + held.router) * cut.embed
    again = 2 if job.trains else 1  # the backward pass
    found = []

    def add(kind: str, axes: tuple[str, ...], sent: float, count: int, overlapped: bool, what: str) -> None:
        if sent:
            found.append(Traffic(kind, axes, sent, count, overlapped, what))

    def lost(axis: str) -> float:
        return (size[axis] - 1) / size[axis]

    add("all-gather", ("fsdp",), again * HALF * fetched * lost("fsdp"), again * layers * 7, False, "weights")
    if job.trains:
        add("reduce-scatter", ("fsdp",), FLOAT * fetched * lost("fsdp"), layers * 7, False, "gradients")
        for axis in ("data", "expert", "context"):
            split = held.total - (held.experts if axis == "expert" else 0)
            add("all-reduce", (axis,), 2 * FLOAT * split * lost(axis), layers * 7, False, "gradients")
    reduced = 2 * (passes(job) - 1 if job.trains else 1) * layers
    add("all-reduce", ("tensor",), 2 * HALF * reduced * t * d * lost("tensor"), reduced, False, "sums of heads and widths")
    ring = size["expert"]
    if moe and ring > 1:
        chunks = (2 * ring - 1) + (4 * ring - 2 if job.trains else 0)
        add("collective-permute", ("expert",), HALF * chunks * moe * t * d, chunks * moe, True, "tokens and their sums")
    if cut.seq > 1:
        rows = job.batch / cut.batch * job.seq * config.num_key_value_heads / cut.kv_heads * config.head_dim * 2
        add("all-gather", ("context",), 4 * HALF * layers * rows * lost("context"), 8 * layers, False, "keys and values")
    around = size["fsdp"] - 1
    headed = job.batch / cut.batch if job.mode == "prefill" else t
    states = (HALF * t + HALF * headed) * d + ((HALF * t + (HALF + FLOAT) * headed) * d if job.trains else 0)
    logits = 0 if job.trains else FLOAT * headed * config.vocab_size / cut.vocab
    add("all-gather", ("fsdp",), around * (states + logits), 4 * again, False, "states to the words and back")
    return tuple(found)


def device_memory(job: Job, cut: Shares) -> dict[str, float]:
    """Bytes that a step needs at most.

    weights: float32 in training, else bfloat16. optimizer: two float32 moments. gradients: float32. cache: 2 L b K S H in
    bfloat16. activations: each layer's input, t D in bfloat16; without remat all that its products read. working: one layer
    whole along embed, in bfloat16 and its gradient in float32; its rows, k (2 D + 3 F / mlp) a token for experts and D + 3 F
    / mlp for a dense MLP, twice in training; a block of logits three times.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        Category -> bytes.
    """
    config, t = job.config, cut.tokens(job)
    d, layers = config.hidden_size, config.num_hidden_layers
    held = parameters(job, cut)
    kinds = {kind.mlp for kind in config.block_kinds()}
    layer = (held.attention + held.dense + held.experts + held.router) * cut.embed / layers
    rows = 0.0
    if "moe" in kinds:
        rows = config.num_experts_per_tok * (2 * d + 3 * config.moe_intermediate_size / cut.mlp)
    if "dense" in kinds:
        rows = max(rows, d + 3 * config.intermediate_size / cut.mlp)
    heads = (config.num_attention_heads / cut.heads + 2 * config.num_key_value_heads / cut.kv_heads) * config.head_dim
    of_layer = HALF * t * (rows + heads + 2 * d)
    logits = 3 * FLOAT * LOGITS if job.trains else FLOAT * job.batch / cut.batch * config.vocab_size
    saved = HALF * t * d * layers if job.remat != "none" else of_layer * layers
    return {
        "weights": (FLOAT if job.trains else HALF) * held.total,
        "optimizer": 2 * FLOAT * held.total if job.trains else 0.0,
        "gradients": FLOAT * held.total if job.trains else 0.0,
        "cache": _cache(job, cut),
        "activations": saved if job.trains else 0.0,
        "working": (2 if job.trains else 1) * of_layer + (HALF + FLOAT if job.trains else HALF) * layer + logits,
    }


def model_flops(job: Job) -> float:
    """FLOPs of a step that the model itself asks for, over the whole pod: what MFU counts.

    6 per token and active parameter that is multiplied (the embedding is looked up, not multiplied; a head is multiplied,
    also a tied one) in training, 2 in inference; attention 12 L N H S per token in training with S half a row, 4 L N H S in
    inference. Nothing that remat makes again is counted.

    Args:
        job: the job.

    Returns:
        FLOPs.
    """
    config = job.config
    table = config.vocab_size * config.hidden_size
    active = config.num_active_params() - (0 if config.tie_word_embeddings else table)
    headed = job.batch if job.mode == "prefill" else job.tokens
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen(job)
    per_token = active - table + attention
    return (6 if job.trains else 2) * (per_token * job.tokens + table * headed)
