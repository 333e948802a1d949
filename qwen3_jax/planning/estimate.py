"""The analytic model that decides which meshes are worth compiling; what is ranked is compiled, and nothing of it is from here.

All figures are of one device and one step. The letters: t tokens of a device, b its rows, L layers, D embed, N and K query
and key heads, H head_dim, F width, E experts, k of them per token, V words, S keys that a query sees on average. Products are
in bfloat16, weights, gradients and optimizer of training in float32. A forward product of m parameters with t tokens is 2 m t
FLOPs and its backward pass twice that. With remat a layer's forward pass is made twice; experts and the head make theirs
again by themselves.
"""

import collections
import dataclasses

from qwen3_jax.parallel.word_losses import LOGITS
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import Shares, parameters

FLOAT, HALF = 4, 2  # bytes
ARRAYS = {"attention": 4, "dense": 3, "experts": 3, "router": 1, "norms": 4, "words": 1}  # of a layer, by kind of parameters


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
        ways: directions that share the bytes and run at the same time: 2 of a ring whose halves go around both ways.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: int
    overlapped: bool
    what: str
    ways: int = 1


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
    # Tokens that travel to a shard of the words come from as many devices as share it with them.
    head = 2 * headed * d * config.vocab_size * cut.devices(cut.travelling) / cut.vocab
    return passes(job) * layers * t + (4 if job.trains else 1) * head


def cache_bytes(job: Job, cut: Shares) -> float:
    """Bytes of keys and values: 2 L b K S H in bfloat16; none in training.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        Bytes of one device.
    """
    config = job.config
    if job.trains:
        return 0.0
    heads = config.num_key_value_heads / cut.kv_heads
    return 2 * HALF * config.num_hidden_layers * job.batch / cut.batch * heads * job.seq * config.head_dim


def device_traffic(job: Job, cut: Shares) -> tuple[Traffic, ...]:
    """What a device sends in a step.

    A gather or scatter of an array of n bytes over p devices sends n (p - 1) / p, a reduction twice that. Only the ring of
    experts is taken to run beside computation: compiled schedules show it so, and the others waited for.

    - weights over the axes that they are gathered from, in bfloat16, for the forward pass and again for the backward one;
      gradients scattered in float32.
    - float32 gradients reduced over every axis that tokens are split over and a weight is not.
    - hidden states to the vocabulary's shards and back, (p - 1) t D, and their lookup, over the axes that split both.
    - tensor: t D in bfloat16 reduced after attention and after the MLP, in each pass but that of the weights' gradients.
    - expert: tokens with their sums, as the dispatch's own cost model lets them travel (`_dispatched`).
    - context: keys and values gathered in each pass, their gradients scattered.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        The collectives over axes larger than 1.
    """
    config, t, size = job.config, cut.tokens(job), cut.sizes
    d, layers = config.hidden_size, config.num_hidden_layers
    again = 2 if job.trains else 1  # the backward pass
    sums: dict[tuple[str, tuple[str, ...], str], list[float]] = collections.defaultdict(lambda: [0.0, 0])

    def together(kind: str, axes: tuple[str, ...], what: str, sent: float, count: int) -> None:
        total = sums[kind, axes, what]
        total[0], total[1] = total[0] + sent, total[1] + count

    for name, count in vars(parameters(job, cut)).items():
        axes, alike, arrays = cut.gathered[name], cut.alike[name], ARRAYS[name] * (1 if name == "words" else layers)
        others, same = cut.devices(axes) - 1, cut.devices(alike)
        together("all-gather", axes, "weights", again * HALF * count * others, again * arrays)
        if job.trains:
            together("reduce-scatter", axes, "gradients", FLOAT * count * others, arrays)
            together("all-reduce", alike, "gradients", 2 * FLOAT * count * (same - 1) / same, arrays)
    found = [Traffic(*key[:2], sent, int(count), False, key[2]) for key, (sent, count) in sums.items()]

    def add(kind: str, axes: tuple[str, ...], sent: float, count: int, what: str) -> None:
        found.append(Traffic(kind, axes, sent, count, False, what))

    def lost(axis: str) -> float:
        return (size[axis] - 1) / size[axis]

    reduced = 2 * (passes(job) - 1 if job.trains else 1) * layers
    add("all-reduce", ("tensor",), 2 * HALF * reduced * t * d * lost("tensor"), reduced, "sums of heads and widths")
    found += _dispatched(job, cut)
    if cut.seq > 1:
        rows = job.batch / cut.batch * job.seq * config.num_key_value_heads / cut.kv_heads * config.head_dim * 2
        add("all-gather", ("context",), 4 * HALF * layers * rows * lost("context"), 8 * layers, "keys and values")
    around = cut.devices(cut.travelling) - 1
    headed = job.batch / cut.batch if job.mode == "prefill" else t
    states = (HALF * t + HALF * headed) * d + ((HALF * t + (HALF + FLOAT) * headed) * d if job.trains else 0)
    logits = 0 if job.trains else FLOAT * headed * config.vocab_size / cut.vocab
    add("all-gather", cut.travelling, around * (states + logits), 4 * again, "states to the words and back")
    return tuple(part for part in found if part.bytes)


