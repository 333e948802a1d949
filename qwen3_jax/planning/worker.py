"""One candidate in a process of its own: `python -m qwen3_jax.planning.worker REQUEST RESULT`, both JSON files.

A compiler that runs out of memory, aborts or never ends takes this process with it and nothing else.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax

from qwen3_jax.config import Qwen3Config
from qwen3_jax.parallel.mesh import MeshError, make_mesh
from qwen3_jax.parallel.rules import RULES
from qwen3_jax.planning.job import Job
from qwen3_jax.planning.program import memory_of_failure, read_program
from qwen3_jax.planning.programs import lowered
from qwen3_jax.planning.topology import devices_of, parse_topology


def compiled_figures(request: dict) -> dict:
    """Lower and compile one candidate, and read what the compiler says.

    Args:
        request: config (as config.json), mode, batch, seq, remat, rank, base, adapter_dtype, topology, slices, mesh (a wish),
            rules (all rows that may differ from RULES).

    Returns:
        arguments (category -> bytes of a device), seconds (of tracing and compiling), and one of: program (a Program's fields);
        needed and available bytes of one that does not fit; reason of one that fails.
    """
    config = Qwen3Config.from_hf(request["config"])
    options = {name: request[name] for name in ("mode", "batch", "seq", "remat", "rank", "base", "adapter_dtype")}
    job = Job(config, **options)
    topology = parse_topology(request["topology"], request["slices"])
    start = time.monotonic()
    try:
        mesh = make_mesh(request["mesh"], slices=topology.slices, devices=devices_of(topology))
        made = lowered(job, mesh, RULES.replace(**request["rules"]))
    except MeshError as error:
        return {"reason": str(error), "seconds": time.monotonic() - start}
    try:
        compiled = made.program.compile()
    except jax.errors.JaxRuntimeError as error:
        known = {"arguments": made.arguments, "seconds": time.monotonic() - start}
        full = memory_of_failure(error)
        if full is not None:
            return known | {"needed": full.needed, "available": full.available}
        return known | {"reason": f"the compiler refused: {str(error).splitlines()[0][:300]}"}
    seconds = time.monotonic() - start
    return {"arguments": made.arguments, "seconds": seconds, "program": dataclasses.asdict(read_program(compiled, mesh))}


if __name__ == "__main__":
    taken, given = map(Path, sys.argv[1:])
    given.write_text(json.dumps(compiled_figures(json.loads(taken.read_text()))))
