"""Custom calls of the selected branch's CPU kernel that are made by hand, and lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.examples import FAILURES

from jax_nsa import native

TARGET = native.target_name("cpu", "select_attention")
PROBLEM = {
    "key_value_heads": 2, "partial": 0, "tokens_apart": 0, "interleaved": 0,
    "select_block_size": 16, "window_size": 7,
}  # fmt: skip


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def i32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int32)


ARRAYS = {
    "query": f32(2, 3, 4, 8), "key": f32(5, 16, 16), "value": f32(5, 16, 12),
    "topk_indices": i32(2, 3, 2, 5), "block_table": i32(2, 2), "lengths": i32(2) + 20,
}  # fmt: skip
RESULTS = {
    "attention": f32(2, 3, 4, 6), "window_attention": f32(2, 3, 4, 6),
    "lse": f32(2, 3, 4), "window_lse": f32(2, 3, 4),
}  # fmt: skip


def call_kernel(*, operands: Any = None, results: Any = None, **scalars: int) -> list[jax.Array]:
    """Calls the kernel with these changes, None for an array left out."""
    given = {n: a for n, a in (ARRAYS | (operands or {})).items() if a is not None}
    wanted = {n: a for n, a in (RESULTS | (results or {})).items() if a is not None}
    call = jax.ffi.ffi_call(
        TARGET,
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in wanted.values()],
    )
    problem = {n: np.int64(value) for n, value in (PROBLEM | scalars).items()}
    outcome = call(
        *map(jnp.asarray, given.values()), operands=" ".join(given), results=" ".join(wanted),
        problem=problem | {"scale": np.float32(0.5)},
    )  # fmt: skip
    return jax.block_until_ready(outcome)


HALF = np.zeros((2, 3, 4, 6), np.float16)
APART = "gives attention where it has topk_indices, and only there"
LIES = {
    "attention_type": ({"results": {"attention": HALF}}, "attention has an unexpected element"),
    "window_type": ({"results": {"window_attention": HALF}}, "window_attention has an unexpected"),
    "partial_type": (
        {"operands": {n: ARRAYS[n].astype(np.float16) for n in ("query", "key", "value")},
         "results": {"attention": HALF, "window_attention": HALF}, "partial": 1},
        "attention has an unexpected element type",
    ),
    "attention": ({"results": {"attention": f32(2, 3, 4, 5)}}, "attention must have shape [2, 3"),
    "lse": ({"results": {"lse": f32(2, 3, 3)}}, "lse must have shape [2, 3, 4], got [2, 3, 3]"),
    "lse_alone": (
        {"results": {"attention": None}, "operands": {"topk_indices": None}},
        "gives lse beside attention only",
    ),
    "indices_type": ({"operands": {"topk_indices": f32(2, 3, 2, 5)}}, "topk_indices has an unexp"),
    "indices_rank": ({"operands": {"topk_indices": i32(2, 2, 5)}}, "topk_indices must have rank 4"),
    "no_indices": ({"operands": {"topk_indices": i32(2, 3, 2, 0)}}, "topk_indices must not be emp"),
    "indices": (
        {"operands": {"topk_indices": i32(2, 3, 1, 5)}},
        "topk_indices must have shape [2, 3, 2, 5], got [2, 3, 1, 5]",
    ),
    "block": ({"select_block_size": 24}, "select_block_size must be a multiple of 16 up to 128"),
    "attention_without_indices": ({"operands": {"topk_indices": None}}, APART),
    "indices_without_attention": ({"results": {"attention": None, "lse": None}}, APART),
    "window_without_size": ({"window_size": 0}, "gives window_attention where window_size is pos"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), LIES.values(), ids=LIES)
def test_kernel_refuses_operands_that_do_not_fit(changes, message):
    with pytest.raises(FAILURES) as caught:
        call_kernel(**changes)
    assert "INVALID_ARGUMENT" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_size": 0, "results": {"window_attention": None, "window_lse": None}},
        {
            "operands": {"topk_indices": None},
            "results": {"attention": None, "lse": None},
            "window_size": 1,
        },
        {"window_size": 1, "results": {"lse": None}},
    ],
    ids=["both", "selected", "window", "newest"],
)
def test_kernel_takes_the_same_call_unchanged(changes):
    for result in call_kernel(**changes):
        assert not np.isnan(result).any()


PACKED = {
    "query": f32(6, 4, 8), "topk_indices": i32(6, 2, 5), "token_counts": i32(2) + 3,
    "first_rows": np.array([0, 3], np.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("operands", "scalars", "at", "place"),
    [
        ({}, {}, (1, 2, 1, 4), "[1, 1, 4]"),
        ({}, {"tokens_apart": 1}, (1, 2, 1, 4), "[1, 2, 1, 4]"),
        (PACKED, {}, (5, 1, 4), "[5, 1, 4]"),
    ],
    ids=["one token", "tokens", "packed"],
)
def test_a_bad_block_of_a_sequence_of_whole_blocks_is_named(operands, scalars, at, place):
    indices = np.array((ARRAYS | operands)["topk_indices"])
    indices[at] = 2
    results = {n: f32(6, *a.shape[2:]) for n, a in RESULTS.items()} if operands else {}
    given = operands | {"topk_indices": indices, "lengths": i32(2) + 32}
    with pytest.raises(FAILURES) as caught:
        call_kernel(operands=given, results=results, **scalars)
    assert f"topk_indices{place} must be in [-1, 1], the blocks of 16" in str(caught.value)
    assert "that its sequence has, got 2" in str(caught.value)


def test_kernel_refuses_a_call_without_its_problem():
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((2, 3, 4, 6), np.float32))
    with pytest.raises(FAILURES, match="has no attribute problem"):
        jax.block_until_ready(call(ARRAYS["query"], operands="query", results="attention"))
