"""What one instruction of a compiled program costs: FLOPs of its matrix products, and bytes that it moves.

FLOPs are those of dot, convolution (what a TPU's compiler makes of matrix products) and kernels; what the vector units do
beside them is left out. Bytes are operands read and results written, padded to tiles as they lie in memory. A slice counts what
it takes, an update in place what it writes, inside of fusions too: a loop over stacked layers would else count the whole stack
in every round. Gathered rows count with the tiles that they lie in. These are the conventions of the compiler's own cost
analysis, but that one tells no memory from another, counts the body of a loop once and a copy between memories four times.
What a program is timed by differs in one thing: of gathered and scattered rows the lines count, as machine code copies them.
"""

import dataclasses
import json
import math
import re

from qwen3_jax.planning.hlo import HBM, Computation, Instruction, Module, Shape, leaves

# Nothing of these moves data: they name it, or their parts are counted one by one.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier partition-id replica-id "
    "while conditional call domain get-dimension-size".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
# Products of queries by keys that jax's splash kernels make, each 2 x N x T x S x H; a backward pass makes the scores again.
# They carry no estimate. Half of the scores is counted: these kernels leave out tiles that causality hides.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def matrix_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """FLOPs of one execution, those of fused computations in it included, those of loops and calls not.

    Args:
        module: the program.
        computation: where the instruction stands.
        instruction: the instruction.

    Returns:
        FLOPs, two for a multiplication and its addition.
    """
    if instruction.opcode == "dot":
        left, result = computation.operands(instruction)[0].arrays[0], instruction.arrays[0]
        return 2.0 * result.size * math.prod(left.dims[axis] for axis in instruction.numbers("lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        left, right = (each.arrays[0] for each in computation.operands(instruction))
        return _convolution(left, right, instruction)
    if instruction.opcode == "fusion":
        fused = module[instruction.called[0]]
        return sum(matrix_flops(module, fused, each) for each in fused)
    if is_kernel(instruction):
        estimate = kernel_estimate(instruction)
        return float(estimate["flops"]) if estimate else _splash(computation, instruction) or 0.0
    return 0.0


def _convolution(left: Shape, right: Shape, instruction: Instruction) -> float:
    """2 for each pair of elements that meets: places of the window in padding or between dilated elements meet none."""
    names, _, of_result = instruction.attribute("dim_labels").partition("->")
    of_left, of_right = names.split("_")
    result = instruction.arrays[0]
    window = _window(instruction.attribute("window"), sum(label.isdigit() for label in of_left))
    pairs = 1
    for at, places in enumerate(window):
        sizes = tuple(
            shape.dims[labels.index(str(at))] for shape, labels in ((left, of_left), (right, of_right), (result, of_result))
        )
        pairs *= _meetings(sizes, places)
    groups, batch_groups = (int(instruction.attribute(name) or 1) for name in ("feature_group_count", "batch_group_count"))
    features = left.dims[of_left.index("f")] // groups
    return 2.0 * pairs * features * result.dims[of_result.index("f")] * (left.dims[of_left.index("b")] // batch_groups)


def _window(text: str, rank: int) -> list[tuple[int, ...]]:
    """Of each spatial dimension: stride, padding before, dilation of either operand, whether the window runs backwards."""
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))

    def numbers(name: str, default: int) -> list[int]:
        # A padding is "before_after"; all others are one number for each dimension.
        return [int(part.partition("_")[0]) for part in fields[name].split("x")] if name in fields else [default] * rank

    names = ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1), ("rhs_reversal", 0)
    return list(zip(*(numbers(name, default) for name, default in names), strict=True))


def _meetings(sizes: tuple[int, ...], window: tuple[int, ...]) -> int:
    """In how many pairs of a place in the result and one in the window an element of the operand is met."""
    size, kernel, result = sizes
    stride, low, dilation, kernel_dilation, reverse = window
    common = math.gcd(stride, dilation)
    step = dilation // common
    inverse = pow(stride // common, -1, step) if step > 1 else 0
    found = 0
    for place in range(kernel):
        offset = (kernel - 1 - place if reverse else place) * kernel_dilation - low
        if -offset % common:
            continue
        # Places p with 0 <= p * stride + offset <= (size - 1) * dilation, divisible by the dilation: every step-th one.
        first, last = max(0, -(offset // stride)), min(result - 1, ((size - 1) * dilation - offset) // stride)
        residue = (-offset // common) * inverse % step if step > 1 else 0
        first += (residue - first) % step
        found += max(0, (last - first) // step + 1)
    return found


def is_async_half(instruction: Instruction, half: str = "") -> bool:
    """Whether it marks the "Start" or the "Done" of a collective that goes on inside of the fusions between, or either."""
    return instruction.attribute("custom_call_target").startswith(f'"AsyncCollective{half}')


def chain_of(fused: Computation, instruction: Instruction) -> tuple[str, str] | None:
    """What tells the pieces of one collective in several fusions from those of others; None for a collective in one piece."""
    chain = re.search(r'chain_id="(\d+)"', instruction.attribute("frontend_attributes"))
    return (instruction.attribute("channel_id"), chain.group(1)) if chain else None


def _goes_on(fused: Computation, instruction: Instruction) -> bool:
    """Whether it is a later piece of a collective, whose bytes were counted where it began."""
    return chain_of(fused, instruction) is not None and not any(is_async_half(each, "Start") for each in fused)


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel on a TPU."""
    return instruction.opcode == "custom-call" and instruction.attribute("custom_call_target") == '"tpu_custom_call"'


