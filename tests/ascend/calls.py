"""A call of each operator that makes every kind of CANN call there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import compress.problems
import compress_attention.problems
import jax
import jax.numpy as jnp
import numpy as np
import select_attention.problems

import jax_nsa

# Several tokens and a mask.
COMPRESS_ATTENTION = compress_attention.problems.Geometry(
    dtype="bfloat16", lengths=(40, 33), token_counts=(3, 2), masked=True, k=2, group=2,
)  # fmt: skip
# What CANN's kernel takes as it is.
SELECT_ATTENTION = select_attention.problems.Geometry(
    dtype="bfloat16", lengths=(100, 37), token_counts=(2, 1), key_value_heads=1, head_size=192,
    value_size=128, page=64,
)  # fmt: skip
COMPRESS = compress.problems.Geometry(
    dtype="bfloat16", lengths=(49, 47, 80), token_counts=(3, 2, 1), page=64, head_sizes=(32, 16),
    bias=False,
)  # fmt: skip

_OPERATORS: Mapping[str, tuple[Callable[..., Any], Callable[[Any], dict[str, Any]], Any]] = {
    "compress_attention": (
        jax_nsa.nsa_compress_attention_infer, compress_attention.problems.build, COMPRESS_ATTENTION,
    ),
    "select_attention": (
        jax_nsa.nsa_select_attention_infer, select_attention.problems.build, SELECT_ATTENTION,
    ),
    "compress": (jax_nsa.nsa_compress_infer, compress.problems.build, COMPRESS),
}  # fmt: skip
TARGETS = tuple(_OPERATORS)
# CANN's name of each.
FUNCTIONS = {
    "compress_attention": "aclnnNsaCompressAttentionInfer",
    "select_attention": "aclnnNsaSelectedAttentionInfer",
    "compress": "aclnnNsaCompressWithCache",
}


def call(
    target: str,
    implementation: str = "ascend",
    *,
    lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[np.ndarray, ...]:
    """The results of the call, as bits; of one with other lengths if they are given."""
    operator, build, geometry = _OPERATORS[target]
    geometry = dataclasses.replace(geometry, lengths=lengths or geometry.lengths)
    arrays = jax.tree.map(
        lambda value: jnp.asarray(value) if isinstance(value, np.ndarray) else value,
        build(geometry),
    )
    results = operator(**arrays, implementation=implementation, **options)
    return tuple(
        array.view(f"u{array.itemsize}") for array in map(np.asarray, jax.tree.leaves(results))
    )
