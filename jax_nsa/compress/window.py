"""Which compress window a decode step completes, where it lies, and what it holds.

Windows of `l` original tokens end at the tokens `l + i * d`, i = 0, 1, ... (arXiv 2502.11089, eq.
7). A step that brings a sequence `q_b` tokens, to `T_b` in all, completes the window that ends in
`(T_b - q_b, T_b]`, if there is one; `q_b <= d`, so there is at most one.

`nsa_compress_infer` sums a window with weights. For a model that summarises it in another way:

    window = completed_window(lengths, compress_block_size=l, compress_stride=d)
    tokens = gather_window(
        pool, block_table, window, key_value_head_num=heads, compress_block_size=l)
    slots = window_slots(window, compressed_block_table, page_block_size=page)
    # Slots of -1 must go past the end: JAX takes -1 for the last row.
    cache = cache.at[jnp.where(slots < 0, len(cache), slots)].set(phi(tokens), mode="drop")
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import _compat, blocks, checks, paged
from jax_nsa.checks import ArrayLike


class Window(NamedTuple):
    """The window that each sequence completes in a step. All arrays are `[B]`.

    Attributes:
        completes: bool, whether it completes one.
        first: int32, the window's first token; 0 where there is no window.
        position: int32, the compressed position that the window becomes; 0 where there is none.
    """

    completes: Any
    first: Any
    position: Any


def last_window(lengths: Any, counts: Any, *, size: int, stride: int) -> Window:
    """The window that `counts` new tokens complete, of NumPy or JAX integers that are legal."""
    numpy = np if isinstance(lengths, np.ndarray) else jnp
    position = (lengths - size) // stride
    completes = (lengths >= size) & (size + position * stride > lengths - counts)
    position = numpy.where(completes, position, 0)
    return Window(completes, position * stride, position)


def completed_window(
    actual_seq_len: ArrayLike,
    actual_seq_qlen: ArrayLike | None = None,
    *,
    compress_block_size: int,
    compress_stride: int,
) -> Window:
    """Tells which window each sequence completes in a step.

    Args:
        actual_seq_len: integers `[B]`, the original tokens `T_b`, this step's included.
        actual_seq_qlen: integers `[B]`, this step's tokens `q_b <= d`; None: one each.
        compress_block_size: `l`, tokens in a window.
        compress_stride: `d`, tokens between the starts of two windows.

    Returns:
        The windows, as JAX arrays. Lengths and counts that cannot be complete none.

    Raises:
        TypeError: lengths or counts that are not integers.
        ValueError: illegal sizes, or lengths or counts of another rank.
    """
    size = blocks.check_block_size(
        "compress_block_size", checks.integer("compress_block_size", compress_block_size)
    )
    stride = checks.integer("compress_stride", compress_stride)
    blocks.check_stride(size, stride)
    lengths = checks.Integers("actual_seq_len", actual_seq_len, rank=1).array()
    counts = jnp.ones_like(lengths)
    if actual_seq_qlen is not None:
        counts = checks.Integers("actual_seq_qlen", actual_seq_qlen, rank=1).array()
        if counts.shape != lengths.shape:
            raise ValueError(
                "actual_seq_qlen must have an entry for each of actual_seq_len's "
                f"{lengths.shape[0]}, got shape {counts.shape}"
            )
    legal = (lengths >= 0) & (counts >= 0) & (counts <= stride)
    return last_window(jnp.where(legal, lengths, 0), counts, size=size, stride=stride)


@_compat.with_usual_promotion
def window_slots(window: Window, block_table: ArrayLike, *, page_block_size: int) -> jax.Array:
    """Tells which row of a paged cache of compressed positions a window becomes.

    Args:
        window: the windows of each sequence.
        block_table: integers `[B, P]`, the pages of the *compressed* cache.
        page_block_size: rows in a page of it.

    Returns:
        int32 `[B]`, rows numbered through all pages; -1 where there is no window, or no page
        for it.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an illegal page size, or a table of another shape.
    """
    page_block_size = paged.page_size(page_block_size)
    table = _table_for(window, block_table)
    column = window.position // page_block_size
    pages = pages_of(table, column[:, None])[:, 0]
    # A page past the pool stays past it, also where its rows are beyond int32.
    pages = jnp.minimum(pages, np.iinfo(np.int32).max // page_block_size - 1)
    slots = pages * page_block_size + window.position % page_block_size
    return jnp.where(window.completes & (pages >= 0), slots, -1)


@_compat.with_usual_promotion
def gather_window(
    pool: ArrayLike,
    block_table: ArrayLike,
    window: Window,
    *,
    key_value_head_num: int,
    compress_block_size: int,
) -> jax.Array:
    """Reads each sequence's window from a paged pool of original tokens.

    Args:
        pool: bfloat16, float16 or float32 `[num_pages, page, N * D]` or `[num_pages, page, N,
            D]`.
        block_table: integers `[B, P]`, its pages.
        window: the windows.
        key_value_head_num: `N`.
        compress_block_size: `l`, tokens in a window.

    Returns:
        pool's dtype `[B, l, N, D]`; 0 where a sequence completes no window, NaN for tokens whose
        page is not one of the pool's.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an illegal size, or a pool or a table of another shape.
    """
    table = _table_for(window, block_table)
    pool = jnp.asarray(checks.floats("pool", pool))
    heads = checks.count("key_value_head_num", key_value_head_num)
    size = blocks.check_block_size(
        "compress_block_size", checks.integer("compress_block_size", compress_block_size)
    )
    by_heads = pool.ndim == 4 and pool.shape[2] == heads
    if 0 in pool.shape or (not by_heads and (pool.ndim != 3 or pool.shape[2] % heads)):
        raise ValueError(
            f"pool must have shape [pages, page, {heads} * head_size] or [pages, page, {heads}, "
            f"head_size] (key_value_head_num), got {pool.shape}"
        )
    page = paged.page_size(pool.shape[1])
    position = window.first[:, None] + jnp.arange(size, dtype=jnp.int32)
    pages = pages_of(table, position // page)
    by_head = pool.reshape(*pool.shape[:2], heads, -1)
    taken = by_head[jnp.clip(pages, 0, pool.shape[0] - 1), position % page]
    is_there = ((pages >= 0) & (pages < pool.shape[0]))[..., None, None]
    taken = jnp.where(is_there, taken, jnp.full((), jnp.nan, pool.dtype))
    # Rows that no window needs may hold anything, and a factor of 0 would not clear a NaN.
    return jnp.where(window.completes[:, None, None, None], taken, jnp.zeros((), pool.dtype))


def _table_for(window: Any, block_table: ArrayLike) -> jax.Array:
    """The block table, which must have a row of pages for each sequence of the windows."""
    if not isinstance(window, Window):
        raise TypeError(
            f"window must be what completed_window returns, got {type(window).__name__}"
        )
    table = checks.Integers("block_table", block_table, rank=2).array()
    sequences = window.completes.shape[0]
    if table.shape[0] != sequences or table.shape[1] == 0:
        raise ValueError(
            f"block_table must have a row for each of window's {sequences} sequences, of one page "
            f"or more, got shape {table.shape}"
        )
    return table


def pages_of(block_table: jax.Array, columns: jax.Array) -> jax.Array:
    """Entries of each sequence's row of the block table: int32 `[B, n]` from columns `[B, n]`.

    -1 for columns that the table does not have.
    """
    there = columns < block_table.shape[1]
    pages = jnp.take_along_axis(block_table, jnp.where(there, columns, 0), axis=1)
    return jnp.where(there, pages, -1)
