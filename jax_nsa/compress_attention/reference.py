"""The operator in jnp, step by step as the mathematics reads: what every kernel has to compute.

It gathers each sequence's pages and keeps all probabilities, so its memory is O(sequences *
length); it exists to be read, to run on any XLA platform, and to be differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa import pools, softmax, tokens
from jax_nsa._compat import with_usual_promotion
from jax_nsa.axes import is_packed
from jax_nsa.compress_attention.problem import Problem

_CHUNK = 512  # values that are ranked together; twice or half as many are no faster on an H100


class _Sequences(NamedTuple):
    """Query by sequence, and what is known of each; a packed row is a sequence of one token.

    Attributes:
        query: `[sequences, tokens, N, D]`.
        token: int32[sequences or 1, tokens], each row's number in its sequence.
        counts: int32[sequences], how many of its rows hold a token.
        owned: int32[sequences] or a number, how many rows it has for them.
        block_table: int32[sequences, columns].
        lengths: int32[sequences], compressed positions.
        early: int32[sequences], leading tokens that ignore the last of these.
        select_lengths: int32[sequences], original tokens.
    """

    query: jax.Array
    token: jax.Array
    counts: jax.Array
    owned: Any
    block_table: jax.Array
    lengths: jax.Array
    early: jax.Array
    select_lengths: jax.Array


@with_usual_promotion
def compress_attention(operands: Mapping[str, jax.Array], problem: Problem) -> dict[str, jax.Array]:
    """Computes the results by name; operands and results are described in `door.py`."""
    sequences = _by_sequence(operands)
    token, counts, lengths = sequences.token, sequences.counts, sequences.lengths
    bad = _are_bad(sequences, operands["key"].shape, problem)
    absent = ~bad[:, None] & (token >= counts[:, None])  # rows that hold no token

    attention, probabilities, lse = _attend(sequences, operands["key"], operands["value"], problem)
    scores = block_scores(probabilities, problem)
    num_blocks = blocks_of_tokens(
        token, counts[:, None], lengths[:, None], sequences.select_lengths[:, None], problem
    )
    num_blocks = jnp.where(bad[:, None] | absent, 0, num_blocks)
    # A block's importance is the sum of its scores over the heads of the group.
    indices = select(jnp.sum(scores, axis=3), num_blocks[:, :, None], problem)

    def rule(computed: jax.Array, when_absent: float) -> jax.Array:
        """Heads beside each other; bad sequences' rows NaN, rows without a token `when_absent`."""
        by_head = computed.reshape(*sequences.query.shape[:3], *computed.shape[4:])
        extra = (None,) * (by_head.ndim - 2)
        filled = jnp.where(absent[(..., *extra)], when_absent, by_head)
        return jnp.where(bad[(..., None, *extra)], jnp.nan, filled)

    query = operands["query"]
    attention_dtype = jnp.float32 if problem.return_block_scores else query.dtype
    results = {
        "attention": rule(attention, 0.0).astype(attention_dtype),
        "topk_indices": indices,
    }
    if problem.return_lse:
        results["lse"] = rule(lse, -jnp.inf)
    if problem.return_block_scores:
        results["block_scores"] = rule(scores, 0.0)
    return {name: r.reshape(*query.shape[:-2], *r.shape[2:]) for name, r in results.items()}


def _by_sequence(operands: Mapping[str, jax.Array]) -> _Sequences:
    query, block_table, lengths = (operands[n] for n in ("query", "block_table", "lengths"))
    early = operands.get("early_counts", jnp.zeros_like(lengths))
    select_lengths = operands.get("select_lengths", jnp.zeros_like(lengths))
    if not is_packed(operands):
        token, owned = tokens.numbers(operands), query.shape[1]
        counts = operands.get("token_counts", jnp.full_like(lengths, owned))
        return _Sequences(query, token, counts, owned, block_table, lengths, early, select_lengths)
    first_rows, rows = operands["first_rows"], query.shape[0]
    sequence = tokens.sequence_of_rows(first_rows, rows)
    token = tokens.numbers(operands)[:, None]
    of_sequences = (
        operands["token_counts"], tokens.owned_rows(first_rows, rows), block_table, lengths, early,
        select_lengths,
    )  # fmt: skip
    return _Sequences(query[:, None], token, *(array[sequence] for array in of_sequences))


