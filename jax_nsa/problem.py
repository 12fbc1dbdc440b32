"""The static problem: block geometry, legal values and shapes. Plain Python, no JAX.

Symbols are those of the NSA paper (arXiv 2502.11089, section 3.3): compress blocks of `l` tokens
start every `d` tokens of the original sequence; select blocks of `l'` tokens tile it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

COMPRESS_STRIDES = (16, 32, 48, 64)
WINDOW_GRANULE = 16
WINDOW_MAX = 128
PAGE_GRANULE = 16
PAGE_MAX = 128
GROUP_MAX = 128
HEAD_SIZE_MAX = 192
VALUE_SIZE_MAX = 128
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ("TND", "BSND")
INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Window:
    """How compressed positions map to select blocks.

    Attributes:
        compress_block_size: `l`, original tokens that one compressed position summarises.
        compress_stride: `d`, original tokens between the starts of two compressed positions.
        select_block_size: `l'`, original tokens in a block that the next branch may select.
    """

    compress_block_size: int
    compress_stride: int
    select_block_size: int

    def __post_init__(self) -> None:
        sizes = range(WINDOW_GRANULE, WINDOW_MAX + 1, WINDOW_GRANULE)
        for name in ("compress_block_size", "select_block_size"):
            if getattr(self, name) not in sizes:
                raise ValueError(
                    f"{name} must be a multiple of {WINDOW_GRANULE} in "
                    f"[{WINDOW_GRANULE}, {WINDOW_MAX}], got {getattr(self, name)}"
                )
        if self.compress_stride not in COMPRESS_STRIDES:
            raise ValueError(
                f"compress_stride must be one of {COMPRESS_STRIDES}, got {self.compress_stride}"
            )
        if self.compress_block_size < self.compress_stride:
            raise ValueError(
                f"compress_block_size must be at least compress_stride ({self.compress_stride}), "
                f"got {self.compress_block_size}"
            )
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

    def num_blocks(self, length: Any) -> Any:
        """Select blocks of `length` compressed positions, `ceil(original_length / l')`.

        Works on ints, NumPy and JAX arrays alike. A length of 0 has no blocks.
        """
        return -(-self.original_length(length) // self.select_block_size) * (length > 0)


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static in one call and not in its shapes. Hashable: a primitive parameter.

    Attributes:
        window: the block geometry.
        scale: the factor on query-key products.
        key_value_heads: `Nkv`.
        select_block_count: `k`.
        return_lse: whether the log-sum-exp is a result.
        return_block_scores: whether each head's block scores are a result, after the log-sum-exp,
            which they need, and attention is float32: what merging sequences that are split over
            devices builds on.
    """

    window: Window
    scale: float
    key_value_heads: int
    select_block_count: int
    return_lse: bool = False
    return_block_scores: bool = False


class Shaped(Protocol):
    """What the shape rules need of an array."""

    @property
    def shape(self) -> tuple[Any, ...]: ...
    @property
    def dtype(self) -> Any: ...


def check_integer(name: str, value: Any) -> int:
    """Returns `value` as an int; refuses bools, floats and what is not known yet."""
    try:
        if isinstance(value, bool) or type(value).__name__ == "bool":
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a Python integer, got {value!r} of type {type(value).__name__}"
        ) from None


def check_count(name: str, value: Any) -> int:
    """Returns `value` as an int of at least 1 that int32 can hold."""
    integer = check_integer(name, value)
    if not 1 <= integer <= INT32_MAX:
        raise ValueError(f"{name} must be in [1, {INT32_MAX}], got {integer}")
    return integer


def check_scale(value: Any) -> float:
    """Returns `value` as a float that float32 can hold; refuses NaN and infinities."""
    if hasattr(value, "dtype"):  # a NumPy or JAX scalar
        kinds = ("float", "bfloat", "int", "uint")
        real = value.shape == () and value.dtype.name.startswith(kinds)
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real:
        raise TypeError(
            f"scale_value must be a real number, got {value!r} of type {type(value).__name__}"
        )
    try:
        scale = float(value)
    except OverflowError:
        scale = math.inf
    except TypeError as error:
        raise TypeError(
            f"scale_value must be known when the call is traced, got {value!r}: {error}"
        ) from None
    if not abs(scale) <= 3.4028234663852886e38:
        raise ValueError(f"scale_value must be finite in float32, got {scale}")
    return scale


