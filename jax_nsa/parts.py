"""What devices tell each other of the parts of a softmax that each of them holds.

A device knows its part's log-sum-exp `lse_r`. With the largest of them, `peak`, the whole is

    exp(lse - peak) = sum_r exp(lse_r - peak),

so devices first agree on the peak, and then add up. An all-reduce of few numbers costs what any
costs: what else is to be told travels with one of the two.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import jax
import jax.numpy as jnp
from jax import lax


def positions_of_device(operands: Mapping[str, jax.Array], multiple: int, of: str) -> int:
    """How many positions of each sequence a device holds: its block table's pages times their rows.

    Args:
        operands: the operands on this device.
        multiple: what it must be a multiple of, so that no select block is on two devices.
        of: the same in the user's terms.

    Raises:
        ValueError: it is not.
    """
    columns, page = operands["block_table"].shape[1], operands["key"].shape[1]
    if columns * page % multiple:
        raise ValueError(
            "with context_axis, the pages of a sequence on each device must hold a multiple of "
            f"{of} = {multiple} positions, got block_table with {columns} columns for pages of "
            f"{page} rows"
        )
    return columns * page


def worst_and_peak(
    state: jax.Array, lse: jax.Array, axis_name: Hashable
) -> tuple[jax.Array, jax.Array]:
    """The worst state and the largest log-sum-exp of all devices, by one all-reduce.

    Args:
        state: int32 `[...]`, what this device knows of a row; the larger, the worse. Apart from
            `lse`, as not every platform's maximum keeps a NaN.
        lse: float32 `[...]`, of this device's part: -inf where it has none, NaN only where the
            state tells it.
        axis_name: the mesh axis of the devices.

    Returns:
        int32 and float32 `[...]`, the same on each device; the peak is 0 where no device has a
        part. Any other peak would give the same whole, so it has no derivative.
    """
    known = lax.stop_gradient(jnp.where(jnp.isnan(lse), -jnp.inf, lse))
    worst, peak = lax.pmax(jnp.stack([state.astype(lse.dtype), known]), axis_name)
    return worst.astype(state.dtype), jnp.where(peak == -jnp.inf, 0.0, peak)
