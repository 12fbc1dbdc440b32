"""Small caches that grow."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jax_nsa import PagePools, PageTables

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 4, 2, 8, 4
SIZES = {"slots": 3, "pages": 9, "pages_per_slot": 5, "page_block_size": 16}
WINDOWS = [(16, 16), (32, 16), (48, 32), (64, 64)]
PROMPT = 70  # tokens that a prompt is padded to


def weights(size, seed=5):
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(size, KEY_VALUE_HEADS)).astype(np.float32) for _ in range(2))


def empty(block, stride, dtype="float32", **sizes):
    tables = PageTables.empty(
        **SIZES | sizes, compress_block_size=block, compress_stride=stride
    )  # fmt: skip
    return tables, PagePools.empty(tables, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE, dtype)


def empty_interleaved(block, stride, dtype="float32"):
    """The same with one pool for both, where values are as large as keys."""
    tables, _ = empty(block, stride)
    pools = PagePools.empty(
        tables, KEY_VALUE_HEADS, HEAD_SIZE, dtype=dtype, kv_layout="interleaved"
    )
    return tables, pools


def apart(key, value):
    """Pools of keys and of values, also where one pool holds them in turn."""
    return (key, value) if value is not None else (key[:, :, ::2], key[:, :, 1::2])


class Programs:
    """What a server compiles: once each, whatever comes and goes."""

    def __init__(self, block, stride):
        weight = weights(block)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(tables, pools, counts, key, value):
            tables, fits = tables.allocate(counts)
            return tables, pools.append(tables, key, value, weight), fits

        self.step = step
        self.truncate = jax.jit(lambda tables, lengths: tables.truncate(lengths), donate_argnums=0)
        self.free = jax.jit(lambda tables, slots: tables.free(slots), donate_argnums=0)

    def compiled(self):
        return [f._cache_size() for f in (self.step, self.truncate, self.free)]


class Lists:
    """The cache as a dict of lists, and what may be asked of it."""

    def __init__(self, block, stride, slots, pages, pages_per_slot, page_block_size):
        self.block, self.stride, self.page = block, stride, page_block_size
        self.pages, self.columns = pages, pages_per_slot
        self.rows = {slot: [] for slot in range(slots)}

    def held(self, tokens):
        return sum(1 for first in range(0, tokens, self.page))

    def step(self, counts, key, value):
        left = self.pages - sum(self.held(len(rows)) for rows in self.rows.values())
        asked, fits = 0, []
        for slot, rows in self.rows.items():
            many = len(rows) + counts[slot]
            if self.held(many) > self.columns:
                fits.append(False)
                continue
            new = self.held(many) - self.held(len(rows))
            asked += new
            fits.append(new == 0 or asked <= left)
        for slot in np.flatnonzero(fits):
            self.rows[slot] += [(key[slot, j], value[slot, j]) for j in range(counts[slot])]
        return fits

    def windows(self, slot):
        """Pairs of compressed rows, in float64."""
        rows = self.rows[slot]
        found = []
        for end in range(self.block, len(rows) + 1, self.stride):
            pair = zip(*rows[end - self.block : end], strict=True)
            found.append([
                sum(np.float64(row) * w[:, None] for row, w in zip(side, weight, strict=True))
                for side, weight in zip(pair, weights(self.block), strict=True)
            ])  # fmt: skip
        return found


def assert_holds(model, tables, pools):
    """Asserts that a cache holds the lists' rows, and that each page is someone's or free."""
    tables, pools = jax.tree.map(np.asarray, (tables, pools))
    original, compressed = (
        apart(pools.key, pools.value),
        apart(pools.compressed_key, pools.compressed_value),
    )
    lengths = [len(rows) for rows in model.rows.values()]
    assert tables.lengths.tolist() == lengths
    windows = [model.windows(slot) for slot in model.rows]
    for pages, held in ((tables.original, lengths), (tables.compressed, map(len, windows))):
        names = []
        for row, count in zip(pages.block_table, map(model.held, held), strict=True):
            names += row[:count].tolist()
            assert np.all(row[count:] == -1)
        assert 0 <= pages.free_count <= len(pages.free)
        names += pages.free[: pages.free_count].tolist()
        assert sorted(names) == list(range(len(pages.free))), "a page is lost or named twice"
    for slot, rows in model.rows.items():
        for i, expected in enumerate(rows):
            page = tables.original.block_table[slot, i // model.page]
            for pool, row in zip(original, expected, strict=True):
                np.testing.assert_array_equal(pool[page, i % model.page], row)
        for i, expected in enumerate(windows[slot]):
            page = tables.compressed.block_table[slot, i // model.page]
            for pool, row in zip(compressed, expected, strict=True):
                np.testing.assert_allclose(pool[page, i % model.page], row, rtol=1e-4, atol=1e-4)
