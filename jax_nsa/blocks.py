"""The geometry of blocks: which original tokens a compressed position or a selectable block covers.

Symbols are those of the NSA paper (arXiv 2502.11089, section 3.3): compress windows of `l` tokens
start every `d` tokens of the original sequence; select blocks of `l'` tokens tile it, so that block
`j` holds tokens `[j * l', (j + 1) * l')`. Plain Python, no JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Any

COMPRESS_STRIDES = (16, 32, 48, 64)
BLOCK_GRANULE = 16
BLOCK_MAX = 128


def check_block_size(name: str, size: int) -> int:
    """Returns a legal size of a block in tokens: a multiple of 16 up to 128."""
    if size not in range(BLOCK_GRANULE, BLOCK_MAX + 1, BLOCK_GRANULE):
        raise ValueError(
            f"{name} must be a multiple of {BLOCK_GRANULE} in [{BLOCK_GRANULE}, {BLOCK_MAX}], "
            f"got {size}"
        )
    return size


def check_stride(compress_block_size: int, compress_stride: int) -> None:
    """Checks that the stride of compress windows is legal, and that they overlap or touch."""
    if compress_stride not in COMPRESS_STRIDES:
        raise ValueError(
            f"compress_stride must be one of {COMPRESS_STRIDES}, got {compress_stride}"
        )
    if compress_block_size < compress_stride:
        raise ValueError(
            f"compress_block_size must be at least compress_stride ({compress_stride}), "
            f"got {compress_block_size}"
        )


def compressed_length(tokens: Any, compress_block_size: int, compress_stride: int) -> Any:
    """Compressed positions of `tokens` original ones: `(tokens - l)//d + 1`, from `l` on.

    Works on ints, NumPy and JAX arrays alike; `tokens >= 0`.
    """
    positions = (tokens - compress_block_size) // compress_stride + 1
    return positions * (tokens >= compress_block_size)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How original tokens, compressed positions and select blocks lie over each other.

    Attributes:
        compress_block_size: `l`, original tokens that one compressed position summarises.
        compress_stride: `d`, original tokens between the starts of two compressed positions.
        select_block_size: `l'`, original tokens in a block that the next branch may select.

    Raises:
        ValueError: the sizes are illegal or do not fit each other.
    """

    compress_block_size: int
    compress_stride: int
    select_block_size: int

    def __post_init__(self) -> None:
        check_block_size("compress_block_size", self.compress_block_size)
        check_block_size("select_block_size", self.select_block_size)
        check_stride(self.compress_block_size, self.compress_stride)
        if self.select_block_size < self.compress_block_size:
            raise ValueError(
                "select_block_size must be at least compress_block_size "
                f"({self.compress_block_size}), got {self.select_block_size}"
            )
        if self.select_block_size % self.compress_stride:
            raise ValueError(
                f"select_block_size must be a multiple of compress_stride "
                f"({self.compress_stride}), got {self.select_block_size}"
            )

    @property
    def strides_per_select_block(self) -> int:
        """`M = l'/d`: compressed positions that start in one select block."""
        return self.select_block_size // self.compress_stride

    @property
    def strides_per_compress_block(self) -> int:
        """`L = floor(l/d)`: select-block strides that one compressed position covers."""
        return self.compress_block_size // self.compress_stride

    def original_length(self, length: Any) -> Any:
        """Original tokens that `length` compressed positions cover: `(length - 1)*d + l`.

        Works on ints, NumPy and JAX arrays alike; meaningful for `length >= 1`.
        """
        return (length - 1) * self.compress_stride + self.compress_block_size

    def compressed_length(self, tokens: Any) -> Any:
        """Compressed positions of `tokens` original ones: `(tokens - l)//d + 1`, from `l` on.

        Works on ints, NumPy and JAX arrays alike; `tokens >= 0`.
        """
        return compressed_length(tokens, self.compress_block_size, self.compress_stride)

    def num_blocks(self, length: Any) -> Any:
        """Select blocks of `length` compressed positions, `ceil(original_length / l')`.

        Works on ints, NumPy and JAX arrays alike. A length of 0 has no blocks.
        """
        return -(-self.original_length(length) // self.select_block_size) * (length > 0)

    def universe(self, tokens: Any) -> Any:
        """Select blocks that hold `tokens` original tokens, `ceil(tokens / l')`.

        Works on ints, NumPy and JAX arrays alike.
        """
        return -(-tokens // self.select_block_size)

    def max_universe(self, length: Any) -> Any:
        """Select blocks of the longest sequence that has `length` compressed positions.

        That sequence ends one token before its next compress window: `length*d + l - 1` tokens.
        """
        return self.universe(length * self.compress_stride + self.compress_block_size - 1)
