"""The gates, which weigh the branches of Native Sparse Attention, and the sum."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_nsa import checks
from jax_nsa._compat import with_usual_promotion
from jax_nsa.checks import ArrayLike

BRANCHES = 3  # compressed, selected, window


def checked_gates(gates: ArrayLike, query: ArrayLike) -> ArrayLike:
    """Returns gates that are query's leading axes and one for each branch, in a legal dtype."""
    gates = checks.floats("gates", gates, like=("query", query), or_float32=True)
    expected = (*query.shape[:-1], BRANCHES)
    if tuple(gates.shape) != expected:
        raise ValueError(
            f"gates must have shape {expected}, query's without the head size and one for each of "
            f"three branches, got {tuple(gates.shape)}"
        )
    return gates


@functools.partial(jax.jit, static_argnames="dtype")
@with_usual_promotion
def gated_sum(gates: jax.Array, *branches: jax.Array, dtype: Any) -> jax.Array:
    """Adds the branches up in float32, and rounds once.

    A branch that is 0 adds 0 even where its gate is infinite or NaN: so are all branches of a row
    that holds no token, whose gates may be anything.

    Args:
        gates: `[..., N, 3]`, `dtype` or float32.
        *branches: `[..., N, Dv]`, the attention of each of the three.
        dtype: that of the result.

    Returns:
        `[..., N, Dv]`.
    """
    total = jnp.float32(0)
    for gate, branch in zip(jnp.unstack(gates, axis=-1), branches, strict=True):
        weight = gate[..., None].astype(jnp.float32)
        # Not the product is chosen but the gate: where a branch is 0 it still has a derivative.
        weight = jnp.where((branch == 0) & ~jnp.isfinite(weight), 0, weight)
        total = total + weight * branch
    return total.astype(dtype)
