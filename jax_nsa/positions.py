"""From the blocks that a step chose to the tokens in them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_nsa import blocks, checks
from jax_nsa._compat import with_usual_promotion
from jax_nsa.checks import IntegersLike


def block_positions(
    topk_indices: IntegersLike, lengths: IntegersLike, *, select_block_size: int
) -> jax.Array:
    """Returns the positions of the tokens in chosen blocks.

    Block `j` holds the tokens `[j * l', (j + 1) * l')` of its sequence (arXiv 2502.11089, section
    3.3.2), as far as they are there.

    Args:
        topk_indices: integers `[B, ..., k]`, blocks, or -1 for none: the second result of
            `nsa_decode_step` and `nsa_compress_attention_infer`.
        lengths: integers `[B]`, the original tokens of each sequence (of packed rows, of each row).
        select_block_size: `l'`, tokens in a block; a multiple of 16 up to 128.

    Returns:
        int32 `[B, ..., k, l']`: positions in the sequence, -1 past its end and where there is no
        block.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument with an illegal value or shape.
    """
    size = blocks.check_block_size(
        "select_block_size", checks.integer("select_block_size", select_block_size)
    )
    ids = checks.Integers("topk_indices", topk_indices, rank=(2, 3, 4))
    tokens = checks.Integers("lengths", lengths, rank=1)
    if tokens.shape != ids.shape[:1]:
        raise ValueError(
            "lengths must have an entry for each of topk_indices' first axis, "
            f"got shapes {tokens.shape} and {ids.shape}"
        )
    tokens.check_range(None)
    return _positions(ids.array(), tokens.array(), size)


@with_usual_promotion
def _positions(ids: jax.Array, lengths: jax.Array, size: int) -> jax.Array:
    ids, end = ids[..., None], jnp.maximum(lengths, 0).reshape(-1, *(1,) * ids.ndim)
    there = (ids >= 0) & (ids < -(-end // size))
    first, after = jnp.where(there, ids, 0) * size, jnp.arange(size, dtype=jnp.int32)
    return jnp.where(there & (after < end - first), first + after, -1)
