"""A cache that grows with keys and values in one pool holds what one with a pool of each does."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interleaved.pools import assert_same, interleave
from kernels import cpu_or_reference, need_cpu

from jax_nsa import PagePools, PageTables, nsa_decode_step

pytestmark = pytest.mark.usefixtures("on_cpu")
IMPLEMENTATIONS = cpu_or_reference("compress", "compress_attention", "select_attention")

SIZES = {
    "slots": 3, "pages": 12, "pages_per_slot": 5, "page_block_size": 16, "compress_block_size": 32,
    "compress_stride": 16,
}  # fmt: skip
PROMPTS, FOLLOWING, OWN_SIZE = (33, 0, 50), (15, 16, 1), 8


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_cache_that_grows(implementation, has_bias, flat, dtype):
    tables = PageTables.empty(**SIZES)
    apart, both = (
        PagePools.empty(tables, 2, OWN_SIZE, dtype=dtype, kv_layout=layout)
        for layout in ("separate", "interleaved")
    )
    if flat:
        both = jax.tree.map(lambda pool: pool.reshape(*pool.shape[:2], -1), both)
    weight = draw(32, 2, seed=1), draw(32, 2, seed=2, dtype=dtype)
    bias = (draw(2, OWN_SIZE, seed=3), None) if has_bias else None

    @functools.partial(jax.jit, donate_argnums=(0,))
    def append(pools, tables, *rows):
        return pools.append(tables, *rows, weight, bias, implementation=implementation)

    for step, counts in enumerate((PROMPTS, FOLLOWING)):
        tables, fits = tables.allocate(jnp.array(counts, jnp.int32))
        assert np.all(fits)
        rows = [draw(3, 50, 2, OWN_SIZE, seed=2 * step + i + 9, dtype=dtype) for i in range(2)]
        apart, both = append(apart, tables, *rows), append(both, tables, *rows)
    for name in ("", "compressed_"):
        pair = [np.asarray(getattr(apart, f"{name}{kind}")) for kind in ("key", "value")]
        pool = np.asarray(getattr(both, f"{name}key"))
        np.testing.assert_array_equal(pool, interleave(*pair, 2).reshape(pool.shape), err_msg=name)
        assert getattr(both, f"{name}value") is None
    step = functools.partial(
        nsa_decode_step, draw(3, 4, OWN_SIZE, seed=5, dtype=dtype), draw(3, 4, 3, seed=6),
        scale_value=0.3, head_num=4, key_value_head_num=2, select_block_size=32,
        select_block_count=2, window_size=20, compress_block_size=32, compress_stride=16,
        implementation=implementation,
    )  # fmt: skip
    assert_same(
        step(*both.views(tables), kv_layout="interleaved"), step(*apart.views(tables)),
        implementation,
    )  # fmt: skip


@need_cpu("compress", "compress_attention", "select_attention")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_growing_copies_no_pool(dtype):
    tables = PageTables.empty(**SIZES)
    pools = PagePools.empty(tables, 2, OWN_SIZE, dtype=dtype, kv_layout="interleaved")
    weight = draw(32, 2, seed=1), draw(32, 2, seed=2)
    tables, _ = tables.allocate(jnp.ones(3, jnp.int32))
    rows = draw(3, 1, 2, OWN_SIZE, dtype=dtype)

    def append(pools, tables, rows):
        return pools.append(tables, rows, rows, weight, implementation="cpu")

    program = jax.jit(append, donate_argnums=0).lower(pools, tables, rows).compile()
    size = sum(pool.nbytes for pool in jax.tree.leaves(pools))
    assert program.memory_analysis().alias_size_in_bytes >= size
    shape = ",".join(map(str, pools.key.shape))
    copies = [
        line
        for line in program.as_text().splitlines()
        if re.search(rf"\[{shape}\]\S* copy\(", line)
    ]
    assert copies == []


def test_misuse_of_pools():
    tables = PageTables.empty(**SIZES)
    with pytest.raises(ValueError, match="value_size must equal head_size with kv_layout"):
        PagePools.empty(tables, 2, 8, 4, kv_layout="interleaved")
    with pytest.raises(ValueError, match="kv_layout must be one of"):
        PagePools.empty(tables, 2, 8, kv_layout="fused")
    pools = PagePools.empty(tables, 2, 8, dtype="float32", kv_layout="interleaved")
    rows, weight = draw(3, 1, 2, 8), draw(32, 2)
    for key, value in ((draw(3, 1, 4, 8), rows), (rows, draw(3, 1, 2, 4)), (draw(3, 8), rows)):
        with pytest.raises(ValueError, match=r"must have shape \[3, tokens, heads, size\]"):
            pools.append(tables, key, value, (weight, weight))
    for pair, error, message in (
        ((weight, weight[:16]), ValueError, r"weight\[1\] must have shape \(32, 2\)"),
        ((weight,), TypeError, "weight must be a pair"),
        (weight, TypeError, "weight must be a pair, for keys and for values, got \\w+$"),
    ):
        with pytest.raises(error, match=message):
            pools.append(tables, rows, rows, pair)
    with pytest.raises(ValueError, match=r"bias\[0\] must have shape \(2, 8\)"):
        pools.append(tables, rows, rows, (weight, weight), (weight, None))
    mixed = dataclasses.replace(pools, compressed_value=pools.compressed_key)
    with pytest.raises(ValueError, match="compressed_value must be None"):
        mixed.views(tables)
