"""The analytic model that decides which meshes are worth compiling; what is ranked is compiled, and nothing of it is from here.

All figures are of one device and one step. The letters: t tokens of a device, b its rows, L layers, D embed, N and K query
and key heads, H head_dim, F width, E experts, k of them per token, V words, S keys that a query sees on average. Products are
in bfloat16, weights, gradients and optimizer of training in float32. A forward product of m parameters with t tokens is 2 m t
FLOPs and its backward pass twice that. With remat a layer's forward pass is made twice; experts make theirs again by
themselves, the head makes its gradient with its loss. In lora the model is frozen, in bfloat16, float32 or codes: of its
matrices the backward pass has one product, of the adapters two, and gradients and optimizer are of these alone.
"""

import collections
import dataclasses

from qwen3_jax.parallel.word_losses import LOGITS
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import Shares, adapters, parameters

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
    """Forward passes that a layer's products cost: 1; in training 3, of frozen ones 2, and one more with remat."""
    return 1 if not job.trains else (3, 2)[job.adapts] + (job.remat != "none")


def device_flops(job: Job, cut: Shares) -> float:
    """FLOPs of a step.

    Per layer and forward pass: attention's projections 2 t (2 D N H / heads + 2 D K H / kv_heads), its scores and sums
    4 t S H N / heads, a dense MLP 6 t D F / mlp, experts 6 t k D F / mlp (tokens shared evenly) and the router 2 t D E. The
    head: 2 t D V over the shards of the vocabulary that tokens are not split over; in prefill of one token a row. Adapters:
    2 t per parameter, whole along embed, of experts of k; they and attention's scores have all passes of training in lora too.

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
    scores = 4 * seen(job) * h * heads * config.num_hidden_layers
    layers = sum(4 * d * h * (heads + keys) + per_token[kind.mlp] for kind in config.block_kinds())
    for kind, factors in adapters(job, cut).items():
        used = config.num_experts_per_tok * cut.experts / config.num_experts if kind == "experts" and config.num_experts else 1
        scores += 2 * used * (factors.embed * cut.devices(cut.gathered[kind]) + factors.inner)
    headed = job.batch / cut.batch if job.mode == "prefill" else t
    # Tokens that travel to a shard of the words come from as many devices as share it with them.
    head = 2 * headed * d * config.vocab_size * cut.devices(cut.travelling) / cut.vocab
    return passes(job) * layers * t + (passes(job) + job.adapts) * scores * t + (3 - job.adapts if job.trains else 1) * head


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
      frozen codes as they are, in two arrays; gradients scattered in float32.
    - float32 gradients reduced over every axis that tokens are split over and a weight is not.
    - in lora the same of the adapters, and no gradients but theirs; sums of r numbers a token over tensor are left out.
    - hidden states to the vocabulary's shards and their gradients back, (p - 1) t D, and their lookup, over the axes that split
      both.
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
        total[0], total[1] = total[0] + sent, total[1] + (count if sent else 0)

    kinds = [kind.mlp for kind in config.block_kinds()]
    dense, moe = kinds.count("dense"), kinds.count("moe")
    times = {"attention": layers, "dense": dense, "experts": moe, "router": moe, "norms": layers, "words": 1}
    for name, count in vars(parameters(job, cut)).items():
        axes, alike, arrays = cut.gathered[name], cut.alike[name], ARRAYS[name] * times[name]
        others, same = cut.devices(axes) - 1, cut.devices(alike)
        sent = min(HALF, job.frozen_bytes(name)) if job.adapts else HALF  # floats are cast before they travel
        together("all-gather", axes, "weights", again * sent * count * others, again * arrays * job.frozen_arrays(name))
        if job.mode == "train":
            together("reduce-scatter", axes, "gradients", FLOAT * count * others, arrays)
            together("all-reduce", alike, "gradients", 2 * FLOAT * count * (same - 1) / same, arrays)
    for name, factors in adapters(job, cut).items():
        axes, alike, arrays = cut.gathered[name], cut.alike[name], ARRAYS[name] * times[name]
        # What lacks the embed axis is the same on all devices that split it, of which those with other tokens add theirs.
        more = alike + tuple(axis for axis in axes if axis in cut.alike["norms"])
        together("all-gather", axes, "adapters", again * HALF * factors.embed * (cut.devices(axes) - 1), again * arrays)
        together("reduce-scatter", axes, "gradients", FLOAT * factors.embed * (cut.devices(axes) - 1), arrays)
        for which, count in ((alike, factors.embed), (more, factors.inner)):
            same = cut.devices(which)
            together("all-reduce", which, "gradients", 2 * FLOAT * count * (same - 1) / same, arrays)
    found = [Traffic(*key[:2], sent, int(count), False, key[2]) for key, (sent, count) in sums.items()]

    def add(kind: str, axes: tuple[str, ...], sent: float, count: int, what: str) -> None:
        found.append(Traffic(kind, axes, sent, count, False, what))

    def lost(axis: str) -> float:
        return (size[axis] - 1) / size[axis]

    reduced = 2 * (passes(job) - (job.mode == "train")) * layers
    add("all-reduce", ("tensor",), 2 * HALF * reduced * t * d * lost("tensor"), reduced, "sums of heads and widths")
    found += _dispatched(job, cut)
    if cut.seq > 1:
        rows = job.batch / cut.batch * job.seq * config.num_key_value_heads / cut.kv_heads * config.head_dim * 2
        add("all-gather", ("context",), 4 * HALF * layers * rows * lost("context"), 8 * layers, "keys and values")
    around = cut.devices(cut.travelling) - 1
    headed = job.batch / cut.batch if job.mode == "prefill" else t
    states = (HALF * t + HALF * headed) * d + (FLOAT * headed * d if job.trains else 0)
    states += HALF * t * d if job.mode == "train" else 0  # gradients of the words that were looked up
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

    weights: float32 in training, else bfloat16; in lora the frozen model as it is kept, and adapters, of which alone there are
    the next two, in their dtype. optimizer: two moments, float32 in training. gradients: likewise. cache: 2 L b K S H in
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
    pairs = sum(factors.total for factors in adapters(job, cut).values())
    trained = pairs if job.adapts else held.total if job.trains else 0.0
    size = job.adapter_bytes if job.adapts else FLOAT
    if job.adapts:
        frozen = sum(job.frozen_bytes(kind) * count for kind, count in vars(held).items())
    else:
        frozen = 0.0 if job.trains else HALF * held.total
    return {
        "weights": size * trained + frozen,
        "optimizer": 2 * size * trained,
        "gradients": size * trained,
        "cache": cache_bytes(job, cut),
        "activations": saved if job.trains else 0.0,
        "working": (2 if job.trains else 1) * of_layer + (HALF + FLOAT if job.mode == "train" else HALF) * layer + logits,
    }


def model_flops(job: Job) -> float:
    """FLOPs of a step that the model itself asks for, over the whole pod: what MFU counts.

    6 per token and active parameter that is multiplied (the embedding is looked up, not multiplied; a head is multiplied,
    also a tied one) in training, 2 in inference; attention 12 L N H S per token in training with S half a row, 4 L N H S in
    inference. In lora 4 per frozen parameter, whose gradient nobody wants, 6 per parameter of a token's adapters, r (in + out)
    for each of its matrices, and attention's 12 L N H S. Nothing that remat makes again is counted.

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
    if not job.adapts:
        return (6 if job.trains else 2) * ((active - table + attention) * job.tokens + table * headed)
    return job.tokens * (4 * active + 6 * (attention + _adapters_of_a_token(job)))


def _adapters_of_a_token(job: Job) -> float:
    """Parameters of all the adapters that one token is multiplied with."""
    config = job.config
    d, h, n, k = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    per_layer = {
        "dense": 3 * (d + config.intermediate_size),
        "moe": 3 * config.num_experts_per_tok * (d + config.moe_intermediate_size),
    }
    attention = 4 * d + 2 * h * (n + k)
    return job.rank * sum(attention + per_layer[kind.mlp] for kind in config.block_kinds())
