"""Rows of an array in HBM: by the compiler's count whole tiles, in time the lines of the tiles that they lie in."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qwen3_jax.planning.hlo import parse
from qwen3_jax.planning.program import counted
from tests.planning.compiled import OPTIONS

# 128 rows of 2,048 numbers; what else is read and written: 128 indices, and the rows themselves.
GATHER = """HloModule m, is_scheduled=true

ENTRY %main (table: {dtype}[4096,2048], index: s32[128]) -> {dtype}[128,2048] {{
  %table = {dtype}[4096,2048]{{1,0{tile}}} parameter(0)
  %index = s32[128]{{0{flat}}} parameter(1)
  ROOT %rows = {dtype}[128,2048]{{1,0{tile}}} gather(%table, %index), offset_dims={{1}}, collapsed_slice_dims={{0}}, \
start_index_map={{0}}, index_vector_dim=1, slice_sizes={{1,2048}}
}}
"""
SCATTER = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inside (table: f32[4096,2048], index: s32[128], rows: f32[128,2048]) -> f32[4096,2048] {
  %table = f32[4096,2048]{1,0:T(8,128)} parameter(0)
  %index = s32[128]{0:T(128)} parameter(1)
  %rows = f32[128,2048]{1,0:T(8,128)} parameter(2)
  ROOT %sums = f32[4096,2048]{1,0:T(8,128)} scatter(%table, %index, %rows), update_window_dims={1}, \
inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%add
}

ENTRY %main (table: f32[4096,2048], index: s32[128], rows: f32[128,2048]) -> f32[4096,2048] {
  %table.1 = f32[4096,2048]{1,0:T(8,128)} parameter(0)
  %index.1 = s32[128]{0:T(128)} parameter(1)
  %rows.1 = f32[128,2048]{1,0:T(8,128)} parameter(2)
  ROOT %fusion = f32[4096,2048]{1,0:T(8,128)} fusion(%table.1, %index.1, %rows.1), kind=kCustom, calls=%inside
}
"""


def lines(array, window):
    """Of an array's text."""
    text = f"ENTRY %m (x: f32[]) -> f32[] {{\n  ROOT %x = {array} parameter(0)\n}}\n"
    return parse(text).entry.root.arrays[0].line_bytes(window)


@pytest.mark.parametrize(
    "array, window, expected",
    [
        ("f32[64,2048]{1,0:T(8,128)}", (1, 2048), 16 * 512),
        ("f32[64,2048]{1,0:T(8,128)}", (3, 2048), 3 * 16 * 512),
        ("f32[64,2048]{1,0:T(8,128)}", (8, 2048), 8 * 2048 * 4),  # whole tiles
        ("f32[64,64]{1,0:T(8,128)}", (1, 64), 512),  # half of a line
        ("f32[64,2048]{1,0:T(8,128)}", (1, 1), 512),
        ("f32[64,2048]{0,1:T(8,128)}", (1, 2048), 2048 * 512),  # across: a line for each number
        ("bf16[64,2048]{1,0:T(8,128)(2,1)}", (1, 2048), 16 * 512),  # half of each word is another row's
        ("bf16[64,2048]{1,0:T(8,128)(2,1)}", (2, 2048), 16 * 512),
        ("bf16[64,2048]{1,0:T(8,128)(2,1)}", (3, 2048), 2 * 16 * 512),
        ("s8[64,2048]{1,0:T(8,128)(4,1)}", (1, 2048), 16 * 512),
        ("bf16[64,2048]{1,0:T(8,128)}", (1, 2048), 16 * 512),  # rows of 256 bytes, two of them in a line
        ("bf16[64,2048]{1,0:T(8,128)}", (8, 2048), 8 * 2048 * 2),
        ("f32[16,64,2048]{2,1,0:T(8,128)}", (2, 1, 2048), 2 * 16 * 512),
        ("f32[5000]{0:T(1024)}", (1,), 512),
        ("f32[5000]{0:T(1024)}", (200,), 2 * 512),
        ("bf16[5000]{0:T(1024)(128)(2,1)}", (256,), 512),
        ("f32[64,2048]{1,0}", (1, 2048), 2048 * 4),  # no tiles: what a GPU's compiler writes
    ],
)
def test_the_lines_of_a_window(array, window, expected):
    assert lines(array, window) == expected


@pytest.mark.parametrize(
    "dtype, tile, flat, whole, timed",
    [
        ("f32", ":T(8,128)", ":T(128)", 8, 1),
        ("bf16", ":T(8,128)(2,1)", ":T(128)", 8, 2),
        ("f32", "", "", 1, 1),
    ],
)
def test_a_gathered_row_is_lines_of_its_tiles(dtype, tile, flat, whole, timed):
    found = counted(GATHER.format(dtype=dtype, tile=tile, flat=flat), {})
    rows = 128 * 2048 * (4 if dtype == "f32" else 2)
    beside = rows + 128 * 4
    assert (found.hbm_bytes, found.timed_hbm_bytes) == (whole * rows + beside, timed * rows + beside)


def test_a_row_scattered_in_a_fusion_is_read_and_written_by_lines():
    found = counted(SCATTER, {})
    rows, index = 128 * 2048 * 4, 512
    assert found.hbm_bytes == 2 * 8 * rows + rows + index
    assert found.timed_hbm_bytes == 2 * rows + rows + index


def gather() -> jax.stages.Compiled:
    """2,048 rows of 512 bfloat16 numbers out of 8,192, which stay in HBM."""
    device = SingleDeviceSharding(topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0])
    table, index = (
        jax.ShapeDtypeStruct(*given, sharding=device) for given in (((8192, 512), jnp.bfloat16), ((2048,), jnp.int32))
    )
    return jax.jit(lambda table, index: table.at[index].get(mode="clip")).lower(table, index).compile(compiler_options=OPTIONS)


def test_a_compiled_gather_counts_as_the_compiler_counts():
    program = gather()
    text, count = program.as_text(), program.cost_analysis()
    assert text is not None and count is not None
    found = counted(text, {})
    rows = 2048 * 512 * 2
    assert found.hbm_bytes == count["bytes accessed"]
    assert found.hbm_bytes - found.timed_hbm_bytes == (8 - 2) * rows
    assert found.timed_hbm_bytes == pytest.approx((2 + 1) * rows, rel=0.02)


def test_machine_code_copies_the_lines_of_a_row_and_no_tile(tmp_path):
    """Of the same gather: each DMA from HBM has a row's lines, in granules; the indices tell how large a granule is."""
    dump = f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"
    command = [sys.executable, "-c", "from tests.planning.test_lines import gather; gather()"]
    environment = {**os.environ, "LIBTPU_INIT_ARGS": dump, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = [each for each in tmp_path.glob("*gather_fusion*-final_bundles.txt") if "schedule-analysis" not in each.name]
    copies = re.findall(r"= dma\.hbm_to_(\w+) .*?/\*size_in_granules=\*/(\d+),", path.read_text())
    (indices,) = {int(size) for place, size in copies if place == "smem"}
    granule = 1024 * 4 / indices  # a tile of indices
    assert granule == 32
    row = lines("bf16[8192,512]{1,0:T(8,128)(2,1)}", (1, 512))
    assert {int(size) * granule for place, size in copies if place == "vmem"} == {row} == {2 * 512 * 2}
