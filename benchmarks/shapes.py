"""The shapes that are quoted, and problem sets too large for any cache."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import jax_nsa

HEAD_SIZE, VALUE_SIZE, PAGE = 192, 128, 128
ROTATED_BYTES = 512 << 20  # keys and values that a shape's problem sets hold together, at least


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode step: D 192, Dv 128, pages of 128, l 32, d 16, l' 64, k 16.

    Attributes:
        sequences: how many sequences.
        heads: query heads.
        key_value_heads: key and value heads.
        length: compressed positions of each sequence.
        tokens: query tokens of each sequence.
        ragged: whether lengths are drawn from [1, length] instead.
    """

    sequences: int
    heads: int
    key_value_heads: int
    length: int
    tokens: int = 1
    ragged: bool = False

    @property
    def num_sets(self) -> int:
        """Problem sets to rotate, so that no call but those of `tiny` finds its keys in a cache."""
        full = self.sequences * self.length * self.row_bytes
        return min(64, max(2, math.ceil(ROTATED_BYTES / full)))

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's keys and values, in bfloat16."""
        return self.key_value_heads * (HEAD_SIZE + VALUE_SIZE) * 2

    @property
    def lengths(self) -> np.ndarray:
        """Each sequence's length."""
        if not self.ragged:
            return np.full(self.sequences, self.length, np.int32)
        return np.random.default_rng(0).integers(1, self.length + 1, self.sequences, np.int32)

    @property
    def floor_bytes(self) -> int:
        """Bytes that any implementation must read: each key and value once."""
        return int(self.lengths.sum()) * self.row_bytes


SHAPES = {
    "tiny": Shape(1, 8, 2, 64),
    "seed": Shape(20, 8, 2, 1024),
    "b1": Shape(1, 64, 4, 8192),
    "b8": Shape(8, 64, 4, 2048),
    "g1": Shape(16, 4, 4, 2048),
    "cann": Shape(20, 64, 4, 4096),
    "cann4": Shape(20, 64, 4, 4096, tokens=4),
    "b64": Shape(64, 8, 2, 8192),
    "b64r": Shape(64, 8, 2, 8192, ragged=True),
    "b128": Shape(128, 64, 4, 8192),
}


def problem_sets(shape: Shape, dtype: str = "bfloat16") -> list[tuple[jax.Array, ...]]:
    """Draws operands: (query, key, value, block table, lengths) for each set."""
    columns = -(-shape.length // PAGE)
    pages = shape.sequences * columns
    normal = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, dtype), static_argnames="shape"
    )
    sets = []
    for i in range(shape.num_sets):
        seeds = jax.random.split(jax.random.key(i), 3)
        table = np.random.default_rng(i).permutation(pages).astype(np.int32)
        sets.append(
            (
                normal(seeds[0], (shape.sequences, shape.tokens, shape.heads, HEAD_SIZE)),
                normal(seeds[1], (pages, PAGE, shape.key_value_heads * HEAD_SIZE)),
                normal(seeds[2], (pages, PAGE, shape.key_value_heads * VALUE_SIZE)),
                jnp.asarray(table.reshape(shape.sequences, columns)),
                jnp.asarray(shape.lengths),
            )
        )
    return jax.block_until_ready(sets)


def operator(shape: Shape, implementation: str):
    """The operator as a function of a problem set."""
    call = functools.partial(
        jax_nsa.nsa_compress_attention_infer,
        scale_value=HEAD_SIZE**-0.5,
        head_num=shape.heads,
        key_value_head_num=shape.key_value_heads,
        select_block_size=64,
        select_block_count=min(16, shape.length // 4),
        page_block_size=PAGE,
        compress_block_size=32,
        compress_stride=16,
        layout="BSND",
        implementation=implementation,
    )

    def run(query, key, value, table, lengths):
        return call(query, key, value, block_table=table, actual_cmp_seq_kvlen=lengths)

    return run
