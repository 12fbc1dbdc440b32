"""What calls over a paged cache share: operands, and checks of heads, pools, tables, counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import checks, pools
from jax_nsa.checks import ArrayLike, Integers
from jax_nsa.operator import Array, Operator

# What attention over a paged cache reads, whichever its positions.
OPERANDS = (
    Array("query", "* (h g) d"),
    Array("key", "p r (h x)"),
    Array("value", "p r (h y)"),
    Array("block_table", "b c", points_into="p"),
)

GROUP_MAX = 128
HEAD_SIZE_MAX = 192


def per_sequence(name: str, values: Any, sequences: Any) -> Integers:
    """Integers, one for each of the block table's rows."""
    integers = checks.Integers(name, values, rank=1)
    if integers.shape != (sequences,):
        raise ValueError(
            f"{name} must have an entry for each of the {sequences} rows of block_table, "
            f"got shape {integers.shape}"
        )
    return integers


def lengths(
    name: str, values: Any, table: Integers, *, sequences: Any, page: int, devices: int = 1
) -> Integers:
    """The length of each sequence, no longer than its row of the block table can name.

    Args:
        name: the argument's name.
        values: the argument.
        table: the block table.
        sequences: how many there are.
        page: rows in a page.
        devices: over how many devices each sequence is split.
    """
    integers = per_sequence(name, values, sequences)
    most = table.shape[1] * page * devices
    if isinstance(most, int) and most > checks.INT32_MAX:
        raise ValueError(
            f"block_table's second axis times page_block_size must be at most {checks.INT32_MAX}"
            f"{f' on {devices} devices' if devices > 1 else ''}, got {table.shape[1]} * {page}"
        )
    integers.check_range(most, " (the block table's pages times page_block_size)")
    return integers


def apply(
    operator: Operator, operands: Mapping[str, jax.Array], known_lengths: Integers,
    merge_parts: Callable[..., dict[str, jax.Array]], *, problem: Any,
    implementation: tuple[str, ...] | None, on_fault: str | None, context_axis: Hashable | None,
) -> dict[str, jax.Array]:  # fmt: skip
    """Applies an operator; where a mesh axis splits sequences, to their parts, which it merges.

    Args:
        operator: which.
        operands: all of the call.
        known_lengths: of the whole sequences.
        merge_parts: merges what the devices along `context_axis` have.
        problem: the static problem.
        implementation: as `Operator.bind` takes it.
        on_fault: as `Operator.bind` takes it.
        context_axis: the mesh axis, or None.
    """
    bind = functools.partial(operator.bind, implementation=implementation, on_fault=on_fault)
    if context_axis is not None:
        return merge_parts(bind, operands, problem=problem, axis_name=context_axis)
    constants = _constant_lengths(operands, known_lengths)
    return bind(operands, problem=problem, constants=constants)


