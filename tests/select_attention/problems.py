"""Legal calls over the operator's whole domain: described in a few integers, drawn, and built.

Hostile wherever the operator promises not to look: unused slots of the block table hold illegal
page ids, rows past a sequence's length NaN and infinities, and rows of query that hold no token NaN
and illegal blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from domain import DTYPES, Rows, draw_pools, draw_rows
from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Geometry(Rows):
    """A legal call, but for the contents of its arrays, which `seed` decides.

    Attributes:
        lengths: original tokens of each sequence.
        tokens: the S of layouts BSND and BSH; unused with TND.
        token_counts: tokens of each sequence; None stands for one (TND) or `tokens`.
        block: tokens in a selectable block.
        k: ids for each row and key/value head; None: no blocks, the window alone.
        window: newest tokens; None: no window.
        pool_rank: 3, heads side by side, or 4.
        spare_slots: columns of block_table beyond what the longest sequence needs.
        ids: "any": drawn with -1 and repetitions; "none": all -1.
    """

    dtype: str = "float32"
    lengths: tuple[int, ...] = (100, 37)
    layout: str = "TND"
    tokens: int = 1
    token_counts: tuple[int, ...] | None = None
    key_value_heads: int = 2
    group: int = 2
    head_size: int = 16
    value_size: int = 8
    page: int = 16
    block: int = 32
    k: int | None = 3
    window: int | None = 20
    scale: float = 0.25
    return_lse: bool = False
    pool_rank: int = 3
    spare_slots: int = 1
    ids: str = "any"
    hostile: bool = True
    seed: int = 0


def build(g: Geometry) -> dict[str, Any]:
    """The arguments of `nsa_select_attention_infer`, or with k None of the window's operator."""
    random = np.random.default_rng(g.seed)
    dtype, heads = DTYPES[g.dtype], g.key_value_heads * g.group
    # A sequence without a token needs none of its pages.
    needed = [-(-n // g.page) if c else 0 for n, c in zip(g.lengths, g.counts, strict=True)]
    pages = sum(needed) + 2
    slots = max([1, *(-(-length // g.page) for length in g.lengths)]) + g.spare_slots
    order = random.permutation(pages)
    garbage = [-7, pages, pages + 5, 2**31 - 1, -(2**31)]
    table = random.choice(garbage if g.hostile else [0], (len(g.lengths), slots)).astype(np.int32)
    pools = {}
    for name, size in (("key", g.head_size), ("value", g.value_size)):
        pool = random.choice([np.nan, np.inf, -np.inf], (pages, g.page, g.key_value_heads, size))
        if not g.hostile:
            pool[:] = 0
        pools[name] = pool
    first = 0
    for b, length in enumerate(g.lengths):
        for p in range(needed[b]):
            page, rows = order[first + p], min(g.page, length - p * g.page)
            table[b, p] = page
            for pool in pools.values():
                pool[page, :rows] = random.normal(size=(rows, *pool.shape[2:]))
        first += needed[b]

    if g.layout == "TND":
        leading = (sum(g.counts),)
        rows = [(r, b) for r, b in enumerate(np.repeat(np.arange(len(g.counts)), g.counts))]
    else:
        leading = (len(g.lengths), g.tokens)
        rows = [((b, t), b) for b, count in enumerate(g.counts) for t in range(count)]
    query = random.normal(size=(*leading, heads, g.head_size))
    if g.layout != "TND" and g.hostile:
        query[np.arange(g.tokens) >= np.array(g.counts)[:, None]] = np.nan
    arguments: dict[str, Any] = {
        "query": query.astype(dtype),
        **{name: pool.astype(dtype) for name, pool in pools.items()},
        "scale_value": g.scale,
        "head_num": heads,
        "key_value_head_num": g.key_value_heads,
        "page_block_size": g.page,
        "layout": g.layout,
        "block_table": table,
        "actual_seq_kvlen": np.array(g.lengths, np.int32),
    }
    if g.pool_rank == 3:
        for name in pools:
            arguments[name] = arguments[name].reshape(pages, g.page, -1)
    if g.layout == "BSH":
        arguments["query"] = arguments["query"].reshape(*leading, -1)
    if g.token_counts is not None:
        arguments["actual_seq_qlen"] = np.array(g.token_counts, np.int32)
    if g.window is not None:
        arguments["window_size"] = g.window
    if g.return_lse:
        arguments["return_lse"] = True
    if g.k is not None:
        shape = (*leading, g.key_value_heads, g.k)
        ids = random.choice(garbage if g.hostile else [-1], shape).astype(np.int32)
        for row, b in rows:
            blocks = -(-g.lengths[b] // g.block) if g.ids == "any" else 0
            ids[row] = random.integers(-1, blocks, ids[row].shape) if blocks else -1
        arguments |= {
            "topk_indices": ids, "select_block_size": g.block, "select_block_count": g.k,
        }  # fmt: skip
    return arguments


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any legal call, small enough for the oracle's loops."""
    k = draw(st.none() | st.integers(1, 9))
    return Geometry(
        **draw_rows(draw, ["TND", "BSND", "BSH"], most_tokens=4, most_length=200),
        **draw_pools(draw),
        block=16 * draw(st.integers(1, 8)),
        k=k,
        window=draw(st.integers(1, 250) if k is None else st.none() | st.integers(1, 250)),
        return_lse=draw(st.booleans()),
        ids=draw(st.sampled_from(["any", "any", "none"])),
    )
