"""What passes through HBM in a step by the analytic model, which decides what is worth compiling (its rest is `estimate`).

The letters are those of `estimate`: t tokens of a device, D embed, N and K heads, H head_dim, F width, E experts, k of a token,
V words. Counted is what compiled steps of a TPU move, operation by operation (tools/show_hbm.py lists them); how often an array
passes is said where it is used. A product reads its input and writes its output in bfloat16.
"""

import math

from pallas_kernels.grouped_matmul.tpu import TILE
from qwen3_jax.parallel.word_losses import block_size
from qwen3_jax.planning.estimate import FLOAT, HALF, cache_bytes, passes
from qwen3_jax.planning.hlo import LINE
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import Shares, adapters, parameters

ON_CHIP = 2**25  # bytes of widened rows that stay in VMEM between two operations


def device_hbm_bytes(job: Job, cut: Shares) -> float:
    """Bytes that pass through HBM in a step, the sum of `hbm_parts`.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        Bytes of one device.
    """
    return sum(hbm_parts(job, cut).values())


def hbm_parts(job: Job, cut: Shares) -> dict[str, float]:
    """Bytes that pass through HBM in a step, by what they are.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        "weights" (with gradients and optimizer), "attention", "dense", "rows" (of experts' buffers), "journeys" (of tokens to
        experts), "words", "cache" -> bytes of one device.
    """
    config = job.config
    kinds = [kind.mlp for kind in config.block_kinds()]
    moe = kinds.count("moe")
    tokens = HALF * passes(job) * cut.tokens(job)
    return {
        "weights": _weights(job, cut) + (_matrices(job, cut) if moe else 0.0),
        "attention": len(kinds) * tokens * _attention(job, cut),
        "dense": kinds.count("dense") * tokens * (3 * config.hidden_size + 6 * config.intermediate_size / cut.mlp),
        "rows": moe * _rows(job, cut) if moe else 0.0,
        "journeys": moe * _journeys(job, cut) if moe else 0.0,
        "words": _words(job, cut),
        "cache": cache_bytes(job, cut) if job.mode == "decode" else 0.0,
    }


def _attention(job: Job, cut: Shares) -> float:
    """Numbers a token, layer and pass: 10 D of norms, residuals and projections, 19 of each query, 17 of each key and value.

    A query is written by its projection; read and written by the norm (2) and by the rotation, halves (2) and sum (3); taken
    from the batch, copied, turned to the kernel's order (3); read by the kernel, which writes output and normaliser (3); put
    back (2), reshaped (2), read by the last projection. Of sequences that are split it is in float32 up to the rotation's sum,
    8 more. A backward pass is as much twice. Scores stay on the chip.
    """
    config = job.config
    heads, keys = config.num_attention_heads / cut.heads, config.num_key_value_heads / cut.kv_heads
    query = 19 + (8 if cut.seq > 1 else 0)
    return 10 * config.hidden_size + config.head_dim * (query * heads + 17 * keys)


def _weights(job: Job, cut: Shares) -> float:
    """All parameters but what the products of experts read: in bfloat16 once a pass, layers whole along embed.

    Training, for the forward pass and again for the backward one: a layer is taken out of the stack (read and written in
    float32), read to be cast, written; what is gathered is read and written once more. Gradients are written and read in
    float32, reduced over devices that hold the same weights (read and written), and put into the stack (read and written). The
    optimizer reads and writes weight and two moments and reads the gradient, the norm of all gradients reads it before. In
    lora all that is of the adapters, and a frozen layer is twice read as it is kept and written in bfloat16.
    """
    held = parameters(job, cut)
    used = held.whole(cut)
    total = HALF * held.words
    for kind in vars(held):
        kept, whole = getattr(held, kind), getattr(used, kind)
        if kind == "words":
            continue
        if kind != "experts":
            total += HALF * passes(job) * whole + (2 * FLOAT * whole if job.mode == "train" else 0.0)
        if job.adapts:
            total += 2 * (job.frozen_bytes(kind) * kept + HALF * whole)
        elif job.trains:
            total += 2 * (3 * FLOAT + HALF) * kept + 2 * FLOAT * kept
            total += 2 * HALF * (kept + whole) if cut.gathered[kind] else 0.0
            total += 2 * FLOAT * kept if cut.alike[kind] else 0.0
    if job.adapts:
        pairs = adapters(job, cut)
        kept = sum(factors.total for factors in pairs.values())
        whole = sum(factors.embed * cut.devices(cut.gathered[kind]) + factors.inner for kind, factors in pairs.items())
        total += (HALF * (passes(job) + 3) + 2 * FLOAT) * whole + (2 + 2 + 8) * FLOAT * kept
    return total + (8 * FLOAT * held.total if job.mode == "train" else 0.0)


