"""Softmax over the positions that a row sees, as all references and training have it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def over_seen(scores: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probabilities of the positions that are seen, and the log-sum-exp of their scores.

    Args:
        scores: float32 `[..., positions]`.
        seen: bool, of a shape that broadcasts to that of the scores.

    Returns:
        `[..., positions]` and `[...]`: where none is seen, all 0 and -inf.
    """
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    # Any other finite number would give the same results, so it has no derivative.
    peak = lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
    weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    return weights / total, lse[..., 0]
