"""Small calls that several test files vary, as functions of their arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention import oracle
from compress_attention.agreement import assert_agrees
from compress_attention.calls import FLOATS, INTEGERS
from compress_attention.problems import Geometry, build

from jax_nsa import nsa_compress_attention_infer

ONE_TOKEN = Geometry(lengths=(40, 7), hostile=False, k=3)
PACKED = Geometry(lengths=(40, 7), token_counts=(1, 3), masked=True, slack=(2, 0), hostile=False)
BATCHED = Geometry(
    lengths=(40, 7), layout="BSND", tokens=3, token_counts=(3, 1), masked=True, slack=(0, 1),
    hostile=False, return_lse=True,
)  # fmt: skip
LAYOUTS = {"one token": ONE_TOKEN, "packed": PACKED, "batched": BATCHED}

# Sequences enough that one of them can be spoilt beside others.
FOUR = Geometry(lengths=(40, 17, 9, 33), k=3, return_lse=True, hostile=False, spare_slots=0)
FOUR_PACKED = replace(FOUR, token_counts=(1, 2, 0, 3), masked=True, slack=(0, 1, 2, 3))
FOUR_BATCHED = replace(FOUR_PACKED, layout="BSND", tokens=3)
FOUR_LAYOUTS = {"TND": FOUR, "packed": FOUR_PACKED, "BSND": FOUR_BATCHED}


def layout_of(value: Any) -> str | None:
    """The name of one of these, for a test's id."""
    return next((name for name, one in FOUR_LAYOUTS.items() if one is value), None)


# JAX raises XLA's InvalidArgument as one or the other.
FAILURES = (ValueError, jax.errors.JaxRuntimeError)


def operator(
    geometry: Geometry, implementation: str | None = "cpu", **options: Any
) -> tuple[Callable[..., tuple], dict[str, np.ndarray]]:
    """The operator as a function of its arrays by name, and those arrays in host memory."""
    static = build(geometry) | {"implementation": implementation} | options
    arrays = {n: static.pop(n) for n in (*FLOATS, *INTEGERS) if n in static}

    def call(**arrays: Any) -> tuple:
        return nsa_compress_attention_infer(**static, **arrays)

    return call, arrays


def operator_in_order(
    geometry: Geometry, implementation: str | None = "cpu", **options: Any
) -> tuple[Callable[..., tuple], list[np.ndarray]]:
    """The operator as a function of its arrays in order, those of `build` and then token counts."""
    call, named = operator(geometry, implementation, **options)
    order = (*FLOATS, "block_table", "actual_cmp_seq_kvlen", "actual_seq_qlen")
    names = sorted(named, key=lambda n: order.index(n) if n in order else len(order))

    def call_in_order(*arrays: Any) -> tuple:
        return call(**dict(zip(names, arrays, strict=True)))

    return call_in_order, [named[n] for n in names]


def operator_on_device(
    geometry: Geometry, implementation: str | None, **options: Any
) -> tuple[Callable[..., tuple], list[jax.Array]]:
    """The same with arrays on the device, which the host does not look into."""
    call, arrays = operator_in_order(geometry, implementation, **options)
    return call, [jnp.asarray(a) for a in arrays]


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {n: jnp.asarray(a) for n, a in arrays.items()}


def assert_right(results: tuple, geometry: Geometry, rows: Any = ...) -> None:
    """Asserts that float32 results are the oracle's for a geometry."""
    expected = oracle.compress_attention(**build(geometry))
    assert_agrees(tuple(results), expected, attention_tolerance=1e-5, rows=rows)


def assert_same(results: tuple, others: tuple) -> None:
    for one, other in zip(results, others, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def assert_close(results: tuple, expected: tuple) -> None:
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == want.dtype
        np.testing.assert_allclose(np.asarray(result), np.asarray(want), rtol=1e-5, atol=1e-6)


def message_of(function: Callable[..., Any], *arguments: Any) -> str:
    """What a call that must fail says."""
    with pytest.raises(FAILURES) as failure:
        jax.block_until_ready(function(*arguments))
    return str(failure.value)
