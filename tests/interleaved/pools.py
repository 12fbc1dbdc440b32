"""Legal calls with one pool of keys and values, made of calls with a pool of each."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

LARGEST = 128  # size of a head whose values are as large as its keys


def interleave(key: Any, value: Any, heads: int) -> jax.Array:
    """The pool `[pages, page, 2 * heads, D]` of pools of 3 or 4 axes; short values end in noise."""
    key, value = (jnp.reshape(pool, (*pool.shape[:2], heads, -1)) for pool in (key, value))
    missing = key.shape[3] - value.shape[3]
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=7)
    return jnp.stack([key, value], axis=3).reshape(*key.shape[:2], 2 * heads, -1)


def interleaved(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call of an attention operator with an interleaved pool."""
    heads = arguments["key_value_head_num"]
    pool = interleave(arguments["key"], arguments["value"], heads)
    return {**arguments, "key": pool, "value": None, "kv_layout": "interleaved"}


def assert_same(results: Any, expected: Any, implementation: str = "cpu") -> None:
    """The kernels' bits do not depend on how they are called; of the reference XLA decides."""
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if implementation == "reference" else {"rtol": 0}
    for result, want in zip(results, expected, strict=True):
        np.testing.assert_allclose(np.asarray(result), np.asarray(want), **tolerance)


class Interleaved:
    """Makes each call of a contract's tests one with an interleaved pool.

    What the results must be is unchanged: that of the call as the test has it.
    """

    def apply(self, arguments: dict[str, Any], **options: Any) -> tuple:
        """Calls the operator, and leaves of attentions the size of the test's values."""
        heads = arguments["key_value_head_num"]
        key_size, size = (
            math.prod(arguments[name].shape[2:]) // heads for name in ("key", "value")
        )
        if key_size > LARGEST:
            pytest.skip("values of such heads are smaller than keys")
        results = super().apply(interleaved(arguments), **options)
        attentions = 1 + ("topk_indices" in arguments and "window_size" in arguments)
        by_head = arguments["head_num"] if arguments.get("layout") == "BSH" else 1

        def cut(attention: jax.Array) -> jax.Array:
            *leading, width = attention.shape
            values = attention.reshape(*leading, by_head, width // by_head)[..., :size]
            return values.reshape(*leading, by_head * size)

        return (*map(cut, results[:attentions]), *results[attentions:])
