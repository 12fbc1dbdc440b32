"""Decode steps with names: the sizes that are measured, tried and quoted, in one table."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_nsa.blocks import Blocks


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one decode step.

    Attributes:
        about: what the shape stands for.
        sequences: how many sequences.
        heads: query heads.
        key_value_heads: key and value heads.
        length: compressed positions of each sequence.
        query_tokens: new tokens of each sequence.
        ragged: whether lengths are drawn from [1, length] instead.
        head_size: of queries and keys.
        value_size: of values.
        page: rows in a page of either cache.
        blocks: the geometry of blocks.
        select_count: blocks chosen for each token and key/value head.
        window: the newest tokens that the sliding window holds.
    """

    about: str
    sequences: int
    heads: int
    key_value_heads: int
    length: int
    query_tokens: int = 1
    ragged: bool = False
    head_size: int = 192
    value_size: int = 128
    page: int = 128
    blocks: Blocks = dataclasses.field(
        default_factory=lambda: Blocks(
            compress_block_size=32, compress_stride=16, select_block_size=64
        )
    )
    select_count: int = 16
    window: int = 512

    @property
    def lengths(self) -> np.ndarray:
        """Compressed positions of each sequence, int32."""
        if not self.ragged:
            return np.full(self.sequences, self.length, np.int32)
        drawn = np.random.default_rng(0).integers(1, self.length + 1, self.sequences)
        return drawn.astype(np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """Original tokens of each sequence, int32: the fewest that make its positions."""
        return np.asarray(self.blocks.original_length(self.lengths), np.int32)

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's keys and values, in bfloat16."""
        return self.key_value_heads * (self.head_size + self.value_size) * 2

    def __str__(self) -> str:
        least, most = (1 if self.ragged else self.length), self.length
        lengths, tokens = (
            f"{first} to {last}" if self.ragged else f"{last}"
            for first, last in (
                (least, most),
                map(self.blocks.original_length, (least, most)),
            )
        )
        new = f", {self.query_tokens} new tokens each" if self.query_tokens > 1 else ""
        return (
            f"{self.sequences} x {lengths} compressed positions ({tokens} original tokens), "
            f"{self.heads}/{self.key_value_heads} heads{new}: {self.about}"
        )


SHAPES = {
    "trial": Shape("what python -m jax_nsa tries", 4, 8, 2, 255),
    "tiny": Shape(
        "next to nothing to read, so that a call's own cost shows",
        1,
        8,
        2,
        64,
        select_count=4,
        window=64,
    ),
    "seed": Shape("the example in torch_npu's documentation", 20, 8, 2, 1024),
    "b1": Shape("one long sequence, few pieces for many processors", 1, 64, 4, 8192),
    "b8": Shape("a small batch", 8, 64, 4, 2048),
    "g1": Shape("one head in each group, so that no key is used twice", 16, 4, 4, 2048),
    "wide": Shape("as seed, with groups of 16 heads", 20, 64, 4, 1024),
    "cann": Shape("the example in C++ of CANN, Ascend's toolkit", 20, 64, 4, 4096),
    "cann4": Shape("the same with drafted tokens to verify", 20, 64, 4, 4096, query_tokens=4),
    "b64": Shape("a large batch", 64, 8, 2, 8192),
    "b64r": Shape("the same with unequal lengths", 64, 8, 2, 8192, ragged=True),
    "b128": Shape("the largest batch", 128, 64, 4, 8192),
}
