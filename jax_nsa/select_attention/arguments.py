"""What either front door checks of its arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_nsa import checks, paged
from jax_nsa.select_attention.problem import Problem


def check_arrays(
    query: Any, key: Any, value: Any, problem: Problem, *, layout: str, head_num: int, page: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query as `[B, S, N, D]` or packed `[T, N, D]`, the pools as `[pages, page, Nkv * x]`."""
    query, key, value = paged.floats(query, key, value, interleaved=problem.interleaved)
    if layout == "BSH":
        shape = tuple(query.shape)
        if len(shape) != 3 or shape[2] == 0 or shape[2] % head_num:
            raise ValueError(
                "query must have shape [B, S, heads * head_size] with layout BSH, its last axis a "
                f"multiple of head_num ({head_num}), got {shape}"
            )
        query = query.reshape(*shape[:2], head_num, shape[2] // head_num)
    return paged.attention(
        query, key, value, packed=layout == "TND", head_num=head_num,
        key_value_heads=problem.key_value_heads, page=page, interleaved=problem.interleaved,
    )  # fmt: skip


def check_chosen(
    chosen: tuple[Any, int], query: jax.Array, problem: Problem, layout: str
) -> checks.Integers:
    """`topk_indices`, its shape checked."""
    values, count = chosen
    expected = (*query.shape[:-2], problem.key_value_heads, count)
    shapes = [expected]
    if layout != "TND" and query.shape[1] == 1:
        shapes.append((expected[0], *expected[2:]))
    indices = checks.Integers("topk_indices", values, rank=tuple(map(len, shapes)))
    if indices.shape not in shapes:
        raise ValueError(
            "topk_indices must have shape "
            f"{' or '.join(map(str, shapes))} (query's rows, key_value_head_num, "
            f"select_block_count), got {indices.shape}"
        )
    return indices


class Rows(NamedTuple):
    """Whose the rows of a query are, as far as the host knows.

    Attributes:
        sequence: int `[B, S]`, or `[T]` where rows are packed: the sequence of each row, -1 where
            it holds no token.
        later: the same of how many tokens of its sequence come after it in this step.
    """

    sequence: np.ndarray
    later: np.ndarray


def known_rows(
    counts: checks.Integers | None, leading: tuple[Any, ...], *, packed: bool
) -> Rows | None:
    """The rows of a query; None where only the program knows.

    Args:
        counts: tokens of each sequence, where they are given.
        leading: query's axes of rows: `[T]` packed, else `[B, S]`.
        packed: whether rows are packed.
    """
    known = counts is None or counts.host is not None
    if not known or not all(isinstance(size, int) for size in leading):
        return None
    each = np.full(leading[0], 1 if packed else leading[1])
    if counts is not None and counts.host is not None:
        each = counts.host.astype(int)
    if packed:
        sequence = np.repeat(np.arange(len(each)), each)
        return Rows(sequence, np.cumsum(each)[sequence] - 1 - np.arange(len(sequence)))
    sequence, token = np.indices(leading)
    later = each[sequence] - 1 - token
    return Rows(np.where(later >= 0, sequence, -1), later)


def check_pages(
    table: checks.Integers, lengths: checks.Integers, indices: checks.Integers | None,
    rows: Rows | None, problem: Problem, *, page: int, pages: Any,
) -> None:  # fmt: skip
    """Refuses page ids that tokens read and the pools do not have, where the host knows them."""
    if lengths.host is None or rows is None:
        return
    known = lengths.host
    ids = None
    if indices is not None and indices.host is not None:
        ids = indices.host.reshape(*rows.sequence.shape, math.prod(indices.shape[-2:]))

    def needed() -> np.ndarray:
        there = rows.sequence >= 0
        sequence = rows.sequence[there]
        tokens = np.bincount(sequence, minlength=len(known))
        # The windows of consecutive tokens leave no gap.
        first = np.maximum(known - (tokens - 1 + problem.window_size), 0)
        has_window = (tokens > 0) & (problem.window_size > 0)
        read = paged.pages_between(first, known * has_window, table.shape[1], page=page)
        if ids is not None:
            size, end = problem.select_block_size, known[sequence] - rows.later[there]
            block = ids[there].astype(np.int64)
            last = np.minimum((block + 1) * size, end[:, None]) - 1
            for column in (block * size // page + i for i in range(-(-size // page) + 1)):
                is_read = (block >= 0) & (last >= block * size) & (column <= last // page)
                read[np.broadcast_to(sequence[:, None], block.shape)[is_read], column[is_read]] = 1
        return read

    paged.page_ids(table, needed, pages=pages)
