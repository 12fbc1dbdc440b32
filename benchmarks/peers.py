"""What else computes (part of) the same."""

from __future__ import annotations

from collections.abc import Callable

import jax

from benchmarks.shapes import HEAD_SIZE, VALUE_SIZE, Shape


def torch_attention(shape: Shape) -> Callable | None:
    """PyTorch's attention over gathered pages, without a selection; None where it can't run."""
    try:
        import torch
    except ImportError:
        return None
    if shape.ragged or jax.default_backend() != "cpu":
        return None

    def run(query, key, value, table, lengths):
        del lengths
        query, key, value, table = map(torch.from_dlpack, (query, key, value, table))
        pages = table.long()
        heads = shape.key_value_heads
        k = key[pages].view(shape.sequences, -1, heads, HEAD_SIZE).transpose(1, 2)
        v = value[pages].view(shape.sequences, -1, heads, VALUE_SIZE).transpose(1, 2)
        q = query.transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run
