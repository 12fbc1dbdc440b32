"""What either front door checks of its arguments."""

from __future__ import annotations

from typing import Any

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


def sequences_of_rows(
    counts: checks.Integers | None, leading: tuple[Any, ...], *, packed: bool
) -> np.ndarray | None:
    """The sequence of each row, -1 where it holds no token; None where only the program knows.

    Args:
        counts: tokens of each sequence, where they are given.
        leading: the axes of rows that `topk_indices` has: `[T]` packed, else `[B, S]` or `[B]`.
        packed: whether rows are packed.
    """
    known = counts is None or counts.host is not None
    if not known or not all(isinstance(size, int) for size in leading):
        return None
    sequence, token = np.indices((*leading, 1) if len(leading) == 1 else leading)
    if counts is None or counts.host is None:
        return sequence.reshape(leading)
    if packed:
        return np.repeat(np.arange(len(counts.host)), counts.host.astype(int))
    return np.where(token < counts.host[sequence], sequence, -1).reshape(leading)


def check_window_pages(
    table: checks.Integers, lengths: checks.Integers, counts: checks.Integers | None,
    problem: Problem, *, page: int, pages: Any,
) -> None:  # fmt: skip
    """Refuses page ids that a window needs and the pools do not have, where the host knows them."""
    if table.host is None or lengths.host is None or counts is not None:
        return
    first = np.maximum(lengths.host - problem.window_size, 0)
    paged.page_ids(table, lengths.host, page=page, pages=pages, first=first)
