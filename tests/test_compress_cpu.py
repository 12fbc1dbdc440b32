"""Compression on the CPU: each instruction set, threads, messages, calls without the front door."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress.calls import COUNTED, Calls
from compress.problems import Geometry, build

from jax_nsa import native, nsa_compress_infer
from jax_nsa.backends import cpu

REASON = native.unavailable("cpu", "compress")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Cpu(Calls):
    implementation = "cpu"


# Which instruction set.


@pytest.fixture(scope="module", params=["avx512", "avx2", "sse2", "neon"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces an instruction set, if this machine has it."""
    if request.param not in native.module().cpu_kernels():
        pytest.skip(f"this machine has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.ISA_VARIABLE, request.param)
        jax.clear_caches()  # programs keep the instruction set that they were compiled for
        yield request.param
    jax.clear_caches()


# One column less and more than vectors of every kind hold, and pairs of these.
@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("weight_dtype", [None, "float32"])
def test_head_size(isa, dtype, weight_dtype, size):
    del isa
    Cpu().check(
        replace(COUNTED, dtype=dtype, weight_dtype=weight_dtype, head_sizes=(size, 3), heads=3)
    )


def test_forced_instruction_set_is_in_the_program(isa):
    arguments = build(COUNTED)
    program = jax.jit(lambda cache: nsa_compress_infer(**arguments | {"cache": cache}))
    assert f'isa = "{isa}"' in program.lower(arguments["cache"]).as_text()


def test_program_for_a_missing_instruction_set_fails(monkeypatch):
    monkeypatch.setattr(cpu, "configuration", lambda call: {"isa": "mmx"})
    with pytest.raises(jax.errors.JaxRuntimeError, match='no CPU kernel "mmx"'):
        Cpu().call(build(COUNTED), "jit, arrays")


# Threads.


def test_as_much_as_threads_share():
    """16 MB of windows, of sequences that all complete one."""
    lengths = tuple(128 + 16 * int(i) for i in np.random.default_rng(0).integers(0, 4, 64))
    Cpu().check(
        Geometry(
            dtype="bfloat16", lengths=lengths, heads=4, head_sizes=(160, 96), page=32,
            window=(128, 16),
        )
    )  # fmt: skip


# Messages about values that only the running program knows.


def message_of(arguments: dict[str, Any], mapped: tuple[str, ...], depth: int = 1) -> str:
    """What a call fails with whose arguments of these names are mapped."""
    given = {n: jax.tree.map(jnp.asarray, a) for n, a in arguments.items() if np.ndim(a)}
    static = {n: a for n, a in arguments.items() if n not in given}

    def run(arrays):
        return nsa_compress_infer(**static, **arrays, implementation="cpu")

    for _ in range(depth):
        run = jax.vmap(run, in_axes=({n: 0 if n in mapped else None for n in given},))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError)) as caught:
        jax.block_until_ready(jax.jit(run)(given))
    return str(caught.value)


