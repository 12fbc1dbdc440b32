"""A whole NSA decode step, jitted and scanned, over paged caches that grow.

Native Sparse Attention (arXiv 2502.11089) answers each new token from all of the past at one
position per 16 tokens, from the blocks that matter most by that, and from the newest tokens as they
are. Between steps the caches grow: each token adds a row, every 16th completes a window whose
summary (here the mean) becomes a compressed row, and where a last page is full, another is taken.

    python examples/decode_loop.py
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import PagePools, PageTables, nsa_attention, nsa_compress, nsa_decode_step

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 8, 2, 64, 64
COMPRESS_BLOCK, STRIDE, PAGE, MAX_TOKENS = 32, 16, 16, 1024
MEAN = np.full((COMPRESS_BLOCK, KEY_VALUE_HEADS), 1 / COMPRESS_BLOCK, np.float32)
OPTIONS = {
    "scale_value": HEAD_SIZE**-0.5, "compress_block_size": COMPRESS_BLOCK,
    "compress_stride": STRIDE, "select_block_size": 64, "select_block_count": 4, "window_size": 64,
}  # fmt: skip


def decode_step(
    cache: tuple[PageTables, PagePools],
    token: tuple[jax.Array, ...],
    implementation: str | None = None,
) -> tuple[tuple[PageTables, PagePools], jax.Array]:
    """Takes a token of each sequence that is active; returns the cache and the attention."""
    tables, pools = cache
    query, key, value, gates, active = token
    tables, _ = tables.allocate(active)
    pools = pools.append(
        tables, key[:, None], value[:, None], (MEAN, MEAN), implementation=implementation
    )
    attention, _ = nsa_decode_step(
        query, gates, *pools.views(tables), head_num=HEADS, key_value_head_num=KEY_VALUE_HEADS,
        implementation=implementation, **OPTIONS,
    )  # fmt: skip
    return (tables, pools), attention


@functools.partial(jax.jit, static_argnames="implementation", donate_argnames="cache")
def decode(
    cache: tuple[PageTables, PagePools],
    tokens: tuple[jax.Array, ...],
    implementation: str | None = None,
) -> tuple[tuple[PageTables, PagePools], jax.Array]:
    """Scans `decode_step` over the leading axis of `tokens`: one program for all the steps."""
    return jax.lax.scan(
        functools.partial(decode_step, implementation=implementation), cache, tokens
    )


def dense(query: jax.Array, key: jax.Array, value: jax.Array, gates: jax.Array) -> jax.Array:
    """The same for one whole sequence, `[tokens, heads, size]`, without a cache."""
    summaries = [nsa_compress(rows, MEAN, COMPRESS_BLOCK, STRIDE)[None] for rows in (key, value)]
    whole = (rows[None] for rows in (query, key, value))
    return nsa_attention(*whole, *summaries, gates[None], **OPTIONS)[0]


def main(sequences: int = 3, steps: int = 700, implementation: str | None = None) -> float:
    """Decodes random tokens and compares with dense attention; returns the largest difference."""
    seeds = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(seeds[0], [steps, sequences, HEADS, HEAD_SIZE])
    key = jax.random.normal(seeds[1], [steps, sequences, KEY_VALUE_HEADS, HEAD_SIZE])
    value = jax.random.normal(seeds[2], [steps, sequences, KEY_VALUE_HEADS, VALUE_SIZE])
    gates = jax.nn.sigmoid(jax.random.normal(seeds[3], [steps, sequences, HEADS, 3]))
    # Sequences join one after another, so that each fills its windows and pages in its own time.
    joins = 150 * np.arange(sequences)
    active = jnp.asarray(np.arange(steps)[:, None] >= joins, jnp.int32)

    tables = PageTables.empty(
        slots=sequences, pages=sequences * MAX_TOKENS // PAGE, pages_per_slot=MAX_TOKENS // PAGE,
        page_block_size=PAGE, compress_block_size=COMPRESS_BLOCK, compress_stride=STRIDE,
    )  # fmt: skip
    pools = PagePools.empty(tables, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE, jnp.float32)
    (tables, pools), attention = decode(
        (tables, pools), (query, key, value, gates, active), implementation
    )

    worst = 0.0
    for b, first in enumerate(joins):
        expected = dense(*(rows[first:, b] for rows in (query, key, value, gates)))
        difference = float(jnp.abs(attention[first:, b] - expected).max())
        pages = [int(page) for page in tables.compressed.block_table[b] if page >= 0]
        print(
            f"sequence {b}: {tables.lengths[b]} tokens, {tables.compressed_lengths[b]} compressed "
            f"positions in pages {pages}; differs from dense by {difference:.1e}"
        )
        worst = max(worst, difference)
    assert worst < 1e-4, "the decode loop disagrees with dense attention"
    return worst


if __name__ == "__main__":
    main()
