"""Values at the ends of their type's range: means of finite values are finite, small ones count.

A mean of positions that all have one value is that value, whatever the order of sums. Kernels that
sum before they divide must not leave the range on the way.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nsa
from jax_nsa import native

pytestmark = pytest.mark.timeout(120)

KERNELS = [f"cpu-{isa}" for isa in native.module().cpu_kernels()]
POSITIONS, PAGE, GROUP, SIZE = 4000, 128, 4, 32
PAGES = -(-POSITIONS // PAGE)
# The greatest but for what rounding needs, a sum of which overflows soon; one of which 4000
# overflow; and one small enough to vanish, were weights made much smaller than their number asks.
VALUES = {
    "float32": (3.4e38, 1e35, 1e-25),
    "bfloat16": (3.3e38, 3e36, 1e-25),
    "float16": (65504.0, 65504.0, 1e-3),
}
CASES = [(dtype, value) for dtype, values in VALUES.items() for value in values]


@pytest.fixture(params=[*KERNELS, "reference", pytest.param("cuda", marks=pytest.mark.cuda)])
def implementation(request, monkeypatch) -> Iterator[str]:
    """Names an implementation; the CPU kernel with each instruction set that this machine has."""
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("JAX_NSA_CPU_ISA", isa)
    jax.clear_caches()  # programs keep the instruction set that they were compiled for
    yield name
    jax.clear_caches()


def operands(dtype: str, value: float, spread: float) -> dict:
    """A call's arrays: all values alike, products of query and key normal, times `spread`."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)  # noqa: E731
    return {
        "query": draw(1, 1, GROUP, SIZE) * jnp.asarray(spread, dtype),
        "key": draw(PAGES, PAGE, SIZE),
        "value": jnp.full((PAGES, PAGE, SIZE), value, dtype),
        "block_table": jnp.arange(PAGES)[None],
        "scale_value": SIZE**-0.5,
        "head_num": GROUP,
        "key_value_head_num": 1,
        "select_block_size": 64,
        "page_block_size": PAGE,
        "layout": "BSND",
    }


def check(attention: jax.Array, dtype: str, value: float) -> None:
    want = float(jnp.asarray(value, dtype))
    got = np.asarray(attention, np.float64)
    np.testing.assert_allclose(got, want, rtol=3e-4 if dtype == "float32" else 1e-2)


# Equal products, and products of which one raises the others' reference again and again.
@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize(("dtype", "value"), CASES)
def test_compressed(implementation, dtype, value, spread):
    attention, _ = jax_nsa.nsa_compress_attention_infer(
        **operands(dtype, value, spread),
        actual_cmp_seq_kvlen=jnp.asarray([POSITIONS]),
        select_block_count=16,
        compress_block_size=32,
        compress_stride=16,
        implementation=implementation,
    )
    check(attention, dtype, value)


@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize(("dtype", "value"), CASES)
def test_selected_and_window(implementation, dtype, value, spread):
    attentions = jax_nsa.nsa_select_attention_infer(
        **operands(dtype, value, spread),
        topk_indices=jnp.arange(16)[None, None, None],
        actual_seq_kvlen=jnp.asarray([POSITIONS]),
        select_block_count=16,
        window_size=POSITIONS,
        implementation=implementation,
    )
    for attention in attentions:
        check(attention, dtype, value)


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_log_sum_exp_is_of_the_products_alone(implementation, spread):
    """However kernels scale weights: with equal products it is the logarithm of their number."""
    arguments = operands("float32", 1.0, spread)
    *_, lse = jax_nsa.nsa_compress_attention_infer(
        **arguments,
        actual_cmp_seq_kvlen=jnp.asarray([POSITIONS]),
        select_block_count=16,
        compress_block_size=32,
        compress_stride=16,
        return_lse=True,
        implementation=implementation,
    )
    keys = np.asarray(arguments["key"], np.float64).reshape(-1, SIZE)[:POSITIONS]
    products = np.asarray(arguments["query"], np.float64)[0, 0] @ keys.T * SIZE**-0.5
    peak = products.max(-1, keepdims=True)
    want = np.log(np.exp(products - peak).sum(-1)) + peak[:, 0]
    np.testing.assert_allclose(np.ravel(lse), want, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 4, 16])
def test_one_position_stands_out(implementation, group):
    """Wherever it lies, it has all the weight: none may be overlooked when peaks are searched."""
    positions, page = 192, 64  # one sequence for each, which prefers it; all share the pages
    keys = jnp.eye(positions).reshape(-1, page, positions) * 100
    arguments = {
        "query": jnp.repeat(100 * jnp.eye(positions)[:, None, None], group, 2), "key": keys,
        "value": jnp.arange(positions, dtype=jnp.float32).reshape(-1, page, 1),
        "block_table": jnp.tile(jnp.arange(positions // page), (positions, 1)), "scale_value": 1.0,
        "head_num": group, "key_value_head_num": 1, "select_block_size": page,
        "select_block_count": 3, "page_block_size": page, "layout": "BSND",
        "implementation": implementation,
    }  # fmt: skip
    lengths = jnp.full(positions, positions)
    compressed, _ = jax_nsa.nsa_compress_attention_infer(
        **arguments, actual_cmp_seq_kvlen=lengths, compress_block_size=32, compress_stride=16
    )
    blocks = jnp.tile(jnp.arange(3), (positions, 1, 1, 1))
    selected, window = jax_nsa.nsa_select_attention_infer(
        **arguments, topk_indices=blocks, actual_seq_kvlen=lengths, window_size=positions
    )
    expected = np.broadcast_to(np.arange(positions)[:, None, None, None], compressed.shape)
    for attention in (compressed, selected, window):
        np.testing.assert_array_equal(attention, expected)


def test_the_last_positions_that_int32_counts(implementation):
    """The last block ends past them, where a sum with its size would be negative."""
    page, block, window = 112, 96, 40
    columns = (2**31 - 16) // page
    length = columns * page
    assert (length // block + 1) * block > 2**31
    arguments = operands("float32", 1.0, 1.0)
    random = np.random.default_rng(1)
    key, value = random.standard_normal((2, page, SIZE)).astype(np.float32)
    arguments |= {
        "key": key[None], "value": value[None], "page_block_size": page, "select_block_size": block,
        "block_table": jnp.zeros((1, columns), jnp.int32),  # all of one page
    }  # fmt: skip
    attentions = jax_nsa.nsa_select_attention_infer(
        **arguments,
        topk_indices=jnp.asarray([[[[(length - 1) // block, -1]]]], jnp.int32),
        actual_seq_kvlen=jnp.asarray([length], jnp.int32),
        select_block_count=2,
        window_size=window,
        implementation=implementation,
    )
    query = np.asarray(arguments["query"])[0, 0]
    for attention, first in zip(
        attentions, (length // block * block, length - window), strict=True
    ):
        rows = np.arange(first, length) % page
        weights = np.exp(query @ key[rows].T * SIZE**-0.5)
        expected = (weights / weights.sum(-1, keepdims=True)) @ value[rows]
        np.testing.assert_allclose(attention[0, 0], expected, rtol=1e-4, atol=1e-5)
