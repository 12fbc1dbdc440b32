"""Context parallelism: sequences whose compressed cache is split over devices along its pages.

Runs inside `jax.shard_map`. Along the mesh axis, device r holds columns `r*P .. (r+1)*P - 1` of the
whole block table and the pages that they name: the positions from `r*P*page` on. Each device
attends to its own positions, and the parts merge by their log-sum-exp:

    attention = sum_r exp(lse_r - lse) * attention_r,    lse = log(sum_r exp(lse_r))

Block scores are linear in the probabilities, so they merge by the same factor, and a group's heads
are summed before anything is sent. A block at the edge of two devices' positions takes some from
both: by CANN's rule the last block of a device takes the next device's first position, by the
aligned rule the first block of a device takes some of the last positions of the device before.
Devices exchange `O(N*Dv + Nkv*blocks)` numbers for each query row; keys, values and probabilities
stay where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa import _compat, parts, tokens
from jax_nsa.compress_attention import reference
from jax_nsa.compress_attention.problem import Problem

# What a device can know of a row, in ascending order of consequence.
_ABSENT, _PRESENT, _NAN, _FAULTY = range(4)


@_compat.with_usual_promotion
def merge_parts(
    bind: Callable[..., dict[str, jax.Array]],
    operands: Mapping[str, jax.Array],
    *,
    problem: Problem,
    axis_name: Hashable,
) -> dict[str, jax.Array]:
    """Applies the operator to sequences split over a mesh axis.

    Args:
        bind: applies the operator to what a device holds: `bind(operands, problem=...)`.
        operands: the operands on this device: its pages and its columns of the block table; query,
            lengths and what tells tokens of the whole sequences.
        problem: the static problem of the whole sequences.
        axis_name: the mesh axis that splits the positions.

    Returns:
        The results for the whole sequences, the same on each device of the axis.

    Raises:
        ValueError: a device's positions do not end where a select block ends.
    """
    query, key, block_table, lengths = (
        operands[n] for n in ("query", "key", "block_table", "lengths")
    )
    early, select_lengths = operands.get("early_counts"), operands.get("select_lengths")
    stride = problem.blocks.strides_per_select_block
    part = block_table.shape[1] * key.shape[1]
    if part % stride:
        raise ValueError(
            "with context_axis, the pages of a sequence on each device must hold a multiple of "
            f"select_block_size / compress_stride = {stride} positions, got block_table with "
            f"{block_table.shape[1]} columns for pages of {key.shape[1]} rows"
        )
    devices = lax.axis_size(axis_name)
    start = lax.axis_index(axis_name) * part
    # A length that the devices together cannot hold stays a fault on each of them.
    legal = (lengths >= 0) & (lengths <= devices * part)
    local = jnp.where(legal, jnp.clip(lengths - start, 0, part), lengths)

    def attend(columns: int, lengths_here: jax.Array, **changes: Any) -> dict[str, jax.Array]:
        """The operator on this device's first positions; early tokens ignore the last of all."""
        changed: dict[str, jax.Array] = {
            "block_table": block_table[:, :columns],
            "lengths": lengths_here,
        }
        holds_last = start + lengths_here == lengths
        if early is not None:
            changed["early_counts"] = jnp.where(holds_last | (early < 0), early, 0)
        if select_lengths is not None:
            changed["select_lengths"] = _select_lengths_here(
                lengths, lengths_here, select_lengths, start, problem
            )
        changes = {"init_blocks": 1, "local_blocks": 0, "causal": False, **changes}
        return bind(
            {**operands, **changed},
            problem=dataclasses.replace(problem, return_lse=True, select_block_count=1, **changes),
        )

    here = attend(block_table.shape[1], local, return_block_scores=True)
    lse, scores = here["lse"], here["block_scores"]

    # What is known of each head's row here, the worse on any device deciding for all.
    group = query.shape[-2] // problem.key_value_heads
    # Any row that holds a token has block 0.
    chosen = jnp.repeat(here["topk_indices"][..., 0] == 0, group, axis=-1)
    state = jnp.where(chosen, _PRESENT, _ABSENT)
    state = jnp.where(jnp.isnan(lse), jnp.where(chosen, _NAN, _FAULTY), state)
    state, peak = parts.worst_and_peak(state, lse, axis_name)
    total = lax.psum(jnp.exp(lse - peak), axis_name)
    empty = total == 0.0
    known = peak + jnp.log(jnp.where(empty, 1.0, total))  # rows that see nothing keep zeros
    whole = jnp.where(empty, -jnp.inf, known)
    whole = jnp.where(state >= _NAN, jnp.nan, whole)
    factor = jnp.where(state >= _NAN, jnp.nan, jnp.exp(lse - known))

    before = jnp.zeros_like(known)
    if not problem.aligned:
        # The one position that adds to a block of the device before: this device's first, to the
        # block that ends just before it. Alone in its sequence, its log-sum-exp is its score.
        first = attend(1, jnp.minimum(local, 1))
        before = jnp.exp(first["lse"] - known)
    scores = jnp.concatenate([before[..., None], scores * factor[..., None]], axis=-1)
    grouped = scores.reshape(*scores.shape[:-2], problem.key_value_heads, group, -1)
    importance = jnp.sum(grouped, axis=-2)
    blocks = problem.max_blocks(devices * part)
    whole_importance, importance = _compat.vary_alike(
        jnp.zeros((*importance.shape[:-1], 1 + blocks), importance.dtype), importance
    )
    whole_importance = lax.dynamic_update_slice_in_dim(
        whole_importance, importance, start // stride, axis=-1
    )
    attention, whole_importance = lax.psum(
        (here["attention"] * factor[..., None], whole_importance), axis_name
    )

    state = state[..., ::group]
    present = (state == _PRESENT) | (state == _NAN)
    num_blocks = jnp.where(present, _blocks_of_rows(operands, problem)[..., None], 0)
    results = {
        "attention": attention.astype(query.dtype),
        "topk_indices": reference.select(whole_importance[..., 1:], num_blocks, problem),
    }
    return {**results, "lse": whole} if problem.return_lse else results