EVERYTHING = ("input", "cache", "slot_mapping", "block_table", "actual_seq_len", "actual_seq_qlen")


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("actual_seq_len", (1, 2), -7, "actual_seq_len[2] at index 1 of jax.vmap must be in [0, "
         "112] (7 pages of 16 rows), got -7"),
        ("actual_seq_qlen", (2, 3), 17, "actual_seq_qlen[3] at index 2 of jax.vmap must be in [0, "
         "16] (compress_stride, so that at most one compress window ends), got 17"),
        ("block_table", (2, 2, 4), 17, "block_table[2, 4] at index 2 of jax.vmap must be in [0, "
         "17), the pages of input, got 17"),
        ("block_table", (0, 2, 4), -3, "[0, 17), the pages of input, got -3"),
        ("slot_mapping", (1, 2), 9, "slot_mapping[2] at index 1 of jax.vmap must be below 9, the "
         "rows of cache, got 9"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("everything", [False, True])
def test_faults_under_vmap(name, at, value, message, everything):
    arguments = build(COUNTED)
    mapped = EVERYTHING if everything else (name,)
    many = {n: np.stack([a] * 3) if n in mapped else a for n, a in arguments.items()}
    many[name][at] = value
    assert message in message_of(many, mapped)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_row_for_two_under_vmap(depth):
    """Rows of other mapped calls are others."""
    arguments = build(COUNTED)
    slots = np.stack([arguments["slot_mapping"]] * 2**depth)
    slots[1, 3] = slots[1, 2]
    many = arguments | {"slot_mapping": slots.reshape(*[2] * depth, -1)}
    where = "index 1" if depth == 1 else "indices (0, 1)"
    assert (
        f"slot_mapping[3] at {where} of jax.vmap must not be slot_mapping[2] at {where} of "
        f"jax.vmap, as both sequences complete a compress window, got {slots[1, 2]} for both"
    ) in message_of(many, ("slot_mapping",), depth)


# The kernel trusts what cc/compress_call.cc let through, so it is called without the front door.

ARRAYS = {
    "input_0": np.zeros((5, 16, 6), np.float32),
    "weight_0": np.zeros((32, 2), np.float32),
    "cache_0": np.zeros((7, 2, 3), np.float32),
    "bias_0": np.zeros((2, 3), np.float32),
    "block_table": np.zeros((2, 3), np.int32),
    "lengths": np.array([32, 33], np.int32),
    "slot_mapping": np.zeros(2, np.int32),
    "token_counts": np.ones(2, np.int32),
}
SECOND = {
    "input_1": np.zeros((5, 16, 8), np.float32),
    "weight_1": np.zeros((32, 2), np.float32),
    "cache_1": np.zeros((7, 8), np.float32),
}
PROBLEM = {"heads": 2, "compress_block_size": 32, "compress_stride": 16}


def call_kernel(arrays: dict[str, Any], *, aliased: bool = True, **problem: int) -> None:
    """Calls the kernel with these arrays, None for those left out."""
    arrays = {name: array for name, array in arrays.items() if array is not None}
    caches = [name for name in arrays if name.startswith("cache")]
    call = jax.ffi.ffi_call(
        "jax_nsa_compress_cpu",
        [jax.ShapeDtypeStruct(arrays[n].shape, arrays[n].dtype) for n in caches],
        input_output_aliases={list(arrays).index(n): i for i, n in enumerate(caches)}
        if aliased
        else None,
    )
    scalars = {n: np.int64(value) for n, value in (PROBLEM | problem).items()}
    names = {"operands": " ".join(arrays), "results": " ".join(caches)}
    jax.block_until_ready(call(*map(jnp.asarray, arrays.values()), **names, problem=scalars))


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


LIES = {
    "input_rank": ({"input_0": f32(5, 96)}, "input_0 must have rank 3"),
    "input_empty": ({"input_0": f32(0, 16, 6)}, "input_0 must not be empty"),
    "input_heads": ({"input_0": f32(5, 16, 7)}, "input_0 must have shape [5, 16, 6]"),
    "input_type": ({"input_0": np.zeros((5, 16, 6), np.int32)}, "input_0 must be bfloat16"),
    "large_heads": (
        {"input_0": f32(5, 16, 514), "cache_0": f32(7, 514), "bias_0": None},
        "input_0's head size must be at most 256, got 257",
    ),
    "page": ({"input_0": f32(5, 24, 6)}, "page size must be a multiple of 16 up to 256, got 24"),
    "weight": ({"weight_0": f32(31, 2)}, "weight_0 must have shape [32, 2], got [31, 2]"),
    "weight_type": ({"weight_0": np.zeros((32, 2), np.float16)}, "weight_0 must have input's type"),
    "bias": ({"bias_0": f32(3, 2)}, "bias_0 must have shape [2, 3], got [3, 2]"),
    "cache": ({"cache_0": f32(7, 7)}, "cache_0 must have 8 rows of 6, got shape [7, 7]"),
    "cache_type": ({"cache_0": np.zeros((7, 6), np.float16)}, "cache_0 has an unexpected element"),
    "no_lengths": ({"lengths": None}, "needs lengths"),
    "no_slots": ({"slot_mapping": None}, "needs slot_mapping"),
    "lengths": ({"lengths": np.zeros(3, np.int32)}, "lengths must have shape [2], got [3]"),
    "slots_type": ({"slot_mapping": f32(2)}, "slot_mapping has an unexpected element type"),
    "table_size": (
        {"input_0": f32(5, 256, 6), "block_table": np.zeros((1, 2**31 // 256), np.int32)},
        "block_table names more positions than lengths can count",
    ),
    "table_rank": ({"block_table": np.zeros(3, np.int32)}, "block_table must have rank 2"),
    "second_pages": (SECOND | {"input_1": f32(4, 16, 8)}, "input_1 must have shape [5, 16, 8]"),
    "second_rows": (SECOND | {"cache_1": f32(6, 8)}, "cache_1 must have 7 rows of 8"),
    "second_type": (
        SECOND | {"input_1": np.zeros((5, 16, 8), np.float16)},
        "input_1 must have input_0's type",
    ),
    "second_without_cache": (SECOND | {"cache_1": None}, "needs cache_1"),
    "cache_without_input": (SECOND | {"input_1": None}, "a cache for each input"),
}


@pytest.mark.parametrize(("changes", "message"), LIES.values(), ids=LIES)
def test_kernel_refuses_operands_that_do_not_fit(changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_kernel(ARRAYS | changes)
    assert "INVALID_ARGUMENT" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "sizes",
    [{"heads": 0}, {"compress_stride": 0}, {"compress_stride": 48}, {"compress_block_size": 144},
     {"compress_stride": 8}, {"compress_block_size": -16}],
    ids=str,
)  # fmt: skip
def test_kernel_refuses_sizes(sizes):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"must be (positive|multiples)"):
        call_kernel(ARRAYS, **sizes)


def test_kernel_refuses_to_write_elsewhere():
    with pytest.raises(jax.errors.JaxRuntimeError, match="must give cache_0 in its operand's"):
        call_kernel(ARRAYS, aliased=False)


@pytest.mark.parametrize("more", [{}, SECOND])
def test_kernel_takes_the_same_call_unchanged(more):
    call_kernel(ARRAYS | more)
