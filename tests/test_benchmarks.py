"""The benchmarks run, read what they say, and count the bytes that a call has to read."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_nsa import native
from jax_nsa.shapes import SHAPES

REPOSITORY = pathlib.Path(__file__).parents[1]
sys.path.append(str(REPOSITORY))
from benchmarks import decode_step, probe, problems, select_attention  # noqa: E402

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="no C++17 compiler for benchmarks/probe.cc: install one, or name it by CXX",
)


@needs_compiler
def test_every_operator_is_timed(tmp_path):
    output = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "tiny", "--repeat", "1", "--output", str(output)],
        cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text())["rows"]
    names = ["compress_attention", "select_attention", "decode_step"]
    assert [row["operator"] for row in rows] == names
    timed = {"reference", "empty FFI call"} | ({"cpu"} if "cpu" in native.compiled() else set())
    for row in rows:
        assert timed <= set(row["seconds"])
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert f"tiny: {SHAPES['tiny']}" in done.stdout


@needs_compiler
def test_the_reader_reads_everything():
    data = np.random.default_rng(0).integers(0, 2**63, 1 << 16, np.uint64)
    read = probe.library().read_all(data.ctypes.data, data.nbytes)
    assert read == np.bitwise_xor.reduce(data)


@needs_compiler
def test_an_empty_call_has_the_same_operands_and_results():
    shape = SHAPES["tiny"]
    run = select_attention.call(shape, "reference")
    operands = select_attention.operands(shape)[0]
    expected = jax.tree.leaves(jax.eval_shape(run, *operands))
    results = jax.jit(probe.empty_call(run))(*operands)
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected]
    text = jax.jit(probe.empty_call(run)).lower(*operands).as_text()
    assert probe.NOTHING in text
    assert "%arg5" in text


@pytest.mark.parametrize("name", select_attention.BENCHMARK.shapes)
def test_chosen_blocks_lie_before_the_window(name):
    shape = SHAPES[name]
    ids = np.asarray(select_attention.chosen_blocks(shape, 3))
    assert ids.shape == (shape.sequences, 1, shape.key_value_heads, shape.select_count)
    ends = (ids + 1) * shape.blocks.select_block_size
    assert ids.min() >= 0
    assert ends.max() <= shape.tokens[0] - shape.window
    assert all(len(set(row)) == shape.select_count for row in ids.reshape(-1, ids.shape[-1]))


@pytest.mark.parametrize("name", decode_step.BENCHMARK.shapes)
def test_the_floor_of_a_step_counts_every_row_once(name):
    shape = SHAPES[name]
    tokens, size = int(shape.tokens[0]), shape.blocks.select_block_size
    last = (tokens - 1) // size
    chosen = [0, last - 1, last, *range(1, shape.select_count - 2)]
    rows = {i for block in chosen for i in range(block * size, min((block + 1) * size, tokens))}
    rows |= set(range(tokens - shape.window, tokens))
    expected = shape.sequences * (len(rows) + shape.length) * shape.row_bytes
    assert decode_step.floor_bytes(shape) == expected


def test_sets_read_more_than_caches_hold():
    for name in select_attention.BENCHMARK.shapes[1:]:
        floor = select_attention.floor_bytes(SHAPES[name])
        assert floor * problems.num_sets(floor) >= problems.ROTATED_BYTES
