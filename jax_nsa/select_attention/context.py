"""Context parallelism: sequences whose cache of original tokens is split over devices.

Runs inside `jax.shard_map`. Along the mesh axis, device r holds columns `r*P .. (r+1)*P - 1` of the
whole block table and the pages that they name: the positions from `r*P*page` on. Each device
attends to the chosen blocks and the part of the window that it holds, and the parts merge by their
log-sum-exp:

    attention = sum_r exp(lse_r - lse) * attention_r,    lse = log(sum_r exp(lse_r))

Devices exchange `O(N*Dv)` numbers for each query row; keys and values stay where they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jax_nsa import _compat, parts, tokens
from jax_nsa.select_attention.problem import Problem


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
        operands: the operands on this device: its pages and its columns of the block table; all
            else of the whole sequences.
        problem: the static problem of the whole sequences.
        axis_name: the mesh axis that splits the positions.

    Returns:
        The results for the whole sequences, the same on each device of the axis.

    Raises:
        ValueError: a device's positions do not end where a select block ends.
    """
    lengths, size = operands["lengths"], problem.select_block_size
    part = parts.positions_of_device(operands, size or 1, "select_block_size")
    start = lax.axis_index(axis_name) * part
    capacity = lax.axis_size(axis_name) * part
    legal = (lengths >= 0) & (lengths <= capacity)
    changed = {"lengths": jnp.where(legal, lengths - start, 0)}
    bad = tokens.of_rows(operands, ~legal)[..., None]
    if size:
        indices = operands["topk_indices"]
        blocks = -(-tokens.of_rows(operands, lengths) // size)[..., None, None]
        wrong = jnp.any((indices < -1) | (indices >= blocks), axis=-1)
        holds_token = tokens.numbers(operands) < tokens.counts(operands)
        bad = bad | (wrong & holds_token[..., None])
        here = indices - start // size
        changed["topk_indices"] = jnp.where((indices >= 0) & (here >= 0), here, -1)
    results = bind(
        {**operands, **changed},
        problem=dataclasses.replace(problem, partial=True, return_lse=True),
    )
    group = operands["query"].shape[-2] // problem.key_value_heads
    query_bad = jnp.broadcast_to(bad, (*bad.shape[:-1], problem.key_value_heads))
    query_bad = jnp.repeat(query_bad, group, axis=-1)

    merged, lses = {}, {}
    for name, of_lse in (("attention", "lse"), ("window_attention", "window_lse")):
        if name in results:
            attention, lse = _merge(results[name], results[of_lse], query_bad, axis_name)
            merged[name] = attention.astype(operands["query"].dtype)
            lses[of_lse] = lse
    return {**merged, **lses} if problem.return_lse else merged


def _merge(
    attention: jax.Array, lse: jax.Array, bad: jax.Array, axis_name: Hashable
) -> tuple[jax.Array, jax.Array]:
    """Merges the devices' parts; rows that are bad on any of them become NaN."""
    state, peak = parts.worst_and_peak((bad | jnp.isnan(lse)).astype(jnp.int32), lse, axis_name)
    spoilt = state > 0
    # A share of the mean, so that the sum of attentions is finite where the mean is.
    share = jnp.where(spoilt, 0.0, jnp.exp(lse - peak) / lax.axis_size(axis_name))
    # A share of 0 does not clear a NaN.
    weighed = jnp.where(share[..., None] == 0.0, 0.0, attention * share[..., None])
    total, summed = lax.psum((share, weighed), axis_name)
    empty = total == 0.0  # rows that see nothing keep zeros
    total = jnp.where(empty, 1.0, total)
    whole = summed / total[..., None]
    whole_lse = peak + jnp.log(total) + math.log(lax.axis_size(axis_name))
    whole_lse = jnp.where(empty, -jnp.inf, whole_lse)
    return (
        jnp.where(spoilt[..., None], jnp.nan, whole),
        jnp.where(spoilt, jnp.nan, whole_lse),
    )
