"""The cache that grows, against lists of rows: nothing is lost, doubled or written elsewhere."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import (
    HEAD_SIZE,
    HEADS,
    KEY_VALUE_HEADS,
    PROMPT,
    SIZES,
    VALUE_SIZE,
    WINDOWS,
    Lists,
    Programs,
    assert_holds,
    empty,
    empty_interleaved,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kernels import cpu_or_reference

from jax_nsa import native, nsa_attention, nsa_compress, nsa_decode_step

IMPLEMENTATIONS = cpu_or_reference("compress")


PROGRAMS = functools.cache(Programs)


@st.composite
def events(draw):
    slots = SIZES["slots"]
    kind = draw(st.sampled_from(["step", "step", "prompt", "prompt", "truncate", "free"]))
    if kind == "free":
        return kind, draw(st.lists(st.booleans(), min_size=slots, max_size=slots))
    most = {"step": 1, "prompt": PROMPT, "truncate": 90}[kind]
    some = st.integers(0, most) | st.sampled_from([0, most])
    return kind, draw(st.lists(some, min_size=slots, max_size=slots))


@given(
    window=st.sampled_from(WINDOWS),
    history=st.lists(events(), min_size=1, max_size=14),
    seed=st.integers(0, 99),
)
def test_any_history_leaves_what_lists_hold(window, history, seed):
    random = np.random.default_rng(seed)
    programs, model = PROGRAMS(*window), Lists(*window, **SIZES)
    tables, pools = empty(*window)
    # A whole pool may lie anywhere: what no sequence owns must not matter.
    pools = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), pools)
    for kind, numbers in history:
        if kind == "free":
            tables = programs.free(tables, np.array(numbers))
            for slot in np.flatnonzero(numbers):
                model.rows[slot] = []
        elif kind == "truncate":
            tables = programs.truncate(tables, np.array(numbers, np.int32))
            for slot, rows in model.rows.items():
                del rows[numbers[slot] :]
        else:
            shape = (SIZES["slots"], PROMPT if kind == "prompt" else 1, KEY_VALUE_HEADS)
            key = random.normal(size=(*shape, HEAD_SIZE)).astype(np.float32)
            value = random.normal(size=(*shape, VALUE_SIZE)).astype(np.float32)
            counts = np.array(numbers, np.int32)
            tables, pools, fits = programs.step(tables, pools, counts, key, value)
            expected = model.step(numbers, key, value)
            assert fits.tolist() == expected
            assert tables.counts.tolist() == [
                n if fit else 0 for n, fit in zip(numbers, expected, strict=True)
            ]
        assert_holds(model, tables, pools)
    # One program for prompts and one for single tokens.
    assert all(most >= n for n, most in zip(programs.compiled(), (2, 1, 1), strict=True))


def test_pools_may_be_numpy_arrays():
    """As they are when they come from a file."""
    tables, pools = empty(32, 16)
    slots = SIZES["slots"]
    tables, _ = tables.allocate(np.full(slots, 5, np.int32))
    random = np.random.default_rng(0)
    key, value = (
        random.normal(size=(slots, 5, KEY_VALUE_HEADS, size)).astype(np.float32)
        for size in (HEAD_SIZE, VALUE_SIZE)
    )
    of_jax = pools.append(tables, key, value, weights(32))
    of_numpy = jax.tree.map(np.asarray, pools).append(tables, key, value, weights(32))
    jax.tree.map(np.testing.assert_array_equal, of_numpy, of_jax)


def sequences(tokens, block, stride, seed=0):
    """Whole sequences of random rows, one for each slot, and their dense attention."""
    random = np.random.default_rng(seed)
    slots = SIZES["slots"]

    def normal(*shape):
        return jnp.asarray(random.normal(size=(slots, tokens, *shape)), jnp.float32)

    arrays = {
        "query": normal(HEADS, HEAD_SIZE),
        "key": normal(KEY_VALUE_HEADS, HEAD_SIZE),
        "value": normal(KEY_VALUE_HEADS, VALUE_SIZE),
        "gates": jax.nn.sigmoid(normal(HEADS, 3)),
    }
    for name, weight in zip(("key", "value"), weights(block), strict=True):
        arrays[f"compressed_{name}"] = jnp.stack(
            [nsa_compress(array, weight, block, stride) for array in arrays[name]]
        )
    options = {
        "scale_value": 0.3, "compress_block_size": block, "compress_stride": stride,
        "select_block_size": 64, "select_block_count": 2, "window_size": 20,
        "importance": "aligned", "init_blocks": 0, "local_blocks": 1,
    }  # fmt: skip
    return arrays, nsa_attention(**arrays, **options), options


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [(32, 16), (48, 32)], ids=str)
@pytest.mark.parametrize("several", [1, 3])
def test_decoding_over_it_is_dense_attention(implementation, window, several):
    """Prompts of different lengths, the last one later; drafts of which some tokens are refused."""
    arrays, attention, options = sequences(140, *window)
    arrays = jax.tree.map(np.asarray, arrays)
    tables, pools = empty(*window, pages=27, pages_per_slot=9)
    weight = weights(window[0])

    def rows(name, first, many):
        """Each slot's rows from its `first` on."""
        return np.stack([row[at : at + many] for row, at in zip(arrays[name], first, strict=True)])

    @jax.jit
    def step(tables, pools, counts, query, key, value, gates):
        tables, fits = tables.allocate(counts)
        pools = pools.append(tables, key, value, weight, implementation=implementation)
        attention, _ = nsa_decode_step(
            query, gates, *pools.views(tables), head_num=HEADS,
            key_value_head_num=KEY_VALUE_HEADS, layout="BSND", actual_seq_qlen=tables.counts,
            implementation=implementation, **options,
        )  # fmt: skip
        return tables, pools, fits, attention

    prompts, late = np.array([17, 64, 40], np.int32), 2
    tables, _ = tables.allocate(np.where(np.arange(3) == late, 0, prompts))
    zeros = np.zeros(3, int)
    pools = pools.append(tables, rows("key", zeros, 70), rows("value", zeros, 70), weight)
    random = np.random.default_rng(2)
    for number in range(24):
        if number == 5:
            tables, _ = tables.allocate([0, 0, int(prompts[late])])
            key, value = arrays["key"][late:, :50], arrays["value"][late:, :50]
            # The second row is padding.
            key, value = (np.concatenate([a, a]) for a in (key, value))
            pools = pools.append(tables, key, value, weight, slots=[late, -1])
        first = np.asarray(tables.lengths)
        there = np.array([True, True, number >= 5])
        counts = np.where(there, random.integers(1, several + 1, 3), 0).astype(np.int32)
        names = ("query", "key", "value", "gates")
        tables, pools, fits, decoded = step(
            tables, pools, counts, *(rows(name, first, several) for name in names)
        )
        assert np.all(fits)
        for slot in range(3):
            dense = attention[slot, first[slot] : first[slot] + counts[slot]]
            np.testing.assert_allclose(decoded[slot, : len(dense)], dense, rtol=1e-4, atol=1e-5)
        # The next step writes other rows over those that were refused.
        kept = first + np.maximum(np.minimum(counts, 1), counts - random.integers(0, 2, 3))
        tables = tables.truncate(np.where(there, kept, 0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, PROMPT])
