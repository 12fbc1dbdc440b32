"""CANN's aclnnNsaSelectedAttentionInfer: what it cannot do, and safe calls of it on the NPU.

On the NPU neither blocks nor pages are read by the host, as that would wait for the operator that
chooses them. So the program itself makes them safe: each row of query becomes a sequence of its
own, which ends where the row's sight ends; blocks stand before -1, as CANN's kernel never ends at a
leading -1; page ids are clipped. Rows of faulty values become NaN afterwards, and rows that see
nothing 0. CANN's kernel has no window: its tokens are gathered into pages all of whose blocks are
chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa import native
from jax_nsa._compat import with_usual_promotion
from jax_nsa.backends import Call
from jax_nsa.select_attention.reference import rows_of_query

WINDOW_PAGE = 128  # rows of the pages that a window is gathered into
WINDOW_BLOCK = 64


def refuses(call: Call, platform: str) -> str | None:
    """Why CANN's operator cannot serve the call, as far as its shapes tell."""
    if call.problem.return_lse or call.problem.partial:
        return "CANN's kernel gives no log-sum-exp (return_lse, context_axis)"
    if platform != "ascend":
        return None  # the host gathers what any call reads into one that CANN's kernel takes
    limits = native.module().ascend_limits(call.operator.target)
    query, key, value = map(call.operand, ("query", "key", "value"))
    heads = call.problem.key_value_heads
    if heads > limits["heads"]:
        return (
            "CANN's kernel reads the blocks of the first key/value head for all heads, which is "
            f"right for one on each device, got key_value_head_num = {heads}"
        )
    group = query.shape[-2] // heads
    if group > limits["group"]:
        return f"CANN's kernel takes at most {limits['group']} query heads, got {group}"
    sizes = (query.shape[-1], value.shape[2] // heads)
    if sizes != (limits["head_size"], limits["value_size"]):
        return (
            f"CANN's kernel takes heads of {limits['head_size']} and values of "
            f"{limits['value_size']}, got {sizes[0]} and {sizes[1]}"
        )
    pages = (limits["small_page"], limits["large_page"])
    if key.shape[1] not in pages:
        return f"CANN's kernel takes pages of {pages[0]} or {pages[1]} rows, got {key.shape[1]}"
    return None


class _Branch(NamedTuple):
    """A branch as a call that CANN's operator serves, but for query; R rows of query.

    Attributes:
        operands: by name.
        block: tokens in a block.
        limits: positions of each row, where the program knows them.
        sees: bool[R], whether the row sees any position.
        bad: bool[R], whether what it reads is not there.
    """

    operands: dict[str, jax.Array]
    block: int
    limits: np.ndarray | None
    sees: jax.Array
    bad: jax.Array


def on_device(
    call: Call,
    operands: Sequence[jax.Array],
    run: Callable[[Call, Sequence[jax.Array]], Sequence[jax.Array]],
) -> Sequence[jax.Array]:
    """One call of CANN's operator for the chosen blocks, one for the window.

    Args:
        call: the call.
        operands: its operands.
        run: runs a call whose operands are safe.

    Returns:
        The attentions, `[*rows of query, N, Dv]`.
    """
    results = [run(*safe)[0] for safe in safe_calls(call, operands)]
    return attentions(call, operands, results)


@with_usual_promotion
def safe_calls(
    call: Call, operands: Sequence[jax.Array]
) -> list[tuple[Call, tuple[jax.Array, ...]]]:
    """The calls that CANN's operator serves, and their operands: of the blocks, of the window."""
    named = dict(zip(call.names, operands, strict=True))
    query = named["query"].reshape(-1, 1, *named["query"].shape[-2:])
    safe = []
    for branch in _branches(call, named, rows_of_query(named, call.problem)):
        arrays = {"query": query, **branch.operands}
        limits = () if branch.limits is None else tuple(branch.limits.tolist())
        problem = dataclasses.replace(call.problem, select_block_size=branch.block, window_size=0)
        inner = dataclasses.replace(
            call,
            operands=tuple(jax.typeof(array) for array in arrays.values()),
            names=tuple(arrays),
            problem=problem,
            constants=(("lengths", limits),),
        )
        safe.append((inner, tuple(arrays.values())))
    return safe


@with_usual_promotion
def attentions(
    call: Call, operands: Sequence[jax.Array], results: Sequence[jax.Array]
) -> list[jax.Array]:
    """The call's results, from those of its safe calls: `[*rows of query, N, Dv]`."""
    named = dict(zip(call.names, operands, strict=True))
    query, rows = named["query"], rows_of_query(named, call.problem)
    marked = []
    for branch, result in zip(_branches(call, named, rows), results, strict=True):
        attention = jnp.where(branch.sees[:, None], result.reshape(rows["bad"].shape[0], -1), 0.0)
        bad = rows["bad"] | branch.bad
        attention = jnp.where(bad[:, None], jnp.nan, attention).astype(query.dtype)
        marked.append(attention.reshape(*query.shape[:-1], -1))
    return marked


def _branches(
    call: Call, operands: Mapping[str, jax.Array], rows: Mapping[str, jax.Array]
) -> list[_Branch]:
    """Those that the call has."""
    branches = []
    if call.problem.select_block_size:
        branches.append(_chosen(call, operands, rows))
    if call.problem.window_size:
        branches.append(_window(call, operands, rows))
    return branches


def _chosen(
    call: Call, operands: Mapping[str, jax.Array], rows: Mapping[str, jax.Array]
) -> _Branch:
    size, limit = call.problem.select_block_size, rows["limit"][:, None]
    ids = operands["topk_indices"].reshape(limit.shape[0], -1)
    blocks = -(-rows["length"][:, None] // size)
    bad = jnp.any((ids < -1) | (ids >= blocks), axis=1) & ~rows["absent"]
    begun = (ids >= 0) & (ids < -(-limit // size))
    ids = -jnp.sort(-jnp.where(begun, ids, -1), axis=1)
    sees = ids[:, 0] >= 0

    # A block lies in as many pages at most.
    page = operands["key"].shape[1]
    column = ids[..., None] * size // page + jnp.arange((size + page - 2) // page + 1)
    read = (ids[..., None] >= 0) & (
        column * page < jnp.minimum((ids[..., None] + 1) * size, limit[..., None])
    )
    table = operands["block_table"][rows["sequence"]]
    bad = bad | _reads_no_page(operands, table, column.reshape(ids.shape[0], -1), read)
    ids = ids.at[:, 0].max(0)  # where there is none; its result is not used
    heads = call.problem.key_value_heads
    return _Branch(
        operands={
            "key": operands["key"],
            "value": operands["value"],
            "block_table": jnp.clip(table, 0, operands["key"].shape[0] - 1),
            "lengths": jnp.maximum(rows["limit"], 1),
            "topk_indices": ids.reshape(ids.shape[0], 1, heads, -1),
        },
        block=size,
        limits=_known_limits(call),
        sees=sees,
        bad=bad,
    )


def _window(
    call: Call, operands: Mapping[str, jax.Array], rows: Mapping[str, jax.Array]
) -> _Branch:
    limit, page = rows["limit"], operands["key"].shape[1]
    table = operands["block_table"][rows["sequence"]]
    pages = -(-min(call.problem.window_size, table.shape[1] * page) // WINDOW_PAGE)
    length = jnp.minimum(limit, call.problem.window_size)
    at = jnp.arange(pages * WINDOW_PAGE, dtype=jnp.int32)
    position = (limit - length)[:, None] + at
    seen = at < length[:, None]
    bad = _reads_no_page(operands, table, position // page, seen)
    column = jnp.minimum(position // page, table.shape[1] - 1)
    page_ids = jnp.take_along_axis(table, column, axis=1)

    def gather(pool: jax.Array) -> jax.Array:
        taken = pool[jnp.clip(page_ids, 0, pool.shape[0] - 1), position % page]
        # What no row sees may be NaN, which a factor of 0 would not clear.
        taken = jnp.where(seen[..., None], taken, jnp.zeros((), pool.dtype))
        return taken.reshape(-1, WINDOW_PAGE, pool.shape[2])

    count = limit.shape[0]
    blocks = jnp.arange(pages * (WINDOW_PAGE // WINDOW_BLOCK), dtype=jnp.int32)
    length = jnp.maximum(length, 1)
    ids = jnp.where(blocks * WINDOW_BLOCK < length[:, None], blocks, -1)
    heads = call.problem.key_value_heads
    known = _known_limits(call)
    return _Branch(
        operands={
            "key": gather(operands["key"]),
            "value": gather(operands["value"]),
            "block_table": jnp.arange(count * pages, dtype=jnp.int32).reshape(count, pages),
            "lengths": length,
            "topk_indices": jnp.broadcast_to(
                ids[:, None, None], (count, 1, heads, blocks.shape[0])
            ),
        },
        block=WINDOW_BLOCK,
        limits=None if known is None else np.minimum(known, call.problem.window_size),
        sees=limit > 0,
        bad=bad,
    )


def _reads_no_page(
    operands: Mapping[str, jax.Array], table: jax.Array, column: jax.Array, read: jax.Array
) -> jax.Array:
    """Whether a row reads a page that is not there: bool[R].

    Args:
        operands: those of the call.
        table: int32[R, P], each row's pages.
        column: int32[R, n], columns of it.
        read: bool[R, n] or of more axes, which of the columns are read.
    """
    ids = jnp.take_along_axis(table, jnp.minimum(column, table.shape[1] - 1), axis=1)
    absent = (ids < 0) | (ids >= operands["key"].shape[0])
    return jnp.any(absent & read.reshape(column.shape), axis=1)


def _known_limits(call: Call) -> np.ndarray | None:
    """How many positions each row of query sees, at least 1, where the program knows it."""
    lengths = np.asarray(dict(call.constants).get("lengths", ()), np.int64)
    shape = call.operands[0].shape
    if "token_counts" in call.names or len(lengths) != shape[0] or not isinstance(shape[1], int):
        return None
    later = np.arange(shape[1])[::-1]  # tokens of the step after each
    return np.maximum(lengths[:, None] - later, 1).ravel()
