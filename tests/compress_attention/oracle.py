"""The operator in float64 NumPy, written from its definition and sharing nothing with the product.

Loops where the definition has an index, so that a reader can hold it against the formulas. Only
legal calls: what a faulty one does is for the tests to say.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Expected:
    """The true results of a call, with query's leading axes, and how hard they are to compute.

    Attributes:
        attention: `[..., N, Dv]`.
        importance: `[..., Nkv, blocks]` for the blocks of a full block table: +inf where a block is
            always chosen, -inf where the sequence has none.
        topk_indices: `[..., Nkv, k]`.
        lse: `[..., N]`.
        block_scores: `[..., N, blocks]`, each head's own, none forced.
        attention_size: `[..., N]`, the norm that `attention` has if its terms do not cancel.
        score_size: `[..., N]`, the largest `sum |scale * q * k|` behind a score.
    """

    attention: np.ndarray
    importance: np.ndarray
    topk_indices: np.ndarray
    lse: np.ndarray
    block_scores: np.ndarray
    attention_size: np.ndarray
    score_size: np.ndarray


def compress_attention(
    query,
    key,
    value,
    scale_value,
    head_num,
    key_value_head_num,
    select_block_size,
    select_block_count,
    page_block_size,
    compress_block_size,
    compress_stride,
    atten_mask=None,
    block_table=None,
    actual_seq_qlen=None,
    actual_cmp_seq_kvlen=None,
    actual_sel_seq_kvlen=None,
    *,
    layout="TND",
    return_lse=False,
    importance="cann",
    init_blocks=1,
    local_blocks=2,
) -> Expected:
    """Computes all results of a call with the operator's own arguments."""
    del return_lse
    query, key, value = (np.asarray(a).astype(np.float64) for a in (query, key, value))
    sequences, slots = np.shape(block_table)
    value_size = value.shape[2] // key_value_head_num
    aligned = importance == "aligned"
    # Original tokens that as many positions cover as the block table can name: at least, or where
    # tokens past the last position count, too, at most.
    capacity = (slots * page_block_size - 1) * compress_stride + compress_block_size
    if aligned:
        capacity += compress_stride - 1
    max_blocks = math.ceil(capacity / select_block_size)

    leading = query.shape[:-2]
    expected = Expected(
        attention=np.zeros((*leading, head_num, value_size)),
        importance=np.full((*leading, key_value_head_num, max_blocks), -np.inf),
        topk_indices=np.full((*leading, key_value_head_num, select_block_count), -1),
        lse=np.full((*leading, head_num), -np.inf),
        block_scores=np.zeros((*leading, head_num, max_blocks)),
        attention_size=np.zeros((*leading, head_num)),
        score_size=np.zeros((*leading, head_num)),
    )

    first_row = 0
    for b in range(sequences):
        if actual_seq_qlen is not None:
            tokens = int(actual_seq_qlen[b])
        else:
            tokens = 1 if layout == "TND" else query.shape[1]
        length = int(actual_cmp_seq_kvlen[b])
        for t in range(tokens):
            row = first_row + t if layout == "TND" else (b, t)
            visible = length
            if atten_mask is not None and length > 0:
                covered = (length - 1) * compress_stride + compress_block_size
                if tokens - 1 - t > int(actual_sel_seq_kvlen[b]) - covered:
                    visible = length - 1
            # The original tokens that are divided into blocks.
            divided = (length - 1) * compress_stride + compress_block_size if length else 0
            if aligned:
                divided = int(actual_sel_seq_kvlen[b])
                if atten_mask is not None:
                    divided = max(0, divided - (tokens - 1 - t))
            for h in range(key_value_head_num):
                _attend_group(
                    expected, row, h,
                    query=query[row], key=key, value=value, table=block_table[b],
                    visible=visible, scale=scale_value, group=head_num // key_value_head_num,
                    page=page_block_size, stride=compress_stride, compress=compress_block_size,
                    select=select_block_size, num_blocks=math.ceil(divided / select_block_size),
                    aligned=aligned, init_blocks=init_blocks, local_blocks=local_blocks,
                )  # fmt: skip
        first_row += tokens
    return expected


def _attend_group(
    expected, row, h, *, query, key, value, table, visible, scale, group, page, stride, compress,
    select, num_blocks, aligned, init_blocks, local_blocks,
):  # fmt: skip
    """Fills in one token's results for key/value head `h` and the query heads that share it."""
    heads = slice(h * group, (h + 1) * group)
    head_size, value_size = query.shape[-1], expected.attention.shape[-1]
    q = query[heads]

    # Step 1: position i lives in page table[i // page], row i % page.
    k = np.zeros((visible, head_size))
    v = np.zeros((visible, value_size))
    for i in range(visible):
        k[i] = key[table[i // page], i % page, h * head_size : (h + 1) * head_size]
        v[i] = value[table[i // page], i % page, h * value_size : (h + 1) * value_size]

    # Steps 2 to 4: softmax attention.
    p = np.zeros((group, visible))
    if visible:
        s = scale * (q @ k.T)
        peak = s.max(axis=1, keepdims=True)
        total = np.exp(s - peak).sum(axis=1, keepdims=True)
        p = np.exp(s - peak) / total
        expected.attention[row][heads] = p @ v
        expected.lse[row][heads] = (peak + np.log(total))[:, 0]
        expected.attention_size[row][heads] = np.sqrt((p**2 @ v**2).sum(axis=1))
        expected.score_size[row][heads] = abs(scale) * (abs(q) @ abs(k).T).max(axis=1)

    # Step 5: scores of the blocks, equation 9 of the paper, which counts blocks from 1.
    score = expected.block_scores[row][heads]
    for j in range(num_blocks):
        for m in range(select // stride):
            for n in range(compress // stride):
                # By the aligned rule M j + m - n, by CANN's M (j + 1) - m - n.
                i = select // stride * (j if aligned else j + 1) + (m if aligned else -m) - n
                if 0 <= i < visible:
                    score[:, j] += p[:, i]

    # Steps 6 and 7: importance, the first and the last blocks forced.
    importance = expected.importance[row][h]
    for j in range(num_blocks):
        forced = j < init_blocks or j + local_blocks >= num_blocks
        importance[j] = np.inf if forced else score[:, j].sum()

    # Step 8: the most important ones, descending, the lower index first among equals.
    order = sorted(range(num_blocks), key=lambda j: (-importance[j], j))
    indices = expected.topk_indices[row][h]
    chosen = order[: len(indices)]
    indices[: len(chosen)] = chosen