def kernel_name(instruction: Instruction) -> str:
    """A kernel's name, without the number that tells its calls apart."""
    return re.sub(r"[.\d]+$", "", instruction.name)


def kernel_estimate(instruction: Instruction) -> dict[str, str] | None:
    """A kernel's own estimate of its cost: `flops` and `bytes_accessed`; None where its author gave none."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.rest)
    return json.loads(found.group(1)) if found else None


def counts_kernel(computation: Computation, instruction: Instruction) -> bool:
    """Whether a kernel's FLOPs are known: by its own estimate, or by the table of this file."""
    return kernel_estimate(instruction) is not None or _splash(computation, instruction) is not None


def _splash(computation: Computation, instruction: Instruction) -> float | None:
    found = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.rest + instruction.name)
    if found is None:
        return None
    arrays = [array for each in computation.operands(instruction) for array in each.arrays]
    queries, keys, *_ = [array for array in arrays if len(array.dims) >= 3 and array.dtype in ("bf16", "f32")]
    return _SPLASH[found.group(1)] * 2.0 * queries.size * keys.dims[-2] / 2


def bytes_moved(
    module: Module, computation: Computation, instruction: Instruction, memory: int | None = HBM, lines: bool = False
) -> float:
    """Bytes that one execution reads and writes, those of loops and calls not included.

    Args:
        module: the program.
        computation: where the instruction stands; not a fused computation.
        instruction: the instruction.
        memory: which memory's bytes count; None for all.
        lines: count gathered and scattered rows with the lines of a tile that they lie in (`Shape.line_bytes`), not with
            whole tiles.

    Returns:
        Bytes.
    """
    kind = instruction.opcode
    if kind in _FREE or kind.endswith(("-done", "-update")) or (kind.endswith("-start") and instruction.called):
        return 0.0

    def of(*arrays: Shape) -> float:
        return float(sum(array.bytes for array in arrays if memory in (None, array.memory)))

    operands, results = computation.operands(instruction), instruction.arrays
    if kind.endswith("-start"):
        # The result names the operands again, and holds flags: what arrives is what the operands do not name.
        inputs = [array for each in operands for array in each.arrays]
        return of(*inputs) + of(*_arriving(instruction, inputs))
    if kind in _SLICES or kind in _UPDATES:
        touched = _touched(computation, instruction, lines) if memory in (None, operands[0].arrays[0].memory) else 0.0
        others = of(*(array for each in operands[1:] for array in each.arrays))
        return touched + others + (of(*results) if kind in _SLICES else touched if kind == "scatter" else 0.0)
    if kind == "fusion":
        fused = module[instruction.called[0]]
        inputs = sum(
            _read(module, fused, fused.parameters[number], lines)
            for number, each in enumerate(operands)
            if memory in (None, each.arrays[0].memory)
        )
        return inputs + sum(
            size for array, size in _written(module, fused, fused.root, lines) if memory in (None, array.memory)
        )
    if kind == "custom-call":
        estimate = kernel_estimate(instruction)
        if estimate:
            return float(estimate["bytes_accessed"])
        if instruction.attribute("custom_call_target") == '"AllocateBuffer"':
            return 0.0
    return of(*results) + of(*(array for each in operands for array in each.arrays))