@pytest.mark.parametrize("scanned", [False, True])
def test_owned_pools_are_not_copied(dtype, tokens, scanned):
    if dtype == "bfloat16" and native.unavailable("cpu", "compress") is not None:
        pytest.skip("before JAX 0.12, XLA's scatter for the CPU converts bfloat16 pools")
    tables, pools = empty(32, 16, dtype, pages=301)
    shape = (SIZES["slots"], tokens, KEY_VALUE_HEADS)
    key, value = jnp.ones((*shape, HEAD_SIZE), dtype), jnp.ones((*shape, VALUE_SIZE), dtype)

    def step(tables, pools):
        tables, _ = tables.allocate(jnp.full(shape[0], tokens, jnp.int32))
        return tables, pools.append(tables, key, value, weights(32))

    def steps(tables, pools):
        return jax.lax.scan(lambda carry, _: (step(*carry), None), (tables, pools), length=3)[0]

    run = jax.jit(steps if scanned else step, donate_argnums=(0, 1))
    compiled = run.lower(tables, pools).compile()
    sizes = {pool.size for pool in jax.tree.leaves(pools)}
    for line in compiled.as_text().splitlines():
        if found := re.search(r"= \w+\[([\d,]*)\]\S* (copy|convert)\(", line):
            size = np.prod([int(n) for n in found[1].split(",") if n])
            assert size not in sizes, f"a pool is copied: {line}"
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= sum(pool.nbytes for pool in jax.tree.leaves(pools))


