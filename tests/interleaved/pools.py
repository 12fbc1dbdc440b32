"""Legal calls with one pool of keys and values, made of calls with a pool of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nsa import (
    nsa_compress_attention_infer,
    nsa_select_attention_infer,
    nsa_window_attention_infer,
)

LARGEST = 128  # size of a head whose values are as large as its keys
TRACED = (
    "query", "key", "block_table", "topk_indices", "actual_cmp_seq_kvlen", "actual_seq_kvlen",
    "actual_seq_qlen", "actual_sel_seq_kvlen",
)  # fmt: skip


def interleave(key: Any, value: Any, heads: int) -> np.ndarray:
    """The pool `[pages, page, 2 * heads, D]` of pools of 3 or 4 axes; short values end in noise."""
    key, value = (np.reshape(pool, (*pool.shape[:2], heads, -1)) for pool in (key, value))
    both = np.full((*key.shape[:3], 2, key.shape[3]), 7, key.dtype)
    both[..., 0, :] = key
    both[..., 1, : value.shape[3]] = value
    return both.reshape(*key.shape[:2], 2 * heads, -1)


def interleaved(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call of an attention operator with an interleaved pool."""
    heads = arguments["key_value_head_num"]
    pool = interleave(arguments["key"], arguments["value"], heads)
    return {**arguments, "key": pool, "value": None, "kv_layout": "interleaved"}


def value_size(arguments: dict[str, Any]) -> int:
    """The size of a value's head."""
    return np.size(arguments["value"][0, 0]) // arguments["key_value_head_num"]


def operator_of(arguments: dict[str, Any]) -> Callable[..., Any]:
    """The operator whose arguments these are."""
    if "compress_stride" in arguments:
        return nsa_compress_attention_infer
    return nsa_select_attention_infer if "topk_indices" in arguments else nsa_window_attention_infer


def assert_same(results: Any, expected: Any, implementation: str = "cpu") -> None:
    """The kernels' bits do not depend on how they are called; of the reference XLA decides."""
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if implementation == "reference" else {"rtol": 0}
    for result, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(result), np.asarray(want), **tolerance)


class Interleaved:
    """Makes each call of a contract's tests one with an interleaved pool.

    What the results must be is unchanged: that of the call as the test has it.
    """

    implementation: str

    def call(self, arguments: dict[str, Any], form: str = "eager, arrays", **options: Any) -> tuple:
        """Calls the operator, and leaves of attentions the size of the test's values."""
        heads = arguments["key_value_head_num"]
        if np.size(arguments["key"][0, 0]) // heads > LARGEST:
            pytest.skip("values of such heads are smaller than keys")
        size, packed_heads = value_size(arguments), arguments.get("layout") == "BSH"
        operator, arguments = operator_of(arguments), interleaved(arguments)
        traced = [n for n in (TRACED if form.endswith("arrays") else TRACED[:2]) if n in arguments]
        static = {n: v for n, v in arguments.items() if n not in traced}

        def run(arrays: dict[str, jax.Array]) -> tuple:
            results = operator(**static, **arrays, implementation=self.implementation, **options)
            return results if isinstance(results, tuple) else (results,)

        run = jax.jit(run) if form.startswith("jit") else run
        results = jax.block_until_ready(run({n: jnp.asarray(arguments[n]) for n in traced}))
        attentions = 1 + ("topk_indices" in arguments and "window_size" in arguments)
        whole = arguments["head_num"] if packed_heads else 1

        def cut(attention: jax.Array) -> jax.Array:
            *leading, width = attention.shape
            by_head = attention.reshape(*leading, whole, width // whole)[..., :size]
            return by_head.reshape(*leading, whole * size)

        return (*map(cut, results[:attentions]), *results[attentions:])
