"""Legal calls with one pool of keys and values, made of calls with a pool of each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nsa import PagedKV

LARGEST = 128  # size of a head whose values are as large as its keys


RANKS = (3, 4, 5)  # of a pool of both


def interleave(key: Any, value: Any, heads: int, rank: int = 4) -> jax.Array:
    """One pool of pools of 3 or 4 axes; short values end in noise.

    Args:
        key: the pool of keys.
        value: that of values.
        heads: key/value heads.
        rank: 3, `[pages, page, heads * 2 * D]`; 4, `[pages, page, 2 * heads, D]`; or 5, `[pages,
            page, heads, 2, D]`.
    """
    key, value = (jnp.reshape(pool, (*pool.shape[:2], heads, -1)) for pool in (key, value))
    missing = key.shape[3] - value.shape[3]
    value = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)), constant_values=7)
    row = {3: (-1,), 4: (2 * heads, key.shape[3]), 5: (heads, 2, key.shape[3])}[rank]
    return jnp.stack([key, value], axis=3).reshape(*key.shape[:2], *row)


def interleaved(arguments: dict[str, Any], rank: int = 4) -> dict[str, Any]:
    """The same call of an attention operator with an interleaved pool."""
    heads = arguments["key_value_head_num"]
    pool = interleave(arguments["key"], arguments["value"], heads, rank)
    return {**arguments, "key": pool, "value": None, "kv_layout": "interleaved"}


def interleaved_step(arguments: dict[str, Any], rank: int = 4) -> dict[str, Any]:
    """The same step with an interleaved pool in each of its caches."""
    heads = arguments["key_value_head_num"]
    caches = {
        name: dataclasses.replace(
            cache, key=interleave(cache.key, cache.value, heads, rank), value=None
        )
        for name, cache in arguments.items()
        if isinstance(cache, PagedKV)
    }
    return {**arguments, **caches, "kv_layout": "interleaved"}


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
