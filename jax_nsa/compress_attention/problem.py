"""The static problem of the compressed branch, and the rules that only it has. No JAX."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_nsa.blocks import Blocks
from jax_nsa.checks import Integers

LAYOUTS = ("TND", "BSND")
IMPORTANCES = ("cann", "aligned")


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static in one call and not in its shapes. Hashable: a primitive parameter.

    Attributes:
        blocks: the block geometry.
        scale: the factor on query-key products.
        key_value_heads: `Nkv`.
        select_block_count: `k`.
        importance: whose rule ranks blocks: "cann", that of CANN, Ascend's toolkit, or "aligned",
            that of open training codes.
        init_blocks: how many of the first blocks are always chosen.
        local_blocks: how many of the last blocks are always chosen.
        causal: whether a token sees only what compress windows that ended before it hold.
        return_lse: whether the log-sum-exp is a result.
        return_block_scores: whether each head's block scores are a result, after the log-sum-exp,
            which they need, and attention is float32: what merging sequences that are split over
            devices builds on.
        interleaved: whether one pool holds keys and values.
    """

    blocks: Blocks
    scale: float
    key_value_heads: int
    select_block_count: int
    importance: str = "cann"
    init_blocks: int = 1
    local_blocks: int = 2
    causal: bool = False
    return_lse: bool = False
    return_block_scores: bool = False
    interleaved: bool = False

    @property
    def aligned(self) -> bool:
        """Whether open training codes' rule ranks the blocks."""
        return self.importance == "aligned"

    @property
    def is_canns(self) -> bool:
        """Whether the choice of blocks is the one that CANN's kernel makes."""
        return (self.importance, self.init_blocks, self.local_blocks) == ("cann", 1, 2)

    def with_heads(self, key_value_heads: int) -> Problem:
        """The problem of a part of the heads."""
        return dataclasses.replace(self, key_value_heads=key_value_heads)

    def max_blocks(self, capacity: int) -> int:
        """Blocks of the longest sequence with `capacity` compressed positions."""
        if self.aligned:
            return self.blocks.max_universe(capacity)
        return self.blocks.num_blocks(capacity)

    def scalars(self) -> dict[str, int | float]:
        """What kernels are told, by name."""
        return {
            "scale": self.scale,
            "key_value_heads": self.key_value_heads,
            **dataclasses.asdict(self.blocks),
            "aligned": int(self.aligned),
            "init_blocks": self.init_blocks,
            "local_blocks": self.local_blocks,
            "causal": int(self.causal),
            "interleaved": int(self.interleaved),
        }


def check_select_lengths(select_lengths: Integers, lengths: Integers, *, blocks: Blocks) -> None:
    """Refuses an `actual_sel_seq_kvlen` that does not compress to `actual_cmp_seq_kvlen`."""
    if select_lengths.host is None or lengths.host is None:
        return
    select, length = select_lengths.host.astype(object), lengths.host.astype(object)
    first = np.where(lengths.host > 0, blocks.original_length(length), 0)
    last = blocks.original_length(length + 1) - 1
    bad = (select < first) | (select > last)
    if bad.any():
        b = int(np.argmax(bad))
        raise ValueError(
            f"actual_sel_seq_kvlen[{b}] must be in [{first[b]}, {last[b]}], the original lengths "
            f"that compress to actual_cmp_seq_kvlen[{b}] = {length[b]}, got {select[b]}"
        )
