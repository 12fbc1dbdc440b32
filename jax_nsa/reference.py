"""The operator in jnp, step by step as the mathematics reads: the meaning every kernel is held to.

It gathers each sequence's pages and keeps all probabilities, so its memory is O(sequences *
length); it exists to be read, to run on any XLA platform, and to be differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa.problem import Problem, Window

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def with_usual_promotion(
    function: Callable[_Parameters, _Result],
) -> Callable[_Parameters, _Result]:
    """Makes `function` mean the same however strict the user wants promotion in their own code."""

    @functools.wraps(function)
    def wrapped(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


@with_usual_promotion
def compress_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *tokens: jax.Array,
    problem: Problem,
) -> list[jax.Array]:
    """Computes the primitive's results; operands and results are described in `primitive.py`."""
    if query.ndim == 4:
        rows = query
        token = jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
        counts, early = tokens or (jnp.full_like(lengths, query.shape[1]), jnp.zeros_like(lengths))
        bad_tokens = (counts < 0) | (counts > query.shape[1])
    else:
        # Ragged rows: give each row its sequence's table and length, and treat it as a sequence
        # of one token.
        counts, early, first_rows = tokens
        rows = query[:, None]
        sequence = sequence_of_rows(first_rows, query.shape[0])
        token = (jnp.arange(query.shape[0], dtype=jnp.int32) - first_rows[sequence])[:, None]
        rows_end = jnp.full((1,), query.shape[0], jnp.int32)
        bounds = jnp.minimum(jnp.concatenate([first_rows, rows_end]), rows_end)
        bad_tokens = ((counts < 0) | (counts > jnp.diff(bounds)))[sequence]
        block_table, lengths = block_table[sequence], lengths[sequence]
        counts, early = counts[sequence], early[sequence]

    num_pages, page = key.shape[:2]
    position = jnp.arange(block_table.shape[1] * page, dtype=jnp.int32)
    in_sequence = position < lengths[:, None]
    needed = in_sequence[:, ::page] & (counts > 0)[:, None]
    bad_page = jnp.any(needed & ((block_table < 0) | (block_table >= num_pages)), axis=1)
    bad = bad_tokens | bad_page | (lengths < 0) | (lengths > position.size) | (early < 0)
    absent = ~bad[:, None] & (token >= counts[:, None])  # rows that hold no token
    visible = lengths[:, None] - (token < early[:, None])  # compressed positions a token sees

    # 1. Token i lives in page block_table[b, i // page], row i % page. Rows past the length may
    # hold anything, also NaN, so they become zeros.
    def gather(pool: jax.Array) -> jax.Array:
        pages = pool[jnp.clip(block_table, 0, num_pages - 1)].astype(jnp.float32)
        heads = pages.reshape(block_table.shape[0], position.size, problem.key_value_heads, -1)
        return jnp.where(in_sequence[:, :, None, None], heads, 0.0)

    key_rows, value_rows = gather(key), gather(value)

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
    scores_of_blocks = block_scores(probabilities, problem.window)
    importance = jnp.sum(scores_of_blocks, axis=3)
    num_blocks = problem.window.num_blocks(lengths)[:, None]
    num_blocks = jnp.where(bad[:, None] | absent, 0, num_blocks)
    indices = select(importance, num_blocks[:, :, None], problem.select_block_count)

    def rule(computed: jax.Array, when_absent: float) -> jax.Array:
        """Rows of bad sequences become NaN, rows without a token `when_absent`."""
        extra = (None,) * (computed.ndim - 2)
        filled = jnp.where(absent[(..., *extra)], when_absent, computed)
        return jnp.where(bad[(..., None, *extra)], jnp.nan, filled)

    attention = attention.reshape(*rows.shape[:3], -1)
    attention_dtype = jnp.float32 if problem.return_block_scores else query.dtype
    leading = query.shape[:-2]
    results = [
        rule(attention, 0.0).astype(attention_dtype).reshape(*leading, *attention.shape[2:]),
        indices.reshape(*leading, *indices.shape[2:]),
    ]
    if problem.return_lse:
        lse = jnp.where(empty, -jnp.inf, peak + jnp.log(jnp.where(empty, 1.0, total)))
        results.append(rule(lse.reshape(rows.shape[:3]), -jnp.inf).reshape(*leading, -1))
    if problem.return_block_scores:
        per_head = scores_of_blocks.reshape(*rows.shape[:3], -1)
        results.append(rule(per_head, 0.0).reshape(*leading, *per_head.shape[2:]))
    return results


def sequence_of_rows(first_rows: jax.Array, rows: int) -> jax.Array:
    """The sequence that owns each of the ragged rows: int32[rows]."""
    row = jnp.arange(rows, dtype=jnp.int32)
    # Not jnp.searchsorted, which takes no symbolic number of sequences.
    return jnp.sum(first_rows[None, :] <= row[:, None], axis=1, dtype=jnp.int32) - 1


def select(importance: jax.Array, num_blocks: jax.Array, count: int) -> jax.Array:
    """Picks the most important blocks: the initial and the two last always, then by importance.

    Args:
        importance: float32[..., blocks], the scores summed over the heads of a group.
        num_blocks: int32[...], how many blocks the sequence has.
        count: blocks to pick.

    Returns:
        int32[..., count], by descending importance, of equals the lower index first; -1 where the
        sequence has fewer blocks.
    """
    num_blocks = num_blocks[..., None]
    block = jnp.arange(importance.shape[-1], dtype=jnp.int32)
    always = (block == 0) | (block == num_blocks - 2) | (block == num_blocks - 1)
    # NaN comes only of non-finite inputs; ranking it last keeps the choice well-defined.
    importance = jnp.where(jnp.isnan(importance), -1.0, importance)
    importance = jnp.where(always, jnp.inf, importance)
    importance = jnp.where(block < num_blocks, importance, -jnp.inf)
    order = jnp.argsort(importance, axis=-1, descending=True, stable=True).astype(jnp.int32)
    missing = max(0, count - order.shape[-1])
    order = jnp.pad(order, [(0, 0)] * (order.ndim - 1) + [(0, missing)])[..., :count]
    return jnp.where(jnp.arange(count, dtype=jnp.int32) < num_blocks, order, -1)


def block_scores(probabilities: jax.Array, window: Window) -> jax.Array:
    """Sums probabilities into select blocks: the paper's eq. 9, block index j from 0.

    `score[j] = sum_{m<M} sum_{n<L} p[M*(j+1) - m - n]`, terms outside the sequence dropped.

    Args:
        probabilities: float32[..., positions], 0 outside the sequence.
        window: the block geometry, which gives M and L.

    Returns:
        float32[..., blocks], as many blocks as `positions` fill.
    """
    m_count, n_count = window.strides_per_select_block, window.strides_per_compress_block
    positions = probabilities.shape[-1]
    blocks = window.num_blocks(positions)
    before, after = m_count + n_count, m_count * (blocks + 1)
    padded = jnp.pad(probabilities, [(0, 0)] * (probabilities.ndim - 1) + [(before, after)])
    scores = jnp.zeros((*probabilities.shape[:-1], blocks), probabilities.dtype)
    for m in range(m_count):
        for n in range(n_count):
            first = before + m_count - m - n  # where block 0 finds this term
            scores += lax.slice_in_dim(
                padded, first, first + m_count * (blocks - 1) + 1, m_count, axis=-1
            )
    return scores
