"""What compiled programs say of the candidates, as seconds and bytes by category, best first; nothing analytic orders them."""

import dataclasses

from qwen3_jax.planning.candidates import Candidate
from qwen3_jax.planning.compile import Outcome
from qwen3_jax.planning.efficiency import Efficiency
from qwen3_jax.planning.estimate import model_flops
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.program import Collective, Program
from qwen3_jax.planning.roofline import StepTime, step_time
from qwen3_jax.planning.topology import Topology

# Where each figure of a row is from: the compiler, the arguments' shapes, the analytic model, or both as said in `assumptions`.
SOURCES = {
    "flops": "compiled",
    "timed_flops": "compiled, less those of empty rows in the experts' buffers; analytic where the assumptions say so",
    "transport": "what the program was compiled with",
    "hbm_bytes": "compiled, by the compiler's own rules",
    "timed_hbm_bytes": "compiled, gathered and scattered rows by the 512-byte lines of memory that they lie in",
    "collectives": "compiled",
    "compile_seconds": "measured",
    "bytes.arguments": "compiled",
    "bytes.temporaries": "compiled",
    "bytes.output": "compiled",
    "bytes.aliased": "compiled",
    "bytes.code": "compiled",
    "bytes.total": "compiled",
    "bytes.weights": "shapes",
    "bytes.optimizer": "shapes",
    "bytes.cache": "shapes",
    "bytes.batch": "shapes",
    "bytes.gradients": "analytic, of the compiled temporaries",
    "bytes.activations": "analytic, of the compiled temporaries",
    "bytes.working": "compiled temporaries less the analytic gradients and activations",
    "step_seconds": "compiled figures over the chip's facts and the assumed efficiencies",
    "tokens_per_second_per_chip": "from step_seconds",
    "mfu": "from step_seconds and the analytic model FLOPs",
}