def _are_bad(sequences: _Sequences, key_shape: tuple[int, ...], problem: Problem) -> jax.Array:
    """Which sequences have a fault: bool[sequences]."""
    block_table, lengths, counts = sequences.block_table, sequences.lengths, sequences.counts
    num_pages, page = key_shape[:2]
    capacity = block_table.shape[1] * page
    first_of_page = jnp.arange(0, capacity, page, dtype=jnp.int32)
    needed = (first_of_page < lengths[:, None]) & (counts > 0)[:, None]
    bad = jnp.any(needed & ((block_table < 0) | (block_table >= num_pages)), axis=1)
    bad |= (counts < 0) | (counts > sequences.owned)
    bad |= (lengths < 0) | (lengths > capacity) | (sequences.early < 0)
    if problem.aligned:
        select_lengths = sequences.select_lengths
        fits = problem.blocks.compressed_length(select_lengths) == lengths
        bad |= (select_lengths < 0) | ~fits
    return bad


def _attend(
    sequences: _Sequences, key: jax.Array, value: jax.Array, problem: Problem
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax attention of every token to its sequence's positions, in float32.

    Returns:
        float32[sequences, tokens, kv heads, group, value size]; the probabilities, with positions
        for the last axis; and the log-sum-exp, without it.
    """
    num_pages, page = key.shape[:2]
    position = jnp.arange(sequences.block_table.shape[1] * page, dtype=jnp.int32)
    in_sequence = position < sequences.lengths[:, None]

    # 1. Position i lies in page block_table[b, i // page], row i % page. Rows past the length may
    # hold anything, also NaN, so they become zeros.
    def gather(pool: jax.Array) -> jax.Array:
        pages = pool[jnp.clip(sequences.block_table, 0, num_pages - 1)].astype(jnp.float32)
        heads = pages.reshape(*in_sequence.shape, problem.key_value_heads, -1)
        return jnp.where(in_sequence[:, :, None, None], heads, 0.0)

    key_rows, value_rows = pools.keys_and_values(
        gather(key), gather(value), interleaved=problem.interleaved
    )

    # 2. Scores, accumulated and scaled in float32: [sequences, tokens, kv heads, group, positions].
    rows = sequences.query
    grouped = rows.reshape(*rows.shape[:2], problem.key_value_heads, -1, rows.shape[-1])
    scores = problem.scale * jnp.einsum(
        "bthgd,bihd->bthgi",
        grouped.astype(jnp.float32),
        key_rows,
        precision=lax.Precision.HIGHEST,
    )

    # 3. Softmax over the positions that the token sees.
    is_early = sequences.token < sequences.early[:, None]
    visible = sequences.lengths[:, None] - is_early
    seen = (position < visible[:, :, None])[:, :, None, None, :]
    probabilities, lse = softmax.over_seen(scores, seen)

    # 4. The attention.
    attention = jnp.einsum(
        "bthgi,bihd->bthgd", probabilities, value_rows, precision=lax.Precision.HIGHEST
    )
    return attention, probabilities, lse


def blocks_of_tokens(
    token: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    select_lengths: jax.Array,
    problem: Problem,
) -> jax.Array:
    """How many blocks each token chooses from: int32, of the shape that all broadcast to.

    Args:
        token: int32, each one's number in its sequence.
        counts: int32, tokens of its sequence.
        lengths: int32, compressed positions of it.
        select_lengths: int32, original tokens of it; only the aligned rule reads them.
        problem: the static problem.
    """
    if not problem.aligned:
        return problem.blocks.num_blocks(lengths) + jnp.zeros_like(token)
    later = jnp.where(problem.causal, counts - 1 - token, 0)
    return problem.blocks.universe(jnp.maximum(select_lengths - later, 0))


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
