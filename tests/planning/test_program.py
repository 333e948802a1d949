"""What is read from compiled programs, beside the compiler's own count of those without a loop."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import pallas_kernels
from qwen3_jax.planning import loops
from qwen3_jax.planning.program import Collective, counted, memory_of_failure, overlaps, read_program
from tests.planning.compiled import OPTIONS, decoding, layers, pod, ring, training, unrolled

CLOSE = 0.02


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile(compiler_options=OPTIONS)


def own_count(program: jax.stages.Compiled) -> tuple[float, float]:
    """The compiler's FLOPs and bytes, in which the body of a loop counts once."""
    count = program.cost_analysis()
    assert count is not None
    return count["flops"], count["bytes accessed"]


def sent(collectives: tuple[Collective, ...], axes: tuple[str, ...]) -> int:
    return sum(collective.bytes for collective in collectives if collective.axes == axes)


@pytest.mark.parametrize("lower", [training, decoding])
def test_a_model_s_program_beside_the_unrolled_one(lower, monkeypatch):
    scanned, flat = compiled(lower()), compiled(unrolled(lower, monkeypatch))
    found, plain = read_program(scanned, pod()), read_program(flat, pod())
    flops, moved = own_count(flat)
    assert found.unknown == plain.unknown == ()
    assert found.flops == plain.flops == pytest.approx(flops, rel=CLOSE)
    assert plain.hbm_bytes == pytest.approx(moved, rel=CLOSE)
    # What travels is the same: loops are multiplied, also where a collective stands in them.
    for axes in (("fsdp",), ("tensor",)):
        assert sent(found.collectives, axes) == pytest.approx(sent(plain.collectives, axes), rel=CLOSE)
        assert sent(found.collectives, axes) > 0
    assert {collective.axes for collective in found.collectives} <= {("fsdp",), ("tensor",), ("fsdp", "tensor")}
    memory = scanned.memory_analysis()
    assert memory is not None
    assert (found.arguments, found.output) == (memory.argument_size_in_bytes, memory.output_size_in_bytes)
    assert (found.temporaries, found.aliased) == (memory.temp_size_in_bytes, memory.alias_size_in_bytes)
    # A loop's body is counted by the same rules: once, it is what the compiler says of the scanned program.
    monkeypatch.setattr(loops, "loop_rounds", lambda *_: 1)
    once = read_program(scanned, pod())
    flops, moved = own_count(scanned)
    assert once.flops == pytest.approx(flops, rel=CLOSE) and once.hbm_bytes == pytest.approx(moved, rel=CLOSE)
    assert found.flops > 1.2 * once.flops and found.hbm_bytes > 1.2 * once.hbm_bytes


def test_loops_within_loops_beside_the_unrolled_program(monkeypatch):
    scanned, flat = compiled(layers()), compiled(unrolled(layers, monkeypatch))
    found = read_program(scanned, pod())
    flops, moved = own_count(flat)
    assert found.flops == pytest.approx(flops, rel=CLOSE)
    assert found.hbm_bytes == pytest.approx(moved, rel=CLOSE)
    gathered, summed = found.collectives
    # Two layers of two blocks: a chip has 2 x 1024 x 2048 of each of both weights, and sends them once.
    assert gathered == Collective("all-gather", ("fsdp",), 2 * 2 * 2 * 1024 * 2048 * 2, 4, False)
    # An all-reduce over two chips sends its operand once, 4096 x 2048 sums a layer.
    assert summed == Collective("all-reduce", ("tensor",), 2 * 4096 * 2048 * 2, 2, False)


def test_a_ring_shows_its_overlap():
    program = ring(6).compile()
    text = program.as_text()
    assert text is not None
    (moved,) = read_program(program, pod()).collectives
    assert moved == Collective("collective-permute", ("fsdp",), 6 * 1024 * 1024 * 2, 6, True)
    (pair,) = overlaps(text)
    assert pair.kind == "collective-permute" and len(pair.work) == 1
    # The same schedule, with nothing between start and end.
    lines = text.splitlines()
    work = next(line for line in lines if line.strip().startswith(f"%{pair.work[0]} = "))
    done = next(at for at, line in enumerate(lines) if "collective-permute-done(" in line)
    lines.remove(work)
    lines.insert(done, work)
    assert overlaps("\n".join(lines))[0].work == ()
    assert not counted("\n".join(lines), dict(pod().shape)).collectives[0].overlapped