def check_shapes(
    problem: Problem,
    query: Shaped,
    key: Shaped,
    value: Shaped,
    block_table: Shaped,
    *,
    layout: str,
    head_num: int,
    page_block_size: int,
) -> None:
    """Holds the operands' shapes to the rules of the operator, naming the first one broken.

    Args:
        problem: the static problem.
        query: `[T, N, D]` for layout TND, `[B, S, N, D]` for BSND.
        key: `[num_blocks, page, Nkv*D]`.
        value: `[num_blocks, page, Nkv*Dv]`.
        block_table: `[B, P]`.
        layout: "TND" or "BSND".
        head_num: `N` as the caller states it.
        page_block_size: `page` as the caller states it.

    Raises:
        ValueError: names the argument, what it has and what is legal.
    """
    query_axes = "[tokens, heads, head_size]" if layout == "TND" else "[B, S, heads, head_size]"
    for name, array, axes in (
        ("query", query, query_axes),
        ("key", key, "[pages, page_block_size, key_value_heads * head_size]"),
        ("value", value, "[pages, page_block_size, key_value_heads * value_head_size]"),
        ("block_table", block_table, "[sequences, pages_per_sequence]"),
    ):
        if len(array.shape) != axes.count(",") + 1:
            raise ValueError(f"{name} must have shape {axes}, got {tuple(array.shape)}")
        if any(isinstance(n, int) and n == 0 for n in array.shape):
            raise ValueError(f"{name} must not be empty, got shape {tuple(array.shape)}")

    heads, head_size = query.shape[-2:]
    key_value_heads = problem.key_value_heads
    if heads != head_num:
        raise ValueError(
            f"head_num must equal the heads of query, {heads} in shape {tuple(query.shape)}, "
            f"got {head_num}"
        )
    if heads % key_value_heads:
        raise ValueError(
            f"head_num must be a multiple of key_value_head_num ({key_value_heads}), got {heads}"
        )
    group = heads // key_value_heads
    if GROUP_MAX % group:
        raise ValueError(
            f"head_num / key_value_head_num must divide {GROUP_MAX}, "
            f"got {heads} / {key_value_heads} = {group}"
        )
    if head_size > HEAD_SIZE_MAX:
        raise ValueError(f"query's head size must be at most {HEAD_SIZE_MAX}, got {head_size}")
    if key.shape[2] != key_value_heads * head_size:
        raise ValueError(
            "key's last axis must be key_value_head_num * head_size = "
            f"{key_value_heads} * {head_size} = {key_value_heads * head_size}, "
            f"got {key.shape[2]} in shape {tuple(key.shape)}"
        )
    if value.shape[2] % key_value_heads:
        raise ValueError(
            f"value's last axis must be a multiple of key_value_head_num ({key_value_heads}), "
            f"got {value.shape[2]} in shape {tuple(value.shape)}"
        )
    value_size = value.shape[2] // key_value_heads
    if value_size > min(VALUE_SIZE_MAX, head_size):
        raise ValueError(
            f"value's head size must be at most {VALUE_SIZE_MAX} and at most query's "
            f"({head_size}), got {value_size}"
        )
    if page_block_size % PAGE_GRANULE or not 0 < page_block_size <= PAGE_MAX:
        raise ValueError(
            f"page_block_size must be a multiple of {PAGE_GRANULE} up to {PAGE_MAX}, "
            f"got {page_block_size}"
        )
    for name, array in (("key", key), ("value", value)):
        if array.shape[1] != page_block_size:
            raise ValueError(
                f"{name}'s second axis must be page_block_size ({page_block_size}), "
                f"got shape {tuple(array.shape)}"
            )
    if key.shape[0] != value.shape[0]:
        raise ValueError(
            f"key and value must have as many pages, got {key.shape[0]} and {value.shape[0]}"
        )
    if layout == "BSND" and query.shape[0] != block_table.shape[0]:
        raise ValueError(
            "block_table must have a row for each sequence of query, "
            f"got shapes {tuple(block_table.shape)} and {tuple(query.shape)}"
        )


def check_lengths(lengths: Sequence[int], *, capacity: int) -> None:
    """Holds `actual_cmp_seq_kvlen` to `[0, capacity]`, the rows its block-table row can name."""
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"actual_cmp_seq_kvlen[{b}] must be in [0, {capacity}] (the block table's pages "
                f"times page_block_size), got {length}"
            )


def check_token_counts(counts: Sequence[int], *, layout: str, tokens: int) -> None:
    """Holds `actual_seq_qlen` to the query's token axis (T for TND, S for BSND)."""
    for b, count in enumerate(counts):
        if count < 0 or (layout == "BSND" and count > tokens):
            legal = f"in [0, {tokens}]" if layout == "BSND" else "at least 0"
            raise ValueError(f"actual_seq_qlen[{b}] must be {legal}, got {count}")
    if layout == "TND" and sum(counts) != tokens:
        raise ValueError(
            f"actual_seq_qlen must sum to query's tokens ({tokens}), got a sum of {sum(counts)}"
        )


def check_select_lengths(
    select_lengths: Iterable[int], lengths: Iterable[int], *, window: Window
) -> None:
    """Holds `actual_sel_seq_kvlen` to the lengths that compress to `actual_cmp_seq_kvlen`."""
    for b, (select, length) in enumerate(zip(select_lengths, lengths, strict=True)):
        compressed = (
            max(select - window.compress_block_size, -window.compress_stride)
            // window.compress_stride
            + 1
        )
        if select < 0 or compressed != length:
            first = window.original_length(length) if length else 0
            last = window.original_length(length + 1) - 1
            raise ValueError(
                f"actual_sel_seq_kvlen[{b}] must be in [{first}, {last}], the original lengths "
                f"that compress to actual_cmp_seq_kvlen[{b}] = {length}, got {select}"
            )


def check_page_ids(
    block_table: Any,
    lengths: Any,
    *,
    page_block_size: int,
    num_pages: int,
) -> None:
    """Holds the block-table entries that the lengths need to `[0, num_pages)`."""
    for b, (row, length) in enumerate(zip(block_table, lengths, strict=True)):
        for p in range(math.ceil(length / page_block_size)):
            if not 0 <= row[p] < num_pages:
                raise ValueError(
                    f"block_table[{b}, {p}] must be in [0, {num_pages}), the pages of key and "
                    f"value, got {row[p]}"
                )