def _select_lengths_here(
    lengths: jax.Array,
    here: jax.Array,
    select_lengths: jax.Array,
    start: jax.Array,
    problem: Problem,
) -> jax.Array:
    """Original lengths that fit this device's positions; -1 where they are not as they should be.

    Whoever holds the last position has what comes after it too. A sequence without positions is on
    the first device.
    """
    blocks = problem.blocks
    consistent = (select_lengths >= 0) & (blocks.compressed_length(select_lengths) == lengths)
    rest = select_lengths - start * blocks.compress_stride
    inner = jnp.where(here > 0, blocks.original_length(here), 0)
    is_last = (start + here == lengths) & ((here > 0) | (start == 0))
    return jnp.where(consistent, jnp.where(is_last, rest, inner), -1)


def _blocks_of_rows(operands: Mapping[str, jax.Array], problem: Problem) -> jax.Array:
    """How many blocks the token in each of query's rows chooses from, as if it held one."""
    query, lengths = operands["query"], operands["lengths"]
    select_lengths = operands.get("select_lengths", jnp.zeros_like(lengths))
    if "first_rows" not in operands:
        token = jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
        counts = operands.get("token_counts", jnp.full_like(lengths, query.shape[1]))
        return reference.blocks_of_tokens(token, counts, lengths, select_lengths, problem)
    first_rows = operands["first_rows"]
    sequence = tokens.sequence_of_rows(first_rows, query.shape[0])
    token = (jnp.arange(query.shape[0], dtype=jnp.int32) - first_rows[sequence])[:, None]
    counts, lengths, select_lengths = (
        array[sequence] for array in (operands["token_counts"], lengths, select_lengths)
    )
    return reference.blocks_of_tokens(token, counts, lengths, select_lengths, problem)[:, 0]
