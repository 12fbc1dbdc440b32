"""Context parallelism: sequences whose compressed cache is split over devices along its pages.

Runs inside `jax.shard_map`. Along the mesh axis, device r holds columns `r*P .. (r+1)*P - 1` of the
whole block table and the pages that they name: the positions from `r*P*page` on. Each device
attends to its own positions, and the parts merge by their log-sum-exp:

    attention = sum_r exp(lse_r - lse) * attention_r,    lse = log(sum_r exp(lse_r))

Block scores are linear in the probabilities, so they merge by the same factor, and a group's heads
are summed before anything is sent. Devices exchange `O(N*Dv + Nkv*blocks)` numbers for each query
row; keys, values and probabilities stay where they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa import _compat, primitive, reference
from jax_nsa.problem import Problem

# What a device can know of a row, in ascending order of consequence.
_ABSENT, _PRESENT, _NAN, _FAULTY = range(4)


@reference.with_usual_promotion
def merge_parts(
    *operands: jax.Array,
    problem: Problem,
    implementation: Sequence[str] | None,
    axis_name: Hashable,
) -> list[jax.Array]:
    """Applies the primitive to sequences split over a mesh axis.

    Args:
        *operands: the primitive's operands on this device: its pages and its columns of the block
            table; query, lengths and token operands of the whole sequences.
        problem: the static problem of the whole sequences.
        implementation: as `primitive.bind` takes it.
        axis_name: the mesh axis that splits the positions.

    Returns:
        The primitive's results for the whole sequences, the same on each device of the axis.

    Raises:
        ValueError: a device's positions do not end where a select block ends.
    """
    query, key, value, block_table, lengths, *tokens = operands
    window = problem.window
    stride = window.strides_per_select_block
    page = key.shape[1]
    part = block_table.shape[1] * page
    if part % stride:
        raise ValueError(
            "with context_axis, the pages of a sequence on each device must hold a multiple of "
            f"select_block_size / compress_stride = {stride} positions, got block_table with "
            f"{block_table.shape[1]} columns for pages of {page} rows"
        )
    devices = lax.axis_size(axis_name)
    start = lax.axis_index(axis_name) * part
    # A length that the devices together cannot hold stays a fault on each of them.
    legal = (lengths >= 0) & (lengths <= devices * part)
    local = jnp.where(legal, jnp.clip(lengths - start, 0, part), lengths)

    def attend(columns: int, lengths_here: jax.Array, **changes: object) -> list[jax.Array]:
        """The primitive on this device's first positions; early tokens ignore the last of all."""
        parts = list(tokens)
        if parts:
            holds_last = start + lengths_here == lengths
            parts[1] = jnp.where(holds_last | (tokens[1] < 0), tokens[1], 0)
        return primitive.bind(
            query, key, value, block_table[:, :columns], lengths_here, *parts,
            problem=dataclasses.replace(problem, return_lse=True, **changes),  # type: ignore[arg-type]
            implementation=implementation,
        )  # fmt: skip

    attention, indices, lse, scores = attend(
        block_table.shape[1], local, return_block_scores=True, select_block_count=1
    )
    # The one position that adds to a block of the device before: this device's first, to the block
    # that ends just before it. Alone in its sequence, its log-sum-exp is its score.
    _, _, first_lse = attend(1, jnp.minimum(local, 1), select_block_count=1)

    # What is known of each head's row here, the worse on any device deciding for all. Compared as
    # integers, since not every platform's maximum and exponential keep a NaN.
    group = query.shape[-2] // problem.key_value_heads
    chosen = jnp.repeat(indices[..., 0] == 0, group, axis=-1)  # any present row has block 0
    state = jnp.where(chosen, _PRESENT, _ABSENT)
    state = jnp.where(jnp.isnan(lse), jnp.where(chosen, _NAN, _FAULTY), state)
    state = lax.pmax(state, axis_name)

    peak = lax.pmax(lax.stop_gradient(lse), axis_name)  # any other would give the same result
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = lax.psum(jnp.exp(lse - peak), axis_name)
    empty = total == 0.0
    known = peak + jnp.log(jnp.where(empty, 1.0, total))  # rows that see nothing keep zeros
    whole = jnp.where(empty, -jnp.inf, known)
    whole = jnp.where(state >= _NAN, jnp.nan, whole)
    factor = jnp.where(state >= _NAN, jnp.nan, jnp.exp(lse - known))
    attention = lax.psum(attention * factor[..., None], axis_name)

    before = jnp.exp(first_lse - known)[..., None]
    scores = jnp.concatenate([before, scores * factor[..., None]], axis=-1)
    grouped = scores.reshape(*scores.shape[:-2], problem.key_value_heads, group, -1)
    importance = jnp.sum(grouped, axis=-2)
    whole_importance, importance = _compat.vary_alike(
        jnp.zeros(
            (*importance.shape[:-1], 1 + window.num_blocks(devices * part)), importance.dtype
        ),
        importance,
    )
    whole_importance = lax.dynamic_update_slice_in_dim(
        whole_importance, importance, start // stride, axis=-1
    )
    whole_importance = lax.psum(whole_importance, axis_name)[..., 1:]

    state = state[..., ::group]
    present = (state == _PRESENT) | (state == _NAN)
    row_lengths = (
        lengths[:, None]
        if query.ndim == 4
        else lengths[reference.sequence_of_rows(tokens[2], query.shape[0])]
    )
    num_blocks = jnp.where(present, window.num_blocks(row_lengths)[..., None], 0)
    results = [
        attention.astype(query.dtype),
        reference.select(whole_importance, num_blocks, problem.select_block_count),
    ]
    return [*results, whole] if problem.return_lse else results
