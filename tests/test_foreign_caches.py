"""Other libraries' caches are served where they lie, by the functions that docs/caches.md shows."""

from __future__ import annotations

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels import need_cpu

from jax_nsa import PagedKV, nsa_attention, nsa_compress, nsa_compress_infer
from jax_nsa import nsa_decode_step as decode_step
from jax_nsa.compress.window import completed_window, window_slots

pytestmark = need_cpu("compress", "compress_attention", "select_attention")

SEQUENCES, ROWS, PAGE, SIZE, STRIDE = 3, 208, 16, 32, 16
HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 4, 2, 8, 4
LENGTHS = np.array([208, 47, 96], np.int32)  # the first and the last end a window
WEIGHT = (np.full((SIZE, KEY_VALUE_HEADS), 1 / SIZE, np.float32),) * 2
OPTIONS = {
    "scale_value": 0.4, "compress_block_size": SIZE, "compress_stride": STRIDE,
    "select_block_size": 32, "select_block_count": 3, "window_size": 20,
}  # fmt: skip


def documented():
    """The functions of the page, by name."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "caches.md").read_text()
    names = {
        "PagedKV": PagedKV, "np": np, "jnp": jnp, "math": math,
        "nsa_compress_infer": nsa_compress_infer,
        "completed_window": completed_window, "window_slots": window_slots,
    }  # fmt: skip
    for snippet in re.findall(r"^```python\n(def .*?)^```", text, re.M | re.S):
        exec(compile(snippet, "docs/caches.md", "exec"), names)
    return names


def sequences(dtype, value_size):
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=(SEQUENCES, ROWS, *shape)), dtype)

    key, value = normal(KEY_VALUE_HEADS, HEAD_SIZE), normal(KEY_VALUE_HEADS, value_size)
    compressed = [
        jnp.stack([nsa_compress(row, WEIGHT[0], SIZE, STRIDE) for row in rows])
        for rows in (key, value)
    ]
    return normal(HEADS, HEAD_SIZE), key, value, compressed, jax.nn.sigmoid(normal(HEADS, 3))


def paged(rows, table, pages):
    """Rows `[B, n, heads, size]` in a pool of pages; all else is NaN."""
    padded = np.full((SEQUENCES, table.shape[1] * PAGE, *rows.shape[2:]), np.nan, rows.dtype)
    padded[:, : rows.shape[1]] = rows
    pool = np.full((pages, PAGE, *rows.shape[2:]), np.nan, rows.dtype)
    pool[table] = padded.reshape(*table.shape, PAGE, *rows.shape[2:])
    return jnp.asarray(pool)


def caches(layout, key, value, compressed):
    """The arrays that a library keeps, original and compressed, and how they become caches.

    The window that the last token ends is not there yet, nor is what follows a sequence's end.
    """
    names = documented()
    done = np.maximum(0, (LENGTHS - 1 - SIZE) // STRIDE + 1)
    kept = []
    for pair, lengths in (((key, value), LENGTHS), (compressed, done)):
        mask = np.arange(pair[0].shape[1]) < lengths[:, None]
        kept.append([np.where(mask[..., None, None], rows, np.nan).astype(key.dtype)
                     for rows in pair])  # fmt: skip
    total = (LENGTHS - SIZE) // STRIDE + 1
    compress = names["compress"]
    if layout == "dense":
        kept[1] = [np.pad(rows, ((0, 0), (0, 4), (0, 0), (0, 0))) for rows in kept[1]]
        arrays = jax.tree.map(jnp.asarray, kept)
        views = [lambda pair, n=n: names["of_dense"](*pair, n) for n in (LENGTHS, total)]
    else:
        random = np.random.default_rng(1)
        tables = [
            random.permutation(SEQUENCES * columns + 2)[: SEQUENCES * columns]
            .reshape(SEQUENCES, columns).astype(np.int32)
            for columns in (ROWS // PAGE, 1)
        ]  # fmt: skip
        arrays = [[paged(rows, table, table.size + 2) for rows in pair]
                  for pair, table in zip(kept, tables, strict=True)]  # fmt: skip
        view = names["of_pages"]
        if layout != "pages":
            view, compress = names["of_interleaved"], names["compress_interleaved"]
            arrays = [[jnp.stack(pair, 3).reshape(*pair[0].shape[:2], -1, HEAD_SIZE)]
                      for pair in arrays]  # fmt: skip
            if layout == "in groups":
                arrays[0] = [arrays[0][0].reshape(*arrays[0][0].shape[:2], -1, 2, HEAD_SIZE)]
        views = [
            lambda pair, table=table, n=n: view(*pair, jnp.asarray(table), n)
            for table, n in zip(tables, (LENGTHS, total), strict=True)
        ]
    return arrays, views, compress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["pages", "dense", "interleaved", "in groups"])
def test_a_step_on_a_cache_where_it_lies(layout, dtype):
    interleaved = layout in ("interleaved", "in groups")
    query, key, value, compressed, gates = sequences(
        dtype, HEAD_SIZE if interleaved else VALUE_SIZE
    )
    arrays, (of_original, of_compressed), compress = caches(layout, key, value, compressed)
    newest = (np.arange(SEQUENCES), LENGTHS - 1)

    def step(original, compressed, query, gates):
        cache = of_original(original)
        compressed = compress(cache, of_compressed(compressed), WEIGHT, size=SIZE, stride=STRIDE)
        compressed = [compressed] if interleaved else compressed
        shaped = [new.reshape(old.shape) for new, old in zip(compressed, arrays[1], strict=True)]
        attention, _ = decode_step(
            query, gates, of_compressed(shaped), cache, head_num=HEADS,
            key_value_head_num=KEY_VALUE_HEADS, implementation="cpu", **OPTIONS,
            kv_layout="interleaved" if interleaved else "separate",
        )  # fmt: skip
        return attention, shaped

    arguments = (*arrays, query[newest], gates[newest])
    program = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
    sizes = {array.size for array in jax.tree.leaves(arrays)}
    for line in program.as_text().splitlines():
        if found := re.search(r"= \w+\[([\d,]+)\]\S* (copy|transpose|convert|fusion)\(", line):
            size = np.prod([int(n) for n in found[1].split(",")])
            assert size not in sizes, f"a cache is copied: {line}"
    donated = sum(array.nbytes for array in arrays[1])
    assert program.memory_analysis().alias_size_in_bytes >= donated

    attention, _ = program(*arguments)
    for slot, length in enumerate(LENGTHS):
        windows = (length - SIZE) // STRIDE + 1
        whole = [rows[slot : slot + 1, :length] for rows in (query, key, value)]
        parts = [rows[slot : slot + 1, :windows] for rows in compressed]
        dense = nsa_attention(*whole, *parts, gates[slot : slot + 1, :length], **OPTIONS)
        tolerance = {"float32": 1e-4, "bfloat16": 2e-2}[dtype]
        np.testing.assert_allclose(
            np.float32(attention[slot]), np.float32(dense[0, -1]), rtol=tolerance, atol=tolerance
        )