def _matrices(job: Job, cut: Shares) -> float:
    """Experts' matrices in the grouped matmuls, three in a forward pass and five in a backward one, and their gradients.

    A visit reads those that its c tokens chose, E (1 - (1 - k / E)^c) of all, and one more for each further tile of rows: a
    matrix is not kept from one tile to the next. In inference they are read where they lie in the stack (on GPUs a
    layer is copied first, which is not counted). A visit's gradient is written and read in bfloat16, and written in float32; in
    lora there is none. Where tokens travel sums are cleared, each visit reads and writes them, and what was gathered is read
    and written to be scattered.
    """
    config, choice = job.config, cut.choice
    assert choice is not None  # there are experts
    held = parameters(job, cut)
    used = held.whole(cut)
    chosen = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** cut.chunk(job)
    layers = sum(kind.mlp == "moe" for kind in config.block_kinds())
    matrix = config.hidden_size * config.moe_intermediate_size / cut.mlp
    again = 3 * layers * matrix * max(0.0, choice.capacity / TILE[0] - 1)
    read = (8 / 3 if job.trains else 1) * HALF * cut.visits * (used.experts * chosen + again)
    if job.adapts or not job.trains:
        return read
    if choice.transport is None:
        return read + used.experts * (2 * HALF + FLOAT)
    scattered = FLOAT * (used.experts + held.experts) if cut.gathered["experts"] else 0.0
    return read + used.experts * (FLOAT + cut.visits * (2 * HALF + 2 * FLOAT)) + scattered


def _rows(job: Job, cut: Shares) -> float:
    """Rows of a layer's experts: all that their buffers hold, in each visit.

    A gathered row of bfloat16 shares its lines with another, so it is read twice. Numbers of D forward: gathered (2 + 1), read
    by gate and by up, written by down, empty rows cleared (2); backward two are gathered, the products read or write 8, two
    gradients are joined (3). Either way rows are then read, widened and added to the sums in float32, which are read and
    written; many at a time pass through HBM widened. Of F 7 and 19.
    """
    choice = cut.choice
    assert choice is not None  # there are experts
    d, width, rows = job.config.hidden_size, job.config.moe_intermediate_size / cut.mlp, choice.capacity
    widened = 2 * FLOAT if rows / 8 * d * FLOAT > ON_CHIP else 0
    added = HALF + widened + 2 * FLOAT
    forward = d * (HALF * 8 + added) + HALF * 7 * width
    backward = d * (HALF * 17 + added) + HALF * 19 * width
    return cut.visits * rows * (forward + (backward if job.trains else 0.0))


def _journeys(job: Job, cut: Shares) -> float:
    """Tokens of a layer that are at experts, in each visit.

    Their sums are cleared and read in float32 and written in bfloat16. Where tokens travel, each of their arrays (states and
    sums, on the way back gradients too) is read and written to be sent and again to be kept, what is visited is joined, and
    sums are added to those that came. A token's k experts and weights, padded to a line, pass 3 times, on the way back 8.
    """
    choice = cut.choice
    assert choice is not None  # there are experts
    each = 0.0
    for arrays, lines in ((2, 3), (3, 8)) if job.trains else ((2, 3),):
        passed = 2 * FLOAT + HALF
        if choice.transport is not None:
            passed += HALF * (4 * arrays + 2 * (arrays - 1) + 3)
        each += job.config.hidden_size * passed + LINE * lines
    return cut.visits * cut.present(job) * each


def _words(job: Job, cut: Shares) -> float:
    """Logits of all tokens that come to this device's words, written and read in float32.

    In training they are read for each product of their gradient again, which is made where it is multiplied; for each block the
    words are read twice in bfloat16, and their gradient is read and written.
    """
    config, words = job.config, job.config.vocab_size / cut.vocab
    headed = job.batch / cut.batch if job.mode == "prefill" else cut.tokens(job)
    logits = headed * cut.devices(cut.travelling) * words
    if not job.trains:
        return 2 * FLOAT * logits
    size = block_size(int(headed), math.ceil(words), int(cut.devices(cut.travelling)))
    of_words = 2 * HALF + (0 if job.adapts else 2 * FLOAT)
    return (4 - job.adapts) * FLOAT * logits + of_words * words * config.hidden_size * math.ceil(headed / size)
