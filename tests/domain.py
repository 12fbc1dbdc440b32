"""What the operators' domains have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
# Query heads of a key/value head.
GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)
# Relative error of an attention row that rounding may cause, by dtype.
ATTENTION_TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 1e-5}


class Rows:
    """Query's rows, of what has `lengths`, `layout`, `tokens` and `token_counts`."""

    lengths: tuple[int, ...]
    layout: str
    tokens: int
    token_counts: tuple[int, ...] | None

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        if self.token_counts is not None:
            return self.token_counts
        return (1 if self.layout == "TND" else self.tokens,) * len(self.lengths)


def draw_rows(
    draw: st.DrawFn, layouts: Sequence[str], *, most_tokens: int, most_length: int,
    holds_tokens: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Draws a few sequences, with `holds_tokens` as long as the step's tokens at least."""
    layout, tokens = draw(st.sampled_from(layouts)), draw(st.integers(1, most_tokens))
    least = tokens if holds_tokens else 0
    lengths = draw(st.lists(st.integers(least, most_length), min_size=1, max_size=3))
    counts = None
    if draw(st.booleans()):
        counts = tuple(draw(st.integers(0, tokens)) for _ in lengths)
        if layout == "TND" and not sum(counts):
            counts = (1, *counts[1:])
    return {
        "layout": layout, "tokens": tokens, "lengths": tuple(lengths), "token_counts": counts,
    }  # fmt: skip


def draw_pools(draw: st.DrawFn) -> dict[str, Any]:
    """Draws heads, pages and all that is alike in calls over a cache of original tokens."""
    head_size = draw(st.integers(1, 40))
    return {
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "key_value_heads": draw(st.integers(1, 3)),
        "group": draw(st.sampled_from(GROUPS[:5])),
        "head_size": head_size,
        "value_size": draw(st.integers(1, head_size)),
        "page": 16 * draw(st.integers(1, 16)),
        "scale": draw(st.sampled_from([0.125, 1.0, -0.5, 0.0])),
        "pool_rank": draw(st.sampled_from([3, 4])),
        "spare_slots": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 2**16)),
    }
