"""Legal calls over the operator's whole domain: described in a few integers, drawn, and built.

They are hostile wherever the operator promises not to look: unused slots of the block table hold
illegal page ids, tokens outside the windows that end NaN and infinities, and sequences that
complete no window name any row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from domain import DTYPES
from hypothesis import strategies as st

STRIDES = (16, 32, 48, 64)
# Every legal (compress_block_size, compress_stride).
WINDOWS = tuple((size, d) for d in STRIDES for size in range(16, 129, 16) if size >= d)
CACHES = ("rows", "pages", "pages of heads")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A legal call, but for the contents of its arrays, which `seed` decides.

    Attributes:
        dtype: of input and cache.
        weight_dtype: of weight and bias, where it is not that.
        lengths: original tokens of each sequence.
        token_counts: this step's tokens of each sequence; None: the argument is not given.
        heads: of input and cache.
        head_sizes: of each input; two are compressed by one call.
        page: rows of input's pages.
        window: compress_block_size and compress_stride.
        skipped: sequences whose slot is negative.
        bias: whether there is one.
        input_rank: 3 or 4 axes of input.
        cache: the shape of the cache.
        spare_slots: block table columns beyond what the longest sequence needs.
        hostile: whether what must not be read holds garbage, or else zeros.
    """

    dtype: str = "float32"
    weight_dtype: str | None = None
    lengths: tuple[int, ...] = (48, 47, 80, 32)
    token_counts: tuple[int, ...] | None = None
    heads: int = 2
    head_sizes: tuple[int, ...] = (5,)
    page: int = 16
    window: tuple[int, int] = (32, 16)
    skipped: tuple[int, ...] = ()
    bias: bool = True
    input_rank: int = 3
    cache: str = "rows"
    spare_slots: int = 1
    hostile: bool = True
    seed: int = 0

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens that the step brings to each sequence."""
        return self.token_counts or (1,) * len(self.lengths)

    @property
    def ends(self) -> tuple[int | None, ...]:
        """Where the window of each sequence ends; None where none does."""
        size, stride = self.window
        return tuple(
            next((e for e in range(size, n + 1, stride) if e > n - count), None)
            for n, count in zip(self.lengths, self.counts, strict=True)
        )


def build(g: Geometry) -> dict[str, Any]:
    """The operator's arguments by name, all of them host values; pairs where there are two."""
    random = np.random.default_rng(g.seed)
    garbage = np.random.default_rng([g.seed, 1])  # its draws leave the others' alone
    dtype = DTYPES[g.dtype]
    weight_dtype = DTYPES[g.weight_dtype or g.dtype]
    size, stride = g.window
    sequences = len(g.lengths)
    needed = [-(-n // g.page) for n in g.lengths]
    slots = max([1, *needed]) + g.spare_slots
    pages = sum(needed) + 2
    illegal = [-(2**31), -1, pages, 2**31 - 1]
    table = (
        garbage.choice(illegal, (sequences, slots)) if g.hostile else np.zeros((sequences, slots))
    ).astype(np.int32)
    order = iter(random.permutation(pages))
    used = np.zeros((pages, g.page), bool)
    for b, end in enumerate(g.ends):
        # Only the pages that the window lies in are there.
        for i in range(end - size, end) if end is not None else ():
            column = i // g.page
            if i == end - size or i % g.page == 0:
                table[b, column] = next(order)
            used[table[b, column], i % g.page] = True

    cache_pages, cache_page = -(-(sequences + 3) // 3), 3
    rows = cache_pages * cache_page
    slot_mapping = random.permutation(rows)[:sequences].astype(np.int32)
    for b, end in enumerate(g.ends):
        if b in g.skipped:
            slot_mapping[b] = random.choice([-1, -rows, -(2**31)])
        elif end is None and g.hostile:
            slot_mapping[b] = garbage.choice([-1, 0, rows - 1, rows, 2**31 - 1, -(2**31)])

    inputs, weights, caches, biases = [], [], [], []
    for head_size in g.head_sizes:
        pool = random.standard_normal((pages, g.page, g.heads, head_size))
        unread = garbage.choice([np.nan, np.inf, -np.inf], pool.shape) if g.hostile else 0.0
        pool = np.where(used[..., None, None], pool, unread).astype(dtype)
        inputs.append(pool if g.input_rank == 4 else pool.reshape(pages, g.page, -1))
        weights.append(random.standard_normal((size, g.heads)).astype(weight_dtype))
        biases.append(random.standard_normal((g.heads, head_size)).astype(weight_dtype))
        cache = random.standard_normal((rows, g.heads, head_size)).astype(dtype)
        if g.hostile:  # what is there is neither read nor touched
            cache[garbage.random(rows) < 0.3] = np.nan
        if g.cache == "pages":
            cache = cache.reshape(cache_pages, cache_page, -1)
        elif g.cache == "pages of heads":
            cache = cache.reshape(cache_pages, cache_page, g.heads, head_size)
        caches.append(cache)

    def one_or_pair(arrays: list[np.ndarray]) -> Any:
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    arguments: dict[str, Any] = {
        "input": one_or_pair(inputs),
        "weight": one_or_pair(weights),
        "slot_mapping": slot_mapping,
        "compress_block_size": size,
        "compress_stride": stride,
        "page_block_size": g.page,
        "block_table": table,
        "actual_seq_len": np.array(g.lengths, np.int32),
        "cache": one_or_pair(caches),
    }
    if g.bias:
        arguments["bias"] = one_or_pair(biases)
    if g.token_counts is not None:
        arguments["actual_seq_qlen"] = np.array(g.token_counts, np.int32)
    return arguments


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any legal call, small enough for the oracle's loops."""
    integers, pick = st.integers, st.sampled_from
    dtype = draw(pick(sorted(DTYPES)))
    size, stride = draw(pick(WINDOWS))
    sequences = draw(integers(1, 5))
    # Windows end often enough, and lengths next to their ends are where kernels go wrong.
    ends = st.builds(lambda i, off: size + i * stride + off, integers(0, 6), integers(-2, 2))
    lengths = draw(st.lists(integers(0, 300) | ends, min_size=sequences, max_size=sequences))
    counts = None
    if draw(st.booleans()):
        counts = tuple(
            draw(
                st.lists(
                    pick([0, 1, 2, stride - 1, stride]) | integers(0, stride),
                    min_size=sequences,
                    max_size=sequences,
                )
            )
        )
    return Geometry(
        dtype=dtype,
        weight_dtype=draw(pick([None, "float32"])),
        lengths=tuple(lengths),
        token_counts=counts,
        heads=draw(integers(1, 5)),
        head_sizes=tuple(draw(st.lists(integers(1, 70), min_size=1, max_size=2))),
        page=16 * draw(integers(1, 16)),
        window=(size, stride),
        skipped=tuple(draw(st.sets(integers(0, sequences - 1), max_size=2))),
        bias=draw(st.booleans()),
        input_rank=draw(pick([3, 4])),
        cache=draw(pick(CACHES)),
        spare_slots=draw(integers(0, 2)),
        seed=draw(integers(0, 2**16)),
    )