def test_kernels_bring_their_own_count():
    device = SingleDeviceSharding(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    given = array(1024, 256), array(8, 512, 256), array(8, dtype=jnp.int32)
    program = jax.jit(lambda *given: pallas_kernels.grouped_matmul(*given, transpose_rhs=True)).lower(*given).compile()
    text = program.as_text()
    assert text is not None
    found = counted(text, {})
    assert found.flops == 2 * 1024 * 256 * 512
    assert found.unknown == ("1 calls of the kernel gmm, 2.68e+08 FLOPs: rows of no group are counted like the others",)
    stripped = text.replace('"cost_estimate"', '"estimate"')
    assert counted(stripped, {}).flops == 0
    assert counted(stripped, {}).unknown == ("1 calls of the kernel gmm: it carries no estimate of its FLOPs",)


def test_attention_counts_the_half_of_the_scores_that_causality_leaves():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.CausalMask((256, 256))] * 4)
    kernel = splash.make_splash_mha_single_device(mask)
    device = SingleDeviceSharding(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0])
    queries, keys = (jax.ShapeDtypeStruct((heads, 256, 128), jnp.bfloat16, sharding=device) for heads in (4, 2))
    with jax.default_matmul_precision("default"):
        text = jax.jit(kernel).lower(queries, keys, keys).compile().as_text()
    assert text is not None
    # Queries by keys, and what follows by values.
    assert counted(text, {}).flops == 2 * (2 * 4 * 256 * 256 * 128) / 2
    assert counted(text, {}).unknown == ()


def test_a_loop_that_waits_for_data_is_counted_once_and_said():
    device = SingleDeviceSharding(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0])
    square = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=device)
    program = jax.jit(lambda x, w: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)).lower(square, square)
    text = program.compile().as_text()
    assert text is not None
    found = counted(text, {})
    assert found.flops == 2 * 256**3
    assert len(found.unknown) == 1 and "its rounds are not known when compiled; counted once" in found.unknown[0]


def test_what_does_not_fit_is_read_from_the_error():
    device = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
    large = jax.ShapeDtypeStruct((40, 2**28), jnp.float32, sharding=device)
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: x * 2).lower(large).compile()
    failure = memory_of_failure(raised.value)
    assert failure is not None and str(failure) == "the program needs 80.00 GiB of memory, a chip has 15.75"
    assert (failure.needed, failure.available) == (80 * 2**30, int(15.75 * 2**30))
    older = memory_of_failure(RuntimeError("Ran out of memory in memory space hbm. Used 101.29G of 31.24G hbm. Exceeded"))
    assert older is not None and older.needed == int(101.29 * 2**30)
    assert memory_of_failure(ValueError("Mosaic failed to compile the kernel")) is None


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,2},{1,3}}", ("fsdp",)),
        ("[2,2]<=[4]", ("tensor",)),
        ("[2,2]<=[2,2]T(1,0)", ("fsdp",)),
        ("[1,4]<=[4]", ("fsdp", "tensor")),
        ("{}", ("fsdp", "tensor")),
        ("mesh['data'=1,'fsdp'=2,'tensor'=2] {'data','fsdp'}", ("fsdp",)),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=4] {'axis_0':(1)2}", ("fsdp",)),
        ("mesh['axis_0'=4] {'axis_0':(2)2}", ("tensor",)),
        ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'axis_1'}", ("fsdp",)),
        ("{{0,3},{1,2}}", ()),
    ],
)
def test_groups_in_every_form_are_mesh_axes(groups, axes):
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (x: bf16[8,128]) -> bf16[16,128] {{
  %x = bf16[8,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %gathered = bf16[16,128]{{1,0:T(8,128)(2,1)}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
"""
    (found,) = counted(text, dict(data=1, fsdp=2, expert=1, context=1, tensor=2)).collectives
    assert (found.kind, found.axes, found.count) == ("all-gather", axes, 1)
    assert found.bytes == 8 * 128 * 2 * (3 if len(axes) == 2 else 1)
