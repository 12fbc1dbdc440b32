"""Legal decode steps over the whole domain: described in a few integers, drawn, and built.

Hostile as the operators' own problems are, and in the gates of rows that hold no token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from compress_attention.problems import WINDOWS
from domain import DTYPES, draw_pools, draw_rows
from hypothesis import strategies as st
from select_attention.problems import Geometry, build

from jax_nsa import PagedKV

ORIGINAL = Geometry(block=64)


@dataclasses.dataclass(frozen=True)
class Step:
    """A legal step, but for the contents of its arrays, which `original.seed` decides.

    Attributes:
        original: the selected branch: query's layout and rows, lengths, sizes, blocks and window.
        compressed_page: rows in a page of the compressed cache.
        compress: original tokens behind a compressed position.
        stride: original tokens between two.
        window_page: rows in a page of the window's own cache; None: the selected branch's.
        gates: the gates' dtype.
        importance: whose rule ranks the blocks.
        init_blocks: how many of the first blocks are always chosen.
        local_blocks: how many of the last ones.
    """

    original: Geometry = ORIGINAL
    compressed_page: int = 16
    compress: int = 32
    stride: int = 16
    window_page: int | None = None
    gates: str = "float32"
    importance: str = "cann"
    init_blocks: int = 1
    local_blocks: int = 2

    @property
    def compressed_lengths(self) -> tuple[int, ...]:
        """Windows that end within each sequence."""
        return tuple(
            max(0, (length - self.compress) // self.stride + 1) for length in self.original.lengths
        )

    @property
    def holds_token(self) -> np.ndarray:
        """Which rows of query do: `[B, S]`, or of packed rows `[T]`."""
        g = self.original
        if g.layout == "TND":
            return np.ones(sum(g.counts), bool)
        return np.arange(g.tokens) < np.array(g.counts)[:, None]


def arguments_of(step: Step) -> dict[str, Any]:
    """The arguments of `nsa_decode_step`; its integers in caches are NumPy arrays."""
    g = step.original
    selected = build(g)
    others = {
        "compressed": (step.compressed_lengths, step.compressed_page),
        "window": (g.lengths, step.window_page),
    }
    caches = {"selected": cache(selected)}
    for seed, (name, (lengths, page)) in enumerate(others.items()):
        if page is None:
            continue
        other = dataclasses.replace(
            g, lengths=lengths, page=page, k=None, window=1, seed=g.seed + 1 + seed, pool_rank=3
        )
        caches[name] = cache(build(other))
    random = np.random.default_rng(g.seed + 3)
    gates = random.uniform(-0.2, 1.0, (*selected["query"].shape[:-1], 3))
    gates[~step.holds_token] = np.nan
    kept = ("query", "scale_value", "head_num", "key_value_head_num", "layout", "actual_seq_qlen")
    return {
        **{name: selected[name] for name in kept if name in selected},
        **caches,
        "gates": gates.astype(DTYPES[step.gates]),
        "select_block_size": g.block,
        "select_block_count": g.k,
        "compress_block_size": step.compress,
        "compress_stride": step.stride,
        "window_size": g.window,
        **{n: getattr(step, n) for n in ("importance", "init_blocks", "local_blocks")},
    }


def cache(arguments: dict[str, Any]) -> PagedKV:
    """The cache that an operator's arguments describe."""
    names = ("key", "value", "block_table", "actual_seq_kvlen")
    return PagedKV(*(arguments[name] for name in names))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Any legal step, small enough for the oracle's loops."""
    compress, stride, block = draw(st.sampled_from(WINDOWS))
    original = Geometry(
        **draw_rows(draw, ["TND", "BSND"], most_tokens=3, most_length=250, holds_tokens=True),
        **draw_pools(draw),
        block=block,
        k=draw(st.integers(1, 6)),
        window=draw(st.integers(1, 300)),
    )
    return Step(
        original,
        compressed_page=16 * draw(st.integers(1, 4)),
        compress=compress,
        stride=stride,
        window_page=draw(st.none() | st.sampled_from([16, 48])),
        gates=draw(st.sampled_from([original.dtype, "float32"])),
        importance=draw(st.sampled_from(["cann", "aligned"])),
        init_blocks=draw(st.integers(0, 2)),
        local_blocks=draw(st.integers(0, 3)),
    )
