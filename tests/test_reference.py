"""The jnp reference under the contract, and how it ranks many blocks."""

import jax.numpy as jnp
import numpy as np
import pytest
from compress_attention.contract import CompressAttentionContract

from jax_nsa.blocks import Blocks
from jax_nsa.compress_attention import reference
from jax_nsa.compress_attention.problem import Problem


class TestReference(CompressAttentionContract):
    implementation = "reference"


@pytest.mark.parametrize(
    ("blocks", "count"), [(1, 4), (512, 16), (513, 16), (3000, 16), (5000, 200)]
)
def test_long_rows_are_ranked_as_by_one_sort(blocks, count):
    """Chunk by chunk, equals in ascending order, 0.0 and -0.0 among them."""
    random = np.random.default_rng(blocks)
    importance = random.choice(np.array([-0.0, 0.0, 1.0, 2.0, np.inf], np.float32), (2, 3, blocks))
    importance[1, 2] = random.choice(np.array([-0.0, 0.0], np.float32), blocks)
    problem = Problem(
        Blocks(32, 16, 64), 1.0, 1, select_block_count=count, init_blocks=0, local_blocks=0
    )
    chosen = reference.select(jnp.asarray(importance), jnp.full((2, 3), blocks), problem)
    want = np.full((2, 3, count), -1)
    order = np.argsort(-importance, axis=-1, kind="stable")[..., :count]
    want[..., : order.shape[-1]] = order
    np.testing.assert_array_equal(chosen, want)
