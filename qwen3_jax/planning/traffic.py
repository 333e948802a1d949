"""What passes through HBM in a step by the analytic model, to decide which meshes are worth compiling (`estimate` has the rest).

The letters are those of `estimate`: t tokens of a device, D embed, N and K heads, H head_dim, F width, E experts, k of a token, V
words. Counted is what compiled programs of a TPU do, a matrix product reading its input and writing its output in bfloat16. How often
an array passes was read from such programs (tools/show_hbm.py), operation by operation, and is named where it is used.
"""

from pallas_kernels.grouped_matmul.tpu import TILE
from qwen3_jax.parallel.word_losses import LOGITS
from qwen3_jax.planning.estimate import FLOAT, HALF, cache_bytes, passes
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.shares import Parameters, Shares, parameters

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
    """Bytes that pass through HBM in a step, by what moves them.

    Args:
        job: the job.
        cut: its shares.

    Returns:
        "weights", "attention", "dense", "rows" (of experts), "journeys" (of tokens to experts), "words", "cache" -> bytes of one
        device; those of experts' matrices are in "weights".
    """
    config, t = job.config, cut.tokens(job)
    kinds = [kind.mlp for kind in config.block_kinds()]
    dense, moe = (kinds.count(kind) * passes(job) * HALF * t for kind in ("dense", "moe"))
    return {
        "weights": _weights(job, cut),
        "attention": (dense + moe) * _attention(job, cut),
        "dense": dense * (3 * config.hidden_size + 6 * config.intermediate_size / cut.mlp),
        "rows": kinds.count("moe") * _rows(job, cut),
        "journeys": kinds.count("moe") * _journeys(job, cut),
        "words": _words(job, cut),
        "cache": cache_bytes(job, cut) if job.mode == "decode" else 0.0,
    }


def _attention(job: Job, cut: Shares) -> float:
    """Numbers a token and pass: 10 D of norms, residual and the projections' inputs and output, 19 of each query, 17 of key and value.

    A query is written by its projection; read and written by the norm (2), the rotation's halves (2) and its sum (3); taken from the
    batch, copied and turned to the kernel's order (3); read by the kernel, which writes output and normaliser (3); put back (2),
    reshaped (2) and read by the last projection. A backward pass is as much twice. Scores stay on the chip.
    """
    config = job.config
    heads, keys = config.num_attention_heads / cut.heads, config.num_key_value_heads / cut.kv_heads
    return 10 * config.hidden_size + config.head_dim * (19 * heads + 17 * keys)


def _weights(job: Job, cut: Shares) -> float:
    """Matrices of layers, whole along embed, read in bfloat16 in each pass; and what training does with all parameters.

    Training, twice: a layer's weights are taken from the stack (read and written in float32), cast, and what is gathered is read
    and written again. Gradients are written and read in float32, and put into a stack; the optimizer reads and writes weight and
    two moments, and reads the gradient, for the norm of all once more.
    """
    held = parameters(job, cut)
    used = held.whole(cut)
    layers = {kind: (getattr(held, kind), getattr(used, kind)) for kind in vars(held) if kind != "words"}
    dense = sum(whole for kind, (_, whole) in layers.items() if kind != "experts")
    total = HALF * passes(job) * dense + HALF * held.words + _matrices(job, cut, used)
    if job.trains:
        for kind, (kept, whole) in layers.items():
            total += 2 * ((3 * FLOAT + HALF) * kept + (HALF * (kept + whole) if cut.gathered[kind] else 0.0))
            total += 2 * FLOAT * kept + (0.0 if kind == "experts" else 2 * FLOAT * whole)
        total += 8 * FLOAT * held.total
    return total


def _matrices(job: Job, cut: Shares, used: Parameters) -> float:
    """Experts' matrices in the grouped matmuls: a forward pass has three, a backward pass five and three of gradients.

    A kernel reads the matrices that its rows chose, E (1 - (1 - k / E)^c) with c tokens at a time, and one more for each further tile
    of rows, for between two tiles it goes through the matrix's own. A visit's gradient is written in bfloat16, read and written in
    float32; each further visit reads the sums before.
    """
    config = job.config
    if cut.choice is None:
        return 0.0
    chosen = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** cut.chunk(job)
    layers = sum(kind.mlp == "moe" for kind in config.block_kinds())
    matrix = config.hidden_size * config.moe_intermediate_size / cut.mlp
    again = 3 * layers * matrix * max(0.0, cut.choice.capacity / TILE[0] - 1)
    read = (8 / 3 if job.trains else 1) * HALF * cut.visits * (used.experts * chosen + again)
    if not job.trains:
        return read
    return read + used.experts * (HALF * cut.visits + (HALF + FLOAT) + (HALF + 2 * FLOAT) * (cut.visits - 1))


def _rows(job: Job, cut: Shares) -> float:
    """Of a layer's experts, for each row of their buffers and visit; gathered rows share their lines with others and count twice.

    Forward, bytes: D numbers are gathered (4 + 2), read by gate and up, written by down, cleared past the last (4), read to be
    widened, added (8); 7 F by the three products and what is between them. Backward: two gathers, the products' ten inputs and
    outputs, joined (6), read to be widened, added; 19 F. Widened rows of many tokens go through HBM themselves.
    """
    if cut.choice is None:
        return 0.0
    d, width, rows = job.config.hidden_size, job.config.moe_intermediate_size / cut.mlp, cut.choice.capacity
    added = HALF + 2 * FLOAT + (2 * FLOAT if rows * d * FLOAT / 8 > ON_CHIP else 0)
    forward = rows * (d * (6 + 3 * HALF + 4 + added) + 7 * HALF * width)
    backward = rows * (d * (2 * 6 + 8 * HALF + 6 + added) + 19 * HALF * width)
    return cut.visits * (forward + (backward if job.trains else 0.0))


def _journeys(job: Job, cut: Shares) -> float:
    """Of a layer, for each token that is there, and each visit.

    Its sums are cleared in float32, read and written in bfloat16. Where tokens travel each array (states and sums; backward gradients
    too) is read and written to be sent and to be kept, what is visited is joined, and the sums are added to those that came.
    """
    if cut.choice is None:
        return 0.0
    journeys = (2, 3) if job.trains else (2,)  # arrays
    sums = 2 * FLOAT + HALF
    travel = 0 if cut.choice.transport is None else 5
    each = sum(sums + (8 * arrays + 4 * (arrays - 1) + travel if travel else 0) for arrays in journeys)
    return cut.visits * cut.present(job) * job.config.hidden_size * each


def _words(job: Job, cut: Shares) -> float:
    """Logits of everybody's tokens over this device's words: 14 bytes each in training, 8 in inference.

    In training they are written and read in float32, and as the gradient in bfloat16 by two products; the words' gradient is
    read and written for each block of LOGITS.
    """
    config = job.config
    headed = job.batch / cut.batch if job.mode == "prefill" else cut.tokens(job)
    logits = headed * cut.devices(cut.travelling) * config.vocab_size / cut.vocab
    if not job.trains:
        return 2 * FLOAT * logits
    return (2 * FLOAT + 3 * HALF) * logits + 2 * FLOAT * logits / LOGITS * config.vocab_size / cut.vocab * config.hidden_size
