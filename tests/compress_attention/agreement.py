"""Whether computed results agree with the true ones: how much rounding may do, and no more."""

from __future__ import annotations

import numpy as np
from compress_attention.oracle import Expected

# Relative error of importances and block scores; they are float32 whatever the dtype.
SCORE_TOLERANCE = 1e-4
# Probabilities below it may be flushed to zero.
TINY = 1e-30
# An absolute error below any normal number of the dtype.
SUBNORMAL = {"bfloat16": 2.0**-126, "float16": 2.0**-14, "float32": 2.0**-126}


def assert_agrees(
    results: tuple,
    expected: Expected,
    *,
    attention_tolerance: float,
    rows=...,
) -> None:
    """Asserts that `(attention, topk_indices[, lse[, block_scores]])` agree with the oracle.

    Args:
        results: what the operator returned.
        expected: the oracle's results.
        attention_tolerance: the relative error that an attention row may have.
        rows: an index of the leading axes, to compare some rows only.
    """
    attention, indices, *others = (np.asarray(r) for r in results)
    assert indices.dtype == np.int32
    # Float32 accumulates a score to about this absolute error, the relative one of its exponential.
    rounding = 2.0**-24 * expected.score_size[rows]

    assert_attention(attention[rows], expected, rows, attention_tolerance + rounding)
    assert_indices(indices[rows], expected, rows, SCORE_TOLERANCE + rounding)
    if others:
        assert_lse(others[0][rows], expected.lse[rows], rounding)
    if others[1:]:
        assert_block_scores(
            others[1][rows], expected.block_scores[rows], SCORE_TOLERANCE + rounding
        )


def assert_attention(actual, expected: Expected, rows, tolerance) -> None:
    """Each head's row is within `tolerance` of the true one, relative to its size."""
    truth = expected.attention[rows]
    assert actual.shape == truth.shape
    size = np.maximum(np.linalg.norm(truth, axis=-1), expected.attention_size[rows])
    error = np.linalg.norm(actual.astype(np.float64) - truth, axis=-1)
    legal = tolerance * size + SUBNORMAL[actual.dtype.name] * tolerance
    worst = np.unravel_index(np.argmax(np.nan_to_num(error - legal, nan=np.inf)), error.shape)
    assert np.all(error <= legal), (
        f"attention{list(map(int, worst))} is off by {error[worst]:.3g}, legal is "
        f"{legal[worst]:.3g}: got {actual[worst]}, expected {truth[worst]}"
    )


def assert_indices(actual, expected: Expected, rows, head_tolerance) -> None:
    """Each row holds the most important blocks; only what rounding can't tell apart may swap."""
    truth = expected.topk_indices[rows]
    assert actual.shape == truth.shape
    # What one head's score may be off by, each of them at most its tolerance of its own.
    heads = expected.block_scores[rows]
    grouped = (heads * head_tolerance[..., None]).reshape(*truth.shape[:-1], -1, heads.shape[-1])
    uncertain = grouped.sum(axis=-2) + TINY
    for row in np.ndindex(truth.shape[:-1]):
        if np.array_equal(actual[row], truth[row]):
            continue
        importance = expected.importance[rows][row]
        _assert_row(actual[row], truth[row], importance, uncertain[row], f"topk_indices{list(row)}")


def _assert_row(actual, truth, importance, uncertain, name) -> None:
    context = f"{name} is {actual}, expected {truth}"
    count = int(np.sum(truth >= 0))
    assert np.all(actual[count:] == -1), f"{context}: not padded with -1"
    chosen = actual[:count]
    num_blocks = int(np.sum(importance > -np.inf))
    assert np.all((chosen >= 0) & (chosen < num_blocks)), f"{context}: not blocks of the sequence"
    assert len(set(chosen.tolist())) == count, f"{context}: repeated blocks"
    for place, (got, want) in enumerate(zip(chosen, truth[:count], strict=True)):
        if got == want:
            continue
        with np.errstate(invalid="ignore"):
            apart = abs(importance[got] - importance[want])  # inf or NaN where blocks are forced
        assert apart <= uncertain[got] + uncertain[want], (
            f"{context}: at {place} block {got} of importance {importance[got]:.9g} stands for "
            f"block {want} of {importance[want]:.9g}"
        )


def assert_lse(actual, truth, rounding) -> None:
    """The natural logarithm of the summed exponentials, -inf where there are none."""
    assert actual.dtype == np.float32
    assert actual.shape == truth.shape
    empty = np.isneginf(truth)
    np.testing.assert_array_equal(np.isneginf(actual), empty, "lse")
    error = np.abs(actual[~empty] - truth[~empty])
    legal = 1e-5 + 1e-6 * np.abs(truth[~empty]) + 4 * rounding[~empty]
    assert np.all(error <= legal), f"lse is {actual}, expected {truth}"


def assert_block_scores(actual, truth, tolerance) -> None:
    """Each head's score of each block."""
    assert actual.dtype == np.float32
    assert actual.shape == truth.shape
    error = np.abs(actual.astype(np.float64) - truth)
    legal = tolerance[..., None] * truth + TINY
    assert np.all(error <= legal), f"block_scores are {actual}, expected {truth}"
