"""The step's result: the gated sum of its three branches (arXiv 2502.11089, eq. 5).

    attention = gates[0] * compressed + gates[1] * selected + gates[2] * window

A kernel may know it, and then no branch's attention but the compressed one's goes through memory;
elsewhere it is composed here from the branches that any kernel gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jax_nsa._compat import with_usual_promotion
from jax_nsa.select_attention.problem import Problem
from jax_nsa.select_attention.reference import rows_of_query


@jax.jit
@with_usual_promotion
def add_branches(
    gates: jax.Array,
    compressed: jax.Array,
    selected: jax.Array,
    window: jax.Array,
    absent: jax.Array | None,
) -> jax.Array:
    """Adds the branches up in float32, and rounds once.

    Args:
        gates: `[..., N, 3]`, query's dtype or float32.
        compressed: `[..., N, Dv]`, the attention of each branch.
        selected: the same.
        window: the same.
        absent: bool, of as many axes as query's rows have and one more; whether a row holds no
            token. Its attentions are 0, and its gates may be anything. None: all hold one.

    Returns:
        `[..., N, Dv]`, the dtype of the attentions.
    """
    total = sum(
        gates[..., branch, None].astype(jnp.float32) * attention.astype(jnp.float32)
        for branch, attention in enumerate((compressed, selected, window))
    )
    total = jnp.asarray(total, compressed.dtype)
    return total if absent is None else jnp.where(absent[..., None], compressed, total)


def compose(
    apply: Callable[..., dict[str, jax.Array]], operands: Mapping[str, jax.Array], problem: Problem
) -> dict[str, jax.Array]:
    """Any problem by `apply(operands, problem=...)`, which serves those without gates."""
    if not problem.gated:
        return apply(operands, problem=problem)
    needed = {n: array for n, array in operands.items() if n not in ("gates", "compressed")}
    branches = apply(needed, problem=dataclasses.replace(problem, gated=False))
    absent = None
    if "token_counts" in operands:
        # Of a part of a sequence any length is good.
        rows = rows_of_query(needed, dataclasses.replace(problem, partial=True))
        absent = rows["absent"].reshape(*operands["query"].shape[:-2], 1)
    attention = add_branches(
        operands["gates"], operands["compressed"], branches["attention"],
        branches["window_attention"], absent,
    )  # fmt: skip
    return {"attention": attention}
