"""Which instructions of a compiled program run, and how often: loops with the number of their rounds, calls, branches.

A TPU's compiler says nothing of rounds, so they are worked out: what the condition compares, where the counter begins, and what
the body adds to it are followed through copies, tuples and fusions to constants. A loop that waits for data, like one over
tokens until all rows have ended, has no number; it is counted once, and said.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

from qwen3_jax.planning.hlo import Computation, Instruction, Module

_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda left, right: left < right,
    "LE": lambda left, right: left <= right,
    "GT": lambda left, right: left > right,
    "GE": lambda left, right: left >= right,
    "NE": lambda left, right: left != right,
}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda left, right: left + right,
    "subtract": lambda left, right: left - right,
    "multiply": lambda left, right: left * right,
    "maximum": max,
    "minimum": min,
}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction that runs.

    Attributes:
        computation: where it stands.
        instruction: a fusion is one instruction; loops and calls are replaced by what they run.
        times: how often in one run of the program.
    """

    computation: Computation
    instruction: Instruction
    times: int


def executions(module: Module, unknown: list[str], weight: Callable[[Computation, Instruction], float]) -> Iterator[Execution]:
    """Everything that runs in one run of a program.

    Args:
        module: the program.
        unknown: takes a sentence for each loop whose rounds are not known, which is counted once, and for each choice between
            branches, of which the costliest is counted.
        weight: what an instruction of a branch costs.

    Yields:
        Instructions, with how often each runs.
    """

    def inside(computation: Computation, times: int) -> Iterator[Execution]:
        for instruction in computation:
            kind, called = instruction.opcode, [module[name] for name in instruction.called]
            if kind == "while":
                rounds = loop_rounds(module, computation, instruction)
                if rounds is None:
                    unknown.append(f"loop {_whence(instruction)}: its rounds are not known when compiled; counted once")
                for part in called:
                    yield from inside(part, times * (1 if rounds is None else rounds))
            elif kind == "conditional":
                unknown.append(f"branches {_whence(instruction)}: which one runs is not known; the costliest is counted")
                costs = [sum(weight(each.computation, each.instruction) for each in inside(branch, times)) for branch in called]
                yield from inside(called[costs.index(max(costs))], times)
            elif kind == "call" or (kind.endswith("-start") and called and not _reduces(instruction)):
                yield Execution(computation, instruction, times)
                for part in called:
                    yield from inside(part, times)
            else:
                yield Execution(computation, instruction, times)

    yield from inside(module.entry, 1)


def _reduces(instruction: Instruction) -> bool:
    """Whether the computation that it names joins two numbers, and is no part of the program's course."""
    return instruction.opcode in ("all-reduce-start", "reduce-scatter-start")


