"""The operator in float64 NumPy, written from its definition and sharing nothing with the product.

Loops where the definition has an index. Only legal calls: what a faulty one does is for the tests
to say.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Expected:
    """The true results of a call in query's layout, and how hard they are to compute.

    Attributes:
        attention: over the chosen blocks; None where none are given.
        window_attention: over the newest tokens; None without a window.
        lse: of the first, `[..., N]`.
        window_lse: of the second.
        sizes: for each of the two attentions `[..., N]`, the norm that it has if its terms do not
            cancel.
        score_size: `[..., N]`, the largest `sum |scale * q * k|` behind a score.
    """

    attention: np.ndarray | None
    window_attention: np.ndarray | None
    lse: np.ndarray
    window_lse: np.ndarray
    sizes: tuple[np.ndarray, np.ndarray]
    score_size: np.ndarray


def select_attention(
    query, key, value, topk_indices, scale_value, head_num, key_value_head_num,
    select_block_size, page_block_size, layout, block_table, actual_seq_kvlen,
    actual_seq_qlen=None, window_size=None,
) -> Expected:  # fmt: skip
    """Computes all results; `topk_indices` None leaves the blocks out."""
    query, key, value = (np.asarray(a).astype(np.float64) for a in (query, key, value))
    shape = query.shape
    if layout == "BSH":
        query = query.reshape(*shape[:2], head_num, -1)
    pages = key.shape[0]
    key = key.reshape(pages, page_block_size, key_value_head_num, -1)
    value = value.reshape(pages, page_block_size, key_value_head_num, -1)
    if topk_indices is not None:
        leading = query.shape[:-2]
        topk_indices = np.asarray(topk_indices).reshape(*leading, key_value_head_num, -1)

    def zeros(*tail):
        return np.zeros((*query.shape[:-2], head_num, *tail))

    attentions = zeros(value.shape[-1]), zeros(value.shape[-1])
    lses = zeros() - np.inf, zeros() - np.inf
    sizes, score_size = (zeros(), zeros()), zeros()
    group = head_num // key_value_head_num
    first_row = 0
    for b, length in enumerate(actual_seq_kvlen):
        if actual_seq_qlen is not None:
            tokens = int(actual_seq_qlen[b])
        else:
            tokens = 1 if layout == "TND" else query.shape[1]
        for t in range(tokens):
            row = first_row + t if layout == "TND" else (b, t)
            limit = int(length) - (tokens - 1 - t)
            for h in range(key_value_head_num):
                chosen = []
                if topk_indices is not None:
                    for i in topk_indices[row][h]:
                        if i >= 0:
                            end = min((i + 1) * select_block_size, limit)
                            chosen += range(i * select_block_size, end)
                newest = range(max(0, limit - (window_size or 0)), max(limit, 0))
                for n in range(h * group, (h + 1) * group):
                    for which, positions in enumerate((chosen, newest)):
                        if not len(positions):
                            continue
                        at = [
                            (block_table[b][p // page_block_size], p % page_block_size)
                            for p in positions
                        ]
                        k = np.stack([key[page, r, h] for page, r in at])
                        v = np.stack([value[page, r, h] for page, r in at])
                        s = scale_value * (k @ query[row][n])
                        w = np.exp(s - s.max())
                        p = w / w.sum()
                        attentions[which][row][n] = p @ v
                        lses[which][row][n] = s.max() + np.log(w.sum())
                        # What a position listed twice is off by, it is off by twice.
                        _, first, listed = np.unique(
                            positions, return_index=True, return_inverse=True
                        )
                        share = np.bincount(listed, p)
                        sizes[which][row][n] = np.sqrt((share**2 @ v[first] ** 2).sum())
                        bound = abs(scale_value) * (abs(k) @ abs(query[row][n])).max()
                        score_size[row][n] = max(score_size[row][n], bound)
        first_row += tokens

    def in_layout(attention):
        return attention.reshape(*shape[:2], -1) if layout == "BSH" else attention

    return Expected(
        None if topk_indices is None else in_layout(attentions[0]),
        None if window_size is None else in_layout(attentions[1]),
        *lses,
        sizes,
        score_size,
    )