def _constant_lengths(
    operands: Mapping[str, jax.Array], known: Integers
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Lengths that are constants of the program, which a kernel may use, as `bind` takes them.

    Those that the host knows are, under a trace; eagerly, they would make each step's program a new
    one.
    """
    traced = any(isinstance(operand, jax.core.Tracer) for operand in operands.values())
    if not traced or known.host is None:
        return ()
    return (("lengths", tuple(known.host.tolist())),)


def counts_of_tokens(
    counts: Any, query_shape: tuple[Any, ...], table: Integers, *, packed: bool
) -> dict[str, Integers]:
    """`actual_seq_qlen` by its name where it is given, checked against query's token axis.

    Args:
        counts: the argument.
        query_shape: `[T, N, D]` where rows are packed, or `[B, S, N, D]`.
        table: the block table, which has a row for each sequence.
        packed: whether rows are packed.
    """
    sequences = table.shape[0]
    tokens = query_shape[0 if packed else 1]
    if counts is None:
        if packed and tokens != sequences:
            raise ValueError(
                "query must have one row for each row of block_table unless actual_seq_qlen is "
                f"given, got shapes {query_shape} and {table.shape}"
            )
        return {}
    integers = per_sequence("actual_seq_qlen", counts, sequences)
    integers.check_range(None if packed else tokens)
    if packed and integers.host is not None and isinstance(tokens, int):
        total = sum(integers.host.tolist())
        if total != tokens:
            raise ValueError(
                f"actual_seq_qlen must sum to query's tokens ({tokens}), got a sum of {total}"
            )
    return {"actual_seq_qlen": integers}


def sequences(table: Integers, query_shape: tuple[Any, ...], *, packed: bool) -> Any:
    """How many sequences a call has: the rows of its block table."""
    if not packed and query_shape[0] != table.shape[0]:
        raise ValueError(
            "block_table must have a row for each sequence of query, "
            f"got shapes {table.shape} and {query_shape}"
        )
    if table.shape[1:] == (0,) and table.shape[0] != 0:
        raise ValueError(f"block_table must not be empty, got shape {table.shape}")
    return table.shape[0]


def page_ids(table: Integers, needed: Callable[[], np.ndarray], *, pages: int) -> None:
    """Refuses entries of a known block table that sequences need and the pools do not have.

    Args:
        table: the block table.
        needed: gives bool `[B, P]`, which entries are needed; asked where some are bad.
        pages: pages in the pools; a symbolic number is for the running program.
    """
    if table.host is None or not isinstance(pages, int):
        return
    # As unsigned integers, negative ones are beyond all pages too, if their type reaches so far.
    ids = table.host if table.host.itemsize >= 4 else table.host.astype(np.int32)
    bad = ids.view(f"u{ids.itemsize}") >= pages
    if bad.any():
        bad &= needed()
    if bad.any():
        b, p = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{table.name}[{b}, {p}] must be in [0, {pages}), the pages of key and value, "
            f"got {int(table.host[b, p])}"
        )


def pages_between(first: Any, end: np.ndarray, columns: int, *, page: int) -> np.ndarray:
    """Which pages of each sequence hold its rows `[first, end)`: bool `[B, columns]`."""
    column = np.arange(columns, dtype=np.int32)
    first = np.asarray(first)[..., None] // page
    return (column >= first) & (column < -(-end[..., None] // page))


def page_size(value: Any) -> int:
    """Returns `page_block_size`, a multiple of 16 up to 256."""
    size = checks.integer("page_block_size", value)
    if not pools.is_page_size(size):
        raise ValueError(
            f"page_block_size must be a multiple of {pools.PAGE_GRANULE} up to {pools.PAGE_MAX}, "
            f"got {size}"
        )
    return size


def floats(
    query: Any, key: Any, value: Any, *, interleaved: bool
) -> tuple[ArrayLike, ArrayLike, ArrayLike]:
    """Returns query and the pools as arrays of one dtype; one that holds both as either."""
    query = checks.floats("query", query)
    like = ("query", query)
    key = checks.floats("key", key, like=like)
    return query, key, key if interleaved else checks.floats("value", value, like=like)


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    packed: bool,
    head_num: Any,
    key_value_heads: int,
    page: int,
    interleaved: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns query, and the pools as `[pages, page, Nkv * size]`, their shapes checked.

    A pool of keys and values is returned twice, as `[pages, page, Nkv * 2 * size]`.

    Args:
        query: `[B, S, N, D]`, or packed `[T, N, D]`.
        key: the pool of keys, of 3 or 4 axes; or that of keys and values, of 3 to 5.
        value: the pool of values, likewise.
        packed: whether rows are packed.
        head_num: N, as the caller states it.
        key_value_heads: `Nkv`.
        page: rows in a page.
        interleaved: whether one pool holds keys and values.
    """
    axes = "[tokens, heads, head_size]" if packed else "[B, S, heads, head_size]"
    query_shape(query, axes=axes)
    stated = checks.count("head_num", head_num)
    heads(query.shape, stated=stated, key_value_heads=key_value_heads)
    sizes = {"key_value_heads": key_value_heads, "page": page, "head_size": query.shape[-1]}
    if interleaved:
        both = jnp.asarray(pools.of_both(key, **sizes))
        return jnp.asarray(query), both, both
    key, value = pools.of_each(key, value, **sizes)
    return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)


def query_shape(query: ArrayLike, *, axes: str) -> None:
    """Checks query's axes; only its rows may be none."""
    shape = tuple(query.shape)
    if len(shape) != axes.count(",") + 1:
        raise ValueError(f"query must have shape {axes}, got {shape}")
    if any(isinstance(n, int) and n == 0 for n in shape[-2:]):
        raise ValueError(f"query must not be empty, got shape {shape}")


def heads(query_shape: tuple[Any, ...], *, stated: int, key_value_heads: int) -> None:
    """Checks query's heads and head size by the rules of attention over groups of heads."""
    size = query_shape[-1]
    have = query_shape[-2]
    if have != stated:
        raise ValueError(
            f"head_num must equal the heads of query, {have} in shape {query_shape}, got {stated}"
        )
    if have % key_value_heads:
        raise ValueError(
            f"head_num must be a multiple of key_value_head_num ({key_value_heads}), got {have}"
        )
    group = have // key_value_heads
    if GROUP_MAX % group:
        raise ValueError(
            f"head_num / key_value_head_num must divide {GROUP_MAX}, "
            f"got {have} / {key_value_heads} = {group}"
        )
    if size > HEAD_SIZE_MAX:
        raise ValueError(f"query's head size must be at most {HEAD_SIZE_MAX}, got {size}")
