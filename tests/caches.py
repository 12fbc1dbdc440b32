"""Small caches that grow."""

from __future__ import annotations

import numpy as np

from jax_nsa import PagePools, PageTables

HEADS, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE = 4, 2, 8, 4
SIZES = {"slots": 3, "pages": 9, "pages_per_slot": 5, "page_block_size": 16}
WINDOWS = [(16, 16), (32, 16), (48, 32), (64, 64)]


def weights(size, seed=5):
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=(size, KEY_VALUE_HEADS)).astype(np.float32) for _ in range(2))


def empty(block, stride, dtype="float32", **sizes):
    tables = PageTables.empty(
        **SIZES | sizes, compress_block_size=block, compress_stride=stride
    )  # fmt: skip
    return tables, PagePools.empty(tables, KEY_VALUE_HEADS, HEAD_SIZE, VALUE_SIZE, dtype)
