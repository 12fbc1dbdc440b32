"""Blocks whose importances are equal in exact arithmetic come in the order of their indices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from compress_attention.problems import Geometry, build

from jax_nsa import native, nsa_compress_attention_infer

pytestmark = pytest.mark.timeout(120)

KERNELS = [f"cpu-{isa}" for isa in native.module().cpu_kernels()]
# Long enough that kernels compute sequences in parts, and short ones.
LENGTHS = (1, 5, 129, *range(4000, 5001, 100))


REFERENCE = (
    "reference-float32",
    "reference-bfloat16",
    "reference-(5000,)-(48, 16, 96)",
    "reference-(4, 4, 16)",
    "reference-128",
)


@pytest.fixture(params=[*KERNELS, "reference", pytest.param("cuda", marks=pytest.mark.cuda)])
def implementation(request, monkeypatch):
    """Names an implementation; the CPU kernel with each instruction set that this machine has."""
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("JAX_NSA_CPU_ISA", isa)
    elif name == "reference" and request.node.callspec.id not in REFERENCE:
        pytest.skip("the reference is slow; its other cases stand for this one")
    jax.clear_caches()  # programs keep the instruction set that they were compiled for
    yield name
    jax.clear_caches()


def check(arguments, geometry, implementation):
    _, indices = nsa_compress_attention_infer(**arguments, implementation=implementation)
    for b, blocks in enumerate(geometry.num_blocks):
        forced = sorted({j for j in (0, blocks - 2, blocks - 1) if j >= 0})
        want = [*forced, *(j for j in range(blocks) if j not in forced)]
        for got in np.asarray(indices)[b]:
            first = next((i for i, j in enumerate(want) if got[i] != j), None)
            assert first is None, (
                f"length {geometry.lengths[b]}: at {first} block {got[first]} of {blocks} stands "
                f"for block {want[first]}"
            )
            assert np.all(got[blocks:] == -1)


def longest(geometry):
    return max(geometry.num_blocks)


def equal_keys(geometry):
    arguments = build(geometry)
    arguments["select_block_count"] = longest(geometry)
    row = np.random.default_rng(1).standard_normal(arguments["key"].shape[2])
    arguments["key"][:] = row.astype(arguments["key"].dtype)
    return arguments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equal_keys(implementation, dtype):
    """Each head's probabilities are 1 / S; a group of 128 heads sums them."""
    geometry = Geometry(
        dtype=dtype, lengths=LENGTHS, key_value_heads=1, group=128, head_size=64, value_size=4,
        page=128, shared_pages=True, hostile=False,
    )  # fmt: skip
    check(equal_keys(geometry), geometry, implementation)


@pytest.mark.parametrize("window", [(32, 16, 64), (48, 16, 96), (16, 16, 16)], ids=str)
@pytest.mark.parametrize("lengths", [(5000,), (2104, 4100, 4864)], ids=str)
def test_equal_keys_in_other_windows(implementation, lengths, window):
    geometry = Geometry(
        lengths=lengths, key_value_heads=2, group=32, head_size=64, value_size=4, page=48,
        window=window, shared_pages=True, hostile=False, scale=1.0,
    )  # fmt: skip
    check(equal_keys(geometry), geometry, implementation)


@pytest.mark.parametrize("sizes", [(1, 128, 64), (2, 16, 192), (4, 4, 16), (1, 1, 64)], ids=str)
def test_zero_query(implementation, sizes):
    """All scores are zero, whatever the keys; the window is not a power of two of positions."""
    key_value_heads, group, head_size = sizes
    geometry = Geometry(
        lengths=(2104, 700, 31), key_value_heads=key_value_heads, group=group, page=48,
        head_size=head_size, window=(48, 16, 96), shared_pages=True, hostile=False,
    )  # fmt: skip
    arguments = build(geometry)
    arguments["select_block_count"] = longest(geometry)
    arguments["query"][:] = 0
    check(arguments, geometry, implementation)


@pytest.mark.parametrize("group", [2, 128])
def test_zero_scale(implementation, group):
    geometry = Geometry(
        lengths=(2104, 97), group=group, scale=0.0, key_value_heads=1, head_size=64, page=16,
        window=(32, 32, 96), shared_pages=True, hostile=False, dtype="bfloat16",
    )  # fmt: skip
    arguments = build(geometry)
    arguments["select_block_count"] = longest(geometry)
    check(arguments, geometry, implementation)