def _whence(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return f"{instruction.name} ({found.group(1)})" if found else instruction.name


def loop_rounds(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a loop runs.

    Args:
        module: the program.
        computation: where the loop stands.
        loop: the instruction.

    Returns:
        Rounds; None where they depend on data.
    """
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if said:
        return int(said.group(1))
    condition, body = (module[loop.attribute(name).lstrip("%")] for name in ("condition", "body"))
    compared = _comparison(module, condition, condition.root, {})
    if compared is None:
        return None
    at, limit, holds = compared
    start = _element(module, computation, computation.operands(loop)[0], at, {})
    if start is None:
        return None
    following = _element(module, body, body.root, at, {(0, at): start})
    if following is None:
        return None
    step = following - start
    if not holds(start, limit):
        return 0
    if step == 0:
        return None
    rounds = max(1, abs(limit - start) // abs(step) - 1)
    while holds(start + rounds * step, limit) and rounds <= abs(limit - start) // abs(step) + 1:
        rounds += 1
    return None if holds(start + rounds * step, limit) else rounds


Known = dict[tuple[int, int | None], int]  # (parameter, element of it or None) -> value


def _comparison(
    module: Module, computation: Computation, root: Instruction, arguments: dict[int, tuple[Computation, Instruction]]
) -> tuple[int, int, Callable[[int, int], bool]] | None:
    """Of a loop's condition: which element of the state is compared, with what number, and how."""
    while root.opcode in _SAME:
        root = computation.operands(root)[0]
    if root.opcode == "fusion":
        inside = module[root.called[0]]
        outer = dict(enumerate((computation, each) for each in computation.operands(root)))
        return _comparison(module, inside, inside.root, outer)
    holds = _COMPARED.get(root.attribute("direction"))
    if root.opcode != "compare" or holds is None:
        return None
    left, right = (_traced(computation, each, arguments) for each in computation.operands(root))
    at, limit = _counter(*left), _number(module, *right, {})
    if at is not None and limit is not None:
        return at, limit, holds
    at, limit = _counter(*right), _number(module, *left, {})
    return None if at is None or limit is None else (at, limit, lambda counter, bound: holds(bound, counter))


def _traced(
    computation: Computation, instruction: Instruction, arguments: dict[int, tuple[Computation, Instruction]]
) -> tuple[Computation, Instruction]:
    """Where a value comes from, through copies and out of a fusion."""
    while True:
        if instruction.opcode in _SAME:
            instruction = computation.operands(instruction)[0]
        elif instruction.opcode == "parameter" and int(instruction.literal) in arguments:
            computation, instruction = arguments[int(instruction.literal)]
            arguments = {}
        else:
            return computation, instruction


def _counter(computation: Computation, instruction: Instruction) -> int | None:
    """Which element of the loop's state it is, if it is one."""
    if instruction.opcode == "get-tuple-element" and computation.operands(instruction)[0].opcode == "parameter":
        return instruction.numbers("index")[0]
    return None


def _element(module: Module, computation: Computation, tuple_: Instruction, at: int, known: Known) -> int | None:
    while tuple_.opcode in _SAME:
        tuple_ = computation.operands(tuple_)[0]
    if tuple_.opcode == "parameter":
        return known.get((int(tuple_.literal), at))
    if tuple_.opcode == "tuple":
        return _number(module, computation, computation.operands(tuple_)[at], known)
    if tuple_.opcode == "fusion":
        inside = module[tuple_.called[0]]
        return _element(module, inside, inside.root, at, _passed(module, computation, tuple_, known))
    if tuple_.opcode == "while":  # a counter that an earlier loop hands on unchanged
        body = module[tuple_.attribute("body").lstrip("%")]
        start = _element(module, computation, computation.operands(tuple_)[0], at, known)
        return start if start is not None and _element(module, body, body.root, at, {(0, at): start}) == start else None
    return None


def _passed(module: Module, computation: Computation, fusion: Instruction, known: Known) -> Known:
    operands = enumerate(computation.operands(fusion))
    values = {(at, None): _number(module, computation, each, known) for at, each in operands if len(each.arrays) == 1}
    return {key: value for key, value in values.items() if value is not None}


def _number(module: Module, computation: Computation, instruction: Instruction, known: Known) -> int | None:
    """An integer scalar's value, where it follows from constants and what is known of the parameters."""
    kind = instruction.opcode
    if len(instruction.arrays) == 0 or instruction.arrays[0].size != 1 or instruction.arrays[0].dtype[0] not in "su":
        return None
    if kind == "constant":
        found = re.fullmatch(r"\{*(-?\d+)\}*", instruction.literal.strip())
        return int(found.group(1)) if found else None
    if kind == "parameter":
        return known.get((int(instruction.literal), None))
    operands = computation.operands(instruction)
    if kind == "get-tuple-element":
        return _element(module, computation, operands[0], instruction.numbers("index")[0], known)
    if kind in _SAME:
        return _number(module, computation, operands[0], known)
    if kind == "fusion":
        inside = module[instruction.called[0]]
        return _number(module, inside, inside.root, _passed(module, computation, instruction, known))
    if kind in _ARITHMETIC:
        left, right = (_number(module, computation, each, known) for each in operands)
        return None if left is None or right is None else _ARITHMETIC[kind](left, right)
    return None
