"""The operator in jnp, step by step as the mathematics reads: what every kernel has to compute.

It gathers each row's positions, so its memory is O(rows * heads * (k * l' + window)); it exists to
be read, to run on any XLA platform, and to be differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa import pools, softmax, tokens
from jax_nsa._compat import with_usual_promotion
from jax_nsa.axes import is_packed
from jax_nsa.select_attention.problem import Problem


@with_usual_promotion
def select_attention(operands: Mapping[str, jax.Array], problem: Problem) -> dict[str, jax.Array]:
    """Computes the results by name; operands and results are described in `door.py`."""
    query, key = operands["query"], operands["key"]
    heads = problem.key_value_heads
    rows = rows_of_query(operands, problem)
    num_pages, page = key.shape[:2]
    capacity = operands["block_table"].shape[1] * page

    # Which positions each row and key/value head reads: the blocks chosen for it, and the window.
    # A position that it does not see stands as `capacity`, which no sequence has.
    reads: dict[str, jax.Array] = {}
    bad = rows["bad"][:, None]
    limit = rows["limit"][:, None, None]  # positions below it are seen
    if problem.select_block_size:
        size = problem.select_block_size
        blocks = operands["topk_indices"].reshape(-1, heads, operands["topk_indices"].shape[-1])
        positions = _positions_of_blocks(blocks, size, capacity)
        reads["attention"] = jnp.where(positions < limit, positions, capacity)
        if not problem.partial:
            whole = -(-rows["length"] // size)[:, None, None]
            is_bad = (blocks < -1) | (blocks >= whole)
            bad = bad | (jnp.any(is_bad, axis=-1) & ~rows["absent"][:, None])
    if problem.window_size:
        width = min(problem.window_size, capacity)
        # The token itself may lie on another device, and no window begins past what is here.
        start = jnp.clip(rows["newest"][:, None, None] - problem.window_size + 1, 0, limit)
        # `limit - start` first: a sum with a width may be beyond int32.
        after = jnp.arange(width, dtype=jnp.int32)
        positions = jnp.where(after < limit - start, start + after, capacity)
        shape = (positions.shape[0], heads, width)
        reads["window_attention"] = jnp.broadcast_to(positions, shape)

    results, lses = {}, {}
    for name, positions in reads.items():
        column = jnp.minimum(positions // page, operands["block_table"].shape[1] - 1)
        pages = operands["block_table"][rows["sequence"][:, None, None], column]
        is_read = (positions < capacity) & ~bad[:, :, None]
        bad = bad | jnp.any(is_read & ((pages < 0) | (pages >= num_pages)), axis=-1)
        attention, lse = _attend(operands, problem, positions, pages, is_read)
        results[name], lses[name] = attention, lse
    bad = bad & ~rows["absent"][:, None]

    def finish(computed: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of what is faulty become NaN; from [rows, kv heads, group, ...] to query's axes."""
        filled = jnp.where(bad.reshape(*bad.shape, *(1,) * (computed.ndim - 2)), jnp.nan, computed)
        return filled.astype(dtype).reshape(*query.shape[:-1], *computed.shape[3:])

    outcome = {name: finish(r, _attention_dtype(query, problem)) for name, r in results.items()}
    if problem.return_lse:
        names = {"attention": "lse", "window_attention": "window_lse"}
        outcome |= {names[name]: finish(lse, jnp.float32) for name, lse in lses.items()}
    return outcome


def _attention_dtype(query: jax.Array, problem: Problem) -> jnp.dtype:
    """Parts of sequences are merged in float32."""
    return jnp.dtype(jnp.float32) if problem.partial else query.dtype


def rows_of_query(operands: Mapping[str, jax.Array], problem: Problem) -> dict[str, jax.Array]:
    """What is known of each of query's rows, as arrays [rows].

    `sequence` and its `length`; `limit`, below which the row's token sees; `newest`, the position
    of the token itself, which in a part of a sequence may lie past the part's end; `absent` where
    the row holds no token; `bad` where its sequence is faulty.
    """
    query, lengths = operands["query"], operands["lengths"]
    capacity = operands["block_table"].shape[1] * operands["key"].shape[1]
    if is_packed(operands):
        counts, first_rows = operands["token_counts"], operands["first_rows"]
        rows = query.shape[0]
        sequence = tokens.sequence_of_rows(first_rows, rows)
        token = tokens.numbers(operands)
        owned = tokens.owned_rows(first_rows, rows)
    else:
        sequences, each = query.shape[:2]
        sequence = jnp.repeat(jnp.arange(sequences, dtype=jnp.int32), each)
        token = jnp.tile(jnp.arange(each, dtype=jnp.int32), sequences)
        counts = operands.get("token_counts", jnp.full_like(lengths, each))
        owned = jnp.full_like(lengths, each)
    bad = (counts < 0) | (counts > owned)
    if not problem.partial:
        bad = bad | (lengths < 0) | (lengths > capacity)
    count, length = counts[sequence], lengths[sequence]
    bad = bad[sequence]
    absent = ~bad & (token >= count)
    newest = jnp.where(bad | absent, -1, length - (count - token))
    return {
        "sequence": sequence,
        "length": length,
        "newest": newest,
        "limit": jnp.clip(newest + 1, 0, capacity),
        "absent": absent,
        "bad": bad,
    }


def _positions_of_blocks(blocks: jax.Array, size: int, capacity: int) -> jax.Array:
    """Positions of listed blocks: int32[..., k * size]; `capacity` where there is no block."""
    known = (blocks >= 0) & (blocks < -(-capacity // size))
    first = jnp.where(known, blocks, 0) * size
    # `capacity - first` first: the last block's end may be beyond int32.
    after = jnp.minimum(jnp.arange(size, dtype=jnp.int32), capacity - first[..., None])
    positions = jnp.where(known[..., None], first[..., None] + after, capacity)
    return positions.reshape(*blocks.shape[:-1], -1)


def _attend(
    operands: Mapping[str, jax.Array],
    problem: Problem,
    positions: jax.Array,
    pages: jax.Array,
    is_read: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of every row to its positions, in float32.

    Args:
        operands: the operator's.
        problem: the static problem.
        positions: int32[rows, kv heads, n].
        pages: int32 of that shape, the page that holds each.
        is_read: bool of that shape; what is not read may hold anything, NaN too.

    Returns:
        float32[rows, kv heads, group, value size], and its log-sum-exp without the last axis.
    """
    query, heads = operands["query"], problem.key_value_heads
    num_pages, page = operands["key"].shape[:2]
    head = jnp.arange(heads, dtype=jnp.int32)[:, None]

    def gather(pool: jax.Array) -> jax.Array:
        by_head = pool.reshape(num_pages, page, heads, -1)
        taken = by_head[jnp.clip(pages, 0, num_pages - 1), positions % page, head]
        return jnp.where(is_read[..., None], taken.astype(jnp.float32), 0.0)

    keys, values = pools.keys_and_values(
        gather(operands["key"]), gather(operands["value"]), interleaved=problem.interleaved
    )
    grouped = query.reshape(-1, heads, query.shape[-2] // heads, query.shape[-1])
    scores = problem.scale * jnp.einsum(
        "rhgd,rhnd->rhgn",
        grouped.astype(jnp.float32),
        keys,
        precision=lax.Precision.HIGHEST,
    )
    probabilities, lse = softmax.over_seen(scores, is_read[:, :, None, :])
    attention = jnp.einsum(
        "rhgn,rhne->rhge",
        probabilities,
        values,
        precision=lax.Precision.HIGHEST,
    )
    return attention, lse