def _dispatched(job: Job, cut: Shares) -> list[Traffic]:
    """Tokens to experts and back, a journey a layer and in training another one of the backward pass.

    With n shards of experts a chunk is its t tokens' states (D in bfloat16) and 2 k numbers in float32, the sums are states
    again; on the way back gradients travel beside the states, and sums of k numbers more. ring: n steps send the chunk and
    n + 1 the sums, half of both each way around. gather: the n - 1 others' chunks, and their sums. all_to_all: each token once
    to every other shard that has work for it, 1 - (1 - 1 / n)^k of them, and as much back; where a device's blocks do not
    travel as what is in them, whole ones.
    """
    config, choice = job.config, cut.choice
    if choice is None or choice.transport is None:
        return []
    n, t, k = cut.experts, cut.tokens(job), config.num_experts_per_tok
    state = HALF * config.hidden_size
    journeys = [(state + 2 * FLOAT * k, state), (2 * state + 2 * FLOAT * k, state + FLOAT * k)]
    there, back = (t * sum(part) for part in zip(*journeys[: 2 if job.trains else 1], strict=True))
    layers = sum(kind.mlp == "moe" for kind in config.block_kinds())
    count = layers * (2 if job.trains else 1)
    if choice.transport == "ring":
        ways = 1 if t % 2 else 2
        sent = layers * (n * there + (n + 1) * back)
        return [Traffic("collective-permute", cut.split, sent, count * (2 * n + 1), True, "tokens and their sums", ways)]
    if choice.transport == "gather":
        return [
            Traffic("all-gather", cut.split, layers * (n - 1) * there, count, False, "tokens"),
            Traffic("reduce-scatter", cut.split, layers * (n - 1) * back, count, False, "tokens' sums"),
        ]
    share = (n - 1) * (1 - (1 - 1 / n) ** k)
    return [Traffic("ragged-all-to-all", cut.split, layers * share * (there + back), 2 * count, False, "tokens and their sums")]


def device_memory(job: Job, cut: Shares) -> dict[str, float]:
    """Bytes that a step needs at most.

    weights: float32 in training, else bfloat16. optimizer: two float32 moments. gradients: float32. cache: 2 L b K S H in
    bfloat16. activations: each layer's input, t D in bfloat16; without remat all that its products read. working: one layer
    whole along embed, in bfloat16 and its gradient in float32; its rows, 2 D + 3 F / mlp for each that the experts' buffers
    hold and 2 D for each token that is there, D + 3 F / mlp a token for a dense MLP, twice in training; a block of logits
    three times.

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
    used = held.whole(cut)
    layer = (used.total - used.words) / layers
    rows = 0.0
    if cut.choice is not None:
        rows = cut.choice.capacity * (2 * d + 3 * config.moe_intermediate_size / cut.mlp)
        rows += cut.present(job) * 2 * d
    if "dense" in kinds:
        rows = max(rows, t * (d + 3 * config.intermediate_size / cut.mlp))
    heads = (config.num_attention_heads / cut.heads + 2 * config.num_key_value_heads / cut.kv_heads) * config.head_dim
    of_layer = HALF * (rows + t * (heads + 2 * d))
    logits = 3 * FLOAT * LOGITS if job.trains else FLOAT * job.batch / cut.batch * config.vocab_size
    saved = HALF * t * d * layers if job.remat != "none" else of_layer * layers
    return {
        "weights": (FLOAT if job.trains else HALF) * held.total,
        "optimizer": 2 * FLOAT * held.total if job.trains else 0.0,
        "gradients": FLOAT * held.total if job.trains else 0.0,
        "cache": cache_bytes(job, cut),
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
