"""Which row of query is which token of which sequence.

Rows lie as `[B, S, ...]`, or packed as `[T, ...]`, one sequence's after the other's. Kernels take
the counts of tokens, and where rows are packed, each sequence's first row.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jax_nsa import partition
from jax_nsa.axes import is_packed
from jax_nsa.checks import Integers


def sequence_of_rows(first_rows: jax.Array, rows: int) -> jax.Array:
    """The sequence that owns each of the packed rows: int32[rows]."""
    row = jnp.arange(rows, dtype=jnp.int32)
    # Not jnp.searchsorted, which takes no symbolic number of sequences.
    return jnp.sum(first_rows[None, :] <= row[:, None], axis=1, dtype=jnp.int32) - 1


def owned_rows(first_rows: jax.Array, rows: int) -> jax.Array:
    """How many of the packed rows each sequence owns, up to the next one's first: int32[B]."""
    end = jnp.full((1,), rows, jnp.int32)
    return jnp.diff(jnp.minimum(jnp.concatenate([first_rows, end]), end))


def of_rows(operands: Mapping[str, jax.Array], of_sequences: jax.Array) -> jax.Array:
    """What is known of sequences `[B]`, for each of query's rows: `[B, 1]`, or packed `[T]`."""
    if not is_packed(operands):
        return of_sequences[:, None]
    rows = operands["query"].shape[0]
    return of_sequences[sequence_of_rows(operands["first_rows"], rows)]


def numbers(operands: Mapping[str, jax.Array]) -> jax.Array:
    """Which token of its sequence each of query's rows is: int32 `[1, S]`, or packed `[T]`."""
    if not is_packed(operands):
        return jnp.arange(operands["query"].shape[1], dtype=jnp.int32)[None, :]
    row = jnp.arange(operands["query"].shape[0], dtype=jnp.int32)
    return row - of_rows(operands, operands["first_rows"])


def counts(operands: Mapping[str, jax.Array]) -> jax.Array:
    """How many tokens the sequence of each of query's rows has: int32 `[B, 1]`, or packed `[T]`."""
    if "token_counts" in operands:
        return of_rows(operands, operands["token_counts"])
    return jnp.full_like(operands["lengths"], operands["query"].shape[1])[:, None]


def operands(
    query: jax.Array, counts: Integers | None, *, sequences: int, packed: bool, tokens: int
) -> dict[str, jax.Array]:
    """The operands `token_counts` and, where rows are packed, `first_rows`.

    Args:
        query: `[B, S, N, D]`, or packed `[T, N, D]`.
        counts: the tokens of each sequence; None: `tokens` each.
        sequences: B.
        packed: whether rows are packed.
        tokens: S, or T where rows are packed.
    """
    if counts is None:
        array = _alike(sequences, tokens)
    else:
        array = partition.cut_as_sequences(counts.name, counts.array(), query, packed)
    if not packed:
        return {"token_counts": array}
    token_counts, first_rows = _place(array, tokens=tokens)
    return {"token_counts": token_counts, "first_rows": first_rows}


@functools.partial(jax.jit, static_argnames=("sequences", "tokens"))
def _alike(sequences: int, tokens: int) -> jax.Array:
    return jnp.full(sequences, tokens, jnp.int32)


@functools.partial(jax.jit, static_argnames="tokens")
def _place(token_counts: jax.Array, *, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Packed sequences' counts and first rows; where counts are bad, rows that own no row."""
    # A count that does not fit anyway is cut, so that no sum overflows before one is past the
    # query's end; sequences after that own no rows.
    placed = jnp.clip(token_counts, 0, tokens + 1)
    ends = jnp.cumsum(placed, dtype=jnp.int32)
    past = (ends > tokens).astype(jnp.int32)
    is_past_before = jnp.cumsum(past, dtype=jnp.int32) > past
    first_rows = jnp.where(is_past_before, tokens, ends - placed)
    # After a negative count no later row has a known owner.
    lost = jnp.cumsum(token_counts < 0, dtype=jnp.int32) > 0
    return jnp.where(lost & (token_counts >= 0), -1, token_counts), first_rows
