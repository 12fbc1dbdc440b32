"""The operator in float64 NumPy, written from its definition and sharing nothing with the product.

Loops where the definition has an index. Only legal calls: what a faulty one does is for the tests
to say.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Expected:
    """What one cache is after a call.

    Attributes:
        rows: `{row: float64 [N, D]}`, the rows that are written and their true values.
        sizes: likewise the sums of their terms' magnitudes.
    """

    rows: dict[int, np.ndarray]
    sizes: dict[int, np.ndarray]


def compress(
    input,
    weight,
    slot_mapping,
    compress_block_size,
    compress_stride,
    page_block_size,
    *,
    block_table,
    actual_seq_len,
    cache,
    bias=None,
    actual_seq_qlen=None,
) -> Expected:
    """Computes what a call with one input writes, with the operator's own arguments."""
    del cache
    heads = weight.shape[1]
    pool = np.asarray(input).reshape(*input.shape[:2], heads, -1)
    weight = np.asarray(weight).astype(np.float64)
    expected = Expected({}, {})
    for b, length in enumerate(map(int, actual_seq_len)):
        count = 1 if actual_seq_qlen is None else int(actual_seq_qlen[b])
        for end in range(length - count + 1, length + 1):
            if end < compress_block_size or (end - compress_block_size) % compress_stride:
                continue
            slot = int(slot_mapping[b])
            if slot < 0:
                continue
            assert slot not in expected.rows, "two windows for one row"
            total = np.zeros(pool.shape[2:])
            size = np.zeros(pool.shape[2:])
            for t in range(compress_block_size):
                i = end - compress_block_size + t
                token = pool[block_table[b][i // page_block_size], i % page_block_size]
                term = token.astype(np.float64) * weight[t, :, None]
                total += term
                size += abs(term)
            if bias is not None:
                total += np.asarray(bias).astype(np.float64)
                size += abs(np.asarray(bias).astype(np.float64))
            expected.rows[slot], expected.sizes[slot] = total, size
    return expected