@dataclasses.dataclass(frozen=True)
class Move:
    """A compiled collective on the chips' network.

    Attributes:
        collective: as compiled.
        seconds: of all its executions.
        network: the links that its axes have.
    """

    collective: Collective
    seconds: float
    network: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate as compiled.

    Attributes:
        candidate: the mesh, and the analytic model's word on it.
        outcome: what became of its compilation.
        fits: whether a device holds it; None where the compiler failed otherwise.
        bytes: category -> bytes of one device (SOURCES says from where); what is not known is left out.
        moves: its collectives.
        flops: those that the time counts; where it was compiled.
        time: of a step, where it was compiled.
        tokens_per_second_per_chip: likewise.
        mfu: model FLOPs over what the chips could do in that time at their peak; likewise.
        verdict: in words.
    """

    candidate: Candidate
    outcome: Outcome
    fits: bool | None
    bytes: dict[str, int]
    moves: tuple[Move, ...]
    flops: float | None
    time: StepTime | None
    tokens_per_second_per_chip: float | None
    mfu: float | None
    verdict: str


def ranked(job: Job, topology: Topology, efficiency: Efficiency, chosen: list[Candidate], outcomes: list[Outcome]) -> list[Row]:
    """The candidates in order: those that fit by their step's time, then those that do not by their bytes, then failures.

    Args:
        job: the job.
        topology: the chips.
        efficiency: shares of the chip's figures that are reached.
        chosen: the candidates.
        outcomes: what became of each.

    Returns:
        The rows.
    """
    rows = [_row(job, topology, efficiency, *pair) for pair in zip(chosen, outcomes, strict=True)]
    place = {True: 0, False: 1, None: 2}

    def key(row: Row) -> tuple[int, float]:
        return place[row.fits], row.time.total if row.fits and row.time else row.bytes.get("total", 0)

    return sorted(rows, key=key)


def _row(job: Job, topology: Topology, efficiency: Efficiency, candidate: Candidate, outcome: Outcome) -> Row:
    program, chip = outcome.program, topology.chip
    if program is None:
        needed = _needed(candidate, outcome)
        fits = None if outcome.needed is None else False
        return Row(
            candidate, outcome, fits, needed, (), None, None, None, None, _verdict(topology, fits, needed, outcome.reason)
        )
    moves = tuple(_move(candidate, topology, efficiency, move) for move in program.collectives)
    timed = [(move.seconds, move.collective.overlapped) for move in moves]
    flops = candidate.flops if _lacks_flops(job, topology, program) else _filled_flops(candidate, program)
    time = step_time(flops, program.timed_hbm_bytes, timed, chip, efficiency)
    taken = _compiled_bytes(candidate, outcome.arguments, program)
    fits = taken["total"] <= chip.hbm
    rate, mfu = None, None
    if time.total > 0:
        rate = job.tokens / time.total / topology.chips
        mfu = model_flops(job) / (time.total * topology.devices * chip.bf16_flops)
    return Row(candidate, outcome, fits, taken, moves, flops, time, rate, mfu, _verdict(topology, fits, taken, None))


def _filled_flops(candidate: Candidate, program: Program) -> float:
    """A program's FLOPs without those of rows in the experts' buffers that stay empty: a kernel passes over them."""
    return program.flops - (1 - candidate.filled) * program.grouped_flops


def _lacks_flops(job: Job, topology: Topology, program: Program) -> bool:
    """Whether a program counts fewer FLOPs than the model itself asks for: calls of libraries and kernels may declare none."""
    return program.flops < 0.9 * model_flops(job) / topology.devices


def _move(candidate: Candidate, topology: Topology, efficiency: Efficiency, collective: Collective) -> Move:
    # A group that the reader could not name may be any: all devices is the slowest.
    axes = collective.axes or tuple(candidate.sizes)
    route = candidate.links.route(axes)
    hop = topology.chip.hop_seconds
    seconds = route.seconds(collective.kind, collective.bytes, collective.count, hop, efficiency.links, collective.ways)
    return Move(collective, seconds, route.words)


def _compiled_bytes(candidate: Candidate, arguments: dict[str, int], program: Program) -> dict[str, int]:
    gradients = min(program.temporaries, round(candidate.memory["gradients"]))
    activations = min(program.temporaries - gradients, round(candidate.memory["activations"]))
    return {
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "output": program.output,
        "aliased": program.aliased,
        "code": program.code,
        "total": program.arguments + program.temporaries + program.output - program.aliased + program.code,
        **arguments,
        "gradients": gradients,
        "activations": activations,
        "working": program.temporaries - gradients - activations,
    }


def _needed(candidate: Candidate, outcome: Outcome) -> dict[str, int]:
    """Of a program that does not fit: its arguments from the shapes, and what the compiler's total leaves for temporaries."""
    if outcome.needed is None:
        return dict(outcome.arguments)
    arguments = sum(outcome.arguments.values())
    temporaries = max(0, outcome.needed - arguments)
    gradients = min(temporaries, round(candidate.memory["gradients"]))
    activations = min(temporaries - gradients, round(candidate.memory["activations"]))
    return {
        "arguments": arguments,
        "temporaries": temporaries,
        "total": outcome.needed,
        **outcome.arguments,
        "gradients": gradients,
        "activations": activations,
        "working": temporaries - gradients - activations,
    }


def _verdict(topology: Topology, fits: bool | None, taken: dict[str, int], reason: str | None) -> str:
    if fits is None:
        return f"not compiled: {reason}"
    hbm, total = topology.chip.hbm, taken["total"]
    if fits:
        return f"fits: {total / 1e9:.1f} of {hbm / 1e9:.1f} GB"
    if taken["arguments"] > hbm:
        what = "its arguments alone are too large"
    else:
        what = f"beside its arguments there is room for {(hbm - taken['arguments']) / 1e9:.1f} GB of temporaries"
    largest = sorted(
        ("weights", "optimizer", "cache", "gradients", "activations", "working"), key=lambda name: -taken.get(name, 0)
    )
    named = ", ".join(f"{name} {taken[name] / 1e9:.1f}" for name in largest if taken.get(name, 0) > 0.01 * total)
    return f"does not fit: {total / 1e9:.1f} GB, {(total - hbm) / 1e9:.1f} too many ({named}); {what}"