def test_a_full_pool_refuses_and_changes_nothing():
    tables, _ = empty(32, 16)  # 9 pages of 16, 5 to a slot
    tables, fits = tables.allocate([80, 50, 0])
    assert fits.tolist() == [True, True, True]
    assert int(tables.original.free_count) == 0
    before = jax.tree.map(np.asarray, tables)
    # Too long for any slot; within its last page; a page that is not there.
    after, fits = tables.allocate([1, 14, 1])
    assert fits.tolist() == [False, True, False]
    assert after.counts.tolist() == [0, 14, 0]
    assert after.lengths.tolist() == [80, 64, 0]
    np.testing.assert_array_equal(after.original.block_table, before.original.block_table)
    # Who comes first is served first, also where who comes later asks for less.
    freed, _ = after.free([True, False, False]).allocate([0, 0, 16])
    assert int(freed.original.free_count) == 4
    assert freed.allocate([65, 0, 1])[1].tolist() == [False, True, False]
    assert freed.allocate([64, 0, 1])[1].tolist() == [True, True, False]
    assert freed.allocate([64, 0, 0])[1].tolist() == [True, True, True]
    assert freed.truncate([0, 48, 16]).allocate([65, 0, 0])[1].tolist() == [True, True, True]


def test_compressed_pages_are_as_many_as_any_sequences_need_and_no_more():
    sizes = {"slots": 16, "pages": 16, "pages_per_slot": 16}
    tables, _ = empty(16, 16, **sizes)
    # Each rounded up to a page, or all in one slot.
    apart, fits = tables.allocate([16] * 16)
    assert fits.all()
    assert int(apart.compressed.free_count) == 0
    alone, fits = tables.allocate([256] + [0] * 15)
    assert fits.all()
    np.testing.assert_array_equal(alone.compressed.block_table[0], [0])
    assert tables.compressed.block_table.shape == (16, 1)
    assert empty(16, 16, **sizes | {"pages_per_slot": 17})[0].compressed.block_table.shape == (
        16,
        2,
    )


@pytest.mark.parametrize("count", [-1, -(2**31), 2**31 - 1, 81])
def test_counts_that_only_the_program_knows_change_nothing_where_they_cannot_be(count):
    tables, _ = empty(32, 16)
    tables, _ = tables.allocate([0, 3, 0])
    after, fits = jax.jit(lambda t, c: t.allocate(c))(tables, jnp.array([count, count, 5]))
    assert fits.tolist() == [False, False, True]
    assert after.lengths.tolist() == [0, 3, 5]
    cut = jax.jit(lambda t, c: t.truncate(c))(after, jnp.array([0, count, 4]))
    assert cut.lengths.tolist() == [0, 3, 4]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pools_may_be_flat_and_compression_ones_own(flat, dtype):
    tables, pools = empty(32, 16, dtype)
    if flat:
        pools = jax.tree.map(lambda pool: pool.reshape(*pool.shape[:2], -1), pools)
    tables, _ = tables.allocate([40, 0, 0])
    key, value = (
        np.random.default_rng(n).normal(size=(3, 40, KEY_VALUE_HEADS, n)).astype(dtype)
        for n in (HEAD_SIZE, VALUE_SIZE)
    )
    written = pools.append(tables, key, value, None)
    assert jax.tree.map(jnp.shape, written) == jax.tree.map(jnp.shape, pools)
    for pool, rows in ((written.key, key), (written.value, value)):
        mine = np.asarray(pool)[np.asarray(tables.original.block_table[0, :3])]
        np.testing.assert_array_equal(
            mine.reshape(48, *rows.shape[2:]), np.pad(rows[0], ((0, 8), (0, 0), (0, 0)))
        )
        assert np.count_nonzero(pool) == np.count_nonzero(mine)
    assert not np.any(written.compressed_key)
    bias = (np.full((KEY_VALUE_HEADS, HEAD_SIZE), 2, np.float32), None)
    both = pools.append(tables, key, value, [w * 0 for w in weights(32)], bias)
    assert both.compressed_key.sum() == 2 * KEY_VALUE_HEADS * HEAD_SIZE
    assert not np.any(both.compressed_value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", [empty, empty_interleaved])
@pytest.mark.parametrize("flat", [False, True])
def test_heads_on_devices_of_a_mesh_with_explicit_axes(cache, dtype, flat):
    tables, pools = cache(16, 16, dtype)
    if flat and pools.value is not None:
        pools = jax.tree.map(lambda pool: pool.reshape(*pool.shape[:2], -1), pools)
    tables, _ = tables.allocate([17, 3, 0])
    size = HEAD_SIZE if pools.value is None else VALUE_SIZE
    key, value = (
        jax.random.normal(jax.random.key(n), (3, 17, KEY_VALUE_HEADS, n), dtype)
        for n in (HEAD_SIZE, size)
    )
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Explicit,))
    every = []

    def placed(array, axis):
        spec = PartitionSpec(*[None] * axis, "heads")
        return jax.device_put(array, NamedSharding(mesh, spec))

    given = [
        jax.tree.map(lambda pool: placed(pool, 2), pools), placed(key, 2), placed(value, 2),
        tuple(placed(w, 1) for w in weights(16)),
    ]  # fmt: skip
    with jax.set_mesh(mesh):
        append = jax.jit(lambda pools, *rows: pools.append(tables, *rows))
        for rows in (given[1:3], [jax.sharding.reshard(r, PartitionSpec()) for r in given[1:3]]):
            every.append(append(given[0], *rows, given[3]))
        with pytest.raises(ValueError, match=r"value is sharded as .* must be whole"):
            given[0].append(tables, placed(key[:2], 2), placed(value[:2], 0), None, slots=[0, 1])
        if not flat:
            by_size = jax.tree.map(lambda pool: placed(pool, 3), pools)
            with pytest.raises(ValueError, match=r"pools' key is sharded as .* must be whole"):
                by_size.append(tables, key, value, None)
    expected = pools.append(tables, key, value, weights(16))
    for on_devices in every:
        jax.tree.map(np.testing.assert_array_equal, on_devices, expected)


