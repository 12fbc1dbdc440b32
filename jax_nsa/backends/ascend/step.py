"""The branches of a decode step as one custom call on the NPU, with one wait for all lengths.

Between the compressed branch and the one that reads the blocks which that one chooses, nothing but
CANN runs. So what makes blocks safe for a call of their own (`select_attention`) has no place, and
none is needed: CANN's kernel chooses as many blocks as it is asked for, or the call is refused, and
all begin before the end of the last compressed position. No token of a legal step sees less than
the beginning of the last of them: a block begins at a multiple of 16, as that position ends, and a
token ends at most three tokens before it does. A row without a token reads block 0.

A sequence whose original length is shorter than its compressed positions say is told to be as long
as they do, and its rows become NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa._compat import with_usual_promotion
from jax_nsa.backends import Call
from jax_nsa.backends.ascend import select_attention
from jax_nsa.select_attention.reference import rows_of_query

# A call and its operands.
Branch = tuple[Call, Sequence[jax.Array]]
# From the branches of one custom call to the results of each.
Run = Callable[[Sequence[Branch]], Sequence[Sequence[jax.Array]]]
Operands = Sequence[Sequence[jax.Array]]


@with_usual_promotion
def joint(calls: Sequence[Call], operands: Operands, run: Run) -> list[list[jax.Array]]:
    """The results of the calls of a step, by one custom call.

    Args:
        calls: the compressed branch, the chosen blocks with the window or without, and then the
            window.
        operands: those of each. The chosen blocks are not read.
        run: runs the custom call.
    """
    (first, *later), (first_operands, *later_operands) = calls, operands
    safe_of: list[list[Branch]] = [
        [*select_attention.safe_calls(call, its)]
        for call, its in zip(later, later_operands, strict=True)
    ]
    named = dict(zip(later[0].names, later_operands[0], strict=True))
    rows = rows_of_query(named, later[0].problem)
    reach = _reach(first, first_operands, rows["sequence"])
    safe_of[0][0] = _reaching(safe_of[0][0], first, reach)
    branches = [(first, first_operands), *itertools.chain.from_iterable(safe_of)]
    (attention, indices), *results = run(branches)

    absent = rows["absent"].reshape(*indices.shape[:-2], 1, 1)
    indices = jnp.where(absent, -1, indices)
    named["topk_indices"] = indices.reshape(named["topk_indices"].shape)
    later_operands[0] = [named[name] for name in later[0].names]
    outcomes = [[attention, indices]]
    left = iter(results)
    for call, its, safe in zip(later, later_operands, safe_of, strict=True):
        of_call = [result for (result,) in itertools.islice(left, len(safe))]
        outcomes.append(select_attention.attentions(call, its, of_call))
    disagrees = (rows["limit"] < reach) & ~rows["absent"]
    chosen = outcomes[1][0]
    outcomes[1][0] = jnp.where(disagrees.reshape(*chosen.shape[:-2], 1, 1), jnp.nan, chosen).astype(
        chosen.dtype
    )
    return outcomes


def _reach(call: Call, operands: Sequence[jax.Array], sequence: jax.Array) -> jax.Array:
    """Tokens up to the first one of the last block that a row may choose: int32[R]."""
    named = dict(zip(call.names, operands, strict=True))
    capacity = named["block_table"].shape[1] * named["key"].shape[1]
    lengths = jnp.clip(named["lengths"], 1, capacity)
    return _first_of_last(call, lengths)[sequence] + 1


def _first_of_last(call: Call, lengths: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    blocks = call.problem.blocks
    return (blocks.num_blocks(lengths) - 1) * blocks.select_block_size


def _reaching(branch: Branch, first: Call, reach: jax.Array) -> Branch:
    """The call that reads chosen blocks, its sequences no shorter than `reach`.

    Of its blocks, which the kernel takes from the first call, nothing is computed here.
    """
    call, operands = branch
    named = dict(zip(call.names, operands, strict=True))
    capacity = named["block_table"].shape[1] * named["key"].shape[1]
    named["topk_indices"] = jnp.zeros_like(named["topk_indices"])
    named["lengths"] = jnp.minimum(jnp.maximum(named["lengths"], reach), capacity)
    limits = np.asarray(dict(call.constants)["lengths"], np.int64)
    known = np.asarray(dict(first.constants).get("lengths", ()), np.int64)
    if len(limits) and len(known) and len(limits) % len(known) == 0:
        last = np.repeat(_first_of_last(first, known), len(limits) // len(known))
        limits = np.minimum(np.maximum(limits, last + 1), capacity)
    else:
        limits = limits[:0]
    constants = (("lengths", tuple(limits.tolist())),)
    return dataclasses.replace(call, constants=constants), [named[name] for name in call.names]
