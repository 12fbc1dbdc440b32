"""The static problem of compression into the cache, and the rules that only it has."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_nsa import blocks
from jax_nsa.checks import Integers
from jax_nsa.compress.window import Window, last_window

COMPRESSED_HEAD_SIZE_MAX = 256
PAIRS_MAX = 2  # the inputs that one call compresses: keys and values


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static in one call and not in its shapes. Hashable: a primitive parameter.

    Attributes:
        compress_block_size: `l`, original tokens in a window.
        compress_stride: `d`, original tokens between the starts of two windows.
        key_value_heads: `N`, heads of input and cache.
        pairs: how many inputs there are, each with a cache.
        cache: the axes of each cache, in the letters of `operator.py`: "w h d" where it has rows,
            "w v (h d)" or "w v h d" where it has pages.

    Raises:
        ValueError: the sizes are illegal or do not fit each other.
    """

    compress_block_size: int
    compress_stride: int
    key_value_heads: int
    pairs: int = 1
    cache: str = "w h d"

    def __post_init__(self) -> None:
        blocks.check_block_size("compress_block_size", self.compress_block_size)
        blocks.check_stride(self.compress_block_size, self.compress_stride)

    def with_heads(self, key_value_heads: int) -> Problem:
        """The problem of a part of the heads."""
        return dataclasses.replace(self, key_value_heads=key_value_heads)

    def scalars(self) -> dict[str, int | float]:
        """What kernels are told, by name."""
        return {
            "compress_block_size": self.compress_block_size,
            "compress_stride": self.compress_stride,
            "heads": self.key_value_heads,
        }


def check_windows(
    table: Integers,
    lengths: Integers,
    counts: Integers | None,
    slots: Integers,
    problem: Problem,
    *,
    page: int,
    pages: int,
    rows: int,
) -> None:
    """Checks what the host knows of the windows that end now against the pool and the cache.

    Which windows end, lengths and counts tell; where the host does not know them it knows nothing.

    Args:
        table: the block table of the original tokens.
        lengths: the original lengths, legal where they are known.
        counts: tokens of each sequence, likewise; None: one each.
        slots: the rows of the cache.
        problem: the static problem.
        page: rows in a page of the pool.
        pages: pages in the pool.
        rows: rows in the cache.

    Raises:
        ValueError: a window needs a page that is not there, goes into a row that is not there, or
            into the row of another.
    """
    if lengths.host is None or (counts is not None and counts.host is None):
        return
    host_lengths = lengths.host.astype(np.int64)
    tokens = np.ones_like(host_lengths)
    if counts is not None and counts.host is not None:
        tokens = counts.host.astype(np.int64)
    window = last_window(
        host_lengths, tokens, size=problem.compress_block_size, stride=problem.compress_stride
    )
    if table.host is not None:
        _check_pages(table.host, window, problem, page=page, pages=pages)
    if slots.host is not None:
        _check_slots(slots.host, window.completes, rows=rows)


def _check_pages(
    table: np.ndarray, window: Window, problem: Problem, *, page: int, pages: int
) -> None:
    column = np.arange(table.shape[1])
    first = window.first // page
    last = (window.first + problem.compress_block_size - 1) // page
    needed = (column >= first[:, None]) & (column <= last[:, None]) & window.completes[:, None]
    bad = needed & ((table < 0) | (table >= pages))
    if bad.any():
        b, c = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"block_table[{b}, {c}] must be in [0, {pages}), the pages of input, "
            f"got {int(table[b, c])}"
        )


def _check_slots(slots: np.ndarray, completes: np.ndarray, *, rows: int) -> None:
    bad = completes & (slots >= rows)
    if bad.any():
        b = int(np.argmax(bad))
        raise ValueError(
            f"slot_mapping[{b}] must be below {rows}, the rows of cache, got {int(slots[b])}"
        )
    named = np.flatnonzero(completes & (slots >= 0))
    _, first, inverse = np.unique(slots[named], return_index=True, return_inverse=True)
    repeated = named[first[inverse]] != named
    if repeated.any():
        b, of = int(named[repeated][0]), int(named[first[inverse]][repeated][0])
        raise ValueError(
            f"slot_mapping[{b}] must not be slot_mapping[{of}], as both sequences complete a "
            f"compress window, got {int(slots[b])} for both"
        )