def _arriving(instruction: Instruction, inputs: list[Shape]) -> list[Shape]:
    """Results of what starts a transfer: its shape is (operands, results, flags), of a copy (result, operand, flag)."""
    parts = instruction.shape if isinstance(instruction.shape, tuple) else (instruction.shape,)
    if instruction.opcode == "copy-start":
        return [instruction.arrays[0]]
    return list(leaves(parts[1])) if len(parts) > 1 else list(inputs)


def _touched(computation: Computation, instruction: Instruction, lines: bool) -> float:
    """Bytes of its first operand that a slice reads, or that an update writes; a row with its tiles, or with their lines."""
    source, *others = (each.arrays[0] for each in computation.operands(instruction))
    kind, result = instruction.opcode, instruction.arrays[0]
    if kind == "dynamic-update-slice":
        return float(others[0].bytes)
    if kind == "gather":
        window, total = instruction.numbers("slice_sizes"), result.size
    elif kind == "scatter":
        kept = iter(others[-1].dims[axis] for axis in instruction.numbers("update_window_dims"))
        inserted = instruction.numbers("inserted_window_dims")
        window, total = tuple(1 if axis in inserted else next(kept) for axis in range(len(source.dims))), others[-1].size
    else:
        return float(result.bytes)
    one = dataclasses.replace(source, dims=window)
    return float(total // max(one.size, 1) * (source.line_bytes(window) if lines else one.bytes))


def _read(module: Module, fused: Computation, source: Instruction, lines: bool, nested: bool = False) -> float:
    """Bytes of an array that a fused computation reads: what slices take of it, and all of it once for each nested fusion."""
    total, whole = 0.0, False
    size = sum(array.bytes for array in source.arrays)
    for user in fused:
        for at, name in enumerate(user.operands):
            if name != source.name:
                continue
            if user is fused.root and user.opcode == "tuple" or is_async_half(user) or _goes_on(fused, user):
                pass  # handed on
            elif user.opcode == "fusion":
                inside = module[user.called[0]]
                total += _read(module, inside, inside.parameters[at], lines, nested=True)
            elif at == 0 and (user.opcode == "scatter" or (user.opcode == "gather" and nested)):
                total += min(size, _touched(fused, user, lines))
            elif at == 0 and user.opcode in _SLICES:
                total += _touched(fused, user, lines)
            elif user.opcode == "dynamic-update-slice" and at == 0:
                pass  # in place
            elif user.opcode == "bitcast":
                total += min(size, _read(module, fused, user, lines, nested)) if user is not fused.root else size
            elif user.opcode in ("broadcast", "reshape"):
                total += size
            elif not whole:
                total, whole = total + size, True
    return total


def _written(module: Module, fused: Computation, root: Instruction, lines: bool) -> list[tuple[Shape, float]]:
    """The arrays that a fused computation gives, and the bytes of each that it writes."""
    if root.opcode == "tuple":
        return [pair for each in fused.operands(root) for pair in _written(module, fused, each, lines)]
    if root.opcode == "parameter" or _goes_on(fused, root) or is_async_half(root, "Done"):
        return [(array, 0.0) for array in root.arrays]  # handed on
    if root.opcode == "bitcast":
        inner = _written(module, fused, fused.operands(root)[0], lines)
        return [(root.arrays[0], min(inner[0][1], root.arrays[0].bytes))] if len(inner) == 1 else inner
    if root.opcode == "dynamic-update-slice" or (root.opcode == "scatter" and fused.operands(root)[0].opcode == "parameter"):
        return [(root.arrays[0], min(float(root.arrays[0].bytes), _touched(fused, root, lines)))]
    if root.opcode == "fusion":
        inside = module[root.called[0]]
        sizes = [size for _, size in _written(module, inside, inside.root, lines)]
        return list(zip(root.arrays, sizes, strict=True))
    return [(array, float(array.bytes)) for array in root.arrays]
