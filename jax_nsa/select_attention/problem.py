"""The static problem of the selected and the window branch, and the rules that only they have."""

from __future__ import annotations

import dataclasses

import numpy as np

from jax_nsa.checks import Integers

LAYOUTS = ("BSND", "BSH", "TND")


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that is static in one call and not in its shapes. Hashable: a primitive parameter.

    Attributes:
        scale: the factor on query-key products.
        key_value_heads: `Nkv`.
        select_block_size: `l'`, tokens in a block; 0 where no blocks are attended to.
        window_size: how many of the newest tokens the window holds; 0 where there is no window.
        return_lse: whether each attention's log-sum-exp is a result.
        partial: whether the pools hold only a part of each sequence, positions `[0, P * page)` in
            numbers of their own: what lies outside is on other devices.
        interleaved: whether one pool holds keys and values.
        tokens_apart: whether the user's `topk_indices` have an axis of tokens, for messages.
    """

    scale: float
    key_value_heads: int
    select_block_size: int = 0
    window_size: int = 0
    return_lse: bool = False
    partial: bool = False
    interleaved: bool = False
    tokens_apart: bool = False

    def with_heads(self, key_value_heads: int) -> Problem:
        """The problem of a part of the heads."""
        return dataclasses.replace(self, key_value_heads=key_value_heads)

    def scalars(self) -> dict[str, int | float]:
        """What kernels are told, by name."""
        return {
            "scale": self.scale,
            "key_value_heads": self.key_value_heads,
            "select_block_size": self.select_block_size,
            "window_size": self.window_size,
            "partial": int(self.partial),
            "interleaved": int(self.interleaved),
            "tokens_apart": int(self.tokens_apart),
        }


def check_indices(
    indices: Integers, lengths: Integers, sequence_of_row: np.ndarray | None, *, block: int
) -> None:
    """Refuses known `topk_indices` that are neither -1 nor a block that their sequence has.

    Args:
        indices: `[rows, ..., Nkv, k]`.
        lengths: original tokens of each sequence.
        sequence_of_row: int[rows, ...], the sequence of each row, -1 where it holds no token, so
            that nobody looks at its ids; None where only the running program knows.
        block: tokens in a block.
    """
    if indices.host is None or sequence_of_row is None:
        return
    host, sequence = indices.host, sequence_of_row[..., None, None]
    most = np.full(sequence.shape, np.iinfo(np.int64).max)
    if lengths.host is not None:
        most = -(-lengths.host[sequence] // block) - 1
    bad = (sequence >= 0) & ((host < -1) | (host > most))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        place = f"topk_indices[{', '.join(map(str, at))}]"
        limit = int(np.broadcast_to(most, host.shape)[at])
        legal = "at least -1"
        if lengths.host is not None:
            legal = f"in [-1, {limit}], the blocks of {block} tokens that its sequence has"
        raise ValueError(f"{place} must be {legal}, got {int(host[at])}")
