"""Legal calls over the operator's whole domain: described in a few integers, drawn, and built.

A `Geometry` is what Hypothesis draws, shrinks and prints; `build` turns it into the operator's
arguments, hostile wherever the operator promises not to look: unused slots of the block table hold
illegal page ids, and unused rows of query, key and value NaN and infinities.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from domain import DTYPES, GROUPS, Rows
from hypothesis import strategies as st

# Every legal (compress_block_size, compress_stride, select_block_size).
WINDOWS = tuple(
    (compress, stride, select)
    for stride, compress, select in itertools.product(
        (16, 32, 48, 64), range(16, 129, 16), range(16, 129, 16)
    )
    if stride <= compress <= select and select % stride == 0
)


@dataclasses.dataclass(frozen=True)
class Geometry(Rows):
    """A legal call, but for the contents of its arrays, which `seed` decides.

    Attributes:
        lengths: compressed positions of each sequence.
        tokens: the S of layout BSND; unused with TND.
        token_counts: tokens of each sequence; None stands for one (TND) or `tokens` (BSND).
        slack: original tokens of each sequence past its last compressed position's window, at most
            `stride - 1`, or of one without positions, at most `compress - 1`. They count where
            tokens are `masked` or blocks are aligned.
        masked: whether to pass an atten_mask.
        importance: whose rule ranks the blocks; with init_blocks and local_blocks, those that are
            always chosen.
        group: query heads of a key/value head.
        spare_slots: columns of block_table beyond what the longest sequence needs.
        shared_pages: whether sequences may name the same pages.
        hostile: whether what must not be read holds garbage, or else zeros.
        spread: the standard deviation of the keys.
    """

    dtype: str = "float32"
    lengths: tuple[int, ...] = (40, 7)
    layout: str = "TND"
    tokens: int = 1
    token_counts: tuple[int, ...] | None = None
    masked: bool = False
    slack: tuple[int, ...] | None = None
    key_value_heads: int = 2
    group: int = 2
    head_size: int = 16
    value_size: int = 8
    page: int = 16
    spare_slots: int = 1
    window: tuple[int, int, int] = (32, 16, 64)
    k: int = 4
    importance: str = "cann"
    init_blocks: int = 1
    local_blocks: int = 2
    scale: float = 0.25
    return_lse: bool = False
    shared_pages: bool = False
    hostile: bool = True
    spread: float = 1.0
    seed: int = 0

    @property
    def original_lengths(self) -> tuple[int, ...]:
        """Original tokens of each sequence."""
        compress, stride, _ = self.window
        slack = self.slack or (0,) * len(self.lengths)
        return tuple(
            (length - 1) * stride + compress + rest if length else rest
            for length, rest in zip(self.lengths, slack, strict=True)
        )

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Select blocks of each sequence, for its last token."""
        if self.importance == "aligned":
            tokens = self.original_lengths
        else:
            covered = dataclasses.replace(self, slack=None)
            tokens = covered.original_lengths
        return tuple(-(-n // self.window[2]) for n in tokens)

    @property
    def is_canns(self) -> bool:
        """Whether blocks are chosen as CANN's kernel does."""
        return (self.importance, self.init_blocks, self.local_blocks) == ("cann", 1, 2)


@dataclasses.dataclass(frozen=True)
class Domain:
    """The legal calls that an implementation serves; by default all of them."""

    dtypes: tuple[str, ...] = tuple(DTYPES)
    least_length: int = 0
    least_tokens: int = 0
    most_tokens: int | None = None
    pads_selection: bool = True  # k may exceed the blocks of a sequence
    returns_lse: bool = True
    only_canns_choice: bool = False  # of blocks
    hostile: bool = True

    def contains(self, geometry: Geometry) -> bool:
        """Whether the implementation serves such a call."""
        return (
            geometry.dtype in self.dtypes
            and min(geometry.lengths) >= self.least_length
            and min(geometry.counts) >= self.least_tokens
            and (self.most_tokens is None or max(geometry.counts) <= self.most_tokens)
            and (self.pads_selection or geometry.k <= min(geometry.num_blocks))
            and (self.returns_lse or not geometry.return_lse)
            and (geometry.is_canns or not self.only_canns_choice)
        )


def build(geometry: Geometry) -> dict[str, Any]:
    """Returns the operator's arguments by name, all of them host values."""
    g, rng = geometry, np.random.default_rng(geometry.seed)
    garbage = np.random.default_rng([geometry.seed, 1])  # its draws leave the others' alone
    dtype = DTYPES[g.dtype]
    compress, stride, select = g.window
    counts, sequences = g.counts, len(g.lengths)
    # A sequence without a token needs none of its pages.
    needed = [-(-n // g.page) if count else 0 for n, count in zip(g.lengths, counts, strict=True)]
    slots = max(1, *(-(-n // g.page) for n in g.lengths)) + g.spare_slots
    num_pages = (max(needed) if g.shared_pages else sum(needed)) + 1  # one is nobody's

    illegal = [-(2**31), -1, num_pages, 2**31 - 1]
    table = (
        garbage.choice(illegal, (sequences, slots)) if g.hostile else np.zeros((sequences, slots))
    )
    table = table.astype(np.int32)
    pages = rng.permutation(num_pages)
    used = np.zeros((num_pages, g.page), bool)
    for b, num in enumerate(needed):
        if g.shared_pages:
            pages = rng.permutation(num_pages)
        table[b, :num], pages = pages[:num], pages[num:]
        for i in range(g.lengths[b] if num else 0):
            used[table[b, i // g.page], i % g.page] = True

    def pool(size: int, spread: float) -> np.ndarray:
        rows = spread * rng.standard_normal((num_pages, g.page, g.key_value_heads * size))
        unread = garbage.choice([np.nan, np.inf, -np.inf], rows.shape) if g.hostile else 0.0
        return np.where(used[..., None], rows, unread).astype(dtype)

    heads = g.group * g.key_value_heads
    if g.layout == "TND":
        query = rng.standard_normal((sum(counts), heads, g.head_size))
    else:
        query = rng.standard_normal((sequences, g.tokens, heads, g.head_size))
        if g.hostile:
            query[np.arange(g.tokens) >= np.array(counts)[:, None]] = np.nan

    arguments: dict[str, Any] = {
        "query": query.astype(dtype),
        "key": pool(g.head_size, g.spread),
        "value": pool(g.value_size, 1.0),
        "scale_value": g.scale,
        "head_num": heads,
        "key_value_head_num": g.key_value_heads,
        "select_block_size": select,
        "select_block_count": g.k,
        "page_block_size": g.page,
        "compress_block_size": compress,
        "compress_stride": stride,
        "block_table": table,
        "actual_cmp_seq_kvlen": np.array(g.lengths, np.int32),
        "layout": g.layout,
        "return_lse": g.return_lse,
        "importance": g.importance,
        "init_blocks": g.init_blocks,
        "local_blocks": g.local_blocks,
    }
    if g.token_counts is not None:
        arguments["actual_seq_qlen"] = np.array(g.token_counts, np.int32)
    if g.masked:
        arguments["atten_mask"] = np.zeros((1, 1), bool)
    if g.masked or g.importance == "aligned":
        arguments["actual_sel_seq_kvlen"] = np.array(g.original_lengths, np.int32)
    return arguments


@st.composite
def geometries(draw: st.DrawFn, domain: Domain) -> Geometry:
    """Draws from all of `domain`, small enough that an example takes well under a second."""
    integers, pick = st.integers, st.sampled_from
    window = draw(pick(WINDOWS))
    page = draw(pick(range(16, 129, 16)))
    sequences = draw(integers(1, 4))

    def per_sequence(least: int, most: int) -> tuple[int, ...]:
        # The ends of the range are where kernels go wrong.
        values = integers(least, most) | pick(sorted({least, min(least + 1, most), most}))
        return tuple(draw(st.lists(values, min_size=sequences, max_size=sequences)))

    lengths = per_sequence(domain.least_length, draw(pick([page, 40, 150, 300])))
    layout = draw(pick(["TND", "BSND"]))
    tokens, token_counts = 1, None
    if layout == "BSND":
        tokens = draw(integers(max(1, domain.least_tokens), domain.most_tokens or 5))
    if draw(st.booleans()):
        most = tokens if layout == "BSND" else domain.most_tokens or 5
        token_counts = per_sequence(domain.least_tokens, most)
        if layout == "TND" and not any(token_counts):
            token_counts = (1, *token_counts[1:])
    masked = draw(st.booleans())
    importance, init_blocks, local_blocks = "cann", 1, 2
    if not domain.only_canns_choice and draw(st.booleans()):
        importance = draw(pick(["cann", "aligned"]))
        forced = integers(0, 4) | pick([0, 1, 2, 2**31 - 1])
        init_blocks, local_blocks = draw(forced), draw(forced)
    # Few tokens past the last position let early ones see one position less.
    most_slack = window[1] - 1 if importance == "aligned" else min(window[1] - 1, 6)

    head_size = draw(pick([1, 64, 128, 192]) | integers(1, 192))
    value_size = draw(pick([1, min(128, head_size)]) | integers(1, min(128, head_size)))
    group = draw(pick(GROUPS))
    geometry = Geometry(
        dtype=draw(pick(domain.dtypes)),
        lengths=lengths,
        layout=layout,
        tokens=tokens,
        token_counts=token_counts,
        masked=masked,
        slack=per_sequence(0, most_slack) if masked or importance == "aligned" else None,
        importance=importance,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        key_value_heads=draw(integers(1, max(1, min(4, 128 // group)))),
        group=group,
        head_size=head_size,
        value_size=value_size,
        page=page,
        spare_slots=draw(integers(0, 2)),
        window=window,
        scale=draw(pick([0.0, head_size**-0.5, 1.0]) | st.floats(-2, 2, width=32)),
        return_lse=domain.returns_lse and draw(st.booleans()),
        shared_pages=draw(st.booleans()),
        hostile=domain.hostile,
        seed=draw(integers(0, 2**16)),
    )
    blocks = geometry.num_blocks
    most = max(blocks) + 3 if domain.pads_selection else min(blocks)
    return dataclasses.replace(geometry, k=draw(integers(1, most)))
