"""The positions of the tokens in chosen blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nsa import block_positions


def expected(ids, lengths, size):
    """By a loop over everything."""
    positions = np.full((*ids.shape, size), -1)
    for at in np.ndindex(ids.shape):
        for i in range(size if ids[at] >= 0 else 0):
            if ids[at] * size + i < lengths[at[0]]:
                positions[(*at, i)] = ids[at] * size + i
    return positions


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 2, 4)])
@pytest.mark.parametrize("size", [16, 48])
def test_positions(shape, size):
    ids = np.random.default_rng(0).integers(-1, 6, shape).astype(np.int64)
    ids.flat[-1] = 2**31 - 1  # a faulty one is no block
    lengths = [100, 0, 32]
    want = expected(ids, lengths, size)
    positions = block_positions(ids, lengths, select_block_size=size)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, want)
    traced = jax.jit(lambda *arrays: block_positions(*arrays, select_block_size=size))
    np.testing.assert_array_equal(traced(jnp.asarray(ids), jnp.array(lengths)), want)


def test_ids_whose_positions_no_int32_holds():
    """Times 64, each is a small position but for 32 bits."""
    ids = np.array([[2**26, 2**27, 2**26 + 1]], np.int32)
    positions = block_positions(jnp.asarray(ids), jnp.array([2**21]), select_block_size=64)
    np.testing.assert_array_equal(positions, -1)


def test_the_last_block_of_the_longest_sequence():
    """What int32 does not hold is past its end."""
    last = (2**31 - 2) // 48
    positions = block_positions([[last]], [2**31 - 1], select_block_size=48)
    want = last * 48 + np.arange(48)
    np.testing.assert_array_equal(positions, np.where(want < 2**31 - 1, want, -1)[None, None])


def test_negative_lengths_that_only_the_program_knows():
    length = jnp.array([-(2**31)], jnp.int32)
    positions = block_positions(jnp.array([[0, 1]]), length, select_block_size=16)
    np.testing.assert_array_equal(positions, -1)


def test_dtype_does_not_depend_on_x64():
    with jax.enable_x64(True):
        ids, lengths = jnp.array([[0, -1]]), jnp.array([20])
        assert ids.dtype == jnp.int64
        assert block_positions(ids, lengths, select_block_size=16).dtype == jnp.int32


@pytest.mark.parametrize(
    ("arguments", "size", "error", "message"),
    [
        (([[0.5]], [3]), 16, TypeError, "topk_indices must hold integers"),
        (([[0]], [3.0]), 16, TypeError, "lengths must hold integers"),
        (([0], [3]), 16, ValueError, "topk_indices must have rank 2 or 3 or 4"),
        (([[0]], [3, 4]), 16, ValueError, "lengths must have an entry for each"),
        (([[0]], [-1]), 16, ValueError, r"lengths\[0\] must be at least 0, got -1"),
        (([[0]], [3]), 20, ValueError, "select_block_size must be a multiple of 16"),
    ],
)
def test_misuse(arguments, size, error, message):
    with pytest.raises(error, match=message):
        block_positions(*arguments, select_block_size=size)
