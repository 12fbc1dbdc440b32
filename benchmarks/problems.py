"""What the operators' benchmarks have in common: what one is, and pools, tables and sets."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nsa.operator import Operator
from jax_nsa.shapes import Shape

DTYPE = jnp.bfloat16
ROTATED_BYTES = 512 << 20  # that the problem sets of a shape read together, at least
MOST_SETS = 64

Operands = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How to time one operator.

    Attributes:
        name: as the command line has it.
        shapes: names in `jax_nsa.shapes.SHAPES`.
        needs: the operators that an implementation has to have.
        operands: draws problem sets, each a tuple that begins with the query. Used in turn, they
            read more than any cache holds, but those of tiny shapes.
        call: the function of a problem set for an implementation, or None for the best one.
        floor_bytes: bytes that any implementation must read: each key and value needed, once.
        peers: what else computes (part of) the same, on a CPU; by name, as functions of a set.
    """

    name: str
    shapes: tuple[str, ...]
    needs: tuple[Operator, ...]
    operands: Callable[[Shape], list[Operands]]
    call: Callable[[Shape, str | None], Callable]
    floor_bytes: Callable[[Shape], int]
    peers: Callable[[Shape], dict[str, Callable]] = lambda shape: {}


def num_sets(bytes_read: int) -> int:
    """Problem sets to use in turn, if a call reads so many bytes."""
    return min(MOST_SETS, max(2, math.ceil(ROTATED_BYTES / bytes_read)))


@functools.partial(jax.jit, static_argnums=(1,))
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, DTYPE)


def normal(seed: int, *shape: int) -> jax.Array:
    """Normally distributed elements; as many different arrays as seeds and shapes."""
    return _normal(jax.random.key(seed), shape)


def pools(shape: Shape, rows: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Pools of keys and values, for so many rows of each sequence."""
    pages = shape.sequences * -(-rows // shape.page)
    heads = shape.key_value_heads
    return (
        normal(seed, pages, shape.page, heads * shape.head_size),
        normal(seed, pages, shape.page, heads * shape.value_size),
    )


def table(shape: Shape, rows: int, seed: int) -> jax.Array:
    """A block table of pools for so many rows of each sequence, in random order."""
    columns = -(-rows // shape.page)
    order = np.random.default_rng(seed).permutation(shape.sequences * columns)
    return jnp.asarray(order.reshape(shape.sequences, columns), jnp.int32)


def arguments(shape: Shape) -> dict[str, Any]:
    """What attention of either branch, and the step, are told of a shape."""
    return {
        "scale_value": shape.head_size**-0.5,
        "head_num": shape.heads,
        "key_value_head_num": shape.key_value_heads,
        "select_block_size": shape.blocks.select_block_size,
        "select_block_count": shape.select_count,
    }


def query(shape: Shape, seed: int) -> jax.Array:
    """Queries `[sequences, query_tokens, heads, head_size]`."""
    return normal(seed, shape.sequences, shape.query_tokens, shape.heads, shape.head_size)