def test_rows_that_are_missing_are_nan():
    """Slot 1 got three tokens, of which there are two: its newest rows are spoiled."""
    tables, pools = empty(16, 16)
    tables, _ = tables.allocate([2, 3, 0])
    key = np.ones((3, 2, KEY_VALUE_HEADS, HEAD_SIZE), np.float32)
    pools = pools.append(tables, key, key[..., :VALUE_SIZE], None)
    for pool in (pools.key, pools.value):
        of_slot = np.asarray(pool)[np.asarray(tables.original.block_table)[:2, 0]]
        assert np.all(of_slot[0, :2] == 1)
        assert np.all(np.isnan(of_slot[1, 1:3]))


@pytest.mark.parametrize("slots", [[-1, 1], [-5, 1], [3, 1], [2**31 - 1, 1]])
def test_padding_and_slots_that_are_not_there_write_nothing(slots):
    tables, pools = empty(32, 16)
    tables, _ = tables.allocate([40, 40, 40])
    key, value = (np.ones((2, 40, KEY_VALUE_HEADS, n), np.float32) for n in (8, 4))
    written = jax.jit(lambda s: pools.append(tables, key, value, weights(32), slots=s))(
        jnp.array(slots)
    )
    alone = pools.append(tables, key[1:], value[1:], weights(32), slots=[1])
    jax.tree.map(np.testing.assert_array_equal, written, alone)
    assert alone.key.sum() == 40 * KEY_VALUE_HEADS * HEAD_SIZE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_enable_x64", True),
    ],
)
def test_takes_any_promotion(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        tables, pools = empty(32, 16)
        key, val = (jnp.ones((3, 40, KEY_VALUE_HEADS, n), jnp.float32) for n in (8, 4))

        @jax.jit
        def step(tables, pools, counts):
            tables, fits = tables.allocate(counts)
            pools = pools.append(tables, key, val, weights(32), slots=jnp.array([2, 0, -1]))
            return tables.free(~fits).truncate(jnp.array([1, 1, 1])), pools

        after = step(tables, pools, jnp.array([40, 3, 33]))
        for old, new in zip(*map(jax.tree.leaves, ((tables, pools), after)), strict=True):
            assert old.dtype == new.dtype
        assert after[0].lengths.tolist() == [1, 1, 1]
    finally:
        jax.config.update(name, before)
