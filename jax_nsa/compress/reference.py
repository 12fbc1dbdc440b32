"""The operator in jnp, step by step as the mathematics reads: what every kernel has to compute.

Its memory beside the cache, which it updates in place where it may, is O(sequences * l * N * D).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa._compat import with_usual_promotion
from jax_nsa.compress.problem import Problem
from jax_nsa.compress.window import gather_window, last_window, pages_of


@with_usual_promotion
def compress(operands: Mapping[str, jax.Array], problem: Problem) -> dict[str, jax.Array]:
    """Computes the results by name; operands and results are described in `door.py`."""
    block_table, lengths, slots = (operands[n] for n in ("block_table", "lengths", "slot_mapping"))
    counts = operands.get("token_counts", jnp.ones_like(lengths))
    num_pages, page = operands["input_0"].shape[:2]
    # However a cache is paged, its rows are numbered through.
    by_row = [
        operands[f"cache_{i}"].reshape(-1, operands[f"input_{i}"].shape[2])
        for i in range(problem.pairs)
    ]
    rows = by_row[0].shape[0]

    # 1. The window that ends among this step's tokens. Where lengths or counts are faulty, none.
    legal = (lengths >= 0) & (lengths <= block_table.shape[1] * page)
    legal &= (counts >= 0) & (counts <= problem.compress_stride)
    window = last_window(
        jnp.where(legal, lengths, 0),
        jnp.where(legal, counts, 0),
        size=problem.compress_block_size,
        stride=problem.compress_stride,
    )

    # 2. Token i lives in page block_table[b, i // page], row i % page.
    position = window.first[:, None] + jnp.arange(problem.compress_block_size, dtype=jnp.int32)
    pages = pages_of(block_table, position // page)
    has_pages = jnp.all((pages >= 0) & (pages < num_pages), axis=1)

    # 3. The row of the cache. One that two sequences name is nobody's: both would write it.
    named = window.completes & (slots >= 0) & (slots < rows)
    slot = jnp.where(named, slots, rows)
    times_named = jnp.zeros(rows + 1, jnp.int32).at[slot].add(1)
    writes = named & (times_named[slot] == 1) & has_pages
    # Not -1 for what is not written: that would be the last row.
    row = jnp.where(writes, slots, rows)

    # 4. The weighted sum, accumulated in float32 and rounded once.
    results = {}
    read = window._replace(completes=writes)
    for i in range(problem.pairs):
        tokens = gather_window(
            operands[f"input_{i}"],
            block_table,
            read,
            key_value_head_num=problem.key_value_heads,
            compress_block_size=problem.compress_block_size,
        )
        summary = jnp.einsum(
            "blhd,lh->bhd",
            tokens.astype(jnp.float32),
            operands[f"weight_{i}"].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        if f"bias_{i}" in operands:
            summary = summary + operands[f"bias_{i}"].astype(jnp.float32)
        cache = by_row[i]
        summary = summary.reshape(-1, cache.shape[1]).astype(cache.dtype)
        written = cache.at[row].set(summary, mode="drop")
        results[f"cache_{i}"] = written.reshape(operands[f"cache_{i}"].shape)
    return results