def assumptions(job: Job, topology: Topology, efficiency: Efficiency, row: Row) -> list[str]:
    """All that stands between what was compiled and what is predicted, for one row.

    Args:
        job: the job.
        topology: the chips.
        efficiency: shares of the chip's figures that are taken to be reached.
        row: the row.

    Returns:
        Sentences.
    """
    chip = topology.chip
    device = "a device (half a chip)" if chip.devices_per_chip > 1 else "a chip"
    said = [
        f"products run at {efficiency.flops:.0%} of {chip.bf16_flops / 1e12:g} TFLOP/s in bfloat16, {device}",
        f"memory runs at {efficiency.hbm:.0%} of {chip.hbm_bandwidth / 1e9:g} GB/s",
        "a step takes the longer of products and memory traffic of the whole program and collectives not hidden beside it; "
        "collectives run one after the other, and what overlaps is hidden up to the length of that work",
        f"links run at {efficiency.links:.0%} of their bandwidth; a hop takes {chip.hop_seconds * 1e6:g} us",
    ]
    program = row.outcome.program
    if program is not None and _lacks_flops(job, topology, program):
        share = program.flops * topology.devices / model_flops(job)
        said.append(
            f"{row.candidate.wish}: the compiled program counts {share:.0%} of the FLOPs that the model asks for, so products "
            "take the analytic model's"
        )
    elif program is not None and row.flops is not None:
        useful = row.flops * topology.devices / model_flops(job)
        empty = ""
        if row.candidate.filled < 1 and program.grouped_flops:
            empty = (
                f", without the {1 - row.candidate.filled:.0%} of the experts' buffers that stay empty, which kernels declare "
                f"and pass over; with them {program.flops * topology.devices / model_flops(job):.2f} times"
            )
        said.append(f"{row.candidate.wish}: products are {useful:.2f} times the FLOPs that the model asks for{empty}")
        if row.flops > 1.5 * row.candidate.flops:
            said.append(
                f"{row.candidate.wish}: they are {row.flops / row.candidate.flops:.1f} times the analytic model's FLOPs: "
                "work that is not of the model"
            )
    networks = {move.collective.axes: move.network for move in row.moves}
    said += [
        f"{row.candidate.wish}, over {' x '.join(axes) or 'groups not known, taken as all devices'}: {words}"
        for axes, words in networks.items()
    ]
    if job.trains:
        said.append("gradients and activations are the analytic model's shares of the compiled temporaries")
    if job.adapts:
        said.append(
            "MFU counts 4 FLOPs per token and active frozen parameter, 6 per parameter of its adapters, and causal attention "
            "with its gradients; nothing that is computed again"
        )
    else:
        said.append(
            "MFU counts 6 FLOPs in training, 2 in inference, per token and active parameter that is multiplied, and causal "
            "attention; nothing that is computed again"
        )
    said.append("kernels count with the FLOPs and bytes that they declare, whatever they reach")
    if program is not None and program.timed_hbm_bytes < 0.99 * program.hbm_bytes:
        said.append(
            "a row that is gathered or scattered is timed with the 512-byte lines of its tiles that it lies in (128 lanes of "
            "32 bits: one row of float32, two of bfloat16), as compiled code copies it; not measured on a chip. HBM GB has its "
            "whole tiles, as the compiler counts"
        )
        said.append(
            f"{row.candidate.wish}: {program.timed_hbm_bytes / 1e9:,.0f} GB of HBM traffic are timed of the compiler's "
            f"{program.hbm_bytes / 1e9:,.0f}"
        )
    if row.candidate.transport is not None:
        said.append(
            f"{row.candidate.wish}: tokens travel by {row.candidate.transport} to experts that are used evenly: each buffer is "
            "filled once"
        )
    said += [f"chip fact not certain: {what}" for what in chip.uncertain]
    if program is not None:
        said += [f"not known of the program: {what}" for what in program.unknown]
    return said
