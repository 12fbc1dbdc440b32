"""The operator in jnp, step by step as the mathematics reads: the meaning every kernel is held to.

It gathers each sequence's pages and keeps all probabilities, so its memory is O(sequences *
length); it exists to be read, to run on any XLA platform, and to be differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa import pools, tokens
from jax_nsa._compat import with_usual_promotion
from jax_nsa.compress_attention.problem import Problem

_CHUNK = 512  # values that are ranked together; twice or half as many are no faster on an H100


@with_usual_promotion
def compress_attention(operands: Mapping[str, jax.Array], problem: Problem) -> dict[str, jax.Array]:
    """Computes the results by name; operands and results are described in `door.py`."""
    query, key, value, block_table, lengths = (
        operands[n] for n in ("query", "key", "value", "block_table", "lengths")
    )
    early = operands.get("early_counts", jnp.zeros_like(lengths))
    select_lengths = operands.get("select_lengths", jnp.zeros_like(lengths))
    if "first_rows" not in operands:
        rows = query
        token = jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
        counts = operands.get("token_counts", jnp.full_like(lengths, query.shape[1]))
        bad_tokens = (counts < 0) | (counts > query.shape[1])
    else:
        # Packed rows: give each row its sequence's table and length, and treat it as a sequence
        # of one token.
        first_rows, counts = operands["first_rows"], operands["token_counts"]
        rows = query[:, None]
        sequence = tokens.sequence_of_rows(first_rows, query.shape[0])
        token = (jnp.arange(query.shape[0], dtype=jnp.int32) - first_rows[sequence])[:, None]
        rows_end = jnp.full((1,), query.shape[0], jnp.int32)
        bounds = jnp.minimum(jnp.concatenate([first_rows, rows_end]), rows_end)
        bad_tokens = ((counts < 0) | (counts > jnp.diff(bounds)))[sequence]
        block_table, lengths, counts = block_table[sequence], lengths[sequence], counts[sequence]
        early, select_lengths = early[sequence], select_lengths[sequence]

    num_pages, page = key.shape[:2]
    position = jnp.arange(block_table.shape[1] * page, dtype=jnp.int32)
    in_sequence = position < lengths[:, None]
    needed = in_sequence[:, ::page] & (counts > 0)[:, None]
    bad_page = jnp.any(needed & ((block_table < 0) | (block_table >= num_pages)), axis=1)
    bad = bad_tokens | bad_page | (lengths < 0) | (lengths > position.size) | (early < 0)
    if problem.aligned:
        bad |= (select_lengths < 0) | (problem.blocks.compressed_length(select_lengths) != lengths)
    absent = ~bad[:, None] & (token >= counts[:, None])  # rows that hold no token
    visible = lengths[:, None] - (token < early[:, None])  # compressed positions a token sees

    # 1. Token i lives in page block_table[b, i // page], row i % page. Rows past the length may
    # hold anything, also NaN, so they become zeros.
    def gather(pool: jax.Array) -> jax.Array:
        pages = pool[jnp.clip(block_table, 0, num_pages - 1)].astype(jnp.float32)
        heads = pages.reshape(block_table.shape[0], position.size, problem.key_value_heads, -1)
        return jnp.where(in_sequence[:, :, None, None], heads, 0.0)

    key_rows, value_rows = pools.keys_and_values(
        gather(key), gather(value), interleaved=problem.interleaved
    )

    # 2. Scores, accumulated and scaled in float32: [sequences, tokens, kv heads, group, positions].
    grouped = rows.reshape(*rows.shape[:2], problem.key_value_heads, -1, rows.shape[-1])
    scores = problem.scale * jnp.einsum(
        "bthgd,bihd->bthgi",
        grouped.astype(jnp.float32),
        key_rows,
        precision=lax.Precision.HIGHEST,
    )

    # 3. Softmax over the positions that the token sees.
    seen = (position < visible[:, :, None])[:, :, None, None, :]
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0.0
    probabilities = weights / jnp.where(empty, 1.0, total)

    # 4. The attention, in float32.
    attention = jnp.einsum(
        "bthgi,bihd->bthgd", probabilities, value_rows, precision=lax.Precision.HIGHEST
    )

    # 5. and 7. Importance of each select block, summed over the heads of the group; 6. and 8. the
    # choice.
    scores_of_blocks = block_scores(probabilities, problem)
    importance = jnp.sum(scores_of_blocks, axis=3)
    num_blocks = blocks_of_tokens(token, counts, lengths, select_lengths, problem)
    num_blocks = jnp.where(bad[:, None] | absent, 0, num_blocks)
    indices = select(importance, num_blocks[:, :, None], problem)

    def rule(computed: jax.Array, when_absent: float) -> jax.Array:
        """Rows of bad sequences become NaN, rows without a token `when_absent`."""
        extra = (None,) * (computed.ndim - 2)
        filled = jnp.where(absent[(..., *extra)], when_absent, computed)
        return jnp.where(bad[(..., None, *extra)], jnp.nan, filled)

    attention = attention.reshape(*rows.shape[:3], -1)
    attention_dtype = jnp.float32 if problem.return_block_scores else query.dtype
    leading = query.shape[:-2]
    results = {
        "attention": rule(attention, 0.0).astype(attention_dtype),
        "topk_indices": indices,
    }
    if problem.return_lse:
        lse = jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1.0, total)))
        results["lse"] = rule(lse.reshape(rows.shape[:3]), -jnp.inf)
    if problem.return_block_scores:
        per_head = scores_of_blocks.reshape(*rows.shape[:3], -1)
        results["block_scores"] = rule(per_head, 0.0)
    return {name: r.reshape(*leading, *r.shape[2:]) for name, r in results.items()}


def blocks_of_tokens(
    token: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    select_lengths: jax.Array,
    problem: Problem,
) -> jax.Array:
    """How many blocks each token chooses from: int32, of the broadcast shape of `token`.

    Args:
        token: int32[sequences or 1, tokens], each one's number in its sequence.
        counts: int32[sequences], tokens of each sequence.
        lengths: int32[sequences], compressed positions.
        select_lengths: int32[sequences], original tokens; only the aligned rule reads them.
        problem: the static problem.
    """
    if not problem.aligned:
        return jnp.broadcast_to(
            problem.blocks.num_blocks(lengths)[:, None], (lengths.shape[0], token.shape[1])
        )
    later = jnp.where(problem.causal, counts[:, None] - 1 - token, 0)
    return problem.blocks.universe(jnp.maximum(select_lengths[:, None] - later, 0))


def select(importance: jax.Array, num_blocks: jax.Array, problem: Problem) -> jax.Array:
    """Picks the most important blocks: the first and the last ones always, then by importance.

    Args:
        importance: float32[..., blocks], the scores summed over the heads of a group.
        num_blocks: int32[...], how many blocks the token chooses from.
        problem: the static problem: how many to pick, and how many first and last ones always.

    Returns:
        int32[..., count]: those always chosen in ascending order, then by descending importance,
        of equals the lower index first; -1 where there are fewer blocks.
    """
    count = problem.select_block_count
    num_blocks = num_blocks[..., None]
    block = jnp.arange(importance.shape[-1], dtype=jnp.int32)
    always = (block < problem.init_blocks) | (block >= num_blocks - problem.local_blocks)
    # NaN comes only of non-finite inputs; ranking it last keeps the choice well-defined.
    importance = jnp.where(jnp.isnan(importance), -1.0, importance)
    importance = jnp.where(always, jnp.inf, importance)
    importance = jnp.where(block < num_blocks, importance, -jnp.inf)
    order = _descending(importance, count)
    missing = max(0, count - order.shape[-1])
    order = jnp.pad(order, [(0, 0)] * (order.ndim - 1) + [(0, missing)])
    return jnp.where(jnp.arange(count, dtype=jnp.int32) < num_blocks, order, -1)


def _descending(values: jax.Array, count: int) -> jax.Array:
    """The first `count` indices of a stable descending sort along the last axis, or all there are.

    A long row goes by chunks, of which only the first `count` each go on: a GPU ranks many short
    rows at once, and a long one alone.
    """
    chunk = max(_CHUNK, 4 * count)
    values = jnp.where(values == 0.0, 0.0, values)  # -0.0 would rank below
    indices = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)

    def first(values: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest, at = lax.top_k(values, min(count, values.shape[-1]))  # of equals the lower first
        return largest, jnp.take_along_axis(indices, at, axis=-1)

    while (length := values.shape[-1]) > chunk:
        beyond = [(0, 0, 0)] * (values.ndim - 1) + [(0, -length % chunk, 0)]
        rows = (*values.shape[:-1], -1, chunk)
        values = lax.pad(values, -jnp.inf, beyond).reshape(rows)
        indices = lax.pad(indices, length, beyond).reshape(rows)
        values, indices = (x.reshape(*x.shape[:-2], -1) for x in first(values, indices))
    return first(values, indices)[1]


def block_scores(probabilities: jax.Array, problem: Problem) -> jax.Array:
    """Sums probabilities into select blocks: the paper's eq. 9, block index j from 0.

    `score[j] = sum_{m<M} sum_{n<L} p[M*(j+1) - m - n]` by CANN's rule, and one position earlier by
    the aligned one, `p[M*j + m - n]` (the same sum over m from its other end); terms outside the
    sequence dropped.

    Args:
        probabilities: float32[..., positions], 0 outside the sequence.
        problem: the block geometry, which gives M and L, and whose rule it is.

    Returns:
        float32[..., blocks], as many blocks as `positions` fill.
    """
    m_count = problem.blocks.strides_per_select_block
    n_count = problem.blocks.strides_per_compress_block
    blocks = problem.max_blocks(probabilities.shape[-1])
    # The position that block 0 takes for m = n = 0; the others lie before it.
    latest = m_count - 1 if problem.aligned else m_count
    before, after = m_count + n_count, m_count * (blocks + 1)
    padded = jnp.pad(probabilities, [(0, 0)] * (probabilities.ndim - 1) + [(before, after)])
    scores = jnp.zeros((*probabilities.shape[:-1], blocks), probabilities.dtype)
    for m in range(m_count):
        for n in range(n_count):
            first = before + latest - m - n
            scores += lax.slice_in_dim(
                padded, first, first + m_count * (blocks - 1) + 1, m_count, axis=-1
            )
    return scores
